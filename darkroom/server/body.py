"""Reading what a client sends: its body, checked, and that it has gone."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import msgspec
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from starlette.requests import ClientDisconnect, HTTPConnection, Request
from starlette.types import ASGIApp, Receive, Scope, Send

from darkroom.configs.errors import RequestError

from .errors import ApiError, too_many

JSON_LIMIT = 2 * 1024 * 1024
"""Bytes of a JSON body without pictures."""
JSON_WITH_PICTURES = 32 * 1024 * 1024
"""Bytes of one with pictures as data: URLs. It is decoded at one go, while everybody waits, as no form is."""
_MOST_MARKS = 80_000
"""Commas and opening brackets in a JSON body, its texts included: a prompt and a negative one may be full of them. They
bound what there is to decode, which for a few megabytes of `{},` would take seconds."""

_BODY_SECONDS = 60.0
"""To send a body in, and a second more for each MiB that it may have."""

_INFLOW_SECONDS = 5.0
"""After which a client that came when too much was being taken in may come again."""

_KEY = "darkroom.share"
"""Where a request's share lies in its ASGI scope."""

_CODES = {
    "missing": "missing_required_parameter",
    "greater_than_equal": "integer_below_min_value",
    "less_than_equal": "integer_above_max_value",
    "string_too_long": "string_above_max_length",
}
_JSON_TYPES = {
    str: "a string", bool: "a boolean", int: "an integer", float: "a number", list: "an array", dict: "an object",
    type(None): "null",
}  # fmt: skip

M = TypeVar("M", bound=BaseModel)


async def read_json(request: Request, limit: int = JSON_LIMIT) -> dict[str, Any]:
    """The body of an `application/json` request, which must be an object. Raises `ApiError`."""
    if media_type(request) != "application/json":
        raise unsupported(request, "'application/json'")
    data, marks = bytearray(), 0

    def take(piece: bytes) -> None:
        nonlocal marks
        marks += sum(map(piece.count, b",[{"))
        if marks > _MOST_MARKS:
            raise ApiError(400, f"The body has more than {_MOST_MARKS} commas and brackets.")
        data.extend(piece)

    await receive(request, limit, take)
    try:
        body = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise ApiError(400, f"The body is not valid JSON in UTF-8: {str(e)[:200]}.") from None
    except RecursionError:
        raise ApiError(400, "The body is JSON that is nested too deeply.") from None
    if not isinstance(body, dict):
        raise ApiError(400, f"The body must be a JSON object, not {_JSON_TYPES[type(body)]}.")
    return body


def validate(model: type[M], values: dict[str, Any]) -> M:
    """Raises `RequestError` that names the first field at fault."""
    for name in values:  # here, and at the first: pydantic would make an error of each one there is
        check_known(model, name)
    try:
        return model.model_validate(values)
    except ValidationError as e:
        raise _request_error(e.errors(include_url=False)[0]) from None


def check_known(model: type[BaseModel], name: str) -> None:
    """Raises `RequestError` for what is no field."""
    if name not in model.model_fields:
        known = ", ".join(sorted(model.model_fields))
        raise RequestError(
            f"Unknown parameter: '{name[:80]}'. Known: {known}.", param=name[:80], code="unknown_parameter"
        )


async def disconnection(request: Request) -> NoReturn:
    """Wait until the client has gone, of which Starlette tells a plain endpoint nothing. The body must be read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    raise ClientDisconnect


def media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def unsupported(request: Request, expected: str) -> ApiError:
    message = f"Unsupported content type '{media_type(request)[:80]}': expected {expected}."
    return ApiError(415, message, code="unsupported_content_type")


class Inflow:
    """The bytes of all requests that are being taken in: neither slow clients nor many that wait fill the memory."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.held = 0


class Share:
    """What one request holds of the inflow: from its first byte on until nothing here needs its bytes any longer."""

    def __init__(self, inflow: Inflow) -> None:
        self.held = 0
        self._inflow = inflow

    def add(self, number: int) -> None:
        """Raises `ApiError` 429."""
        inflow = self._inflow
        self.held += number
        inflow.held += number
        if inflow.held > inflow.most:
            raise too_many(f"Requests of {inflow.most} bytes are being taken in already.", _INFLOW_SECONDS)

    def give_back(self) -> None:
        """When the bytes are gone, or somebody else counts them."""
        self._inflow.held -= self.held
        self.held = 0


class Intake:
    """The layer in which a request has its share, to its end at most."""

    def __init__(self, app: ASGIApp, inflow: Inflow) -> None:
        self.app = app
        self.inflow = inflow

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        share = scope[_KEY] = Share(self.inflow)
        try:
            await self.app(scope, receive, send)
        finally:
            share.give_back()


def share_of(http: HTTPConnection) -> Share:
    share: Share = http.scope[_KEY]
    return share


async def receive(request: Request, limit: int, take: Callable[[bytes], object]) -> None:
    """Give the body to `take`, piece by piece as it comes. Raises `ApiError` beyond `limit` bytes, or its time."""
    too_large = ApiError(413, f"The body is larger than {limit} bytes.", code="request_too_large")
    if int(request.headers.get("content-length", 0)) > limit:
        raise too_large
    share, seconds = share_of(request), _BODY_SECONDS + limit / 2**20
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                if share.held + len(chunk) > limit:
                    raise too_large
                share.add(len(chunk))
                if chunk:
                    take(chunk)
    except TimeoutError:
        raise ApiError(408, f"The body did not arrive within {seconds:g} seconds.") from None


def _request_error(error: ErrorDetails) -> RequestError:
    kind, value = error["type"], error["input"]
    param = str(error["loc"][0])[:80]
    wrong_type = kind.endswith("_type") or (kind == "literal_error" and not isinstance(value, str))
    if kind == "missing":
        message = f"Missing required parameter: '{param}'."
    elif kind == "none_required":
        message = f"'{param}' is not supported by this model."
    else:
        message = re.sub(r"^(Input|String)", f"'{param}'", error["msg"])
        message += f", not {_JSON_TYPES[type(value)]}." if wrong_type else "."
    code = "invalid_type" if wrong_type else _CODES.get(kind, "invalid_value")
    if code.startswith("integer") and isinstance(value, float):
        code = "invalid_value"
    return RequestError(message, param=param, code=code)
