"""Guidance branches over ranks: the same predictions in the same order, each evaluated once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from darkroom.configs import ParallelConfig
from darkroom.parallel.guidance import BranchCalls, map_branches
from darkroom.parallel.mesh import Axis, Mesh
from tests.ranks import run_ranks


class Predict:
    """Tells the branches apart, and remembers which were asked for."""

    def __init__(self) -> None:
        self.evaluated: list[str] = []

    def __call__(self, branch: str) -> Tensor:
        self.evaluated.append(branch)
        return torch.full((2, 3), float(ord(branch))).T  # not contiguous


def run_branches(rank: int, size: int, tp: int) -> dict[str, tuple[list[str], list[Tensor]]]:
    axis = Mesh(ParallelConfig.model_validate({"cfg": size // tp, "tp": tp}), rank).cfg
    results = {}
    for branches in (["a", "b", "c"][: axis.size], ["a"]):
        predict = Predict()
        predictions = map_branches(predict, branches, axis)
        results["".join(branches)] = (predict.evaluated, predictions)
    return results


@pytest.mark.parametrize(("size", "tp"), [(3, 1), (4, 2)])
def test_each_rank_evaluates_one_branch_and_gets_all(size: int, tp: int) -> None:
    branches = "abc"[: size // tp]
    expected = [Predict()(branch) for branch in branches]
    for rank, results in enumerate(run_ranks(run_branches, size, tp)):
        evaluated, predictions = results[branches]
        assert evaluated == [branches[rank // tp]]
        assert all(map(torch.equal, predictions, expected)) and len(predictions) == len(expected)
        assert not all(map(torch.equal, predictions[::-1], expected[:1]))  # a fault is seen
        assert results["a"][0] == ["a"]  # without guidance, every rank evaluates the only one
        assert torch.equal(results["a"][1][0], expected[0])


def test_one_rank_evaluates_all_branches() -> None:
    predict = Predict()
    assert [float(x[0, 0]) for x in map_branches(predict, ["b", "a", "c"], Axis("cfg"))] == [98.0, 97.0, 99.0]
    assert predict.evaluated == ["b", "a", "c"]


def test_more_branches_than_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="3 guidance branches over cfg=2: the numbers must be equal"):
        map_branches(Predict(), ["a", "b", "c"], Axis("cfg", 2, 1, None, (0, 1)))


# ---- loops that are not ours -----------------------------------------------------------------------------------------


class Transformer:
    """What a stock loop calls; it counts the rows that it computes. Its output has other channels than its input."""

    def __init__(self) -> None:
        self.rows = 0

    def __call__(self, x: Tensor, *, text: Tensor, more: dict[str, Tensor], return_dict: bool = False) -> Any:
        self.rows += len(x)
        return (torch.cat([x + text, x * text], -1) * more["size"],)


def one_after_another(transformer: Any, x: Tensor, texts: list[Tensor], size: Tensor) -> Tensor:
    """Takes views of the outputs, as pipelines do that cut off what belongs to a condition."""
    parts = [transformer(x, text=text, more={"size": size}, return_dict=False)[0][:, :1] for text in texts]
    return parts[1] + 4 * (parts[0] - parts[1])


def as_one_batch(transformer: Any, x: Tensor, texts: list[Tensor], size: Tensor) -> Tensor:
    out = transformer(torch.cat([x] * 2), text=torch.cat(texts), more={"size": torch.cat([size] * 2)})[0]
    one, other = out.chunk(2)
    return other + 4 * (one - other)


def too_early(transformer: Any, x: Tensor, texts: list[Tensor], size: Tensor) -> Tensor:
    first = transformer(x, text=texts[0], more={"size": size})[0] * 2
    return first - transformer(x, text=texts[1], more={"size": size})[0]


X, TEXTS, SIZE = torch.arange(6.0).view(1, 2, 3), [torch.full((1, 2, 3), v) for v in (2.0, 3.0)], torch.tensor([[0.5]])


def run_loops(rank: int, size: int, loop: Any) -> tuple[list[Tensor], int]:
    """Two loops of two steps; of the second, all forms are known."""
    axis, known = Mesh(ParallelConfig.model_validate({"cfg": size}), rank).cfg, {}
    transformer, outputs = Transformer(), []
    for _ in range(2):
        calls = BranchCalls(transformer, axis, known)
        for step in range(2):
            outputs.append(loop(calls, X + step, TEXTS, SIZE))
            calls.end_step(outputs[-1])
    return outputs, transformer.rows


@pytest.mark.parametrize("loop", [one_after_another, as_one_batch])
def test_a_foreign_loop_gets_both_branches(loop: Any) -> None:
    expected = [loop(Transformer(), X + step, TEXTS, SIZE) for step in range(2)] * 2
    for rank, (outputs, rows) in enumerate(run_ranks(run_loops, 2, loop)):
        assert all(map(torch.equal, outputs, expected)) and len(outputs) == 4
        first = 2 if loop is as_one_batch else rank  # a batch is computed whole; or the other's call shows a form
        assert rows == 4 + first  # half of the eight, and what is computed to learn the form


class Layers(Transformer):
    """Takes texts whose batch is their second dimension, and reads what it gets of them as one text a row."""

    def __call__(self, x: Tensor, *, text: Tensor, more: dict[str, Tensor], return_dict: bool = False) -> Any:
        self.rows += len(x)
        return (x * text[0].reshape(len(x), -1, 3).mean(1, keepdim=True) * more["size"],)


def layers_in_one_batch(transformer: Any, x: Tensor, texts: list[Tensor], size: Tensor) -> Tensor:
    return as_one_batch(transformer, x, [torch.stack([torch.cat(texts)] * 3)], size)


def test_a_batch_that_cannot_be_cut_is_refused_by_every_rank() -> None:
    for message in run_ranks(refusal, 2, layers_in_one_batch, Layers()):
        assert "batch of both guidance branches cannot be cut: use --cfg 1" in message


def test_what_is_used_too_early_is_refused_by_every_rank() -> None:
    for message in run_ranks(refusal, 2, too_early, Transformer()):
        assert "used a guidance branch before it asked for the other" in message


def refusal(rank: int, size: int, loop: Any, transformer: Transformer) -> str:
    calls = BranchCalls(transformer, Mesh(ParallelConfig(cfg_parallel_size=2), rank).cfg, {})
    with pytest.raises(RuntimeError) as caught:
        calls.end_step(loop(calls, X, TEXTS, SIZE))
    return str(caught.value)


def test_a_loop_without_two_branches_is_told() -> None:
    calls = BranchCalls(Transformer(), Axis("cfg", 2, 0, None, (0, 1)), {})
    with pytest.raises(RuntimeError, match="neither with one branch nor with a batch of two"):
        calls(torch.cat([X] * 3), text=TEXTS[0], more={"size": SIZE})
    with pytest.raises(RuntimeError, match="neither with one branch"):
        calls([X, X], text=TEXTS[0], more={"size": SIZE})
    calls(X, text=TEXTS[0], more={"size": SIZE})
    with pytest.raises(RuntimeError, match="one guidance branch in a step that was to have two"):
        calls.end_step(X)
