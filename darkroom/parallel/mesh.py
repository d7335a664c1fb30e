"""The mesh of ranks: one named axis per kind of parallelism. The only place that knows how ranks are laid out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from darkroom.configs.parallel import ParallelConfig


@dataclass(frozen=True)
class Axis:
    """This rank's place on one axis, and the collectives along it. An axis of size one costs nothing."""

    name: str
    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None
    ranks: tuple[int, ...] = (0,)
    """The global ranks on this axis, in order."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def all_gather(self, x: torch.Tensor, dim: int, sizes: Sequence[int] | None = None) -> torch.Tensor:
        """Concatenate the ranks' parts along `dim`. `sizes` are their lengths where these differ."""
        if self.size == 1:
            return x
        sizes = sizes or [x.shape[dim]] * self.size
        parts = self.gather_parts(_pad(x, dim, max(sizes)))  # gloo has no uneven all-gather
        return torch.cat([part.narrow(dim, 0, size) for part, size in zip(parts, sizes, strict=True)], dim)

    def gather_parts(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's tensor, all of one shape."""
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x, group=self.group)
        return parts

    def broadcast(self, x: torch.Tensor | None, source: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """Rank `source`'s tensor on every rank. The others pass None, and need not know its shape: at most 6 dims."""
        if self.size == 1:
            assert x is not None
            return x
        shape = list(x.shape) if x is not None else []
        sizes = torch.tensor([len(shape), *shape, *[0] * (6 - len(shape))], device=device)
        dist.broadcast(sizes, self.ranks[source], group=self.group)
        ndim, *shape = sizes.tolist()
        out = torch.empty(shape[:ndim], device=device, dtype=dtype) if x is None else x.contiguous()
        dist.broadcast(out, self.ranks[source], group=self.group)
        return out

    def all_to_all(self, x: torch.Tensor, send: Sequence[int], receive: Sequence[int]) -> torch.Tensor:
        """Rows to and from every rank i, `send[i]` and `receive[i]` of them: [sum(send), ...] -> [sum(receive), ...]"""
        out = x.new_empty((sum(receive), *x.shape[1:]))
        dist.all_to_all_single(out, x.contiguous(), list(receive), list(send), group=self.group)
        return out

    def start_exchange(
        self, sends: Sequence[tuple[torch.Tensor, int]], receives: Sequence[tuple[torch.Tensor, int]]
    ) -> list[dist.Work]:
        """Begin sending tensors to, and receiving into tensors from, ranks of this axis. Wait for each result.

        The tensors must be contiguous, and must live until the work is done.
        """
        ops = [dist.P2POp(dist.isend, x, self.ranks[to], group=self.group) for x, to in sends]
        ops += [dist.P2POp(dist.irecv, x, self.ranks[source], group=self.group) for x, source in receives]
        return dist.batch_isend_irecv(ops) if ops else []


def _pad(x: torch.Tensor, dim: int, length: int) -> torch.Tensor:
    if x.shape[dim] == length:
        return x
    shape = list(x.shape)
    shape[dim] = length - x.shape[dim]
    return torch.cat([x, x.new_zeros(shape)], dim)


class Mesh:
    """`mesh.tp.rank`, `mesh.cfg.size`: one `Axis` per kind of parallelism.

    Ranks are laid out with `cfg` outermost, then `ring`, `ulysses` and `tp`, so that the ranks which talk most are
    neighbours. `sequence` is ring x ulysses; `world` is all of them; `vae` the first ranks, and None on the others.
    Needs an initialised process group when the world is larger than one.
    """

    def __init__(self, config: ParallelConfig, rank: int = 0) -> None:
        self.rank = rank
        self.size = config.world_size
        self._groups: dict[tuple[tuple[int, ...], ...], dist.ProcessGroup | None] = {}
        """By their ranks: axes that span the same ranks share a group, and NCCL's memory for it."""
        names, shape = tuple(config.axes), tuple(config.axes.values())
        grid = torch.arange(self.size).reshape(shape)
        self.cfg, self.ring, self.ulysses, self.tp = (
            self._axis(name, _lines(grid, (i,))) for i, name in enumerate(names)
        )
        self.sequence = self._axis("sequence", _lines(grid, (names.index("ring"), names.index("ulysses"))))
        self.world = self._axis("world", [list(range(self.size))])
        self.vae_size = config.vae_size
        self.vae = self._vae_axis(config.vae_size)

    def connect(self, device: torch.device) -> None:
        """Let every group talk once. NCCL connects a group at its first call, in which all its ranks must take part."""
        for axis in (self.cfg, self.ring, self.ulysses, self.tp, self.sequence, self.world, self.vae):
            if axis is not None:
                axis.all_reduce(torch.zeros(1, device=device))

    def _axis(self, name: str, lines: list[list[int]]) -> Axis:
        if len(lines[0]) == 1:
            return Axis(name, ranks=(self.rank,))
        mine = next(line for line in lines if self.rank in line)
        return Axis(name, len(mine), mine.index(self.rank), self._group(lines), tuple(mine))

    def _vae_axis(self, size: int) -> Axis | None:
        ranks = list(range(size))
        group = self._group([ranks]) if size > 1 else None
        return Axis("vae", size, self.rank, group, tuple(ranks)) if self.rank < size else None

    def _group(self, lines: list[list[int]]) -> dist.ProcessGroup | None:
        """This rank's group among `lines`; None outside of them. Every rank takes part in making every group."""
        key = tuple(tuple(line) for line in lines)
        if key not in self._groups:
            groups = {line: dist.new_group(list(line)) for line in key}
            self._groups[key] = next((group for line, group in groups.items() if self.rank in line), None)
        return self._groups[key]


def _lines(grid: torch.Tensor, dims: tuple[int, ...]) -> list[list[int]]:
    """The groups of ranks that differ only in the coordinates `dims`."""
    others = [i for i in range(grid.ndim) if i not in dims]
    length = math.prod(grid.shape[i] for i in dims)
    lines: list[list[int]] = grid.permute(*others, *dims).reshape(-1, length).tolist()
    return lines
