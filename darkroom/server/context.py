"""What the routes of one app share."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from darkroom.configs.capabilities import Capabilities
from darkroom.configs.config import Limits

from .body import Inflow
from .client import EngineClient
from .decoder import Decoder
from .drain import Drain
from .fetch import Fetcher
from .files import FileStore
from .metrics import Metrics
from .runner import VideoRunner


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
    inflow: Inflow
    decoder: Decoder = field(default_factory=Decoder)


async def _context(request: Request) -> Context:
    context: Context = request.app.state.context
    return context


Shared = Annotated[Context, Depends(_context)]
