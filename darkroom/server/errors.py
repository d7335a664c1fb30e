"""Every failure as OpenAI's error object: one table from what was raised to what the client is told."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Match, Route
from starlette.types import Scope

from darkroom.configs.errors import RequestError

from .client import EngineError


@dataclass(frozen=True)
class ErrorObject:
    message: str
    type: str
    param: str | None
    code: str | None


@dataclass(frozen=True)
class ErrorEnvelope:
    error: ErrorObject


class ApiError(Exception):
    """An answer that is not a success."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers

    @property
    def envelope(self) -> ErrorEnvelope:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return ErrorEnvelope(ErrorObject(str(self), kind, self.param, self.code))

    def response(self) -> Response:
        content = msgspec.json.encode(self.envelope)
        return Response(content, self.status, self.headers, media_type="application/json")


def too_many(message: str, seconds: float) -> ApiError:
    """429, with the time to wait in whole seconds: at least one, and rounded up, so that it is never too short."""
    wait = max(1, math.ceil(seconds))
    return ApiError(
        429, f"{message} Try again in {wait} s.", code="rate_limit_exceeded", headers={"Retry-After": str(wait)}
    )


def to_api_error(error: BaseException, picture_seconds: float = 5.0) -> ApiError:
    """With the seconds that a picture takes, after which there is a place in the queue again."""
    match error:
        case ApiError():
            return error
        case RequestError():
            return ApiError(400, str(error), param=error.param, code=error.code)
        case EngineError(reason="busy"):
            return too_many("The queue is full.", picture_seconds)
        case EngineError(reason="unavailable") | asyncio.CancelledError():
            message = "The model is not ready: it starts, restarts or stops; try again in a few seconds."
            return ApiError(503, message, headers={"Retry-After": "10"})
        case ClientDisconnect():
            return ApiError(499, "The client closed the connection.")
    message = "The server failed at this request; its log names the cause beside this answer's x-request-id."
    return ApiError(500, message, headers={"x-should-retry": "false"})


def _allowed_methods(routes: Iterable[BaseRoute], scope: Scope) -> str:
    """Of all routes that the path leads to; Starlette tells those of the first."""
    found = [route for route in routes if isinstance(route, Route) and route.matches(scope)[0] is not Match.NONE]
    return ", ".join(sorted({method for route in found for method in route.methods or ()}))


async def http_exception(routes: Iterable[BaseRoute], request: Request, error: Exception) -> Response:
    """Starlette's own refusals: no such route, no such method on it."""
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.scope['path']}"[:200]  # `request.url` would parse the Host header
    match error.status_code:
        case 404:
            refusal = ApiError(404, f"There is no route for {what}.")
        case 405:
            allowed = _allowed_methods(routes, request.scope)
            message = f"{what} is not supported; allowed: {allowed}."
            refusal = ApiError(405, message, code="method_not_supported", headers={"Allow": allowed})
        case status:
            refusal = ApiError(status, error.detail, headers=error.headers)
    return refusal.response()
