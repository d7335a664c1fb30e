"""CFG parallelism: each rank of the `cfg` axis evaluates its share of the guidance branches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from .mesh import Axis

Branch = TypeVar("Branch")


def map_branches(
    predict: Callable[[Branch], torch.Tensor], branches: Sequence[Branch], axis: Axis
) -> list[torch.Tensor]:
    """`[predict(branch) for branch in branches]`, spread over the axis; every rank gets every prediction.

    All predictions have one shape. A single branch, as without guidance, is evaluated by every rank.
    """
    if axis.size == 1 or len(branches) == 1:
        return [predict(branch) for branch in branches]
    if len(branches) != axis.size:
        raise ValueError(f"{len(branches)} guidance branches over {axis.name}={axis.size}: the numbers must be equal")
    return axis.gather_parts(predict(branches[axis.rank]))
