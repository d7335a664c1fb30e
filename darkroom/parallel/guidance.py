"""CFG parallelism: each rank of the `cfg` axis evaluates its share of the guidance branches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

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


class BranchCalls:
    """The transformer of a loop that is not ours, which evaluates two branches a step by itself.

    Either both in one call, as a batch of two: each rank then computes a row. Or one after another: a rank answers
    the other's call at once with a placeholder, and after the second call both results are gathered and filled in.
    """

    def __init__(self, forward: Callable[..., Any], axis: Axis, known: dict[Any, Any]) -> None:
        """`known` remembers the form of the outputs by that of the inputs, from one loop to the next."""
        self._forward, self._axis, self._known = forward, axis, known
        self._calls: list[list[torch.Tensor]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        latents = next(iter([*args, *kwargs.values()]))
        if not isinstance(latents, torch.Tensor) or latents.shape[0] > 2:
            raise RuntimeError("the pipeline calls its transformer neither with one branch nor with a batch of two")
        return (self._both if latents.shape[0] == 2 else self._one)(latents, args, kwargs)

    def end_step(self) -> None:
        if self._calls:
            raise RuntimeError("the pipeline evaluated one guidance branch in a step that was to have two")

    def _both(self, _latents: torch.Tensor, args: Any, kwargs: Any) -> Any:
        rank = self._axis.rank

        def row(x: torch.Tensor) -> torch.Tensor:
            return x[rank : rank + 1] if x.ndim and x.shape[0] == 2 else x

        out = self._forward(*_map(args, row), **_map(kwargs, row))
        return _map(out, lambda x: self._axis.all_gather(x, 0))

    def _one(self, latents: torch.Tensor, args: Any, kwargs: Any) -> Any:
        form = (tuple(latents.shape), kwargs.get("return_dict"))
        if len(self._calls) == self._axis.rank or form not in self._known:  # the first time shows what comes out
            out = self._forward(*args, **kwargs)
            self._known[form] = _map(out, lambda x: x.to("meta"))
        else:  # what is computed with a placeholder that is not filled yet is not a number either
            out = _map(self._known[form], lambda x: torch.full_like(x, float("nan"), device=latents.device))
        self._calls.append(_tensors(out))
        if len(self._calls) == self._axis.size:
            self._exchange()
        return out

    def _exchange(self) -> None:
        mine = self._calls[self._axis.rank]
        for i, part in enumerate(mine):
            for branch, whole in enumerate(self._axis.gather_parts(part)):
                if branch != self._axis.rank:
                    self._calls[branch][i].copy_(whole)
        self._calls.clear()


def _map(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same structure with every tensor replaced."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return type(value)(**{key: _map(x, function) for key, x in value.items()})
    if isinstance(value, list | tuple):
        return type(value)(_map(x, function) for x in value)
    return value


def _tensors(value: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []

    def note(x: torch.Tensor) -> torch.Tensor:
        found.append(x)
        return x

    _map(value, note)
    return found
