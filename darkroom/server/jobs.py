"""The videos that clients have asked for, in a database: what was accepted outlives the server.

A server that makes a video holds a claim on its job, and renews it. A claim that was not renewed in time is anyone's to
take over. Every change names the claim that it is made under, so that of two servers one succeeds, and the other learns
that it does not.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from darkroom.configs.errors import ConfigError
from darkroom.configs.request import Request

T = TypeVar("T")
Status = Literal["queued", "in_progress", "completed", "failed"]

METADATA = sa.MetaData()
JOBS = sa.Table(
    "video_jobs",
    METADATA,
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("progress", sa.Integer, nullable=False),
    sa.Column("created_at", sa.BigInteger, nullable=False),
    sa.Column("completed_at", sa.BigInteger),
    sa.Column("expires_at", sa.BigInteger),
    sa.Column("seconds", sa.String(16), nullable=False),
    sa.Column("remixed_from", sa.String(64)),
    sa.Column("error_code", sa.String(64)),
    sa.Column("error_message", sa.Text),
    sa.Column("request", sa.Text, nullable=False),
    sa.Column("has_picture", sa.Boolean, nullable=False),
    sa.Column("claim", sa.String(32), nullable=False),
    sa.Column("lease", sa.Double, nullable=False),
    sa.Column("crashes", sa.Integer, nullable=False),
    sa.Column("size", sa.BigInteger, nullable=False),
    sa.Column("idempotency_key", sa.String(64)),
    sa.Column("unread_since", sa.Double),
    sa.Index("video_jobs_by_status", "status", "id"),
    sa.Index("video_jobs_by_key", "idempotency_key", unique=True),
)

_FINISHED = ("completed", "failed")
_ID = re.compile(r"video_[0-9a-f]{44}", re.ASCII)
_LOCKS = {
    "sqlite": ("SERIALIZABLE", "BEGIN IMMEDIATE"),
    "postgresql": ("READ COMMITTED", "SELECT pg_advisory_xact_lock(7235421)"),
}
"""By database: an isolation level, and a statement after which no other connection's transaction begins with it."""


class QueueFull(Exception):
    """As many jobs wait as may."""


class Outline(msgspec.Struct, frozen=True, kw_only=True):
    """What is shown of a request. Any field may be missing: the request may be of another version."""

    prompt: str = ""
    width: int = 0
    height: int = 0
    num_frames: int = 0
    fps: int = 0
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Job:
    """Times are in Unix seconds."""

    id: str
    model: str
    status: Status = "queued"
    progress: int = 0
    created_at: int
    completed_at: int | None = None
    expires_at: int | None = None
    """When a finished job is deleted."""
    seconds: str
    remixed_from: str | None = None
    error_code: str | None = None
    error_message: str | None = None
    request: str
    """JSON, without the picture that it may begin from."""
    has_picture: bool = False
    claim: str = ""
    """Drawn anew each time that a server takes the job, or leaves it; names the files that it makes."""
    lease: float = 0.0
    """When the claim lapses, unless it is renewed."""
    crashes: int = 0
    """How often it came to nothing: the engine's workers were lost while they had it, or its files were not kept."""
    size: int = 0
    """Bytes of its files."""
    idempotency_key: str | None = None
    """No two jobs have the same."""
    unread_since: float | None = None
    """When its picture could not be read, for the first of the tries up to the last one."""

    @classmethod
    def new(
        cls,
        request: Request,
        *,
        model: str,
        seconds: str,
        remixed_from: str | None = None,
        idempotency_key: str | None = None,
    ) -> tuple[Job, bytes | None]:
        """The job, and the picture that its request begins from."""
        picture = request.images[0] if request.images else None
        bare = msgspec.structs.replace(request, images=())
        now = time.time()
        job = cls(
            id=f"video_{int(now * 1000):012x}{secrets.token_hex(16)}",
            model=model,
            created_at=int(now),
            seconds=seconds,
            remixed_from=remixed_from,
            request=msgspec.json.encode(bare).decode(),
            has_picture=picture is not None,
            size=len(picture or b""),
            idempotency_key=idempotency_key,
        )
        return job, picture

    def read_request(self, picture: bytes | None = None) -> Request:
        """Raises msgspec.DecodeError for the request of a version that knew other fields."""
        request = msgspec.json.decode(self.request, type=Request)
        return request if picture is None else msgspec.structs.replace(request, images=(picture,))

    def outline(self) -> Outline:
        """Never raises: one job of another version must not take the list of all others with it."""
        try:
            return msgspec.json.decode(self.request, type=Outline)
        except msgspec.DecodeError:
            return Outline()


def is_id(id: str) -> bool:
    """Whether it can be a job's. Such ids sort by the time of their creation, so a deleted one is a cursor, too."""
    return bool(_ID.fullmatch(id))


class JobStore:
    """Each method is one statement, and so atomic in itself."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._under_way: set[asyncio.Task[Any]] = set()

    async def settle(self) -> None:
        """Wait for what is under way."""
        await asyncio.gather(*self._under_way, return_exceptions=True)

    async def add(self, job: Job, most_waiting: int | None = None) -> bool:
        """False when there is another job with its idempotency key. Raises `QueueFull` where so many wait already."""
        row = sa.select(*(sa.literal(value, JOBS.c[name].type) for name, value in asdict(job).items()))
        if most_waiting is not None:
            row = row.where(_waiting().scalar_subquery() < most_waiting)
        insert = sa.insert(JOBS).from_select(list(asdict(job)), row)
        try:
            if await self._run(insert, lambda result: result.rowcount, alone=True) == 0:
                raise QueueFull
        except sa.exc.IntegrityError:
            if job.idempotency_key is None:
                raise
            return False
        return True

    async def get(self, id: str) -> Job | None:
        return await self._first(sa.select(JOBS).where(JOBS.c.id == id)) if is_id(id) else None

    async def asked_by(self, idempotency_key: str) -> Job | None:
        return await self._first(sa.select(JOBS).where(JOBS.c.idempotency_key == idempotency_key))

    async def page(self, *, after: str | None, limit: int, newest_first: bool) -> Sequence[Job]:
        query = sa.select(JOBS).order_by(JOBS.c.id.desc() if newest_first else JOBS.c.id).limit(limit)
        if after is not None:
            query = query.where(JOBS.c.id < after if newest_first else JOBS.c.id > after)
        return await self._all(query)

    async def waiting(self) -> int:
        return int(await self._scalar(_waiting()))

    async def claim(self, model: str, lease: float, *, beside: Collection[str] = ()) -> Job | None:
        """Take the oldest job that waits, or whose claim has lapsed, for `lease` seconds.

        None if that is one of the server's own, which it has in hand and whose ids are `beside`: a video that it has
        made, and could not write down while the database was away, is worth more than a new beginning. Nor one that
        came to nothing before, while there is any beside it. Until then none is taken: else it might wait for ever.
        """
        free = sa.and_(JOBS.c.model == model, _free())
        while job := await self._first(sa.select(JOBS).where(free).order_by(JOBS.c.id).limit(1)):
            if job.id in beside or (job.crashes and beside):
                return None
            taken = {"status": "in_progress", "claim": secrets.token_hex(16), "lease": time.time() + lease}
            if await self._change(sa.update(JOBS).where(_held(job), free).values(**taken)):
                return Job(**{**asdict(job), **taken})
        return None

    async def renew(self, job: Job, *, progress: int, lease: float) -> bool:
        """False when the job is no longer held under this claim: it was deleted, or taken over.

        Neither progress nor lease falls, whatever comes last of two renewals that are under way.
        """
        until = time.time() + lease
        furthest = sa.case((JOBS.c.progress < progress, progress), else_=JOBS.c.progress)
        longest = sa.case((JOBS.c.lease < until, until), else_=JOBS.c.lease)
        return await self._change(sa.update(JOBS).where(_held(job)).values(progress=furthest, lease=longest))

    async def release(
        self, job: Job, *, seconds: float = 0.0, crashed: bool = False, unread_since: float | None = None
    ) -> bool:
        """Leave the job to whoever takes it next, after this many seconds.

        The claim is over: a renewal that is still under way does not find it any more, and keeps nobody waiting.
        """
        values = {"claim": secrets.token_hex(16), "lease": time.time() + seconds, "unread_since": unread_since}
        crashes = JOBS.c.crashes + int(crashed)
        return await self._change(sa.update(JOBS).where(_held(job)).values(**values, crashes=crashes))

    async def complete(self, job: Job, *, size: int, ttl: float) -> bool:
        now = int(time.time())
        values = {"status": "completed", "progress": 100, "completed_at": now, "expires_at": now + int(ttl)}
        return await self._change(sa.update(JOBS).where(_held(job)).values(**values, size=JOBS.c.size + size))

    async def fail(self, job: Job, *, code: str, message: str, ttl: float) -> bool:
        values = {"status": "failed", "error_code": code, "error_message": message}
        expires_at = int(time.time() + ttl)
        return await self._change(sa.update(JOBS).where(_held(job)).values(**values, expires_at=expires_at))

    async def delete(self, id: str) -> bool:
        return is_id(id) and await self._change(sa.delete(JOBS).where(JOBS.c.id == id))

    async def expired(self) -> Sequence[Job]:
        return await self._all(sa.select(JOBS).where(JOBS.c.expires_at <= time.time()))

    async def forgotten(self, model: str, seconds: float) -> Sequence[Job]:
        """Jobs of models that nobody serves: not `model`, and none of which any job was held for so long.

        A server that is busy holds jobs of its model: what waits for it is not forgotten, however long that takes.
        """
        before = time.time() - seconds
        held = JOBS.alias()
        served = sa.select(held.c.model).where(held.c.lease >= before)
        unserved = sa.and_(JOBS.c.model != model, JOBS.c.model.not_in(served))
        waiting = sa.and_(JOBS.c.status.not_in(_FINISHED), JOBS.c.created_at < before)
        return await self._all(sa.select(JOBS).where(waiting, unserved))

    async def size(self) -> int:
        """Bytes of all files."""
        return int(await self._scalar(sa.select(sa.func.coalesce(sa.func.sum(JOBS.c.size), 0))))

    async def evictable(self) -> Job | None:
        """The video that was completed first, unless it is the only one."""
        completed = sa.select(JOBS).where(JOBS.c.status == "completed")
        found = await self._all(completed.order_by(JOBS.c.completed_at, JOBS.c.id).limit(2))
        return found[0] if len(found) > 1 else None

    async def claims(self) -> dict[str, str]:
        """Every job's claim by its id: the files that belong to something."""
        return dict(await self._run(sa.select(JOBS.c.id, JOBS.c.claim), lambda result: [tuple(row) for row in result]))

    async def _change(self, statement: sa.UpdateBase) -> bool:
        return await self._run(statement, lambda result: result.rowcount) == 1

    async def _all(self, query: sa.Select[Any]) -> Sequence[Job]:
        return await self._run(query, lambda result: [Job(**row) for row in result.mappings()])

    async def _first(self, query: sa.Select[Any]) -> Job | None:
        return next(iter(await self._all(query)), None)

    async def _scalar(self, query: sa.Select[Any]) -> Any:
        return await self._run(query, lambda result: result.scalar_one())

    async def _run(
        self, statement: sa.Executable, read: Callable[[sa.CursorResult[Any]], T], *, alone: bool = False
    ) -> T:
        """To the end, even if the caller is cancelled: else it would be open whether the statement takes effect."""

        async def run() -> T:
            opened: AbstractAsyncContextManager[AsyncConnection]
            opened = _alone(self._engine) if alone else self._engine.connect()
            async with opened as connection:
                return read(await connection.execute(statement))

        task = asyncio.create_task(run())
        self._under_way.add(task)
        task.add_done_callback(self._has_ended)
        return await asyncio.shield(task)

    def _has_ended(self, task: asyncio.Task[Any]) -> None:
        self._under_way.discard(task)
        if not task.cancelled():
            task.exception()  # is the caller's; where he is gone, asyncio must not log it


def _held(job: Job) -> sa.ColumnElement[bool]:
    """The job is still what was read of it. A claim is never drawn twice, so its state has not changed either."""
    return sa.and_(JOBS.c.id == job.id, JOBS.c.claim == job.claim, JOBS.c.status.not_in(_FINISHED))


def _free() -> sa.ColumnElement[bool]:
    """The job is queued, or nobody's any more."""
    lapsed = sa.and_(JOBS.c.status == "in_progress", JOBS.c.lease < time.time())
    return sa.or_(JOBS.c.status == "queued", lapsed)


def _waiting() -> sa.Select[int]:
    return sa.select(sa.func.count()).where(_free())


@asynccontextmanager
async def open_jobs(url: str) -> AsyncIterator[JobStore]:
    """The store behind a SQLAlchemy URL, its tables brought up to date. Raises `ConfigError`."""
    async with AsyncExitStack() as stack:
        try:
            engine = _engine(url)
            stack.push_async_callback(engine.dispose)
            await _migrate(engine)
        except Exception as e:  # each driver raises errors of its own
            reason = " ".join(str(e).split())[:300] or type(e).__name__
            raise ConfigError(f"--database-url {_without_password(url)}: cannot be used: {reason}") from e
        jobs = JobStore(engine)
        stack.push_async_callback(jobs.settle)
        yield jobs


def _engine(url: str) -> AsyncEngine:
    parsed = sa.make_url(url)
    drivers = {"sqlite": "sqlite+aiosqlite", "postgres": "postgresql+asyncpg", "postgresql": "postgresql+asyncpg"}
    parsed = parsed.set(drivername=drivers.get(parsed.drivername, parsed.drivername))
    engine = create_async_engine(parsed, isolation_level="AUTOCOMMIT", pool_pre_ping=True)
    if parsed.get_backend_name() == "sqlite":
        with open(parsed.database or "", "ab"):  # raises what is wrong; the driver's thread would print it
            pass
        sa.event.listen(engine.sync_engine, "connect", _tune_sqlite)
    return engine


def _tune_sqlite(connection: Any, _: object) -> None:
    cursor = connection.cursor()
    for pragma in ("busy_timeout = 15000", "journal_mode = WAL", "synchronous = FULL"):
        cursor.execute(f"PRAGMA {pragma}")  # with less than FULL a power cut takes accepted jobs with it
    cursor.close()


@asynccontextmanager
async def _alone(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """A transaction that waits for the others of its kind, and sees all that they have done."""
    level, lock = _LOCKS.get(engine.dialect.name, ("SERIALIZABLE", ""))
    async with engine.execution_options(isolation_level=level).begin() as connection:
        if lock:
            await connection.exec_driver_sql(lock)
        yield connection


async def _migrate(engine: AsyncEngine) -> None:
    async with _alone(engine) as connection:
        await connection.run_sync(_upgrade)


def _upgrade(connection: sa.Connection) -> None:
    logging.getLogger("alembic").setLevel(logging.WARNING)  # it tells of every start
    config = Config()
    folder = str(Path(__file__).with_name("migrations"))
    config.set_main_option("script_location", folder.replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def _without_password(url: str) -> str:
    try:
        return sa.make_url(url).render_as_string(hide_password=True)
    except sa.exc.ArgumentError:
        return "URL"
