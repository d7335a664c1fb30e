"""Server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import aclosing

import msgspec
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from .errors import to_api_error

KEEP_ALIVE = 15.0
"""Seconds of silence after which a comment is sent."""

Pieces = Iterable[bytes]
"""One event, or none, in pieces that are small enough to be sent without keeping the event loop from its turn."""


def encode_event(name: str, data: Mapping[str, object]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), msgspec.json.encode({"type": name, **data}))


class EventStream(StreamingResponse):
    """The headers wait for the first event, which may be empty, or the first keep-alive.

    A failure before them is an ordinary HTTP error. A later one becomes an `error` event, and is raised all the same.
    """

    def __init__(self, events: AsyncGenerator[Pieces, None]) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(iter(()), headers=headers, media_type="text/event-stream")
        self.events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started, is_within = False, False

        async def write(event: Pieces, more: bool = True) -> None:
            nonlocal started, is_within
            if not started:
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                started = True
            is_within = True
            await send_pieces(event, send)
            is_within = False
            if not more:
                await send({"type": "http.response.body", "body": b"", "more_body": False})

        try:
            async with aclosing(_kept_alive(self.events)) as events:
                async for event in events:
                    await write(event)
        except (Exception, asyncio.CancelledError) as e:
            if started:
                end = (b"\n\n",) if is_within else ()
                await write((*end, encode_event("error", vars(to_api_error(e).envelope))), more=False)
            raise
        await write((), more=False)


async def send_pieces(pieces: Pieces, send: Send) -> None:
    """With a turn for others after each."""
    for piece in pieces:
        await send({"type": "http.response.body", "body": piece, "more_body": True})
        await asyncio.sleep(0)


async def _kept_alive(events: AsyncGenerator[Pieces, None]) -> AsyncGenerator[Pieces, None]:
    clock = asyncio.get_running_loop().time
    spoken = clock()
    upcoming = asyncio.ensure_future(anext(events, None))
    try:
        while True:
            await asyncio.wait({upcoming}, timeout=max(0.0, spoken + KEEP_ALIVE - clock()))
            if not upcoming.done():
                spoken = clock()
                yield (b": keep-alive\n\n",)
                continue
            if (event := upcoming.result()) is None:
                return
            upcoming = asyncio.ensure_future(anext(events, None))
            if event:
                spoken = clock()
            yield event
    finally:
        upcoming.cancel()
        await asyncio.gather(upcoming, return_exceptions=True)
        await events.aclose()
