"""Server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing

import msgspec
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from .errors import to_api_error

KEEP_ALIVE = 15.0
"""Seconds of silence after which a comment is sent."""


def encode_event(name: str, data: Mapping[str, object]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), msgspec.json.encode({"type": name, **data}))


class EventStream(StreamingResponse):
    """The headers wait for the first chunk, which may be empty, or the first keep-alive.

    A failure before them is an ordinary HTTP error. A later one becomes an `error` event, and is raised all the same.
    """

    def __init__(self, chunks: AsyncGenerator[bytes, None]) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(chunks, headers=headers, media_type="text/event-stream")
        self.chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def write(chunk: bytes, more: bool = True) -> None:
            nonlocal started
            if not started:
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                started = True
            if chunk or not more:
                await send({"type": "http.response.body", "body": chunk, "more_body": more})

        try:
            async with aclosing(_kept_alive(self.chunks)) as chunks:
                async for chunk in chunks:
                    await write(chunk)
        except (Exception, asyncio.CancelledError) as e:
            if started:
                await write(encode_event("error", vars(to_api_error(e).envelope)), more=False)
            raise
        await write(b"", more=False)


async def _kept_alive(chunks: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    clock = asyncio.get_running_loop().time
    spoken = clock()
    upcoming = asyncio.ensure_future(anext(chunks, None))
    try:
        while True:
            await asyncio.wait({upcoming}, timeout=max(0.0, spoken + KEEP_ALIVE - clock()))
            if not upcoming.done():
                spoken = clock()
                yield b": keep-alive\n\n"
                continue
            if (chunk := upcoming.result()) is None:
                return
            upcoming = asyncio.ensure_future(anext(chunks, None))
            if chunk:
                spoken = clock()
            yield chunk
    finally:
        upcoming.cancel()
        await asyncio.gather(upcoming, return_exceptions=True)
        await chunks.aclose()
