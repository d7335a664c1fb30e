"""Makes the videos of the job store, one after another, for as long as the server runs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

from darkroom.configs.errors import RequestError
from darkroom.configs.logs import facts
from darkroom.configs.request import Request
from darkroom.engine.messages import Finished, Progress

from .client import EngineClient, EngineError, interleave
from .drain import Drain
from .errors import ApiError, too_many
from .idempotency import HEADER
from .job_files import JobFiles, open_files
from .jobs import Job, JobStore, QueueFull, open_jobs
from .metrics import Metrics
from .stills import thumbnail_and_spritesheet

logger = logging.getLogger(__name__)

Variant = Literal["video", "thumbnail", "spritesheet"]
_ENDINGS: dict[Variant, str] = {"video": "mp4", "thumbnail": "webp", "spritesheet": "jpg"}
_MAX_CRASHES = 2
"""After so many losses of the workers a job is taken for their cause."""
_BUSY_SECONDS = 2.0
_USUAL_SECONDS = 60.0
"""That a video takes, until one was made."""
_ORPHAN_SECONDS = 3600.0
_DATABASE = "videos.sqlite"


@dataclass(frozen=True, kw_only=True)
class VideoOptions:
    """Times are in seconds."""

    ttl: float = 86_400.0
    """How long a finished job is kept."""
    disk_budget: int | None = None
    """Bytes of all files; beyond it the videos that were completed first are deleted."""
    max_waiting: int = 256
    concurrency: int = 1
    lease: float = 15.0
    """After which a server that has said nothing is taken for dead."""
    renewal: float = 1.0
    """How often a claim is renewed, and progress written down."""
    pause: float = 1.0
    """How often the database is asked for work that other servers have left."""
    cleaning: float = 60.0


@dataclass(frozen=True)
class VideoStores:
    jobs: JobStore
    files: JobFiles
    options: VideoOptions


@asynccontextmanager
async def open_videos(
    folder: Path, *, database_url: str | None, files_url: str | None, options: VideoOptions
) -> AsyncIterator[VideoStores]:
    """What is not elsewhere is in the folder. Raises `ConfigError`."""
    files = await open_files(files_url or folder / "files")
    if database_url is None:
        folder.mkdir(parents=True, exist_ok=True)
        database_url = f"sqlite+aiosqlite:///{folder / _DATABASE}"
    async with open_jobs(database_url) as jobs:
        yield VideoStores(jobs, files, options)


class ClaimLost(Exception):
    """The job was deleted, or another server has taken it over."""


class VideoRunner:
    """While the server drains it goes on with what it has begun, and takes nothing new."""

    def __init__(
        self, stores: VideoStores, *, model: str, client: EngineClient, metrics: Metrics, drain: Drain
    ) -> None:
        self.jobs, self.files, self.options = stores.jobs, stores.files, stores.options
        self._model = model
        self._client = client
        self._metrics = metrics
        self._drain = drain
        self._running: dict[asyncio.Task[None], str] = {}
        """With their jobs' ids: two have the same when this server was stalled, and took its own job over."""
        self._news = asyncio.Event()

    @property
    def is_working(self) -> bool:
        return bool(self._running)

    @property
    def _has_place(self) -> bool:
        return len(self._running) < self.options.concurrency

    async def submit(self, job: Job, picture: bytes | None) -> Job:
        """Accept it: from here on it is not lost. What was asked for with its key before is that job.

        Raises `ApiError` 429 where too many wait, `RequestError` for a key of something else.
        """
        if earlier := await self._earlier(job, picture):
            return earlier
        if await self.jobs.waiting() >= self.options.max_waiting:  # `add` counts, too: this saves writing the picture
            raise self._too_many()
        if picture is not None:
            await self.files.put(_picture_name(job), picture)
        try:
            if await self.jobs.add(job, self.options.max_waiting):
                self._news.set()
                return job
        except QueueFull:
            await self.files.delete(_picture_name(job))
            raise self._too_many() from None
        await self.files.delete(_picture_name(job))  # the same was asked for at the same moment
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
            is_same = picture == await self.files.read(_picture_name(found))
        if not is_same:
            raise RequestError(f"'{HEADER}' was sent before, with another request.", param=HEADER)
        return found

    async def request_of(self, job: Job) -> Request:
        picture = await self.files.read(_picture_name(job)) if job.has_picture else None
        return job.read_request(picture)

    async def delete(self, job: Job) -> bool:
        """Whether it was still there. Stops its work, on another server within a second."""
        if not await self.jobs.delete(job.id):
            return False
        for task, id in self._running.items():
            if id == job.id:
                task.cancel()
        await self.files.delete(_picture_name(job), *_names(job))
        return True

    async def run(self) -> NoReturn:
        """Until it is cancelled. What is under way then is left to the next server."""
        cleaning = asyncio.create_task(self._keep_clean())
        try:
            while True:
                with _logged("cannot take the next video"):
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

    async def clean(self) -> None:
        """Delete what has expired and what is over the budget; fail what nobody takes."""
        for job in await self.jobs.expired():
            await self.delete(job)
        for job in await self.jobs.forgotten(self._model, self.options.ttl):
            message = f"No server took the video, or any other of '{job.model}', within {self.options.ttl:g} seconds."
            await self.jobs.fail(job, code="expired", message=message, ttl=self.options.ttl)
        budget = self.options.disk_budget
        while budget is not None and await self.jobs.size() > budget and (first := await self.jobs.evictable()):
            await self.delete(first)

    async def sweep(self, age: float = _ORPHAN_SECONDS) -> int:
        """Delete files that belong to no job, as a server leaves them that is killed; returns how many."""
        claims = await self.jobs.claims()
        return await self.files.sweep(lambda name: _belongs(name, claims), age)

    async def _keep_clean(self) -> NoReturn:
        swept = -_ORPHAN_SECONDS
        while True:
            with _logged("cannot clean up"):
                if time.monotonic() - swept >= _ORPHAN_SECONDS:
                    await self.sweep()
                    swept = time.monotonic()
                await self.clean()
            await asyncio.sleep(self.options.cleaning)

    async def _take(self) -> None:
        """Jobs, for as long as there is a place for them. Without an engine none would get anywhere."""
        while self._has_place and self._client.last_status.state == "ready" and not self._drain.is_on:
            if (job := await self.jobs.claim(self._model, self.options.lease)) is None:
                return
            task = asyncio.create_task(self._run(job))
            self._running[task] = job.id
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        del self._running[task]
        self._news.set()

    async def _run(self, job: Job) -> None:
        """One job, to whatever end it comes."""
        began = time.monotonic()
        with self._drain.work(), _logged(f"cannot write down the end of {job.id}"):
            try:
                await self._complete(job)
            except asyncio.CancelledError:  # the job was deleted, or the server stops
                await self.jobs.release(job)
                if await self.jobs.get(job.id) is None:
                    await self.files.delete(*_names(job))
            except ClaimLost:
                await self.files.delete(*_names(job))
            except EngineError as e:
                await self._engine_failed(job, e)
            except RequestError as e:  # of which only the workers could tell
                await self._fail(job, str(e), e.code)
            except Exception:
                logger.exception("%s failed", job.id)
                await self._fail(job, "The server could not make the video; its log says why, under the video's id.")
            else:
                logger.info("video", extra=facts(video=job.id, seconds=round(time.monotonic() - began, 6)))
                await self.clean()

    async def _complete(self, job: Job) -> None:
        percent = size = 0

        async def hold() -> NoReturn:
            while await self.jobs.renew(job, progress=percent, lease=self.options.lease):
                await asyncio.sleep(self.options.renewal)
            raise ClaimLost

        async with aclosing(interleave([self._make(job)], hold)) as steps:
            async for _, step in steps:
                percent, size = step
        if not await self.jobs.complete(job, size=size, ttl=self.options.ttl):  # when nothing renews: that would fail
            raise ClaimLost

    async def _make(self, job: Job) -> AsyncGenerator[tuple[int, int], None]:
        """Yields how far it is in per cent, and at the end the bytes that were written."""
        files: tuple[bytes, ...] = ()
        async with aclosing(self._client.generate(await self.request_of(job))) as events:
            async for event in events:
                self._metrics.observe(event)
                match event:
                    case Progress(step=step, num_steps=num_steps):
                        yield 99 * step // max(num_steps, 1), 0  # the last one is the file's
                    case Finished():
                        files = event.files
        yield 99, await self._write(job, files[0])

    async def _write(self, job: Job, video: bytes) -> int:
        """The number of bytes. The names tell of the claim: what comes of another one is not overwritten."""
        thumbnail, spritesheet = await asyncio.to_thread(thumbnail_and_spritesheet, video)
        contents: dict[Variant, bytes] = {"video": video, "thumbnail": thumbnail, "spritesheet": spritesheet}
        for variant, content in contents.items():
            await self.files.put(file_name(job, variant), content)
        return sum(map(len, contents.values()))

    async def _engine_failed(self, job: Job, error: EngineError) -> None:
        logger.warning("%s: %s", job.id, error)
        if error.reason == "internal":
            await self._fail(job, "The model failed at this video; the server's log says why, under the video's id.")
        elif error.reason == "busy":
            await self.jobs.release(job, seconds=_BUSY_SECONDS)
        elif job.crashes + 1 < _MAX_CRASHES:
            await self.jobs.release(job, crashed=True)
        else:
            await self._fail(job, f"The model's workers were lost {_MAX_CRASHES} times while they made this video.")

    async def _fail(self, job: Job, message: str, code: str = "server_error") -> None:
        if await self.jobs.fail(job, code=code, message=message, ttl=self.options.ttl):
            await self.files.delete(*_names(job))


def file_name(job: Job, variant: Variant) -> str:
    return f"{job.id}-{job.claim}.{_ENDINGS[variant]}"


def _asked(job: Job) -> tuple[object, ...]:
    return job.request, job.model, job.seconds, job.remixed_from, job.has_picture


def _picture_name(job: Job) -> str:
    return f"{job.id}.input"


def _names(job: Job) -> list[str]:
    return [file_name(job, variant) for variant in _ENDINGS] if job.claim else []


def _belongs(name: str, claims: dict[str, str]) -> bool:
    id, _, claim = name.partition(".")[0].partition("-")
    return id in claims and claim in ("", claims[id])


@contextlib.contextmanager
def _logged(what: str) -> Iterator[None]:
    """A database or a disk that is away for a while: the work goes on when it is back."""
    try:
        yield
    except Exception:
        logger.exception(what)
