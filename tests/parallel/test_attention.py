"""Ulysses, ring and their product against plain attention over the whole sequence, on real ranks."""

# B batch, S tokens of the whole sequence, H heads, D head dim

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from darkroom.configs import ParallelConfig
from darkroom.parallel import attention
from darkroom.parallel.attention import attend, sdpa
from darkroom.parallel.mesh import Axis, Mesh
from darkroom.parallel.plan import chunk_sizes
from tests.ranks import run_ranks

LAYOUTS: dict[int, list[dict[str, int]]] = {
    2: [{"usp": 2}, {"ring": 2}],
    3: [{"usp": 3}, {"ring": 3}],
    4: [{"usp": 4}, {"ring": 4}, {"usp": 2, "ring": 2}],
}


@dataclass(frozen=True)
class Case:
    """A joint sequence of streams, split over the ranks each on its own, as the plan does it."""

    streams: tuple[int, ...]
    heads: int = 4
    batch: int = 1
    masked: str = "none"
    dtype: torch.dtype = torch.float32
    scale: float | None = None

    def sizes(self, ranks: int) -> list[int]:
        return [sum(parts) for parts in zip(*(chunk_sizes(length, ranks) for length in self.streams), strict=True)]

    def inputs(self) -> list[Tensor]:
        """q, k, v [B, S, H, 8], in the order of the ranks."""
        torch.manual_seed(sum(self.streams) + self.heads)
        shape = (self.batch, sum(self.streams), self.heads, 8)
        return [torch.randn(shape).to(self.dtype) for _ in range(3)]

    def mask(self, ranks: int) -> Tensor | None:
        """[B, S], True where a key counts."""
        B, S = self.batch, sum(self.streams)
        mask = torch.ones(B, S, dtype=torch.bool)
        match self.masked:
            case "none":
                return None
            case "random":
                mask = torch.rand(B, S, generator=torch.Generator().manual_seed(0)) > 0.4
                mask[:, 0] = True
            case "ends":  # as in a batch of prompts of unequal lengths
                mask[0, S // 2 :] = False
            case "a block":  # a rank, or with a ring of two a whole block, has no key that counts
                mask[0].split(self.sizes(ranks))[-1].fill_(False)
                mask[1].split(self.sizes(ranks))[0].fill_(False)
            case "a row":
                mask[1] = False
        return mask


CASES = {
    "even": Case((8, 16)),
    "uneven": Case((3, 14)),
    "batch": Case((5, 9), batch=2),
    "5 heads": Case((5, 9), heads=5),
    "1 head": Case((7,), heads=1),
    "a scale": Case((5, 9), scale=0.3),
    "ranks without a stream": Case((1, 9)),
    "ranks without tokens": Case((1, 1)),
    "random mask": Case((5, 9), batch=2, masked="random"),
    "ends are masked": Case((5, 9), batch=2, masked="ends", heads=5),
    "a block is masked": Case((5, 9), batch=2, masked="a block"),
    "a row is masked": Case((5, 9), batch=2, masked="a row"),
    "mask, and ranks without tokens": Case((2,), batch=2, masked="a block"),
    "bfloat16": Case((5, 9), dtype=torch.bfloat16),
    "bfloat16 with a mask": Case((5, 9), batch=2, masked="random", dtype=torch.bfloat16),
}

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""bfloat16 has 8 bits: 2^-8 of numbers that reach 3, once more than in one device's own result."""


def whole(case: Case, mask: Tensor | None) -> Tensor:
    """Softmax attention in double precision, by its definition. A query with no key that counts gives zero."""
    q, k, v = (x.double().transpose(1, 2) for x in case.inputs())
    scores = q @ k.transpose(-1, -2) * (case.scale or 1 / math.sqrt(q.shape[-1]))
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :], float("-inf"))
    return (scores.softmax(-1).nan_to_num(0.0) @ v).transpose(1, 2)


def attended(case: Case, mesh: Mesh) -> Tensor:
    """This rank's part by the code under test."""
    sizes, rank = case.sizes(mesh.sequence.size), mesh.sequence.rank
    q, k, v = (x.split(sizes, 1)[rank] for x in case.inputs())
    mask = case.mask(mesh.sequence.size)
    part = None if mask is None else mask.split(sizes, 1)[rank]
    return attend(q, k, v, part, case.scale, sizes, mesh.ulysses, mesh.ring)


def difference(case: Case, mesh: Mesh) -> float:
    sizes, rank = case.sizes(mesh.sequence.size), mesh.sequence.rank
    expected = whole(case, case.mask(mesh.sequence.size)).split(sizes, 1)[rank]
    out = attended(case, mesh)
    assert out.dtype == case.dtype and out.shape == expected.shape
    if not torch.isfinite(out).all():
        return float("inf")
    return float((out - expected).abs().max()) if out.numel() else 0.0


def run_cases(rank: int, size: int) -> dict[tuple[str, str], float]:
    worst = {}
    for layout in LAYOUTS[size]:
        mesh = Mesh(ParallelConfig.model_validate(layout), rank)
        for name, case in CASES.items():
            worst[str(layout), name] = difference(case, mesh)
        for name, fault in FAULTS.items():
            with fault():
                worst[str(layout), name] = difference(CASES["random mask"], mesh)
    return worst


# ---- faults ----------------------------------------------------------------------------------------------------------


@contextmanager
def masks_are_forgotten() -> Iterator[None]:
    inner = attention._attend_block
    with patch.object(attention, "_attend_block", lambda q, k, v, _mask, scale: inner(q, k, v, None, scale)):
        yield


@contextmanager
def blocks_weigh_the_same() -> Iterator[None]:
    """What a merge without log-sum-exp would give. Ulysses alone merges nothing."""
    with patch.object(attention, "_merge", lambda out, lse, part, _: (out + part.float() / 2, lse)):
        yield


@contextmanager
def heads_are_swapped() -> Iterator[None]:
    inner = attention._heads_for_tokens
    with patch.object(attention, "_heads_for_tokens", lambda *args: inner(*args).flip(2)):
        yield


FAULTS: dict[str, Callable[[], Any]] = {
    "fault: masks are forgotten": masks_are_forgotten,
    "fault: blocks weigh the same": blocks_weigh_the_same,
    "fault: heads are swapped": heads_are_swapped,
}


@pytest.mark.parametrize("size", LAYOUTS)
def test_spread_attention_is_plain_attention(size: int) -> None:
    results = run_ranks(run_cases, size)
    wrong: dict[str, set[str]] = {str(layout): set() for layout in LAYOUTS[size]}
    for worst in results:
        assert len(worst) == len(LAYOUTS[size]) * (len(CASES) + len(FAULTS))
        for (layout, name), value in worst.items():
            case = CASES.get(name)
            if value > (TOLERANCES[case.dtype] if case else 1e-3):
                wrong[layout].add(name)
    for layout, names in wrong.items():
        unmerged = set() if "ring" in layout else {"fault: blocks weigh the same"}
        assert names == set(FAULTS) - unmerged, layout


# ---- what one rank does ----------------------------------------------------------------------------------------------


def test_one_rank_attends_plainly() -> None:
    one = Axis("one")
    for case in (CASES["uneven"], CASES["random mask"], CASES["a row is masked"]):
        q, k, v = case.inputs()
        mask = case.mask(1)
        out = attend(q, k, v, mask, case.scale, [q.shape[1]], one, one)
        assert float((out - whole(case, mask)).abs().max()) < 1e-5
    q, k, v = CASES["uneven"].inputs()
    assert torch.equal(attend(q, k, v, None, None, [17], one, one), sdpa(q, k, v))


def test_the_reference_is_pytorchs_own_attention() -> None:
    case = CASES["random mask"]
    mask = case.mask(1)
    assert mask is not None
    q, k, v = (x.transpose(1, 2) for x in case.inputs())
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :]).transpose(1, 2)
    assert float((whole(case, mask) - expected).abs().max()) < 1e-5


def test_the_log_sum_exp_is_that_of_the_scores() -> None:
    q, k, v = CASES["batch"].inputs()
    mask = CASES["random mask"].mask(1)
    assert mask is not None
    _, lse = attention._attend_block(q, k, v, mask, 0.5)
    scores = 0.5 * torch.einsum("bqhd,bkhd->bqhk", q, k).masked_fill(~mask[:, None, None, :], float("-inf"))
    assert torch.allclose(lse, scores.logsumexp(-1, keepdim=True), atol=1e-5)


def test_a_kernel_of_choice_is_used_where_no_log_sum_exp_is_needed() -> None:
    def twice(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        return 2 * sdpa(q, k, v, scale)

    q, k, v = CASES["uneven"].inputs()
    one = Axis("one")
    assert torch.equal(attend(q, k, v, None, None, [17], one, one, twice), 2 * sdpa(q, k, v))


# ---- what a ring sends, and when -------------------------------------------------------------------------------------


class _Recorded:
    """A transfer whose end is recorded."""

    def __init__(self, work: dist.Work, log: list[str]) -> None:
        self.work, self.log = work, log

    def wait(self) -> None:
        self.log.append("wait")
        self.work.wait()


def run_recorded(rank: int, size: int, layout: dict[str, int], masked: bool) -> tuple[list[str], list[list[int]]]:
    """What happened in one call, in order; and how many keys each received tensor holds."""
    mesh = Mesh(ParallelConfig.model_validate(layout), rank)
    case = CASES["random mask" if masked else "uneven"]
    log: list[str] = []
    lengths: list[list[int]] = []
    start, attend_block = Axis.start_exchange, attention._attend_block

    def recorded_start(axis: Axis, sends: Sequence[Any], receives: Sequence[Any]) -> list[Any]:
        log.append(f"start {axis.name}")
        lengths.append([x.shape[2 if x.ndim == 5 else 1] for x, _ in receives])
        return [_Recorded(work, log) for work in start(axis, sends, receives)]

    def recorded_attend(*args: Any) -> tuple[Tensor, Tensor]:
        log.append("attend")
        return attend_block(*args)

    def collective(name: str) -> Any:
        inner = getattr(dist, name)

        def called(*args: Any, **kwargs: Any) -> Any:
            log.append(name)
            return inner(*args, **kwargs)

        return patch.object(dist, name, called)

    with ExitStack() as stack:
        stack.enter_context(patch.object(Axis, "start_exchange", recorded_start))
        stack.enter_context(patch.object(attention, "_attend_block", recorded_attend))
        for name in ("all_gather", "all_reduce", "all_to_all_single"):
            stack.enter_context(collective(name))
        attended(case, mesh)
    return log, lengths


def test_a_ring_sends_the_next_block_before_it_attends_over_this_one() -> None:
    """And never gathers: beside the block in hand, a rank has room for the one that comes, which is of its size."""
    for masked in (False, True):
        waits = ["wait"] * (4 if masked else 2)  # sent and received; the mask goes with its block
        hop = ["start ring", "attend", *waits]
        for rank, (log, lengths) in enumerate(run_ranks(run_recorded, 3, {"ring": 3}, masked)):
            assert log == [*hop, *hop, "attend"]
            sizes = CASES["random mask" if masked else "uneven"].sizes(3)
            per_hop = 2 if masked else 1
            assert lengths == [[sizes[(rank - hop) % 3]] * per_hop for hop in (1, 2)]


def test_ulysses_trades_and_never_attends_in_blocks() -> None:
    for log, _ in run_ranks(run_recorded, 2, {"usp": 2}, False):
        assert log == ["all_to_all_single"] * 4


# ---- every device's kernels, each with and without a mask ------------------------------------------------------------

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")],
    ),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("queries", "keys"), [(64, 64), (35, 129), (129, 35), (1, 257), (257, 2), (7, 16)])
def test_a_block_and_its_log_sum_exp_are_plain_attention(
    queries: int, keys: int, dtype: torch.dtype, masked: bool, device: str
) -> None:
    """Also from two blocks, merged as a ring does. Odd lengths: kernels pad and align, and must not tell."""
    generator = torch.Generator().manual_seed(queries + keys)
    q, k, v = (
        torch.randn(2, length, 5, 128, generator=generator).to(device, dtype) for length in (queries, keys, keys)
    )
    mask = torch.rand(2, keys, generator=generator).to(device) > 0.4 if masked else None
    if mask is not None:
        mask[0, 0], mask[1, keys // 2 :] = True, False  # the second block of the second row has no key that counts
        mask[1, 0] = True
    scores = torch.einsum("bqhd,bkhd->bqhk", q.double(), k.double()) / math.sqrt(128)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :], float("-inf"))
    expected = torch.einsum("bqhk,bkhd->bqhd", scores.softmax(-1), v.double())

    out, lse = attention._attend_block(q, k, v, mask, None)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype]
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert float((out - expected).abs().max()) <= tolerance
    assert float((lse - scores.logsumexp(-1, keepdim=True)).abs().max()) <= (2e-5 if dtype == torch.float32 else 1e-3)

    merged, total = torch.zeros_like(q, dtype=torch.float32), q.new_full((2, queries, 5, 1), float("-inf")).float()
    for block in (slice(keys // 2), slice(keys // 2, keys)):
        part = attention._attend_block(q, k[:, block], v[:, block], None if mask is None else mask[:, block], None)
        merged, total = attention._merge(merged, total, *part)
    assert float((merged - expected).abs().max()) <= tolerance
