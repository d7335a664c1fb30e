from __future__ import annotations

import asyncio
import gc
import time
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext

from darkroom.configs.errors import ConfigError
from darkroom.configs.request import Request
from darkroom.server.jobs import METADATA, Job, JobStore, Outline, QueueFull, open_jobs

REQUEST = Request(
    task="text-to-video",
    prompt="x\x00 'y' \U0001f600",
    negative_prompt="",
    width=64,
    height=48,
    num_inference_steps=4,
    guidance_scale=1.5,
    max_sequence_length=8,
    seed=2**64 - 1,
)


def job(**fields) -> Job:
    new, _ = Job.new(REQUEST, model="m", seconds="4")
    return replace(new, **fields)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path) -> str:
    if request.param == "sqlite":
        return f"sqlite+aiosqlite:///{tmp_path / 'jobs.sqlite'}"
    return str(request.getfixturevalue("postgresql"))


def using(url: str, test) -> None:
    """Run `test` on an open store."""

    async def run() -> None:
        async with open_jobs(url) as jobs:
            await test(jobs)

    asyncio.run(run())


def test_a_failure_that_nobody_waits_for_any_more_is_not_logged(tmp_path):
    async def test(jobs: JobStore) -> None:
        told = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context["message"]))
        asking = asyncio.create_task(jobs._run(sa.text("SELECT nothing"), list))
        await asyncio.sleep(0)
        under_way = list(jobs._under_way)
        asking.cancel()
        await asyncio.wait([asking, *under_way])
        assert asking.cancelled() and len(under_way) == 1
        del asking, under_way
        gc.collect()
        assert told == []

    using(f"sqlite+aiosqlite:///{tmp_path / 'jobs.sqlite'}", test)


def test_a_job_is_read_as_it_was_written(url):
    full = job(
        progress=5,
        completed_at=3,
        expires_at=2**40,
        remixed_from="video_1",
        error_code="x",
        error_message="y",
        has_picture=True,
        claim="c",
        lease=1.5,
        crashes=2,
        size=2**40,
        status="failed",
        idempotency_key="k",
        unread_since=2.5,
    )

    async def test(jobs: JobStore) -> None:
        await jobs.add(full)

    using(url, test)

    async def read(jobs: JobStore) -> None:  # by another connection, after another migration
        assert await jobs.get(full.id) == full
        assert full.read_request() == REQUEST
        for unknown in ("", "video_1", "\x00", "x" * 1000, job().id):
            assert await jobs.get(unknown) is None

    using(url, read)


def test_no_two_jobs_have_the_same_key(url):
    first, second = job(idempotency_key="k"), job(idempotency_key="k")

    async def test(jobs: JobStore) -> None:
        assert sum(await asyncio.gather(*(jobs.add(one) for one in (first, second)))) == 1
        kept = await jobs.asked_by("k")
        assert kept in (first, second) and await jobs.asked_by("l") is None
        assert await jobs.add(job()) and await jobs.add(job())
        with pytest.raises(sa.exc.IntegrityError):
            await jobs.add(replace(kept, idempotency_key=None))
        assert await jobs.delete(kept.id) and await jobs.asked_by("k") is None

    using(url, test)


def test_no_more_are_added_than_may_wait(url):
    async def add(jobs: JobStore) -> bool:
        try:
            return await jobs.add(job(), 3)
        except QueueFull:
            return False

    async def test(jobs: JobStore) -> None:
        assert sum(await asyncio.gather(*(add(jobs) for _ in range(40)))) == 3 == await jobs.waiting()
        taken = await jobs.claim("m", 60)
        assert taken and await add(jobs) and not await add(jobs)
        assert await jobs.release(taken) and await jobs.waiting() == 4  # it waits again, though it is in progress

    using(url, test)


def test_the_tables_of_the_first_version_are_brought_up_to_date(url):
    old = job(claim="c")

    async def downgraded(jobs: JobStore) -> None:
        await jobs.add(old)
        async with jobs._engine.execution_options(isolation_level="SERIALIZABLE").begin() as connection:
            await connection.run_sync(_downgrade)

    async def read(jobs: JobStore) -> None:
        assert await jobs.get(old.id) == old

    using(url, downgraded)
    using(url, read)


def _downgrade(connection: sa.Connection) -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parents[2] / "darkroom" / "server" / "migrations"))
    config.attributes["connection"] = connection
    command.downgrade(config, "0001")


def test_a_picture_is_kept_apart():
    made, picture = Job.new(Request(**{**_fields(REQUEST), "images": (b"\x89PNG",)}), model="m", seconds="4")
    assert picture == b"\x89PNG" and made.has_picture and made.size == 4 and len(made.request) < 600
    assert made.read_request(picture).images == (picture,)
    assert made.read_request().images == ()


@pytest.mark.parametrize(
    ("request_", "outline"),
    [
        ('{"prompt": "y", "width": 64, "new": {}}', Outline(prompt="y", width=64)),
        ('{"prompt": 5}', Outline()),
        ("nonsense", Outline()),
    ],
)
def test_a_request_of_another_version_is_shown_as_far_as_it_is_known(request_, outline):
    assert job(request=request_).outline() == outline


def _fields(request: Request) -> dict[str, object]:
    return {name: getattr(request, name) for name in request.__struct_fields__}


def test_ids_sort_by_time_and_cannot_be_guessed():
    first = job()
    time.sleep(0.002)
    second = job()
    assert first.id < second.id and len(set(second.id)) > 8
    assert len({job().id for _ in range(1000)}) == 1000


def test_pages_are_stable_though_all_were_created_at_once(url):
    now = int(time.time())
    made = sorted((job(created_at=now) for _ in range(25)), key=lambda one: one.id)

    async def test(jobs: JobStore) -> None:
        for one in made:
            await jobs.add(one)
        for newest_first in (True, False):
            seen: list[str] = []
            while page := await jobs.page(after=seen[-1] if seen else None, limit=4, newest_first=newest_first):
                seen += [one.id for one in page]
                if len(seen) == 4:  # another one comes while the pages are turned
                    await jobs.add(job(created_at=now))
            assert len(seen) == len(set(seen)) and {one.id for one in made} <= set(seen)
            assert seen == sorted(seen, reverse=newest_first)

    using(url, test)


def test_the_oldest_is_claimed_first_and_by_one_only(url):
    made = sorted((job() for _ in range(20)), key=lambda one: one.id)

    async def test(jobs: JobStore) -> None:
        for one in made:
            await jobs.add(one)
        assert await jobs.claim("another model", 10) is None
        first = await jobs.claim("m", 10)
        assert first and first.id == made[0].id and first.status == "in_progress" and first.claim
        assert await jobs.get(first.id) == first
        taken = await asyncio.gather(*(jobs.claim("m", 10) for _ in range(30)))
        ids = [one.id for one in taken if one]
        assert sorted(ids) == [one.id for one in made[1:]]
        assert await jobs.waiting() == 0

    using(url, test)


def test_a_claim_is_renewed_lapses_and_is_lost(url):
    async def test(jobs: JobStore) -> None:
        await jobs.add(job())
        mine = await jobs.claim("m", 0.2)
        assert mine and await jobs.claim("m", 10) is None
        assert await jobs.renew(mine, progress=40, lease=0.2)
        assert await jobs.renew(mine, progress=10, lease=0.2)
        assert (await jobs.get(mine.id)).progress == 40
        await asyncio.sleep(0.3)
        theirs = await jobs.claim("m", 10)
        assert theirs and theirs.id == mine.id and theirs.claim != mine.claim and theirs.progress == 40
        assert not await jobs.renew(mine, progress=50, lease=10)
        assert not await jobs.complete(mine, size=1, ttl=1)
        assert not await jobs.fail(mine, code="x", message="y", ttl=1)
        assert not await jobs.release(mine)
        assert await jobs.complete(theirs, size=7, ttl=60)
        assert not await jobs.complete(theirs, size=7, ttl=60)
        assert not await jobs.fail(theirs, code="x", message="y", ttl=1)
        done = await jobs.get(mine.id)
        assert (done.status, done.progress, done.size, done.error_code) == ("completed", 100, 7, None)
        assert done.expires_at == done.completed_at + 60
        assert await jobs.claim("m", 10) is None

    using(url, test)


def test_a_released_job_is_taken_when_its_time_has_come(url):
    async def test(jobs: JobStore) -> None:
        await jobs.add(job())
        mine = await jobs.claim("m", 60)
        assert mine and await jobs.release(mine, seconds=0.3, crashed=True)
        assert not await jobs.renew(mine, progress=0, lease=60)  # nor by what was under way
        assert await jobs.claim("m", 10) is None
        await asyncio.sleep(0.4)
        again = await jobs.claim("m", 10)
        assert again and again.crashes == 1

    using(url, test)


def test_a_job_that_came_to_nothing_is_for_a_server_that_makes_no_other(url):
    async def test(jobs: JobStore) -> None:
        first, second = sorted((job(), job()), key=lambda one: one.id)
        await jobs.add(replace(first, crashes=1))
        await jobs.add(second)
        assert await jobs.claim("m", 10, beside=["x"]) is None  # nor what came later: the first would wait for ever
        taken = await jobs.claim("m", 10)
        assert taken and taken.crashes == 1
        later = await jobs.claim("m", 10, beside=[taken.id])
        assert later and later.crashes == 0

    using(url, test)


def test_no_server_claims_what_it_has_in_hand(url):
    async def test(jobs: JobStore) -> None:
        first, second = sorted((job(), job()), key=lambda one: one.id)
        await jobs.add(first)
        await jobs.add(second)
        mine = await jobs.claim("m", -1)
        assert mine and mine.id == first.id
        assert await jobs.claim("m", 10, beside=[mine.id]) is None
        assert await jobs.renew(mine, progress=0, lease=60)
        other = await jobs.claim("m", 10, beside=[mine.id])
        assert other and other.id == second.id

    using(url, test)


def test_no_renewal_makes_a_claim_shorter(url):
    async def test(jobs: JobStore) -> None:
        await jobs.add(job())
        mine = await jobs.claim("m", 10)
        assert mine and await jobs.renew(mine, progress=0, lease=60)
        longest = (await jobs.get(mine.id)).lease
        assert longest > mine.lease + 40
        assert await jobs.renew(mine, progress=0, lease=1)  # as one that was under way before
        assert (await jobs.get(mine.id)).lease == longest

    using(url, test)


def test_what_is_over(url):
    now = int(time.time())
    old = job(created_at=now - 100)
    done = [job(status="completed", completed_at=now - age, size=10 + age, expires_at=now + 60) for age in (5, 9, 1)]
    gone = job(status="failed", expires_at=now - 1)

    async def test(jobs: JobStore) -> None:
        assert await jobs.size() == 0 and await jobs.evictable() is None
        for one in (old, *done, gone):
            await jobs.add(one)
        assert [one.id for one in await jobs.expired()] == [gone.id]
        assert [one.id for one in await jobs.forgotten("another model", 50)] == [old.id]
        assert await jobs.forgotten("another model", 200) == await jobs.forgotten("m", 50) == []
        assert await jobs.size() == 45
        assert (await jobs.evictable()).id == done[1].id
        assert await jobs.delete(done[1].id) and not await jobs.delete(done[1].id)
        assert await jobs.delete(done[0].id)
        assert await jobs.evictable() is None

    using(url, test)


def test_what_waits_for_a_busy_server_of_another_model_is_not_forgotten(url):
    now = int(time.time())
    held = job(created_at=now - 100, status="in_progress", claim="c", lease=now + 10.0)
    waiting, others = job(created_at=now - 100), job(created_at=now - 100, model="n")

    async def test(jobs: JobStore) -> None:
        for one in (held, waiting, others):
            await jobs.add(one)
        assert [one.id for one in await jobs.forgotten("o", 50)] == [others.id]
        assert await jobs.release(held, seconds=-70)
        assert {one.id for one in await jobs.forgotten("o", 50)} == {held.id, waiting.id, others.id}

    using(url, test)


def test_the_migrations_make_the_tables_of_the_code(url):
    def differences(connection: sa.Connection) -> list[object]:
        return list(compare_metadata(MigrationContext.configure(connection), METADATA))

    async def test(jobs: JobStore) -> None:
        async with jobs._engine.connect() as connection:
            assert await connection.run_sync(differences) == []

    using(url, test)


def test_servers_that_start_at_once_migrate_once(url):
    async def test() -> None:
        async def start() -> None:
            async with open_jobs(url) as jobs:
                assert await jobs.waiting() == 0

        await asyncio.gather(*(start() for _ in range(4)))

    asyncio.run(test())


def test_sqlite_survives_a_power_cut(tmp_path):
    async def test(jobs: JobStore) -> None:
        async with jobs._engine.connect() as connection:
            for pragma, value in (("journal_mode", "wal"), ("synchronous", 2)):
                assert (await connection.exec_driver_sql(f"PRAGMA {pragma}")).scalar_one() == value

    using(f"sqlite:///{tmp_path / 'a.sqlite'}", test)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("nonsense", "--database-url URL: cannot be used"),
        ("sqlite+aiosqlite:////no/such/folder/a.sqlite", "No such file"),
        ("sqlite://", "No such file"),
        ("postgresql://me:secret@127.0.0.1:1/x", "me:***@127.0.0.1:1/x"),
        ("unknown://me:secret@host/x", "me:***@host/x"),
    ],
)
def test_databases_that_cannot_be_had(url, words):
    with pytest.raises(ConfigError) as caught:
        using(url, None)
    assert words in str(caught.value) and "secret" not in str(caught.value)


def test_a_database_of_a_newer_version_is_refused(tmp_path):
    url = f"sqlite+aiosqlite:///{tmp_path / 'a.sqlite'}"

    async def test(jobs: JobStore) -> None:
        async with jobs._engine.connect() as connection:
            await connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")

    using(url, test)
    with pytest.raises(ConfigError, match="9999"):
        using(url, None)
