"""Darkroom: an OpenAI-compatible image generation server, and the same engine without a server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .configs import ParallelConfig, RequestError, SamplingParams

if TYPE_CHECKING:
    from .offline import Darkroom

__all__ = ["Darkroom", "ParallelConfig", "RequestError", "SamplingParams"]


def __getattr__(name: str) -> Any:
    """`Darkroom` brings sockets and pictures with it, which a worker or the server does not need."""
    if name == "Darkroom":
        from .offline import Darkroom

        return Darkroom
    raise AttributeError(f"module 'darkroom' has no attribute '{name}'")
