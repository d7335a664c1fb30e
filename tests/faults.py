"""Silent faults, each of which the golden matrix must see. Context managers that break one thing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

from darkroom.parallel import attention, guidance, loading, plan, sequence, spatial, tensor
from darkroom.parallel.mesh import Axis
from darkroom.parallel.plan import HeadBias, Rowwise


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
def rows_of_both_branches_are_swapped() -> Iterator[None]:
    """Of the pipelines that evaluate both branches as one batch."""
    inner = guidance.BranchCalls._both

    def swapped(self: guidance.BranchCalls, *args: Any) -> Any:
        return guidance._map(inner(self, *args), lambda x: x.flip(0))

    with patch.object(guidance.BranchCalls, "_both", swapped):
        yield


@contextmanager
def answers_of_both_calls_are_swapped() -> Iterator[None]:
    """Of the pipelines that evaluate one branch after another."""
    inner = guidance.BranchCalls._exchange

    def swapped(self: guidance.BranchCalls) -> None:
        first, second = self._calls
        inner(self)
        for a, b in zip(first, second, strict=True):
            kept = a.clone()
            a.copy_(b)
            b.copy_(kept)

    with patch.object(guidance.BranchCalls, "_exchange", swapped):
        yield


@contextmanager
def parts_are_cut_as_one() -> Iterator[None]:
    """A fused projection cut as if it were one tensor."""

    def whole(dim: int, shape: Any, _parts: Any, *args: Any) -> plan.Cut:
        return plan._cut(dim, shape, None, False, *args)

    with patch.object(plan, "_cut_parts", whole):
        yield


@contextmanager
def halo_rows_are_zero() -> Iterator[None]:
    """A convolution that sees nothing beyond this rank's rows."""
    inner = spatial.PatchDecoder._extend

    def extend(decoder: Any, x: Any, halo: int) -> Any:
        extended = inner(decoder, x, halo)
        if isinstance(x, torch.Tensor):
            above = halo if decoder.axis.rank > 0 else 0
            extended[..., :above, :] = 0
            extended[..., above + x.shape[-2] :, :] = 0
        return extended

    with patch.object(spatial.PatchDecoder, "_extend", extend):
        yield


@contextmanager
def group_norms_are_of_one_rank() -> Iterator[None]:
    def normalise(_decoder: Any, norm: torch.nn.GroupNorm, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)

    with patch.object(spatial.PatchDecoder, "_normalise", normalise):
        yield


@contextmanager
def tiles_fade_with_another_rounding() -> Iterator[None]:
    """Right but for the last bits."""

    def fade(before: torch.Tensor, after: torch.Tensor, extent: int, dim: int) -> None:
        extent = min(before.shape[dim], after.shape[dim], extent)
        weight = torch.arange(extent, dtype=after.dtype) / extent
        old, new = before.narrow(dim, before.shape[dim] - extent, extent), after.narrow(dim, 0, extent)
        new.copy_(torch.lerp(old, new, weight[:, None] if dim == -2 else weight))

    with patch.object(spatial, "_fade", fade):
        yield


@contextmanager
def pictures_stay_where_they_were_encoded() -> Iterator[None]:
    """Ranks without the VAE have an empty picture instead."""

    def give(encoder: Any, moments: torch.Tensor | None, owner: int) -> torch.Tensor:
        shared = inner(encoder, moments, owner)
        return shared if moments is not None else torch.zeros_like(shared)

    inner = spatial.SharedEncoder._give
    with patch.object(spatial.SharedEncoder, "_give", give):
        yield


@contextmanager
def attention_of_one_stream_stays_local() -> Iterator[None]:
    """A second attention, of the picture alone, that sees this rank's part of it."""
    with patch.object(sequence._SomeStreams, "attend", lambda _self, q, k, v, *_: attention.sdpa(q, k, v)):
        yield


@contextmanager
def biases_are_those_of_the_first_heads() -> Iterator[None]:
    inner = loading.cut_parameter

    def cut(style: Any, name: str, shape: Any, config: Any, size: int, rank: int) -> Any:
        return inner(style, name, shape, config, size, 0 if isinstance(style, HeadBias) else rank)

    with patch.object(loading, "cut_parameter", cut):
        yield


@contextmanager
def norms_are_of_a_rank_alone() -> Iterator[None]:
    """A norm across all heads that sees only those of its rank."""
    inner = tensor._norm_across

    def alone(norm: Any, width: int, axis: Any, x: torch.Tensor) -> torch.Tensor:
        return inner(norm, width // axis.size, Axis("alone"), x)

    with patch.object(tensor, "_norm_across", alone):
        yield
