"""POST /v1/images/generations: OpenAI's fields in, pictures out, whole or as a stream."""

from __future__ import annotations

import asyncio
import time
from binascii import b2a_base64
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter
from fastapi import Request as HttpRequest
from pydantic import BaseModel, ConfigDict, Field, GetPydanticSchema
from pydantic_core import core_schema
from starlette.responses import Response

from darkroom.configs.capabilities import Capabilities
from darkroom.configs.errors import RequestError
from darkroom.configs.request import Request, SamplingParams
from darkroom.engine.messages import Finished, Preview, Progress

from .body import disconnection, read_json, validate
from .client import interleave
from .context import Context, Shared
from .models import check_model
from .sse import EventStream, encode_event
from .trail import trail_of

router = APIRouter()

Quality = Literal["low", "medium", "high"]
Events = AsyncGenerator[tuple[int, Progress | Preview | Finished], None]

_ALIASES = {
    "steps": "num_inference_steps", "infer_steps": "num_inference_steps", "sample_steps": "num_inference_steps",
    "cfg": "guidance_scale", "cfg_scale": "guidance_scale", "txt_cfg": "guidance_scale",
}  # fmt: skip
_QUALITIES: dict[str, Quality | None] = {
    "auto": None, "low": "low", "medium": "medium", "standard": "medium",
    "high": "high", "hd": "high", "xhigh": "high", "max": "high",
}  # fmt: skip
_BASE64_PIECE = 384 * 1024
"""Bytes that are encoded at a time, so that a large picture does not keep the event loop from its turn."""


def _allow_null(schema: dict[str, Any]) -> None:
    for name, field in schema["properties"].items():
        if name not in schema["required"] and "anyOf" not in field:
            common = {key: field.pop(key) for key in ("title", "description", "default") if key in field}
            schema["properties"][name] = {"anyOf": [field, {"type": "null"}], **common}


class ImageRequest(BaseModel):
    """An explicit null is the default: `read` leaves it out."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, json_schema_extra=_allow_null)

    prompt: str = Field(max_length=32_000, description="what the picture shows")
    model: str | None = Field(None, description="the served model, if not given")
    n: int = Field(1, ge=1, le=10, description="how many pictures; picture i is drawn with seed + i")
    size: str = Field("auto", description="'WIDTHxHEIGHT', or 'auto' for the model's own")
    quality: Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"] = Field(
        "auto", description="sets the number of steps where num_inference_steps does not"
    )
    background: Literal["auto", "opaque"] = Field("auto", description="the model makes no alpha channel")
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: int = Field(100, ge=0, le=100, description="the quality of JPEG and WebP")
    response_format: Literal["b64_json"] = "b64_json"
    moderation: Literal["auto", "low"] = Field("auto", description="without effect")
    stream: bool = Field(False, description="answer with server-sent events")
    partial_images: int = Field(0, ge=0, le=3, description="previews on the way, with stream")
    user: str | None = Field(None, description="without effect")
    safety_identifier: str | None = Field(None, description="without effect")
    negative_prompt: str | None = Field(None, max_length=32_000, description="what the picture should not show")
    num_inference_steps: int | None = Field(None, description="denoising steps")
    true_cfg_scale: float | None = Field(None, description="strength of classifier-free guidance")
    guidance_scale: float | None = Field(None, description="the guidance input of guidance-distilled models")
    seed: int | None = Field(None, description="64 bits; the same seed gives the same picture; random, if not given")
    max_sequence_length: int | None = Field(None, description="prompt tokens after which the text is cut off")
    style: None = Field(None, description="not supported")
    complexity: None = Field(None, description="not supported")
    frame_count: None = Field(None, description="not supported")
    frame_duration_ms: None = Field(None, description="not supported")
    svg: None = Field(None, description="not supported")

    @classmethod
    def read(cls, body: dict[str, Any]) -> ImageRequest:
        """The members of `body` and of a literal `extra_body` or `extra_params` in it. Raises `RequestError`."""
        sources: dict[str, dict[str, Any] | None] = {"": body}
        sources |= {name: body.pop(name) for name in ("extra_body", "extra_params") if name in body}
        values: dict[str, Any] = {}
        for source, members in sources.items():
            if not isinstance(members, dict | None):
                raise RequestError(f"'{source}' should be an object.", param=source, code="invalid_type")
            for key, value in (members or {}).items():
                name = _ALIASES.get(key, key)
                if value is None and name in cls.model_fields:
                    continue
                if name in values and (isinstance(value, list | dict) or value != values[name]):
                    raise RequestError(f"'{key[:80]}' contradicts another spelling of it.", param=name[:80])
                values[name] = value
        return validate(cls, values)

    def resolve(self, capabilities: Capabilities) -> Request:
        """The request for the first picture. Raises `RequestError`."""
        if self.partial_images and not self.stream:
            raise RequestError("'partial_images' needs 'stream': true.", param="partial_images")
        if self.output_compression < 100 and self.output_format == "png":
            message = "'output_compression' is for jpeg and webp: png loses nothing."
            raise RequestError(message, param="output_compression")
        width, height = capabilities.parse_size(self.size)
        params = SamplingParams(
            width=width,
            height=height,
            quality=_QUALITIES[self.quality],
            negative_prompt=self.negative_prompt,
            num_inference_steps=self.num_inference_steps,
            true_cfg_scale=self.true_cfg_scale,
            guidance_scale=self.guidance_scale,
            max_sequence_length=self.max_sequence_length,
            seed=self.seed,
        )
        request = capabilities.resolve(self.prompt, params).as_file(self.output_format, self.output_compression)
        return msgspec.structs.replace(request, partial_images=self.partial_images)


Base64 = Annotated[msgspec.Raw, GetPydanticSchema(lambda *_: core_schema.str_schema())]
"""A JSON string, encoded already."""


@dataclass(frozen=True)
class TokenCount:
    text_tokens: int
    image_tokens: int


@dataclass(frozen=True)
class Usage:
    input_tokens: int
    input_tokens_details: TokenCount
    output_tokens: int
    output_tokens_details: TokenCount
    total_tokens: int

    @classmethod
    def of(cls, text_tokens: int, image_tokens: int) -> Usage:
        input, output = TokenCount(text_tokens, 0), TokenCount(0, image_tokens)
        return cls(text_tokens, input, image_tokens, output, text_tokens + image_tokens)


@dataclass(frozen=True, kw_only=True)
class Look:
    """What every answer says of its pictures: the resolved values, never `auto`."""

    size: str
    quality: Quality
    background: Literal["opaque"] = "opaque"
    output_format: Literal["png", "jpeg", "webp"]


@dataclass(frozen=True, kw_only=True)
class Image:
    b64_json: Base64
    seed: int


@dataclass(frozen=True, kw_only=True)
class ImagesResponse(Look):
    created: int
    data: list[Image]
    usage: Usage


@router.post(
    "/v1/images/generations",
    response_model=ImagesResponse,
    responses={
        200: {"content": {"text/event-stream": {}}, "description": "The pictures, or with `stream` their events."}
    },
    openapi_extra={
        "requestBody": {"required": True, "content": {"application/json": {"schema": ImageRequest.model_json_schema()}}}
    },
)
async def create_image(http: HttpRequest, context: Shared) -> Response:
    asked = ImageRequest.read(await read_json(http))
    check_model(asked.model, context)
    trail_of(http).asked = first = asked.resolve(context.capabilities)
    look = Look(
        size=f"{first.width}x{first.height}",
        quality=_QUALITIES[asked.quality] or "high",
        output_format=asked.output_format,
    )
    events = _generate(http, context, [first.picture(i) for i in range(asked.n)])
    return EventStream(_stream(events, look)) if asked.stream else await _answer(events, look)


async def _generate(http: HttpRequest, context: Context, requests: list[Request]) -> Events:
    streams = [context.client.generate(request) for request in requests]
    async with aclosing(interleave(streams, lambda: disconnection(http))) as events:
        async for index, event in events:
            context.metrics.observe(event)
            trail_of(http).add(event)
            yield index, event


async def _answer(events: Events, look: Look) -> Response:
    async with aclosing(events):
        finished = {index: event async for index, event in events if isinstance(event, Finished)}
    pictures = [finished[index] for index in sorted(finished)]
    answer = ImagesResponse(
        created=int(time.time()),
        data=[Image(b64_json=await _base64(file), seed=picture.seed) for picture in pictures for file in picture.files],
        usage=Usage.of(pictures[0].text_tokens, sum(picture.image_tokens for picture in pictures)),
        **vars(look),
    )
    return Response(msgspec.json.encode(answer), media_type="application/json")


async def _stream(events: Events, look: Look) -> AsyncGenerator[bytes, None]:
    """Server-sent events. The prompt's tokens are counted in the first picture's usage, so that usages add up."""
    counted = False
    async with aclosing(events):
        async for index, event in events:
            if isinstance(event, Progress):
                yield b""
                continue
            if isinstance(event, Preview):
                place = {"partial_image_index": event.index, "image_index": index}
                yield encode_event("image_generation.partial_image", await _picture(event.image, look) | place)
                continue
            for file in event.files:
                usage = Usage.of(
                    0 if counted else event.text_tokens, event.image_tokens if file is event.files[0] else 0
                )
                counted = True
                ended = {"usage": usage, "image_index": index, "seed": event.seed}
                yield encode_event("image_generation.completed", await _picture(file, look) | ended)


async def _picture(file: bytes, look: Look) -> dict[str, object]:
    return {"b64_json": await _base64(file), "created_at": int(time.time()), **vars(look)}


async def _base64(image: bytes) -> msgspec.Raw:
    return await asyncio.to_thread(_encode, image) if len(image) > _BASE64_PIECE else _encode(image)


def _encode(image: bytes) -> msgspec.Raw:
    starts = range(0, len(image), _BASE64_PIECE)
    pieces = [b2a_base64(image[i : i + _BASE64_PIECE], newline=False) for i in starts]
    return msgspec.Raw(b"".join([b'"', *pieces, b'"']))
