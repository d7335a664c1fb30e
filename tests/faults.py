"""Silent faults, each of which the golden matrix must see. Context managers that break one thing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

from darkroom.parallel import attention, guidance, plan, tensor
from darkroom.parallel.mesh import Axis
from darkroom.parallel.plan import Rowwise


@contextmanager
def ring_skips_a_hop() -> Iterator[None]:
    def short(*args: Any) -> torch.Tensor:
        q, k, v, mask, scale, _, _ = args
        out: torch.Tensor = attention._attend_block(q, k, v, mask, scale)[0]
        return out

    with patch.object(attention, "_ring", short):
        yield


@contextmanager
def ring_keeps_its_mask() -> Iterator[None]:
    """The fault of diffusers' ring attention: every remote block is attended over with the local mask."""
    kept: list[torch.Tensor] = []

    def pack(k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> list[torch.Tensor]:
        kept[:] = [] if mask is None else [mask]
        return [torch.stack([k, v])]

    inner = attention._attend_block

    def attend(q: Any, k: Any, v: Any, _mask: Any, scale: Any) -> Any:
        mask = kept[0][:, : k.shape[1]] if kept else None
        if mask is not None and mask.shape[1] < k.shape[1]:
            mask = torch.nn.functional.pad(mask, (0, k.shape[1] - mask.shape[1]), value=True)
        return inner(q, k, v, mask, scale)

    with patch.object(attention, "_pack", pack), patch.object(attention, "_attend_block", attend):
        yield


@contextmanager
def heads_come_back_in_another_order() -> Iterator[None]:
    inner = attention._heads_for_tokens
    with patch.object(attention, "_heads_for_tokens", lambda *args: inner(*args).flip(2)):
        yield


@contextmanager
def partial_sums_are_not_reduced() -> Iterator[None]:
    inner = tensor._shard_one

    def shard(module: Any, style: Any, *args: Any) -> None:
        inner(module, style, *args)
        if isinstance(style, Rowwise):
            module._forward_hooks.clear()

    with patch.object(tensor, "_shard_one", shard):
        yield


@contextmanager
def branches_are_swapped() -> Iterator[None]:
    inner = guidance.map_branches

    def swapped(*args: Any) -> list[torch.Tensor]:
        return inner(*args)[::-1]

    with patch("darkroom.engine.worker.map_branches", swapped):
        yield


@contextmanager
def parts_are_cut_as_one() -> Iterator[None]:
    """A fused projection cut as if it were one tensor."""

    def whole(dim: int, shape: Any, _parts: Any, *args: Any) -> plan.Cut:
        return plan._cut(dim, shape, None, False, *args)

    with patch.object(plan, "_cut_parts", whole):
        yield


@contextmanager
def norms_are_of_a_rank_alone() -> Iterator[None]:
    """A norm across all heads that sees only those of its rank."""
    inner = tensor._norm_across

    def alone(norm: Any, width: int, axis: Any, x: torch.Tensor) -> torch.Tensor:
        return inner(norm, width // axis.size, Axis("alone"), x)

    with patch.object(tensor, "_norm_across", alone):
        yield
