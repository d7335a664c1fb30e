"""Which command the workers get next. A pure state machine: no sockets, no torch, no clock of its own.

First come, first served into `max_running` places; from there one denoising step at a time, in turn, so that a short
request does not wait for a long one. Exactly one command is under way at any time: `next` gives it, `finish` takes
the answer.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field

from darkroom.configs.request import Request

from .messages import (
    Cancel,
    Command,
    Decode,
    Drop,
    Encoded,
    EncodingFailed,
    Event,
    Failed,
    Finished,
    FromEncoder,
    Generate,
    Prepare,
    Prepared,
    Preview,
    Progress,
    Refusal,
    Step,
)


@dataclass
class Job:
    """One request from `Prepare` until its picture is encoded."""

    request: Request
    prepared: Prepared
    step: int = 0
    previews: int = 0
    stages: dict[str, float] = field(default_factory=dict)
    encoded: Encoded | None = None
    """The picture, where the encoder thread was faster than the last rank's word that the decode is done."""

    def spend(self, stage: str, seconds: float) -> None:
        self.stages[stage] = self.stages.get(stage, 0.0) + seconds

    @property
    def preview_due(self) -> bool:
        """Previews are spread evenly over the steps; none is due at the last one, which gives the picture itself."""
        wanted = min(self.request.partial_images, self.prepared.num_steps - 1)
        return self.previews < wanted and self.step * (wanted + 1) >= (self.previews + 1) * self.prepared.num_steps


class Scheduler:
    def __init__(
        self, *, max_running: int = 4, max_waiting: int = 256, max_waiting_bytes: int = 1024 * 1024 * 1024
    ) -> None:
        self.max_running = max_running
        self.max_waiting = max_waiting
        self.max_waiting_bytes = max_waiting_bytes
        self.waiting: OrderedDict[str, tuple[Request, float]] = OrderedDict()
        self.running: OrderedDict[str, Job] = OrderedDict()
        self.encoding: dict[str, Job] = {}
        """Decoded; the output rank's encoder thread is at work."""
        self.drops: deque[str] = deque()

    def add(self, message: Generate, now: float) -> Failed | None:
        if len(self.waiting) >= self.max_waiting:
            return Failed(id=message.id, error=f"{self.max_waiting} requests are waiting already", reason="busy")
        num_bytes = message.request.num_bytes
        if num_bytes and self.waiting and self._waiting_bytes() + num_bytes > self.max_waiting_bytes:
            return Failed(id=message.id, error="the pictures that wait take all the room", reason="busy")
        self.waiting[message.id] = (message.request, now)
        return None

    def _waiting_bytes(self) -> int:
        return sum(request.num_bytes for request, _ in self.waiting.values())

    def cancel(self, message: Cancel) -> None:
        self.waiting.pop(message.id, None)
        self.encoding.pop(message.id, None)
        if self.running.pop(message.id, None):
            self.drops.append(message.id)

    def next(self, now: float) -> Command | None:
        """The next command, or None where there is nothing to do."""
        if self.drops:
            ids = tuple(self.drops)
            self.drops.clear()
            return Drop(ids=ids)
        if self.waiting and len(self.running) < self.max_running:
            id, (request, _) = next(iter(self.waiting.items()))
            return Prepare(ids=(id,), requests=(request,))
        for id, job in self.running.items():
            if job.step == job.prepared.num_steps:
                return Decode(ids=(id,))
            return Decode(ids=(id,), preview=job.previews) if job.preview_due else Step(ids=(id,))
        return None

    def finish(self, command: Command, prepared: tuple[Prepared, ...], now: float, seconds: float) -> list[Event]:
        """The workers have done `command` in `seconds`. A request cancelled meanwhile is no longer known here."""
        match command:
            case Prepare(ids=ids):
                for id, facts in zip(ids, prepared, strict=True):
                    self._start(id, facts, now, seconds)
            case Step(ids=ids):
                return [self._advance(id, seconds, len(ids)) for id in ids if id in self.running]
            case Decode(ids=ids):
                return [event for id in ids if (event := self._decoded(id, command.preview, seconds))]
        return []

    def fail(self, command: Command, error: str, refusal: Refusal | None = None) -> list[Event]:
        """All workers refused `command` alike: its requests fail, the others go on."""
        ids = getattr(command, "ids", ())
        known = [id for id in ids if id in self.waiting or id in self.running]
        for id in ids:
            self.waiting.pop(id, None)
            self.running.pop(id, None)
            if id not in self.drops:  # a request cancelled meanwhile
                self.drops.append(id)
        return [Failed(id=id, error=error, refusal=refusal) for id in known]

    def encoded(self, message: FromEncoder) -> Event | None:
        """The encoder thread's word, at any time from `Decode` on. A request cancelled meanwhile is not known here."""
        if not (job := self.running.get(message.id) or self.encoding.get(message.id)):
            return None
        if isinstance(message, EncodingFailed):
            self.cancel(Cancel(id=message.id))
            return Failed(id=message.id, error=message.error)
        if message.preview is not None:
            return Preview(id=message.id, index=message.preview, image=message.files[0])
        job.encoded = message
        return self._finished(message.id) if message.id in self.encoding else None

    def fail_running(self, command: Command | None, error: str) -> list[Event]:
        """The worker group is lost, and with it all that it held. What waits goes on waiting, but for what is named
        by the `command` that was under way: it may be what broke the group."""
        preparing = [id for id in getattr(command, "ids", ()) if self.waiting.pop(id, None)]
        ids = [*preparing, *self.running, *self.encoding]
        self.running.clear()
        self.encoding.clear()
        self.drops.clear()
        return [Failed(id=id, error=error, reason="unavailable") for id in ids]

    def fail_waiting(self, error: str) -> list[Event]:
        ids = list(self.waiting)
        self.waiting.clear()
        return [Failed(id=id, error=error, reason="unavailable") for id in ids]

    def _start(self, id: str, prepared: Prepared, now: float, seconds: float) -> None:
        if id not in self.waiting:  # cancelled while the workers prepared it
            self.drops.append(id)
            return
        request, arrived = self.waiting.pop(id)
        self.running[id] = Job(request, prepared, stages={"queue": now - seconds - arrived, "prepare": seconds})

    def _advance(self, id: str, seconds: float, batch_size: int) -> Event:
        job = self.running[id]
        job.step += 1
        job.spend("denoise", seconds)
        self.running.move_to_end(id)  # the others' turn
        return Progress(id=id, step=job.step, num_steps=job.prepared.num_steps, seconds=seconds, batch_size=batch_size)

    def _decoded(self, id: str, preview: int | None, seconds: float) -> Event | None:
        if not (job := self.running.get(id)):
            return None
        job.spend("decode", seconds)
        if preview is not None:
            job.previews += 1
            return None
        self.encoding[id] = self.running.pop(id)
        self.drops.append(id)
        return self._finished(id) if job.encoded else None

    def _finished(self, id: str) -> Finished:
        job = self.encoding.pop(id)
        assert job.encoded is not None
        job.spend("encode", job.encoded.seconds)
        return Finished(
            id=id,
            files=job.encoded.files,
            seed=job.request.seed,
            text_tokens=job.prepared.text_tokens,
            image_tokens=job.prepared.image_tokens,
            input_image_tokens=job.prepared.input_image_tokens,
            stages=job.stages,
        )
