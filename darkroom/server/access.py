"""One line of log for each request that has ended."""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from typing import Any

from darkroom.configs.logs import facts

from .trail import Trail, stages

logger = logging.getLogger(__name__)

_QUIET = ("/health", "/metrics")
"""Asked by machines, again and again: logged at level debug."""
_SECRET = ("/files/{name}",)
"""Whoever knows the path is let in: it is not written down."""


class AccessLog:
    """Prompts are a client's own, and are left out unless the operator asks for them. Query strings always are."""

    def __init__(self, *, with_prompts: bool) -> None:
        self.with_prompts = with_prompts

    def __call__(self, trail: Trail, scope: MutableMapping[str, Any], seconds: float) -> None:
        route = getattr(scope.get("route"), "path", None)
        level = logging.DEBUG if route in _QUIET else logging.INFO
        if not logger.isEnabledFor(level):
            return
        client = scope.get("client")
        members = facts(
            request_id=trail.id,
            client=client[0] if client else None,
            key=trail.owner,
            method=scope["method"],
            path=route if route in _SECRET else scope.get("raw_path", b"").decode("ascii", "backslashreplace")[:200],
            status=trail.status,
            seconds=round(seconds, 6),
            video=trail.video,
            **self._about_pictures(trail),
        )
        logger.log(level, "request", extra=members)

    def _about_pictures(self, trail: Trail) -> dict[str, object]:
        if (asked := trail.asked) is None:
            return {}
        return {
            "size": f"{asked.width}x{asked.height}",
            "steps": asked.num_inference_steps,
            "pictures": len(trail.made),
            "stages": {stage: round(seconds, 6) for stage, seconds in stages(trail.made).items()} or None,
            "prompt": asked.prompt if self.with_prompts else None,
        }
