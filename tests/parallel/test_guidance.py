"""Guidance branches over ranks: the same predictions in the same order, each evaluated once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from darkroom.configs import ParallelConfig
from darkroom.parallel.guidance import map_branches
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
