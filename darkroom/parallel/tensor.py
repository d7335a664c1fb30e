"""Tensor parallelism: shrink the layers that the plan names, and add the collectives behind them.

Applied to a module whose parameters are still on the meta device; `loading` then reads each rank's part. The scheme
is that of Megatron-LM (https://arxiv.org/abs/1909.08053), with two additions: heads that the ranks do not divide are
filled up with zeros, and modulation layers are cut too and their small outputs gathered.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from .mesh import Axis
from .plan import (
    AttributeStyle,
    Colwise,
    EmbeddingColumns,
    KeyValueGroups,
    LocalHeads,
    LocalWidth,
    NormAcross,
    Plan,
    Rowwise,
    TensorStyle,
    cut_parameter,
    head_layout,
    local_width,
    matches,
    may_lack,
)


def shard(module: nn.Module, plan: Plan, config: Mapping[str, Any], axis: Axis) -> None:
    """Cut `module` for this rank of `axis`. Raises ValueError for a plan that does not fit the module."""
    if axis.size == 1:
        return
    if not plan.tensor:
        raise ValueError(
            f"{type(module).__name__} has no tensor-parallel plan, but {axis.name}={axis.size} was asked for"
        )
    children = dict(module.named_modules())
    cut: dict[str, str] = {}
    for pattern, style in plan.tensor.items():
        found = [path for path in children if matches(pattern, path)]
        if not found and not may_lack(plan, pattern, children):
            raise ValueError(f"the plan names '{pattern}', but {type(module).__name__} has no such module")
        for path in found:
            needed = style.name if isinstance(style, AttributeStyle) else "weight"
            if not hasattr(children[path], needed):
                raise ValueError(f"the plan names '{path}', but {type(children[path]).__name__} has no '{needed}'")
            if needed == "weight" and pattern != cut.setdefault(path, pattern):
                raise ValueError(f"the plan cuts '{path}' twice, as '{cut[path]}' and as '{pattern}'")
            _shard_one(children[path], style, config, axis)


def _shard_one(module: nn.Module, style: TensorStyle, config: Mapping[str, Any], axis: Axis) -> None:
    if isinstance(style, AttributeStyle):
        setattr(module, style.name, _local_value(getattr(module, style.name), style, config, axis))
        return
    whole_width = module.weight.shape[1 if isinstance(style, EmbeddingColumns) else 0]
    for name, parameter in list(module.named_parameters(recurse=False)):
        if cut := cut_parameter(style, name, parameter.shape, config, axis.size, axis.rank):
            part = nn.Parameter(parameter.new_empty(cut.shape(parameter.shape)), requires_grad=False)
            part.whole_shape = tuple(parameter.shape)  # what the checkpoint must hold
            setattr(module, name, part)
    if isinstance(style, Rowwise):
        module.register_forward_hook(lambda _module, _args, out: axis.all_reduce(out))
    elif isinstance(style, EmbeddingColumns) or (isinstance(style, Colwise) and style.gather):
        module.register_forward_hook(lambda _module, _args, out: _gather_features(out, whole_width, axis))
    elif isinstance(style, NormAcross):
        setattr(module, "forward", partial(_norm_across, module, whole_width, axis))  # noqa: B010 - mypy minds the other


def _norm_across(norm: nn.Module, width: int, axis: Axis, x: torch.Tensor) -> torch.Tensor:
    """RMS norm over `width` features of which `x` [..., features] are this rank's. Zeros that fill up add nothing.

    As in torch's own, all is fp32 until the weight is in, and so is the eps where none is given.
    """
    wide = x.float()
    mean = axis.all_reduce(wide.square().sum(-1, keepdim=True)) / width
    eps = torch.finfo(wide.dtype).eps if norm.eps is None else norm.eps
    return (wide * torch.rsqrt(mean + eps) * norm.weight).to(x.dtype)


def _local_value(whole: int, style: AttributeStyle, config: Mapping[str, Any], axis: Axis) -> int:
    """What this rank's module reshapes by, instead of the whole one's number."""
    match style:
        case KeyValueGroups(heads=heads):
            queries, key_values = head_layout(heads, config, axis.size, axis.rank)
            return len(queries) // len(key_values)
        case LocalHeads(heads=heads):
            return len(head_layout(heads, config, axis.size, axis.rank)[0])
        case LocalWidth():
            return local_width(whole, axis.size)


def _gather_features(x: torch.Tensor, width: int, axis: Axis) -> torch.Tensor:
    """[..., this rank's features] -> [..., width]; what was filled up comes last and is left out."""
    return axis.all_gather(x, x.ndim - 1).narrow(-1, 0, width)
