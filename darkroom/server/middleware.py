"""The outermost layer of the app."""

from __future__ import annotations

import asyncio
import logging
import uuid
from email.utils import formatdate

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import to_api_error
from .metrics import Metrics

logger = logging.getLogger(__name__)


class Outermost:
    """Every answer gets an id of its own, every exception the error envelope, every outcome a count."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        id = f"req_{uuid.uuid4().hex}"
        status: int | None = None

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = id
                headers["date"] = formatdate(usegmt=True)
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except (Exception, asyncio.CancelledError) as e:  # which uvicorn raises in what it could not drain
            error = to_api_error(e)
            _log(id, error.status, e)
            if status is None:
                await error.response()(scope, receive, send_with_id)
            status = error.status
        finally:
            self.metrics.count(getattr(scope.get("route"), "path", "unknown"), status or 500)


def _log(id: str, status: int, error: BaseException) -> None:
    if status == 500:
        logger.error("%s failed", id, exc_info=error)
    elif status in (429, 499, 503):
        logger.info("%s ended with %d: %r", id, status, error)
