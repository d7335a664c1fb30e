"""What the routes of one app share."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from darkroom.configs.capabilities import Capabilities
from darkroom.configs.config import Limits

from .client import EngineClient
from .drain import Drain
from .fetch import Fetcher
from .files import FileStore
from .metrics import Metrics
from .runner import VideoRunner

_DECODED_AT_ONCE = 2


@dataclass(frozen=True, kw_only=True)
class Context:
    capabilities: Capabilities
    served_name: str
    client: EngineClient
    limits: Limits
    files: FileStore
    metrics: Metrics = field(default_factory=Metrics)
    drain: Drain = field(default_factory=Drain)
    fetcher: Fetcher = field(default_factory=Fetcher)
    started: int = field(default_factory=lambda: int(time.time()))
    """Unix seconds."""
    videos: VideoRunner | None = None
    """None where the model makes no videos."""
    decoding: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_DECODED_AT_ONCE))
    """Around what decodes a picture in this process: each takes as much as 64 megapixels."""


async def _context(request: Request) -> Context:
    context: Context = request.app.state.context
    return context


Shared = Annotated[Context, Depends(_context)]
