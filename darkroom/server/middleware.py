"""The outermost layers of the app."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from email.utils import formatdate

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .drain import Drain
from .errors import ApiError, to_api_error
from .metrics import Metrics
from .trail import KEY, Observer, Trail, new_id

logger = logging.getLogger(__name__)


class Outermost:
    """Every answer gets an id of its own, every outcome is counted and told to the observers."""

    def __init__(self, app: ASGIApp, metrics: Metrics, drain: Drain, observers: Sequence[Observer] = ()) -> None:
        self.app = app
        self.metrics = metrics
        self.drain = drain
        self.observers = observers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        trail = scope[KEY] = Trail(new_id())
        began = time.perf_counter()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                trail.status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = trail.id
                headers["date"] = formatdate(usegmt=True)
                if self.drain.is_on:
                    headers["connection"] = "close"  # the client's next request may reach another server
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        finally:
            trail.status = trail.status or 500
            self.metrics.count(getattr(scope.get("route"), "path", "unknown"), trail.status)
            for observe in self.observers:
                observe(trail, scope, time.perf_counter() - began)


class CrossOrigin(CORSMiddleware):
    """Starlette's, whose refusals are the error object."""

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        allowed = {name: value for name, value in response.headers.items() if not name.startswith("content-")}
        return ApiError(response.status_code, f"{bytes(response.body).decode()}.", headers=allowed).response()


class Envelope:
    """Every exception becomes the error object."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        trail: Trail = scope[KEY]
        try:
            await self.app(scope, receive, send)
        except (Exception, asyncio.CancelledError) as e:  # which uvicorn raises in what it could not drain
            error = to_api_error(e, self.metrics.usual_seconds or 5.0)
            _log(trail.id, error.status, e)
            if trail.status is None:
                await error.response()(scope, receive, send)
            trail.status = error.status


def _log(id: str, status: int, error: BaseException) -> None:
    if status == 500:
        logger.error("%s failed", id, exc_info=error)
    elif not isinstance(error, ApiError) and status in (429, 499, 503):  # whose cause the client is not told
        logger.info("%s ended with %d: %r", id, status, error)
