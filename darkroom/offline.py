"""Pictures without a server: the same engine, driven by a blocking call."""

from __future__ import annotations

import io
import logging
import os
import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import zmq
from PIL import Image

from .configs.config import EngineConfig
from .configs.devices import resolve_device
from .configs.errors import ConfigError, RequestError
from .configs.parallel import ParallelConfig
from .configs.request import OutputFormat, Request, SamplingParams
from .engine.launch import EngineProcess
from .engine.messages import (
    Cancel,
    Event,
    Failed,
    Finished,
    Generate,
    Inbound,
    Outbound,
    Ping,
    Progress,
    Status,
    decode_outbound,
    encode,
)
from .models.checkpoint import open_checkpoint

logger = logging.getLogger(__name__)

_OPEN = 16
"""Requests that are with the engine at once, at most: more than it runs."""

OnProgress = Callable[[int, int], None]
"""Called after every denoising step with (steps done, steps in all), over all pictures of the call."""


Picture = Image.Image | str | os.PathLike[str] | bytes
"""A picture, or the path or the content of a file that holds one."""


class GenerationError(RuntimeError):
    """The engine could not make the picture, through no fault of the request."""


class Darkroom:
    """A loaded model. Close it, or use it as a context manager: it holds worker processes.

    Further keyword arguments are those of `darkroom serve`: `device`, `dtype`, `revision`, `attention_backend`, ...
    Raises ConfigError for what cannot be.
    """

    def __init__(
        self, model: str | os.PathLike[str], parallel_config: ParallelConfig | None = None, **options: Any
    ) -> None:
        spread = parallel_config.model_dump() if parallel_config else {}
        config = EngineConfig.check({"model": os.fspath(model), "log_level": "warning", **spread, **options})
        checkpoint = open_checkpoint(config)
        self.capabilities = checkpoint.capabilities
        self._max_open, self._max_open_bytes = min(_OPEN, config.max_queue), config.max_queue_mb << 20
        for note in checkpoint.notes(config):
            logger.warning(note)
        self._engine = EngineProcess(checkpoint.pin(resolve_device(config)))
        self._lock = threading.Lock()  # one socket, whose answers must not be read by another thread's call
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.set_hwm(0)
        self._socket.connect(self._engine.address)
        try:
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise

    def generate(
        self,
        prompt: str,
        params: SamplingParams | None = None,
        *,
        images: Sequence[Picture] = (),
        mask: Picture | None = None,
        on_progress: OnProgress | None = None,
    ) -> list[Image.Image]:
        """`params.n` pictures; picture i has the seed `params.seed + i`, which is also its `info["seed"]`.

        Of a layered picture these are all its layers, of a video all its frames, one request's behind the other's.

        `images` are edited, or begun from, as the model does it; `mask` says where (see `SamplingParams`).
        Raises RequestError for parameters that the model cannot take, GenerationError when the engine fails.
        """
        requests = self._requests(prompt, params or SamplingParams(), images, mask)
        pictures: list[Image.Image] = []
        for finished in self.run(requests, on_progress):
            for file in finished.files:
                picture = Image.open(io.BytesIO(file))
                picture.load()
                picture.info["seed"] = finished.seed
                pictures.append(picture)
        return pictures

    def generate_video(
        self,
        prompt: str,
        params: SamplingParams | None = None,
        *,
        images: Sequence[Picture] = (),
        on_progress: OnProgress | None = None,
    ) -> bytes:
        """One video, the content of an MP4 file. Raises as `generate` does, which gives the frames of a video."""
        [request] = self._requests(prompt, replace(params or SamplingParams(), n=1), images, None)
        [finished] = self.run([request.as_file("mp4")], on_progress)
        return finished.files[0]

    def _requests(
        self, prompt: str, params: SamplingParams, images: Sequence[Picture], mask: Picture | None
    ) -> list[Request]:
        if params.n < 1:
            raise RequestError(f"Invalid n {params.n}: expected at least 1.", param="n", code="integer_below_min_value")
        if images:
            params = replace(params, images=tuple(picture_file(image) for image in images))
        if mask is not None:
            params = replace(params, mask=picture_file(mask))
        request = self.capabilities.resolve(prompt, params)
        return [request.picture(i) for i in range(params.n)]

    def run(self, requests: Sequence[Request], on_progress: OnProgress | None = None) -> list[Finished]:
        """Encoded pictures, in the order of the requests, which run side by side, some at a time."""
        with self._lock:
            return self._run(requests, on_progress)

    def _run(self, requests: Sequence[Request], on_progress: OnProgress | None) -> list[Finished]:
        ids = [uuid.uuid4().hex for _ in requests]
        total, done = sum(request.num_inference_steps - request.first_step for request in requests), 0
        finished: dict[str, Finished] = {}
        waiting = deque(Generate(id=id, request=request) for id, request in zip(ids, requests, strict=True))
        try:
            for _ in range(min(self._room_for(requests), len(waiting))):
                self._send(waiting.popleft())
            for event in self._events(ids):
                match event:
                    case Progress():
                        done += 1
                        if on_progress:
                            on_progress(done, total)
                    case Finished(id=id):
                        finished[id] = event
                        if waiting:
                            self._send(waiting.popleft())
                    case Failed(error=error, refusal=refusal):
                        raise refusal.as_error() if refusal else GenerationError(error)
        finally:
            for id in set(ids) - set(finished) - {message.id for message in waiting}:
                self._send(Cancel(id=id))
        return [finished[id] for id in ids]

    def _room_for(self, requests: Sequence[Request]) -> int:
        """How many of them the engine's queue takes, pictures included."""
        largest = max((request.num_bytes for request in requests), default=0)
        return max(1, min(self._max_open, self._max_open_bytes // max(largest, 1)))

    def close(self) -> None:
        self._context.destroy(linger=0)
        self._engine.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _events(self, ids: Sequence[str]) -> Iterator[Event]:
        """The events of these requests, until all have ended."""
        open_ids = set(ids)
        while open_ids:
            event = self._receive()
            if isinstance(event, Status) or event.id not in open_ids:  # of a call that was interrupted
                continue
            if isinstance(event, Finished | Failed):
                open_ids.discard(event.id)
            yield event

    def _wait_until_ready(self) -> None:
        self._send(Ping())
        while not isinstance(status := self._receive(), Status) or status.state != "ready":
            if isinstance(status, Status) and status.state == "failed":
                raise ConfigError(status.detail) if status.is_config_error else GenerationError(status.detail)

    def _send(self, message: Inbound) -> None:
        self._socket.send(encode(message))

    def _receive(self) -> Outbound:
        while not self._socket.poll(500):
            if (code := self._engine.process.poll()) is not None:
                raise GenerationError(f"the engine process ended with exit code {code}")
        outbound: Outbound = decode_outbound(self._socket.recv())
        return outbound


def picture_file(picture: Picture) -> bytes:
    """The content of a picture's file. Raises OSError for a file that cannot be read."""
    if isinstance(picture, bytes):
        return picture
    if isinstance(picture, Image.Image):
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        return buffer.getvalue()
    return Path(picture).read_bytes()


def with_format(request: Request, suffix: str) -> Request:
    """The request for a file of this ending. Raises ConfigError for one that is not known."""
    formats: dict[str, OutputFormat] = {
        ".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp", ".mp4": "mp4",
    }  # fmt: skip
    if suffix.lower() not in formats:
        raise ConfigError(f"--output: no format for the ending '{suffix}'; known: {', '.join(formats)}")
    return request.as_file(formats[suffix.lower()])
