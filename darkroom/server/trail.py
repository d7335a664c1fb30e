"""What is known about one HTTP request when it has ended: for the log and for traces."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import HTTPConnection

from darkroom.configs.request import Request
from darkroom.engine.messages import Finished, Preview, Progress

KEY = "darkroom.trail"
"""Where it lies in an ASGI scope."""


@dataclass
class Trail:
    """The route adds what was asked and what was made; the outermost layer the rest."""

    id: str
    began: float = field(default_factory=time.time)
    """Unix seconds."""
    owner: str | None = None
    """The name of the API key."""
    asked: Request | None = None
    made: list[tuple[float, Finished]] = field(default_factory=list)
    """Pictures, without their bytes, and when."""
    video: str | None = None
    """The id of the job that was asked for."""
    status: int | None = None

    def add(self, event: Progress | Preview | Finished) -> None:
        if isinstance(event, Finished):
            self.made.append((time.time(), _without_bytes(event)))


Observer = Callable[[Trail, MutableMapping[str, Any], float], None]
"""(trail, scope, seconds), when a request has ended."""


def new_id() -> str:
    """For an answer's `x-request-id`."""
    return f"req_{uuid.uuid4().hex}"


def trail_of(http: HTTPConnection) -> Trail:
    trail: Trail = http.scope[KEY]
    return trail


def stages(made: Sequence[tuple[float, Finished]]) -> dict[str, float]:
    """Seconds by stage, over all pictures of a request."""
    total: dict[str, float] = {}
    for _, picture in made:
        for stage, seconds in picture.stages.items():
            total[stage] = total.get(stage, 0.0) + seconds
    return total


def _without_bytes(event: Finished) -> Finished:
    return Finished(
        id=event.id, files=(), seed=event.seed, text_tokens=event.text_tokens, image_tokens=event.image_tokens,
        stages=event.stages,
    )  # fmt: skip
