"""CFG parallelism: each rank of the `cfg` axis evaluates its share of the guidance branches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch

from .mesh import Axis

Branch = TypeVar("Branch")

_NOISE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.01}
"""By how much of the largest number a row may differ from the same row of a batch: kernels round by their shapes."""


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

    Neither is taken for granted. The first batch of a form is also computed whole, and its rows must be what the ranks
    make of them. A placeholder is not a number, and so is what a loop makes of it too early.
    """

    def __init__(self, forward: Callable[..., Any], axis: Axis, known: dict[Any, Any]) -> None:
        """`known` remembers the form of the outputs by that of the inputs, from one loop to the next."""
        self._forward, self._axis, self._known = forward, axis, known
        self._calls: list[list[torch.Tensor]] = []
        self._is_first_step = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        latents = next(iter([*args, *kwargs.values()]))
        if not isinstance(latents, torch.Tensor) or latents.shape[0] > 2:
            raise RuntimeError("the pipeline calls its transformer neither with one branch nor with a batch of two")
        form = (tuple(latents.shape), kwargs.get("return_dict"))
        return (self._both if latents.shape[0] == 2 else self._one)(form, latents.device, args, kwargs)

    def end_step(self, latents: torch.Tensor) -> None:
        """`latents`: what the loop has made of both branches. Raises RuntimeError, on all ranks or on none."""
        if self._calls:
            raise RuntimeError("the pipeline evaluated one guidance branch in a step that was to have two")
        if self._is_first_step and not self._all(bool(latents.isfinite().all()), latents.device):
            raise RuntimeError("the pipeline used a guidance branch before it asked for the other: use --cfg 1")
        self._is_first_step = False

    def _all(self, here: bool, device: torch.device) -> bool:
        """Whether it holds on every rank."""
        return all(bool(there) for there in self._axis.gather_parts(torch.tensor([float(here)], device=device)))

    def _both(self, form: Any, device: torch.device, args: Any, kwargs: Any) -> Any:
        out = self._rows(args, kwargs)
        if form not in self._known:
            rows, out = _tensors(out), self._forward(*args, **kwargs)
            if not self._all(_alike(rows, _tensors(out)), device):
                raise RuntimeError("the pipeline's batch of both guidance branches cannot be cut: use --cfg 1")
            self._known[form] = _map(out, lambda x: x.to("meta"))
        return out

    def _rows(self, args: Any, kwargs: Any) -> Any:
        rank = self._axis.rank

        def row(x: torch.Tensor) -> torch.Tensor:
            return x[rank : rank + 1] if x.ndim and x.shape[0] == 2 else x

        out = self._forward(*_map(args, row), **_map(kwargs, row))
        return _map(out, lambda x: self._axis.all_gather(x, 0))

    def _one(self, form: Any, device: torch.device, args: Any, kwargs: Any) -> Any:
        is_mine = len(self._calls) == self._axis.rank
        if is_mine or form not in self._known:  # the first time shows what comes out
            out = self._forward(*args, **kwargs)
            self._known[form] = _map(out, lambda x: x.to("meta"))
        if not is_mine:
            out = _map(self._known[form], lambda x: torch.full_like(x, float("nan"), device=device))
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


def _alike(rows: Sequence[torch.Tensor], whole: Sequence[torch.Tensor]) -> bool:
    if [x.shape for x in rows] != [x.shape for x in whole]:
        return False
    pairs = zip(rows, whole, strict=True)
    return all(float((a - b).abs().max()) <= _NOISE[b.dtype] * float(b.abs().max()) for a, b in pairs)


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
