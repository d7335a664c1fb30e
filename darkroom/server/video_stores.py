"""Where videos are kept: jobs and files together, what is deleted of both, and what is done while they are away."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NoReturn, TypeVar

from darkroom.configs.request import Request

from .job_files import JobFiles, open_files
from .jobs import Job, JobStore, open_jobs

logger = logging.getLogger(__name__)
T = TypeVar("T")

Variant = Literal["video", "thumbnail", "spritesheet"]
_ENDINGS: dict[Variant, str] = {"video": "mp4", "thumbnail": "webp", "spritesheet": "jpg"}
_ORPHAN_SECONDS = 3600.0
_DATABASE = "videos.sqlite"


@dataclass(frozen=True, kw_only=True)
class VideoOptions:
    """Times are in seconds."""

    ttl: float = 86_400.0
    """How long a finished job is kept; and one that cannot begin, before it fails."""
    disk_budget: int | None = None
    """Bytes of all files; beyond it the videos that were completed first are deleted."""
    max_waiting: int = 256
    concurrency: int = 1
    lease: float = 15.0
    """After which a server that has said nothing is taken for dead."""
    renewal: float = 1.0
    """How often a claim is renewed, and progress written down."""
    pause: float = 1.0
    """How often the database is asked for work that other servers have left, and writing is tried again."""
    patience: float = 300.0
    """How long a database or a disk that is away is waited for: a video that was made costs more than a wait."""
    cleaning: float = 60.0


class NotKept(Exception):
    """What was made could not be written down for longer than the patience. The message is for the log."""


@dataclass(frozen=True)
class VideoStores:
    jobs: JobStore
    files: JobFiles
    options: VideoOptions

    async def request_of(self, job: Job) -> Request:
        """Raises FileNotFoundError, msgspec.DecodeError."""
        picture = await self.files.read(picture_name(job)) if job.has_picture else None
        return job.read_request(picture)

    async def keep(self, job: Job, files: Sequence[bytes]) -> bool:
        """Write down a video, its thumbnail and its spritesheet. False when the claim was lost. Raises `NotKept`.

        The names of files tell of the claim: what comes of another one is not overwritten.
        """
        deadline = time.monotonic() + self.options.patience
        with logged(f"cannot hold {job.id}, which is made"):  # without it, too, it may be that nobody takes the job
            if not await self.jobs.renew(job, progress=99, lease=self.options.patience + self.options.lease):
                return False
        for variant, content in zip(_ENDINGS, files, strict=True):
            await self._patiently(partial(self.files.put, file_name(job, variant), content), deadline)
        return await self._patiently(partial(self._complete, job, sum(map(len, files))), deadline)

    async def _complete(self, job: Job, size: int) -> bool:
        if await self.jobs.complete(job, size=size, ttl=self.options.ttl):
            return True
        found = await self.jobs.get(job.id)  # an earlier call may have done it, and its answer have been lost
        return found is not None and (found.claim, found.status) == (job.claim, "completed")

    async def fail(self, job: Job, message: str, code: str = "server_error") -> None:
        """Raises `NotKept`."""
        write = partial(self.jobs.fail, job, code=code, message=message, ttl=self.options.ttl)
        if await self._patiently(write, time.monotonic() + self.options.patience):
            await self.discard(job)

    async def delete(self, job: Job) -> bool:
        """Whether it was still there."""
        if not await self.jobs.delete(job.id):
            return False
        await self.files.delete(picture_name(job))
        await self.discard(job)
        return True

    async def discard(self, job: Job) -> None:
        """Delete what was made under this claim."""
        if job.claim:
            await self.files.delete(*(file_name(job, variant) for variant in _ENDINGS))

    async def _patiently(self, write: Callable[[], Awaitable[T]], deadline: float) -> T:
        """What the call gives, tried again while a store is away."""
        while True:
            try:
                return await write()
            except Exception as e:  # each driver raises errors of its own
                if time.monotonic() >= deadline:
                    raise NotKept(f"cannot be written down for {self.options.patience:g} seconds: {e!r}") from e
                logger.warning("a video waits to be written down: %r", e)
            await asyncio.sleep(self.options.pause)

    async def keep_clean(self, model: str) -> NoReturn:
        swept = -_ORPHAN_SECONDS
        while True:
            with logged("cannot clean up"):
                if time.monotonic() - swept >= _ORPHAN_SECONDS:
                    await self.sweep()
                    swept = time.monotonic()
                await self.clean(model)
            await asyncio.sleep(self.options.cleaning)

    async def clean(self, model: str) -> None:
        """Delete what has expired and what is over the budget; fail what nobody takes, who serve `model` here."""
        for job in await self.jobs.expired():
            await self.delete(job)
        for job in await self.jobs.forgotten(model, self.options.ttl):
            message = f"No server took the video, or any other of '{job.model}', within {self.options.ttl:g} seconds."
            await self.jobs.fail(job, code="expired", message=message, ttl=self.options.ttl)
        budget = self.options.disk_budget
        while budget is not None and await self.jobs.size() > budget and (first := await self.jobs.evictable()):
            await self.delete(first)

    async def sweep(self, age: float = _ORPHAN_SECONDS) -> int:
        """Delete files that belong to no job, as a server leaves them that is killed; returns how many."""
        claims = await self.jobs.claims()
        return await self.files.sweep(lambda name: _belongs(name, claims), age)


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


def file_name(job: Job, variant: Variant) -> str:
    return f"{job.id}-{job.claim}.{_ENDINGS[variant]}"


def picture_name(job: Job) -> str:
    return f"{job.id}.input"


def _belongs(name: str, claims: dict[str, str]) -> bool:
    id, _, claim = name.partition(".")[0].partition("-")
    return id in claims and claim in ("", claims[id])


@contextlib.contextmanager
def logged(what: str) -> Iterator[None]:
    """A database or a disk that is away for a while: the work goes on when it is back."""
    try:
        yield
    except Exception:
        logger.exception(what)
