"""A real ROUTER socket that speaks the engine's side of the wire, as a test's script has it."""

from __future__ import annotations

import heapq
import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Self

import zmq
from PIL import Image

from darkroom.configs.request import Request
from darkroom.engine.media import encode_files
from darkroom.engine.messages import (
    Cancel,
    Event,
    Failed,
    Finished,
    Generate,
    Outbound,
    Ping,
    Preview,
    Progress,
    Refusal,
    Status,
    encode,
    from_frames,
)

Script = Callable[[Generate], Iterable[Event | float]]
"""The events of one request; a number is a pause in seconds."""


class ScriptedEngine:
    def __init__(self) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.set_hwm(0)
        self._socket.linger = 0
        self.address = f"tcp://127.0.0.1:{self._socket.bind_to_random_port('tcp://127.0.0.1')}"
        self._news: queue.SimpleQueue[bytes | Status] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.reset()

    def reset(self) -> None:
        self.script: Script = picture
        self.status = Status(state="ready")
        self.is_deaf = False
        """Pings are not answered."""
        self.requests: list[Generate] = []
        self.cancelled: list[str] = []

    def say(self, message: bytes | Status) -> None:
        """Tell every client, unasked."""
        if isinstance(message, Status):
            self.status = message
        self._news.put(message)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        self._stopping.set()
        self._thread.join()
        self._context.destroy(linger=0)

    def _run(self) -> None:
        numbers = itertools.count()
        clients: set[bytes] = set()
        due: list[tuple[float, int, bytes, str, Iterator[Event | float]]] = []
        while not self._stopping.is_set():
            while not self._news.empty():
                message = self._news.get()
                for client in clients:
                    self._send(client, message)
            if self._socket.poll(2):
                client, *frames = self._socket.recv_multipart()
                clients.add(client)
                match from_frames(frames):
                    case Ping() if not self.is_deaf:
                        self._send(client, self.status)
                    case Generate() as message:
                        self.requests.append(message)
                        heapq.heappush(due, (0.0, next(numbers), client, message.id, iter(self.script(message))))
                    case Cancel(id=id):
                        self.cancelled.append(id)
            while due and due[0][0] <= time.monotonic():
                _, _, client, id, events = heapq.heappop(due)
                for event in events if id not in self.cancelled else ():
                    if isinstance(event, float):
                        heapq.heappush(due, (time.monotonic() + event, next(numbers), client, id, events))
                        break
                    self._send(client, event)

    def _send(self, client: bytes, message: Outbound | bytes) -> None:
        self._socket.send_multipart([client, message if isinstance(message, bytes) else encode(message)])


def picture(message: Generate) -> Iterator[Event | float]:
    """Two steps, the previews that were asked for, and bytes that name the seed."""
    id, request = message.id, message.request
    yield Progress(id=id, step=1, num_steps=2, seconds=0.25, batch_size=2)
    for index in range(request.partial_images):
        yield Preview(id=id, index=index, image=b"preview %d of %d" % (index, request.seed))
    yield Progress(id=id, step=2, num_steps=2, seconds=0.25, batch_size=2)
    yield finished(message)


def finished(message: Generate, *files: bytes) -> Finished:
    return Finished(
        id=message.id,
        files=files or (b"picture %d" % message.request.seed,),
        seed=message.request.seed,
        text_tokens=7,
        image_tokens=64,
        input_image_tokens=16 * len(message.request.images),
        stages={"queue": 0.002, "prepare": 0.02, "denoise": 0.5, "decode": 0.05, "encode": 0.01},
    )


def slow(message: Generate) -> Iterator[Event | float]:
    """One step, and then nothing for ever."""
    yield Progress(id=message.id, step=1, num_steps=2, seconds=0.25, batch_size=1)
    yield 3600.0


def failing(
    reason: str, *before: Event | float, error: str = "/secret/path.py: out of memory", refusal: Refusal | None = None
) -> Script:
    def script(message: Generate) -> Iterator[Event | float]:
        yield from before
        yield Failed(id=message.id, error=error, reason=reason, refusal=refusal)

    return script


def wait_until(condition: Callable[[], bool], seconds: float = 1.0) -> bool:
    """Whether it became true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def video(message: Generate) -> Iterator[Event | float]:
    """The request's own number of steps, and then a real video of its size, length and rate."""
    id, request = message.id, message.request
    for step in range(1, request.num_inference_steps + 1):
        yield Progress(id=id, step=step, num_steps=request.num_inference_steps, seconds=0.01, batch_size=1)
        yield 0.005
    frames = [_frame(request, i) for i in range(request.num_frames)]
    yield finished(message, *encode_files(frames, request))


def _frame(request: Request, index: int) -> Image.Image:
    """A grey that grows from frame to frame."""
    return Image.new("RGB", (request.width, request.height), (255 * index // max(request.num_frames - 1, 1),) * 3)
