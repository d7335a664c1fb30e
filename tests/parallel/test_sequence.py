"""The vocabulary of sequence plans, on a module made for it: every way to say where to split gives the whole result."""

# B batch, S tokens, T context tokens, C channels, H heads, D head dim

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from darkroom.configs import ParallelConfig
from darkroom.parallel import sequence
from darkroom.parallel.attention import sdpa
from darkroom.parallel.mesh import Axis, Mesh
from darkroom.parallel.plan import Plan, SequenceParallelInput, SequenceParallelOutput, SequenceRule
from darkroom.parallel.sequence import SequenceParallel, sp_gather, sp_shard
from tests.ranks import run_ranks

TOLERANCE = 1e-5
C, H, D = 10, 5, 2

# ---- a module with all that plans talk about -------------------------------------------------------------------------


class Processor:
    """Written as diffusers' processors are."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: Attention, x: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        joint = x if context is None else torch.cat([context, x], 1)
        q, k, v = attn.qkv(joint).unflatten(-1, (3, H, D)).unbind(2)
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(x.shape[:2])], 1)[:, None, None, :]
        out = dispatch_attention_fn(
            q, k, v, attn_mask=mask, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        return out.flatten(2)


class DeafProcessor:
    """One that takes no parallel object."""

    def __call__(self, attn: Attention, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        return x


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(C, 3 * C)
        self.processor: Any = Processor()

    def forward(self, x: Tensor, context: Tensor | None, mask: Tensor | None = None) -> Tensor:
        out: Tensor = self.processor(self, x, context, mask)
        return out


class Block(nn.Module):
    """Joint attention over the context and the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()

    def forward(
        self, x: Tensor, context: Tensor, shift: Tensor, mask: Tensor | None = None, unused: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if shift.ndim == 2:
            shift = shift[:, None]
        out = self.attn(x + shift, context, mask)
        return context + out[:, : context.shape[1]], x + out[:, context.shape[1] :]


class DualBlock(Block):
    """And attention over the tokens alone."""

    def __init__(self) -> None:
        super().__init__()
        self.alone = Attention()

    def forward(
        self, x: Tensor, context: Tensor, shift: Tensor, mask: Tensor | None = None, unused: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        context, x = super().forward(x, context, shift, mask, unused)
        return context, x + self.alone(x, None)


class Positions(nn.Module):
    """[S, C] for the tokens and [T, C] for the context, and nothing for what is not there."""

    def forward(self, tokens: int, context: int) -> tuple[Tensor, Tensor, None]:
        return torch.linspace(-1, 1, tokens * C).view(-1, C), torch.linspace(2, 0, context * C).view(-1, C), None


class Net(nn.Module):
    """Blocks in a list, and in a dictionary one that comes first."""

    def __init__(self, *, refine: bool = True, dual: bool = False) -> None:
        super().__init__()
        self.patch = nn.Linear(3, C)
        self.positions = Positions()
        self.refiners = nn.ModuleDict({"2-1": Block()} if refine else {})
        self.blocks = nn.ModuleList([DualBlock() if dual else Block(), Block()])
        self.out, self.context_out = nn.Linear(C, 4), nn.Linear(C, 2)

    def forward(
        self, x: Tensor, context: Tensor, shift: Tensor, lengths: tuple[int, int], mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        x = self.patch(x)
        places, context_places, _ = self.positions(*lengths)
        for i, block in enumerate([*self.refiners.values(), *self.blocks]):
            if i == 0:
                context, x = block(x, context, shift, mask=mask)
                x, context = x + places, context + context_places
            else:
                context, x = block(context=context, x=x, shift=shift, mask=mask)
        return self.out(x), self.context_out(context)


def net(refine: bool = True, dual: bool = False) -> Net:
    torch.manual_seed(0)
    return Net(refine=refine, dual=dual).requires_grad_(False)


def inputs(tokens: int = 9, context: int = 5, *, masked: bool = True) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(tokens)
    mask = torch.ones(2, context, dtype=torch.bool)
    mask[1, 2:] = False
    return {
        "x": torch.randn(2, tokens, 3, generator=generator),
        "context": torch.randn(2, context, C, generator=generator),
        "shift": torch.randn(2, C, generator=generator),
        "lengths": (tokens, context),
        "mask": mask if masked else None,
    }


# ---- one split, said in many ways ------------------------------------------------------------------------------------

STREAM = SequenceParallelInput(split_dim=1, expected_dims=3, stream=True)
PER_TOKEN = SequenceParallelInput(split_dim=1, expected_dims=2)
PLACES = SequenceParallelInput(split_dim=0, expected_dims=2, split_output=True)
SHIFT = SequenceParallelInput(split_dim=1, expected_dims=3)
"""The shift is [B, C] here, so a plan for [B, S, C] leaves it alone."""

REST: dict[str, SequenceRule] = {
    "positions": {0: PLACES, 1: PLACES, 2: PLACES},
    "out": SequenceParallelOutput(gather_dim=1, expected_dims=3),
    "context_out": SequenceParallelOutput(gather_dim=1, stream="context"),
}

PLANS: dict[str, tuple[bool, dict[str, SequenceRule]]] = {
    "the module itself": (True, {"": {"x": STREAM, "context": STREAM, "mask": PER_TOKEN, "shift": SHIFT}, **REST}),
    "the first of a list": (
        False,
        {"blocks.0": {"x": STREAM, "context": STREAM}, "blocks.*": {"mask": PER_TOKEN, "unused": PER_TOKEN}, **REST},
    ),
    "a key of a dictionary": (
        True,
        {
            "refiners.2-1": {"x": STREAM, "context": STREAM},
            "blocks.*": {"mask": PER_TOKEN},
            "refiners.*": {"mask": PER_TOKEN, "shift": SHIFT},
            **REST,
        },
    ),
    "an output": (
        True,
        {
            "": {"context": STREAM, "mask": PER_TOKEN},
            "patch": {0: SequenceParallelInput(split_dim=1, split_output=True, stream=True)},
            **REST,
            "out": SequenceParallelOutput(gather_dim=1, stream="patch.0"),
        },
    ),
}


ALONE = {"blocks.*.alone": ("x",)}
"""What attends over the tokens alone."""


@contextmanager
def attention_stays_local() -> Iterator[None]:
    def attend(_self: Any, q: Tensor, k: Tensor, v: Tensor, _mask: Any, _scale: Any) -> Tensor:
        return sdpa(q, k, v)

    with patch.object(SequenceParallel, "attend", attend):
        yield


@contextmanager
def parts_come_back_in_another_order() -> Iterator[None]:
    with patch.object(sequence, "sp_gather", lambda *args: sp_gather(*args).flip(args[1])):
        yield


FAULTS: dict[str, Callable[[], Any]] = {
    "fault: local attention": attention_stays_local,
    "fault: another order": parts_come_back_in_another_order,
}


def run_plans(rank: int, size: int, layouts: list[dict[str, int]]) -> dict[str, float]:
    worst = {}

    def difference(refine: bool, plan: dict[str, SequenceRule], backend: str = "auto", dual: bool = False) -> float:
        module = net(refine, dual)
        SequenceParallel(module, Plan(sequence=plan, streams=ALONE if dual else {}), mesh, backend)
        values = [inputs(), inputs(masked=False), inputs(4, 1), inputs()]  # one module, pass after pass
        outs = [(module(**given), net(refine, dual)(**given)) for given in values]
        return max(float((a - b).abs().max()) for got, want in outs for a, b in zip(got, want, strict=True))

    for layout in layouts:
        mesh = Mesh(ParallelConfig.model_validate(layout), rank)
        for name, (refine, plan) in PLANS.items():
            worst[f"{layout} {name}"] = difference(refine, plan)
        worst[f"{layout} some streams"] = difference(*PLANS["the module itself"], dual=True)
        for name, fault in FAULTS.items():
            with fault():
                worst[f"{layout} {name}"] = difference(*PLANS["the module itself"])
        if mesh.ring.size == 1:
            worst[f"{layout} a backend by name"] = difference(*PLANS["an output"], "_native_math")
        x = inputs()["x"]
        worst[f"{layout} sp_gather"] = float((sp_gather(sp_shard(x, 1, mesh.sequence), 1, mesh.sequence, 9) - x).norm())
    return worst


@pytest.mark.parametrize("layouts", [[{"usp": 2}, {"ring": 2}], [{"usp": 3}], [{"usp": 2, "ring": 2}]])
def test_every_way_to_say_it_gives_the_whole_result(layouts: list[dict[str, int]]) -> None:
    size = ParallelConfig.model_validate(layouts[0]).world_size
    for worst in run_ranks(run_plans, size, layouts):
        assert len(worst) >= len(layouts) * (len(PLANS) + len(FAULTS) + 2)
        wrong = {name for name, value in worst.items() if not value <= TOLERANCE}
        assert wrong == {f"{layout} {fault}" for layout in layouts for fault in FAULTS}


@pytest.mark.parametrize(("length", "size"), [(9, 2), (4, 4), (2, 3), (0, 2)])
def test_shards_are_the_whole_in_order(length: int, size: int) -> None:
    x = torch.randn(2, length, 3)
    parts = [sp_shard(x, 1, Axis("sequence", size, rank)) for rank in range(size)]
    assert torch.equal(torch.cat(parts, 1), x)
    assert max(part.shape[1] for part in parts) - min(part.shape[1] for part in parts) <= 1


# ---- what cannot be --------------------------------------------------------------------------------------------------


def first_of_two() -> Any:
    """A mesh for what fails before anything is sent: the first of two ranks, which attends alone."""
    return SimpleNamespace(sequence=Axis("sequence", 2, 0), ulysses=Axis("ulysses"), ring=Axis("ring"))


def applied(module: nn.Module, plan: dict[str, Any]) -> nn.Module:
    SequenceParallel(module, Plan(sequence=plan), first_of_two())
    return module


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({}, "Net has no sequence-parallel plan, but 2 ranks were asked for"),
        ({"blocks.*": {"mask": PER_TOKEN}}, "the sequence plan of Net marks no input as a stream"),
        (
            {"": {"x": STREAM}, "layers.*": {"mask": PER_TOKEN}},
            r"the plan names 'layers\.\*', but Net has no such module",
        ),
        ({"": {"y": STREAM}}, "the plan splits 'y' of '', but its forward has no such input"),
        ({"patch": {0: STREAM}}, "the plan of 'patch': names are inputs, numbers are outputs"),
        ({"": {"x": STREAM, "context": PLACES}}, "the plan of '': names are inputs, numbers are outputs"),
        (
            {"": {"x": STREAM}, "out": SequenceParallelOutput(gather_dim=1, stream="y")},
            "the plan gathers 'out' as the stream 'y'; known: x",
        ),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(plan: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        applied(net(), plan)


@pytest.mark.parametrize(
    ("streams", "message"),
    [
        ({"blocks.*.alone": ("y",)}, r"the plan lets 'blocks\.\*\.alone' attend over 'y'; known: x, context"),
        ({"blocks.*.second": ("x",)}, r"the plan names 'blocks\.\*\.second', but Net has no such module"),
        ({"blocks.*": ("x",)}, r"the plan names the streams of 'blocks\.0', which does not attend"),
    ],
)
def test_streams_that_do_not_fit_are_refused(streams: dict[str, Any], message: str) -> None:
    plan = Plan(sequence={"": {"x": STREAM, "context": STREAM}}, streams=streams)
    with pytest.raises(ValueError, match=message):
        SequenceParallel(net(dual=True), plan, first_of_two())


def test_streams_of_what_is_optional_may_have_no_module() -> None:
    plan = Plan(sequence={"": {"x": STREAM, "context": STREAM}}, streams=ALONE, optional=("blocks.*.alone",))
    SequenceParallel(net(), plan, first_of_two())


def test_attention_over_some_streams_must_say_which() -> None:
    module = applied(net(refine=False, dual=True), {"": {"x": STREAM, "context": STREAM}, **REST})
    with pytest.raises(RuntimeError, match=r"attention of 5 tokens over 5, but .* give this rank 8"):
        module(**inputs(masked=False))


def test_an_attention_without_the_parallel_object_is_refused() -> None:
    module = net()
    module.blocks[1].attn.processor = DeafProcessor()
    with pytest.raises(
        ValueError, match=r"'blocks\.1\.attn' attends with DeafProcessor, which takes no parallel object"
    ):
        applied(module, {"": {"x": STREAM}})


def test_a_module_without_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear has no attention processor to give the parallel object to"):
        applied(nn.Linear(2, 2), {"": {"input": STREAM}})


def test_a_length_that_may_not_be_uneven_is_refused() -> None:
    even = SequenceParallelInput(split_dim=1, stream=True, auto_pad=False)
    module = applied(net(), {"": {"x": even, "context": STREAM}})
    with pytest.raises(ValueError, match="'x' has 9 tokens, not divisible by 2 ranks, and no auto_pad"):
        module(**inputs(9))


def run_even(rank: int, size: int) -> bool:
    even = SequenceParallelInput(split_dim=1, stream=True, auto_pad=False)
    module = net()
    plan = {"": {"x": even, "context": even}, **REST}
    SequenceParallel(module, Plan(sequence=plan), Mesh(ParallelConfig.model_validate({"usp": size}), rank))
    given = inputs(8, 6, masked=False)
    return torch.allclose(module(**given)[0], net()(**given)[0], atol=TOLERANCE)


def test_a_length_that_may_not_be_uneven_is_split_when_it_is_even() -> None:
    assert run_ranks(run_even, 2) == [True, True]


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (
            {"": {"x": STREAM, "context": SequenceParallelInput(split_dim=1)}},
            r"attention of 8 tokens over 8, but the streams \{'x': 9\} give this rank 5: the plan lacks a stream, or",
        ),
        (
            {"blocks.0": {"x": STREAM, "context": STREAM}},  # the refiner attends before anything is split
            r"attention of 14 tokens over 14, but the streams \{\} give this rank 0",
        ),
        (
            {
                "": {"context": STREAM},
                "blocks.0": {"x": STREAM},
                "patch": SequenceParallelOutput(gather_dim=1, stream="x"),
            },
            "'patch' is to be gathered, but its stream 'x' was not split before it",
        ),
    ],
)
def test_a_stream_that_is_missing_is_told(plan: dict[str, Any], message: str) -> None:
    module = applied(net(), plan)
    with pytest.raises(RuntimeError, match=message):
        module(**inputs(masked=False))


def test_a_stream_is_split_once() -> None:
    rest = {name: rule for name, rule in REST.items() if name == "positions"}
    module = applied(net(refine=False), {"blocks.0": {"context": STREAM}, "blocks.*": {"x": STREAM}, **rest})
    with pytest.raises(RuntimeError, match="the stream 'x' of 9 tokens is split again: it has 5 now"):
        module(**inputs(masked=False))


def test_lengths_are_those_of_the_pass_under_way() -> None:
    """A stream that is absent from a pass is not taken from the one before."""
    module = net(refine=False)
    parallel = SequenceParallel(module, Plan(sequence={"": {"x": STREAM, "context": STREAM}, **REST}), first_of_two())
    parallel.lengths["context"] = 100
    with pytest.raises(RuntimeError, match=r"streams \{'context': 5\} give"):
        module(**{**inputs(masked=False), "x": torch.zeros(9, 3)})  # not of three dimensions: not split


# ---- what the dispatcher is asked for --------------------------------------------------------------------------------


def dispatched(**asked: Any) -> Tensor:
    parallel = SequenceParallel(net(), Plan(sequence={"": {"x": STREAM}}), first_of_two())
    parallel.lengths["x"] = 8
    q = k = v = torch.randn(2, 4, H, D)
    out: Tensor = dispatch_attention_fn(
        q,
        asked.pop("key", k),
        asked.pop("value", v),
        backend=sequence._registered_backend(),
        parallel_config=asked.pop("parallel", parallel),
        **asked,
    )
    return out


@pytest.mark.parametrize(
    "asked",
    [
        {"is_causal": True},
        {"dropout_p": 0.1},
        {"key": torch.ones(2, 4, 1, D), "value": torch.ones(2, 4, 1, D), "enable_gqa": True},
        {"attn_mask": torch.zeros(2, 1, 1, 4)},  # added to the scores
        {"attn_mask": torch.ones(2, 1, 4, 4, dtype=torch.bool)},
        {"attn_mask": torch.ones(2, H, 1, 4, dtype=torch.bool)},
    ],
)
def test_what_cannot_be_spread_is_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(NotImplementedError, match="spread"):
        dispatched(**asked)


def test_the_parallel_object_must_come_along() -> None:
    with pytest.raises(RuntimeError, match="without its parallel object"):
        dispatched(parallel=None)


def test_keys_of_another_length_are_refused() -> None:
    other = torch.ones(2, 3, H, D)
    with pytest.raises(RuntimeError, match="attention of 4 tokens over 3"):
        dispatched(key=other, value=other)


@pytest.mark.parametrize("shape", [(2, 4), (2, 1, 1, 4)])
def test_masks_of_keys_are_taken(shape: tuple[int, ...]) -> None:
    assert dispatched(attn_mask=torch.ones(shape, dtype=torch.bool)).shape == (2, 4, H, D)
