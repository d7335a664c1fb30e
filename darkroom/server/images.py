"""POST /v1/images/generations, edits and variations: OpenAI's fields in, pictures out, whole or as a stream."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import msgspec
from fastapi import APIRouter
from fastapi import Request as HttpRequest
from starlette.responses import Response

from darkroom.configs.config import Limits
from darkroom.configs.errors import RequestError
from darkroom.configs.request import Request

from . import document
from .answers import Events, ImagesResponse, Look, Shelf, answer, stream
from .body import JSON_WITH_PICTURES, disconnection, media_type, read_json, share_of, unsupported
from .client import interleave
from .context import Context, Shared
from .fields import (
    QUALITIES,
    EditRequest,
    GenerationRequest,
    ImageRequest,
    StreamedRequest,
    VariationRequest,
    background_of,
)
from .form import read_form
from .idempotency import idempotency_key, seeded
from .models import check_model
from .sse import EventStream
from .trail import trail_of
from .uploads import FILES, Pictures, Sent, from_form, from_json, take

router = APIRouter()

_PICTURES = {"content": {"text/event-stream": {}}, "description": "The pictures, or with `stream` their events."}


@router.post(
    "/v1/images/generations",
    response_model=ImagesResponse,
    responses={200: _PICTURES},
    openapi_extra=document.body(json=GenerationRequest.model_json_schema()),
)
async def create_image(http: HttpRequest, context: Shared) -> Response:
    asked = GenerationRequest.read(await read_json(http))
    return await _draw(http, context, asked, Sent(), "image_generation")


@router.post(
    "/v1/images/edits",
    response_model=ImagesResponse,
    responses={200: _PICTURES},
    openapi_extra=document.body(
        form=document.form_schema(EditRequest, ("image", "mask"), without=("images", "markup"), required=("image",)),
        json={**EditRequest.model_json_schema(), "required": ["images", "prompt"]},
    ),
)
async def edit_image(http: HttpRequest, context: Shared) -> Response:
    return await _draw(http, context, *await _read_edit(http, context), "image_edit")


async def _read_edit(http: HttpRequest, context: Context) -> tuple[EditRequest, Sent]:
    match media_type(http):
        case "multipart/form-data":
            form = await read_form(http, FILES, context.limits)
            return EditRequest.read(form.values, is_form=True), from_form(form)
        case "application/json":
            asked = EditRequest.read(await read_json(http, min(JSON_WITH_PICTURES, context.limits.max_upload_mb << 20)))
            sent = from_json(asked.images, asked.mask)
            return asked.model_copy(update={"images": None, "mask": None}), sent  # so that they are kept once
        case _:
            raise unsupported(http, "'multipart/form-data' or 'application/json'")


@router.post(
    "/v1/images/variations",
    response_model=ImagesResponse,
    openapi_extra=document.body(form=document.form_schema(VariationRequest, ("image",), required=("image",))),
)
async def create_variation(http: HttpRequest, context: Shared) -> Response:
    return await _draw(http, context, *await _read_variation(http, context))


async def _read_variation(http: HttpRequest, context: Context) -> tuple[VariationRequest, Sent]:
    if media_type(http) != "multipart/form-data":
        raise unsupported(http, "'multipart/form-data'")
    form = await read_form(http, FILES, context.limits)
    asked, sent = VariationRequest.read(form.values, is_form=True), from_form(form)
    if sent.mask is not None:
        message = "Unknown parameter: 'mask'. POST /v1/images/edits takes one."
        raise RequestError(message, param="mask", code="unknown_parameter")
    return asked, sent


async def _draw(http: HttpRequest, context: Context, asked: ImageRequest, sent: Sent, events: str = "") -> Response:
    """`events` is their name, should they be asked for.

    Nothing here keeps the pictures that came with the request: once the engine has them, they are the engine's, whose
    queue has a limit of its own.
    """
    check_model(asked.model, context)
    asked.check(context.capabilities, sent)
    _check_number(asked.n, context.limits)
    asked = seeded(asked, idempotency_key(http))
    if sent.images:
        pictures = await take(sent, context.fetcher, context.limits, share_of(http))
        first = await asyncio.to_thread(asked.resolve, context.capabilities, pictures)
        del pictures
    else:
        first = asked.resolve(context.capabilities, Pictures())
    del sent
    _check_room(asked.n, first.num_bytes, context.limits)
    requests = [first.picture(i) for i in range(asked.n)]
    trail_of(http).asked = first = msgspec.structs.replace(first, images=(), mask=None)
    look = Look(
        size=f"{first.width}x{first.height}",
        quality=QUALITIES[asked.quality] or "high",
        background=background_of(first),
        output_format=asked.output_format,
    )
    made = _generate(http, context, requests)
    del requests
    share_of(http).give_back()  # they are sent at the first turn of `made`, and a picture may take minutes
    if isinstance(asked, StreamedRequest) and asked.stream:
        return EventStream(stream(made, look, events))
    return await answer(made, look, Shelf(http, context.files) if asked.response_format == "url" else None)


def _check_number(n: int, limits: Limits) -> None:
    """Raises `RequestError` for what not even an empty queue takes: to be told to try again later would be untrue."""
    if n > limits.max_queue:
        message = f"'n' is {n}, and at most {limits.max_queue} pictures can wait here at a time."
        raise RequestError(message, param="n", code="integer_above_max_value")


def _check_room(n: int, num_bytes: int, limits: Limits) -> None:
    """As `_check_number`, of the pictures' bytes."""
    if n > 1 and n * num_bytes > limits.max_queue_mb << 20:
        message = f"The pictures that were sent, {n} times, are more than the {limits.max_queue_mb} MiB that can wait."
        raise RequestError(message, param="n", code="integer_above_max_value")


async def _generate(http: HttpRequest, context: Context, requests: list[Request]) -> Events:
    streams = [context.client.generate(request) for request in requests]
    del requests
    async with aclosing(interleave(streams, lambda: disconnection(http))) as events:
        async for index, event in events:
            context.metrics.observe(event)
            trail_of(http).add(event)
            yield index, event
