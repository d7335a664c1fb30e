"""Makes the videos of the job store, one after another, for as long as the server runs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import NoReturn

import msgspec

from darkroom.configs.errors import RequestError
from darkroom.configs.logs import facts
from darkroom.configs.request import Request
from darkroom.engine.messages import Finished, Progress

from .client import EngineClient, EngineError, interleave
from .drain import Drain
from .errors import ApiError, too_many
from .idempotency import HEADER
from .jobs import Job, QueueFull
from .metrics import Metrics
from .video_stores import NotKept, VideoStores, logged, picture_name

logger = logging.getLogger(__name__)

_MAX_CRASHES = 2
"""After so many tries that came to nothing a job is taken for their cause."""
_BUSY_SECONDS = 2.0
_USUAL_SECONDS = 60.0
"""That a video takes, until one was made."""


class ClaimLost(Exception):
    """The job was deleted, or another server has taken it over, or may have."""


class NotBegun(Exception):
    """What the job begins from cannot be read now. Nothing is lost by trying again, but somebody waits for its end."""


class VideoRunner:
    """While the server drains it goes on with what it has begun, and takes nothing new."""

    def __init__(
        self, stores: VideoStores, *, model: str, client: EngineClient, metrics: Metrics, drain: Drain
    ) -> None:
        self._stores = stores
        self.jobs, self.files, self.options = stores.jobs, stores.files, stores.options
        self._model = model
        self._client = client
        self._metrics = metrics
        self._drain = drain
        self._running: dict[asyncio.Task[None], Job] = {}
        self._news = asyncio.Event()

    @property
    def _has_place(self) -> bool:
        """Beside a job that came to nothing before there is none: what it breaks would be laid to the others, too."""
        is_alone = any(job.crashes for job in self._running.values())
        return len(self._running) < self.options.concurrency and not is_alone

    async def submit(self, job: Job, picture: bytes | None) -> Job:
        """Accept it: from here on it is not lost. What was asked for with its key before is that job.

        Raises `ApiError` 429 where too many wait, `RequestError` for a key of something else.
        """
        if earlier := await self._earlier(job, picture):
            return earlier
        if await self.jobs.waiting() >= self.options.max_waiting:  # `add` counts, too: this saves writing the picture
            raise self._too_many()
        if picture is not None:
            await self.files.put(picture_name(job), picture)
        try:
            if await self.jobs.add(job, self.options.max_waiting):
                self._news.set()
                return job
        except QueueFull:
            await self.files.delete(picture_name(job))
            raise self._too_many() from None
        await self.files.delete(picture_name(job))  # the same was asked for at the same moment
        return await self.submit(job, picture)

    def _too_many(self) -> ApiError:
        message = f"{self.options.max_waiting} videos are waiting already."
        return too_many(message, self._metrics.usual_seconds or _USUAL_SECONDS)

    async def _earlier(self, job: Job, picture: bytes | None) -> Job | None:
        key = job.idempotency_key
        if key is None or (found := await self.jobs.asked_by(key)) is None:
            return None
        is_same = _asked(found) == _asked(job)
        if is_same and picture is not None:
            try:
                is_same = picture == await self.files.read(picture_name(found))
            except FileNotFoundError:
                # Either the job was deleted a moment ago, and this is a new one; or all that is left to compare is the
                # same, and a client that has only lost its answer is not to pay for another video.
                return await self.jobs.get(found.id)
        if not is_same:
            raise RequestError(f"'{HEADER}' was sent before, with another request.", param=HEADER)
        return found

    async def request_of(self, job: Job) -> Request:
        """Raises `ApiError` where it cannot be asked for again."""
        try:
            return await self._stores.request_of(job)
        except FileNotFoundError:
            message = f"The picture that the video '{job.id}' begins from is gone."
            raise ApiError(404, message, param="id", code="video_not_found") from None
        except msgspec.DecodeError:
            message = f"The video '{job.id}' was asked for with another version of this server."
            raise ApiError(400, message, param="id") from None

    async def delete(self, job: Job) -> bool:
        """Whether it was still there. Stops its work, on another server within a second."""
        was_there = await self._stores.delete(job)
        for task, other in self._running.items():
            if other.id == job.id:
                task.cancel()
        return was_there

    async def run(self) -> NoReturn:
        """Until it is cancelled. What is under way then is left to the next server."""
        cleaning = asyncio.create_task(self._stores.keep_clean(self._model))
        try:
            while True:
                with logged("cannot take the next video"):
                    await self._take()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self.options.pause):
                        await self._news.wait()
                self._news.clear()
        finally:
            tasks = [cleaning, *self._running]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _take(self) -> None:
        """Jobs, for as long as there is a place for them. Without an engine none would get anywhere."""
        while self._has_place and self._client.last_status.state == "ready" and not self._drain.is_on:
            in_hand = [job.id for job in self._running.values()]
            job = await self.jobs.claim(self._model, self.options.lease, beside=in_hand)
            if job is None:
                return
            task = asyncio.create_task(self._run(job))
            self._running[task] = job
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._running[task]
        self._news.set()

    async def _run(self, job: Job) -> None:
        """One job, to whatever end it comes."""
        began = time.monotonic()
        with self._drain.work(), logged(f"cannot write down the end of {job.id}"):
            try:
                await self._complete(job)
            except asyncio.CancelledError:  # the job was deleted, or the server stops
                await self.jobs.release(job)
                if await self.jobs.get(job.id) is None:
                    await self._stores.discard(job)
            except ClaimLost:
                await self._stores.discard(job)
            except EngineError as e:
                await self._engine_failed(job, e)
            except NotBegun as e:
                await self._not_begun(job, e)
            except NotKept as e:
                logger.error("%s: %s", job.id, e)
                await self._try_again(job, "The video's files could not be kept", seconds=self.options.patience)
            except RequestError as e:  # of which only the workers could tell
                await self._stores.fail(job, str(e), e.code)
            except Exception:
                logger.exception("%s failed", job.id)
                message = "The server could not make the video; its log says why, under the video's id."
                await self._stores.fail(job, message)
            else:
                logger.info("video", extra=facts(video=job.id, seconds=round(time.monotonic() - began, 6)))
                await self._stores.clean(self._model)

    async def _complete(self, job: Job) -> None:
        percent = 0
        files: tuple[bytes, ...] = ()
        async with aclosing(interleave([self._make(job)], lambda: self._hold(job, lambda: percent))) as steps:
            async for _, step in steps:
                percent, files = step
        if not await self._stores.keep(job, files):  # when nothing else renews: that would fail once it is completed
            raise ClaimLost

    async def _hold(self, job: Job, percent: Callable[[], int]) -> NoReturn:
        """Renew the claim. While the database is away it is held, until it would have lapsed."""
        lapses = time.monotonic() + self.options.lease
        while True:
            asked = time.monotonic()
            try:
                is_held = await self.jobs.renew(job, progress=percent(), lease=self.options.lease)
                lapses = asked + self.options.lease
            except Exception as e:  # each driver raises errors of its own
                logger.warning("cannot renew the claim on %s: %r", job.id, e)
                is_held = time.monotonic() < lapses
            if not is_held:
                raise ClaimLost
            await asyncio.sleep(self.options.renewal)

    async def _make(self, job: Job) -> AsyncGenerator[tuple[int, tuple[bytes, ...]], None]:
        """Yields how far it is in per cent, and at the end the files."""
        request = msgspec.structs.replace(await self._read(job), stills=True)
        async with aclosing(self._client.generate(request)) as events:
            async for event in events:
                self._metrics.observe(event)
                match event:
                    case Progress(step=step, num_steps=num_steps):
                        yield 99 * step // max(num_steps, 1), ()  # the last one is the file's
                    case Finished():
                        yield 99, event.files

    async def _read(self, job: Job) -> Request:
        """Raises `NotBegun`, or what no waiting mends."""
        try:
            return await self._stores.request_of(job)
        except (FileNotFoundError, msgspec.DecodeError):
            raise
        except Exception as e:  # each store raises errors of its own
            raise NotBegun(f"its picture cannot be read: {e!r}") from e

    async def _not_begun(self, job: Job, error: NotBegun) -> None:
        """Wait for a store that is away; but what is never read would never end, as what is left in it without rights.

        For as long as the client would have had to fetch the video: who asks after it has given up by then.
        """
        logger.warning("%s: %s", job.id, error)
        now, ttl = time.time(), self.options.ttl
        since = job.unread_since or now
        if now - since < ttl:
            await self.jobs.release(job, seconds=_BUSY_SECONDS, unread_since=since)
        else:
            message = f"The picture that the video begins from could not be read for {ttl:g} seconds."
            await self._stores.fail(job, message)

    async def _engine_failed(self, job: Job, error: EngineError) -> None:
        logger.warning("%s: %s", job.id, error)
        if error.reason == "internal":
            message = "The model failed at this video; the server's log says why, under the video's id."
            await self._stores.fail(job, message)
        elif error.reason == "busy":
            await self.jobs.release(job, seconds=_BUSY_SECONDS)
        elif not error.began:  # the workers were lost before they had it
            await self.jobs.release(job)
        else:
            await self._try_again(job, "The model's workers were lost while they made this video")

    async def _try_again(self, job: Job, why: str, seconds: float = 0.0) -> None:
        """But not for ever: what breaks the workers, or is never kept, would be made again and again."""
        if job.crashes + 1 < _MAX_CRASHES:
            await self.jobs.release(job, seconds=seconds, crashed=True)
        else:
            await self._stores.fail(job, f"{why}, and it was tried {_MAX_CRASHES} times.")


def _asked(job: Job) -> tuple[object, ...]:
    """Compared as it is read, not as it is written: a version that knew fewer fields has written other text."""
    try:
        request: Request | str = job.read_request()
    except msgspec.DecodeError:
        request = job.request
    return request, job.model, job.seconds, job.remixed_from, job.has_picture
