"""The server's end of the wire to the engine. Knows no HTTP."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from typing import Any, Literal, NoReturn, TypeVar

import zmq
import zmq.asyncio

from darkroom.configs.request import Request
from darkroom.engine.messages import (
    Cancel,
    Event,
    Failed,
    Finished,
    Generate,
    Inbound,
    Ping,
    Preview,
    Progress,
    Status,
    decode_outbound,
    to_frames,
)

logger = logging.getLogger(__name__)
T = TypeVar("T")


class EngineError(Exception):
    """The engine could not make a picture. The message is for the log; a client is told the reason only."""

    def __init__(
        self, reason: Literal["internal", "unavailable", "busy"], message: str, *, began: bool = False
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.began = began
        """The workers had the picture in hand: they may have been lost because of it."""


class EngineClient:
    """Needs `listen` to be running. Sends never wait: ZMQ's queues are unbounded, the engine's own are not."""

    def __init__(self, address: str) -> None:
        self.last_status = Status(state="starting")
        """The engine's newest word on itself."""
        self._waiters: dict[str, asyncio.Queue[Event | EngineError]] = {}
        self._pings: list[asyncio.Future[Status]] = []
        self._news = asyncio.Event()
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        for option, value in ((zmq.SNDHWM, 0), (zmq.RCVHWM, 0), (zmq.LINGER, 0)):
            self._socket.setsockopt(option, value)
        self._socket.connect(address)

    async def listen(self) -> NoReturn:
        """Run for as long as the server does: hand every message to the one that waits for it."""
        await self._send(Ping())
        try:
            while True:
                frame = await self._socket.recv(copy=False)  # a picture is copied once: when it is decoded
                self._receive(decode_outbound(frame.buffer))
                await asyncio.sleep(0)  # what has come already is given at once: others have their turn between
        except Exception as e:
            logger.exception("cannot go on listening to the engine")
            self.fail_all(EngineError("internal", repr(e)))
            raise

    async def generate(self, request: Request) -> AsyncGenerator[Progress | Preview | Finished, None]:
        """What happens to one picture; the last event is `Finished`. Closing the iterator before it cancels.

        Raises `EngineError`, and does so at once unless the engine is ready; `RequestError` where only the workers
        could tell that the request is at fault.
        """
        if self.last_status.state != "ready":
            raise EngineError("unavailable", f"the engine is {self.last_status.state}")
        id, ended, began = uuid.uuid4().hex, False, False
        queue = self._waiters[id] = asyncio.Queue()
        try:
            await self._send(Generate(id=id, request=request))
            del request  # and with it its pictures, which are the engine's now
            while not ended:
                event = await queue.get()
                ended = isinstance(event, Finished | Failed | EngineError)
                if isinstance(event, EngineError):
                    raise EngineError(event.reason, str(event), began=began)
                if isinstance(event, Failed) and event.refusal:
                    raise event.refusal.as_error()
                if isinstance(event, Failed):
                    status = self.last_status  # what only waited fails, too, but after the engine has said `failed`
                    raise EngineError(event.reason, event.error, began=began or status.state != "failed")
                began = True
                yield event
        finally:
            del self._waiters[id]
            if not ended:
                await self._send(Cancel(id=id))

    async def status(self, timeout: float) -> Status:
        """Ask the engine. Raises `EngineError` if it has not answered after `timeout` seconds."""
        reply: asyncio.Future[Status] = asyncio.get_running_loop().create_future()
        self._pings.append(reply)
        try:
            async with asyncio.timeout(timeout):
                await self._send(Ping())
                return await reply
        except TimeoutError:
            raise EngineError("unavailable", f"the engine has not answered for {timeout:g} s") from None
        finally:
            self._pings.remove(reply)

    async def changed(self) -> Status:
        """Wait for a status that no earlier call has returned. For one caller."""
        await self._news.wait()
        self._news.clear()
        return self.last_status

    def fail_all(self, error: EngineError) -> None:
        """The engine is lost: nobody waits any longer, and nobody starts to until it says `ready` again."""
        if self.last_status.state != "failed":  # else it has said why
            self.last_status = Status(state="failed", detail=str(error))
        self._news.set()
        for queue in self._waiters.values():
            queue.put_nowait(error)
        for reply in self._pings:
            if not reply.done():
                reply.set_exception(error)

    def close(self) -> None:
        self._context.destroy(linger=0)

    def _receive(self, message: Status | Event) -> None:
        if isinstance(message, Status):
            self.last_status = message
            self._news.set()
            for reply in self._pings:
                if not reply.done():
                    reply.set_result(message)
        elif queue := self._waiters.get(message.id):
            queue.put_nowait(message)

    async def _send(self, message: Inbound) -> None:
        if not self._socket.closed:  # as for a request that is cancelled while the server stops
            frames = to_frames(message)
            await self._socket.send_multipart(frames, copy=len(frames) == 1)


async def interleave(
    streams: Sequence[AsyncGenerator[T, None]], watch: Callable[[], Coroutine[Any, Any, NoReturn]]
) -> AsyncGenerator[tuple[int, T], None]:
    """The events of all streams as they come, each with its stream's index, until every stream has ended.

    What one stream raises, or `watch`, which looks out for a reason to stop, ends them all.
    """
    watcher = asyncio.create_task(watch())
    waiting = {asyncio.ensure_future(anext(stream)): i for i, stream in enumerate(streams)}
    try:
        while waiting:
            done, _ = await asyncio.wait({watcher, *waiting}, return_when=asyncio.FIRST_COMPLETED)
            if watcher in done:
                watcher.result()
            for task in done:
                index = waiting.pop(task)
                try:
                    event = task.result()
                except StopAsyncIteration:
                    continue
                waiting[asyncio.ensure_future(anext(streams[index]))] = index
                yield index, event
    finally:
        for task in (watcher, *waiting):
            task.cancel()
        await asyncio.gather(watcher, *waiting, return_exceptions=True)
        for stream in streams:
            await stream.aclose()
