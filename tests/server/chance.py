"""Examples that hypothesis draws: as many as a test asks for, and the same in every run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from hypothesis import HealthCheck, Phase, seed, settings

F = TypeVar("F", bound=Callable[..., None])


def examples(count: int) -> Callable[[F], F]:
    """A failure is shrunk only where that is quick: real servers answer otherwise the second time."""

    def decorate(test: F) -> F:
        drawn = settings(
            max_examples=count,
            deadline=None,  # pytest's timeout is the end of what hangs
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        return seed(5)(drawn(test))

    return decorate
