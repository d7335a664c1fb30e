"""Pictures as OpenAI answers them: whole, as a stream of events, or under a URL."""

from __future__ import annotations

import re
import time
from binascii import b2a_base64
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from darkroom.engine.messages import Finished, Preview, Progress

from .context import Shared
from .errors import ApiError
from .fields import Quality
from .files import FileStore
from .ranges import Part
from .sse import Pieces, send_pieces

router = APIRouter()

Events = AsyncGenerator[tuple[int, Progress | Preview | Finished], None]

_BASE64_PIECE = 384 * 1024
"""Bytes that are encoded and sent at a time, so that no picture keeps the event loop from its turn. Divisible by 3."""
_HOST = re.compile(r"([A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(:[0-9]{1,5})?", re.ASCII)


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
    def of(cls, output: int, first: Finished | None) -> Usage:
        """`first` is given where what was sent in is to be counted: once for all pictures that were made of it."""
        text, images = (first.text_tokens, first.input_image_tokens) if first else (0, 0)
        total = text + images
        return cls(total, TokenCount(text, images), output, TokenCount(0, output), total + output)


@dataclass(frozen=True, kw_only=True)
class Look:
    """What every answer says of its pictures: the resolved values, never `auto`."""

    size: str
    quality: Quality
    background: Literal["opaque", "transparent"]
    output_format: Literal["png", "jpeg", "webp"]


@dataclass(frozen=True, kw_only=True)
class Image:
    """With one of `b64_json` and `url`."""

    b64_json: str | None = None
    url: str | None = None
    seed: int


@dataclass(frozen=True, kw_only=True)
class ImagesResponse(Look):
    """For the document."""

    created: int
    data: list[Image]
    usage: Usage


class Shelf:
    """Makes URLs of files, under the address by which the client of `request` knows this server."""

    def __init__(self, request: Request, files: FileStore) -> None:
        self._base = f"{_root(request)}/files/"
        self._files = files

    async def put(self, files: Sequence[bytes], look: Look) -> list[str]:
        return [self._base + name for name in await self._files.keep(files, look.output_format)]


@router.head("/files/{name}", include_in_schema=False)
@router.get("/files/{name}", response_class=Response, responses={206: {"description": "A part of it."}})
async def get_file(name: str, http: Request, context: Shared) -> Response:
    """A picture that was answered as a URL.

    Its name is the permission, so that a browser can show it: no part of `/v1`, whose routes may ask for a key.
    """
    if (data := await context.files.read(name)) is None:
        raise ApiError(404, "There is no such file, or its time is up.")
    part = Part.asked_for(http, name, len(data))
    headers = {
        **part.headers,
        "cache-control": f"private, max-age={context.files.seconds}",
        "x-content-type-options": "nosniff",
    }
    return Response(data[part.start : part.end], part.status, headers, media_type=f"image/{name.rpartition('.')[2]}")


async def answer(events: Events, look: Look, shelf: Shelf | None) -> Response:
    """All pictures at once: as URLs where there is a shelf to put them on."""
    async with aclosing(events):
        finished = {index: event async for index, event in events if isinstance(event, Finished)}
    pictures = [finished[index] for index in sorted(finished)]
    files = [(file, picture.seed) for picture in pictures for file in picture.files]
    content = {
        "created": int(time.time()),
        "usage": Usage.of(sum(picture.image_tokens for picture in pictures), pictures[0]),
        **vars(look),
    }
    if shelf:
        urls = await shelf.put([file for file, _ in files], look)
        content["data"] = [{"url": url, "seed": seed} for url, (_, seed) in zip(urls, files, strict=True)]
        return Response(msgspec.json.encode(content), media_type="application/json")
    return _Pictures(content, [_Object({"seed": seed}, file) for file, seed in files])


async def stream(events: Events, look: Look, name: str) -> AsyncGenerator[Pieces, None]:
    """Server-sent events `name.partial_image` and `name.completed`, whose usages add up to the whole answer's."""
    counted = False
    async with aclosing(events):
        async for index, event in events:
            if isinstance(event, Progress):
                yield ()
                continue
            if isinstance(event, Preview):
                place = {"partial_image_index": event.index, "image_index": index}
                yield _event(f"{name}.partial_image", event.image, look, place)
                continue
            for number, file in enumerate(event.files):
                usage = Usage.of(0 if number else event.image_tokens, None if counted else event)
                counted = True
                ended = {"usage": usage, "image_index": index, "seed": event.seed}
                yield _event(f"{name}.completed", file, look, ended)


class _Object:
    """A JSON object with a picture as its last member, in pieces."""

    def __init__(self, members: Mapping[str, object], picture: bytes) -> None:
        self._head = msgspec.json.encode(members)[:-1] + b',"b64_json":"'
        self._picture = memoryview(picture)

    def __iter__(self) -> Iterator[bytes]:
        yield self._head
        for start in range(0, len(self._picture), _BASE64_PIECE):
            yield b2a_base64(self._picture[start : start + _BASE64_PIECE], newline=False)
        yield b'"}'

    def __len__(self) -> int:
        """In bytes."""
        return len(self._head) + 4 * -(-len(self._picture) // 3) + 2


class _Pictures(Response):
    """A JSON object whose `data` are pictures. They are encoded as they are sent: it is never in memory as a whole."""

    def __init__(self, content: Mapping[str, object], data: Sequence[_Object]) -> None:
        head, tail = msgspec.json.encode(content)[:-1] + b',"data":[', b"]}"
        self._pieces = chain((head,), *(chain((b",",) if i else (), item) for i, item in enumerate(data)), (tail,))
        length = len(head) + sum(map(len, data)) + len(data) - 1 + len(tail)
        super().__init__(None, headers={"content-length": str(length)}, media_type="application/json")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send_pieces(self._pieces, send)
        await send({"type": "http.response.body", "body": b""})


def _event(name: str, picture: bytes, look: Look, members: Mapping[str, object]) -> Pieces:
    content = _Object({"type": name, "created_at": int(time.time()), **vars(look), **members}, picture)
    return chain((b"event: %b\ndata: " % name.encode(),), content, (b"\n\n",))


def _root(request: Request) -> str:
    """The server's address as the client wrote it; where that is no host's name, the socket's."""
    host = request.headers.get("host", "")
    if not _HOST.fullmatch(host):
        address, port = request.scope.get("server") or ("localhost", None)
        host = f"{address}:{port}" if port else str(address)
    return f"{request.scope['scheme']}://{host}{request.scope.get('root_path', '').rstrip('/')}"
