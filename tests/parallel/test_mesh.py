"""Who sits where on the mesh, and the collectives along an axis where ranks hold unequal parts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from darkroom.configs import ParallelConfig
from darkroom.parallel import mesh as mesh_module
from darkroom.parallel.mesh import Axis, Mesh
from tests.ranks import run_ranks

# ---- the layout, without processes -----------------------------------------------------------------------------------


@contextmanager
def counted_groups() -> Iterator[list[Any]]:
    """Meshes can be made without processes; what groups they ask for is recorded."""
    made: list[Any] = []

    def group(ranks: list[int]) -> object:
        made.append(ranks)
        return object()

    with patch.object(dist, "new_group", group):
        yield made


def meshes(**degrees: int) -> list[Mesh]:
    config = ParallelConfig.model_validate(degrees)
    with counted_groups():
        return [Mesh(config, rank) for rank in range(config.world_size)]


def test_cfg_is_outermost_then_ring_ulysses_and_tp() -> None:
    places = [(m.cfg.rank, m.ring.rank, m.ulysses.rank, m.tp.rank) for m in meshes(cfg=2, ring=2, usp=3, tp=2)]
    assert places == list(product(range(2), range(2), range(3), range(2)))


def test_ranks_of_an_axis_differ_in_nothing_else() -> None:
    last = meshes(cfg=2, ring=2, usp=3, tp=2)[-1]
    assert last.tp.ranks == (22, 23)
    assert last.ulysses.ranks == (19, 21, 23)
    assert last.ring.ranks == (17, 23)
    assert last.cfg.ranks == (11, 23)
    assert last.world.ranks == tuple(range(24)) and last.world.rank == 23


def test_the_sequence_axis_is_ring_times_ulysses() -> None:
    """In the order of `sizes` in attention: ring-major."""
    for m in meshes(cfg=2, ring=2, usp=3, tp=2):
        assert m.sequence.size == 6
        assert m.sequence.rank == m.ring.rank * 3 + m.ulysses.rank
        assert m.sequence.ranks[m.sequence.rank] == m.rank
    assert meshes(cfg=2, ring=2, usp=3, tp=2)[-1].sequence.ranks == (13, 15, 17, 19, 21, 23)


@pytest.mark.parametrize(("asked", "size"), [(1, 1), (3, 3), (4, 4), (9, 4)])
def test_the_vae_axis_is_the_first_ranks(asked: int, size: int) -> None:
    axes = [m.vae for m in meshes(usp=4, **{"vae-pp": asked})]
    assert [axis and (axis.size, axis.rank, axis.ranks) for axis in axes] == [
        (size, rank, tuple(range(size))) if rank < size else None for rank in range(4)
    ]


@pytest.mark.parametrize(
    ("degrees", "groups"),
    [
        ({}, []),
        ({"tp": 2, "vae-pp": 2}, [[0, 1]]),  # tp, the world and the vae share it
        ({"usp": 2, "tp": 2}, [[0, 2], [1, 3], [0, 1], [2, 3], [0, 1, 2, 3]]),
    ],
)
def test_an_axis_of_size_one_makes_no_group(degrees: dict[str, int], groups: list[Any]) -> None:
    with counted_groups() as made:
        mesh = Mesh(ParallelConfig.model_validate(degrees), 0)
    assert made == groups
    for axis in (mesh.cfg, mesh.ring, mesh.ulysses, mesh.tp, mesh.sequence, mesh.world):
        assert (axis.group is None) == (axis.size == 1)


def test_an_axis_of_size_one_has_nothing_to_do() -> None:
    axis, x = Axis("tp"), torch.randn(2, 3)
    assert axis.all_reduce(x) is x
    assert axis.all_gather(x, 1) is x
    assert axis.start_exchange([], []) == []


# ---- collectives, on real ranks --------------------------------------------------------------------------------------

SIZES = {2: [3, 0], 3: [2, 0, 5], 4: [1, 3, 0, 2]}
"""Length of each rank's part."""


def part(rank: int, sizes: list[int], dim: int) -> Tensor:
    shape = [2, 2, 2]
    shape[dim] = sizes[rank]
    return torch.arange(8 * sizes[rank] // 2, dtype=torch.float32).reshape(shape) + 100 * rank


def reduced(axis: Axis) -> bool:
    x = torch.full((3,), float(axis.rank))
    y = axis.all_reduce(x)
    return y is x and torch.equal(x, torch.full((3,), sum(range(axis.size)) * 1.0))


def gathered(axis: Axis) -> bool:
    sizes = SIZES[axis.size]
    return all(
        torch.equal(
            axis.all_gather(part(axis.rank, sizes, dim), dim, sizes),
            torch.cat([part(rank, sizes, dim) for rank in range(axis.size)], dim),
        )
        for dim in range(3)
    )


def gathered_without_sizes(axis: Axis) -> bool:
    x = torch.full((2, 3), axis.rank).T  # not contiguous, and of another type
    whole = axis.all_gather(x, 0)
    return torch.equal(whole, torch.arange(axis.size).repeat_interleave(3)[:, None].expand(-1, 2))


def gathered_from_nobody(axis: Axis) -> bool:
    return axis.all_gather(torch.zeros(2, 0), 1, [0] * axis.size).shape == (2, 0)


def traded(axis: Axis) -> bool:
    """From rank a to rank b go a + 2 b rows, modulo 4: some of them none."""
    send = [(axis.rank + 2 * to) % 4 for to in range(axis.size)]
    receive = [(source + 2 * axis.rank) % 4 for source in range(axis.size)]
    rows = torch.cat([torch.full((count, 2), 10.0 * axis.rank + to) for to, count in enumerate(send)])
    expected = [torch.full((n, 2), 10.0 * source + axis.rank) for source, n in enumerate(receive)]
    return torch.equal(axis.all_to_all(rows, send, receive), torch.cat(expected))


def exchanged(axis: Axis) -> bool:
    """Two tensors each way round the ring, one of them empty on some ranks."""
    to, source = (axis.rank + 1) % axis.size, (axis.rank - 1) % axis.size
    sizes = SIZES[axis.size]
    first, second = part(axis.rank, sizes, 1), torch.full((4,), axis.rank, dtype=torch.uint8)
    got = [torch.empty_like(part(source, sizes, 1)), torch.empty_like(second)]
    work = axis.start_exchange([(first, to), (second, to)], [(x, source) for x in got])
    for transfer in work:
        transfer.wait()
    return torch.equal(got[0], part(source, sizes, 1)) and bool((got[1] == source).all())


def padded_in_front(x: Tensor, dim: int, length: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] = length - x.shape[dim]
    return torch.cat([x.new_zeros(shape), x], dim)


COLLECTIVES = [reduced, gathered, gathered_without_sizes, gathered_from_nobody, traded, exchanged]


def run_collectives(rank: int, size: int, degrees: dict[str, int]) -> dict[str, bool]:
    """Along every axis that this layout has: also those whose ranks are not the world's first."""
    mesh = Mesh(ParallelConfig.model_validate(degrees), rank)
    mesh.connect(torch.device("cpu"))  # some ranks are not on the vae axis: nobody may wait for them
    all_axes = (mesh.cfg, mesh.ring, mesh.ulysses, mesh.tp, mesh.sequence, mesh.world, mesh.vae)
    axes = [axis for axis in all_axes if axis and axis.size > 1]
    passed = {f"{axis.name} {check.__name__}": check(axis) for axis in axes for check in COLLECTIVES}
    with patch.object(mesh_module, "_pad", padded_in_front):
        passed["fault"] = gathered(mesh.world)
    return passed


@pytest.mark.parametrize("degrees", [{"usp": 2, "tp": 2, "vae-pp": 3}, {"cfg": 2, "ring": 2}, {"usp": 3}])
def test_collectives_with_uneven_parts(degrees: dict[str, int]) -> None:
    size = ParallelConfig.model_validate(degrees).world_size
    for passed in run_ranks(run_collectives, size, degrees):
        assert len(passed) > len(COLLECTIVES)
        assert [name for name, ok in passed.items() if not ok] == ["fault"]
