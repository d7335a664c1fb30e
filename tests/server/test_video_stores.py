from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa
from obstore.exceptions import GenericError

from darkroom.configs.capabilities import Capabilities
from darkroom.configs.config import ServeConfig
from darkroom.configs.errors import ConfigError
from darkroom.server import run
from darkroom.server.job_files import JobFiles
from darkroom.server.jobs import JobStore
from darkroom.server.video_stores import VideoOptions, open_videos

from .conftest import CAPABILITIES, VIDEO_CAPABILITIES
from .engine import slow, video, wait_until
from .test_runner import PATH, PICTURE, create, running, sql, status, waits_for

# ---- what is kept ----------------------------------------------------------------------------------------------------


def test_what_has_expired_is_deleted(tmp_path):
    with running(tmp_path, ttl=1.0, cleaning=0.1) as (http, _):
        id = create(http)
        assert wait_until(lambda: status(http, id) == "completed", 10)
        expires_at = http.get(f"{PATH}/{id}").json()["expires_at"]
        assert wait_until(lambda: status(http, id) == "404", 10)
        assert time.time() >= expires_at
        assert wait_until(lambda: not list((tmp_path / "files").iterdir()), 5)


def test_a_job_that_no_server_takes_fails_in_the_end(tmp_path):
    with running(tmp_path, slow) as (http, _):
        id = create(http)
    sql(tmp_path, "UPDATE video_jobs SET created_at = created_at - 1000, lease = 0, model = 'gone'")
    with running(tmp_path, ttl=60.0, cleaning=0.1) as (http, _):
        assert wait_until(lambda: status(http, id) == "failed", 10)
        assert http.get(f"{PATH}/{id}").json()["error"]["code"] == "expired"


def test_what_waits_for_the_served_model_is_not_forgotten(tmp_path):
    with running(tmp_path, slow, ttl=60.0, cleaning=0.1) as (http, server):
        ids = [create(http) for _ in range(3)]
        assert wait_until(lambda: len(server.engine.requests) == 2, 5)
        sql(tmp_path, "UPDATE video_jobs SET created_at = created_at - 1000")
        time.sleep(0.5)
        assert [status(http, id) for id in ids] == ["in_progress", "in_progress", "queued"]


def test_the_first_to_be_completed_go_when_the_budget_is_spent(tmp_path):
    with running(tmp_path) as (http, _):
        ids = [create(http) for _ in range(4)]
        assert wait_until(lambda: {status(http, id) for id in ids} == {"completed"}, 10)
    size = sum(file.stat().st_size for file in (tmp_path / "files").iterdir())
    with running(tmp_path, disk_budget=size * 3 // 4, cleaning=0.1) as (http, _):
        assert wait_until(lambda: status(http, min(ids)) == "404", 10)
        assert wait_until(lambda: not list((tmp_path / "files").glob(f"{min(ids)}*")), 10)
        left = sum(file.stat().st_size for file in (tmp_path / "files").iterdir())
        assert size // 2 < left <= size * 3 // 4
    with running(tmp_path, disk_budget=1, cleaning=0.1) as (http, _):
        assert wait_until(lambda: len(http.get(PATH).json()["data"]) == 1, 10)
        time.sleep(0.3)
        assert len(http.get(PATH).json()["data"]) == 1  # the newest stays, however small the budget is


def test_files_of_no_job_are_swept_at_the_start(tmp_path):
    with running(tmp_path) as (http, _):
        id = create(http)
        assert wait_until(lambda: status(http, id) == "completed", 10)
    files = tmp_path / "files"
    kept = {file.name for file in files.iterdir()}
    orphans = ("video_0-1.mp4", f"{id}-0123.mp4", "video_0.input", f"{id}-1.mp4#1")
    for name in (*orphans, *kept):
        (files / name).touch()
        os.utime(files / name, (time.time() - 7200,) * 2)
    (files / "video_1-1.mp4").touch()  # written by another server a moment ago
    with running(tmp_path):
        assert wait_until(lambda: {file.name for file in files.iterdir()} == {*kept, "video_1-1.mp4"}, 5)


def test_a_folder_that_cannot_be_had_is_named(tmp_path):
    (tmp_path / "file").touch()

    async def use():
        async with open_videos(tmp_path / "file", database_url=None, files_url=None, options=VideoOptions()):
            pass

    with pytest.raises(ConfigError, match="--data-dir"):
        asyncio.run(use())


# ---- while a store is away -------------------------------------------------------------------------------------------


Break = Callable[..., None]


@pytest.fixture
def breaks(monkeypatch) -> Break:
    """Lets a method of a store fail so many times, before its work or after it."""

    def break_(owner: type, name: str, times: int, *, after: bool = False) -> None:
        real, left = getattr(owner, name), iter(range(times))
        error = sa.exc.OperationalError("x", {}, Exception("away")) if owner is JobStore else GenericError("away")

        async def call(self, *args, **kwargs):
            is_broken = next(left, None) is not None
            if is_broken and not after:
                raise error
            result = await real(self, *args, **kwargs)
            if is_broken:
                raise error
            return result

        monkeypatch.setattr(owner, name, call)

    return break_


@pytest.mark.parametrize(("owner", "name"), [(JobStore, "renew"), (JobStore, "complete"), (JobFiles, "put")])
def test_a_store_that_is_away_for_a_while_costs_no_video(tmp_path, breaks, owner, name):
    with running(tmp_path, lease=5.0) as (http, server):
        breaks(owner, name, 3)
        id = create(http)
        assert wait_until(lambda: status(http, id) in ("completed", "failed"), 10)
        assert http.get(f"{PATH}/{id}").json()["error"] is None
        assert http.get(f"{PATH}/{id}/content").content[4:8] == b"ftyp"
        assert len(server.engine.requests) == 1


def test_a_picture_that_cannot_be_read_for_a_while_costs_no_video(tmp_path, breaks, monkeypatch):
    monkeypatch.setattr("darkroom.server.runner._BUSY_SECONDS", 0.1)
    with running(tmp_path) as (http, server):
        breaks(JobFiles, "read", 4)
        body = {"data": {"prompt": "x", "num_frames": "1"}, "files": {"input_reference": PICTURE}}
        id = http.post(PATH, **body).json()["id"]
        assert wait_until(lambda: status(http, id) == "completed", 10)
        assert len(server.engine.requests) == 1 and sql(tmp_path, "SELECT crashes FROM video_jobs") == [(0,)]


def test_a_picture_that_can_never_be_read_fails_its_video_in_the_end(tmp_path, monkeypatch):
    """Also when no server lives for that long."""
    monkeypatch.setattr("darkroom.server.runner._BUSY_SECONDS", 0.1)
    with running(tmp_path, slow) as (http, _):
        body = {"data": {"prompt": "x", "num_frames": "1"}, "files": {"input_reference": PICTURE}}
        id = http.post(PATH, **body).json()["id"]
    picture = tmp_path / "files" / f"{id}.input"
    picture.unlink()
    picture.symlink_to(picture)  # which nobody can read; a file without rights root could
    for _ in range(2):
        with running(tmp_path) as (http, _):
            before = sql(tmp_path, "SELECT claim FROM video_jobs")
            assert wait_until(lambda before=before: sql(tmp_path, "SELECT claim FROM video_jobs") != before, 10)
            time.sleep(0.5)
            assert status(http, id) == "in_progress"
        sql(tmp_path, "UPDATE video_jobs SET unread_since = unread_since - 1800")
    with running(tmp_path) as (http, server):  # whose ttl is an hour
        assert wait_until(lambda: status(http, id) == "failed", 10)
        error = http.get(f"{PATH}/{id}").json()["error"]
        assert error["message"] == "The picture that the video begins from could not be read for 3600 seconds."
        assert server.engine.requests == []


def test_a_completion_whose_answer_was_lost_is_one(tmp_path, breaks):
    with running(tmp_path, lease=5.0) as (http, server):
        breaks(JobStore, "complete", 1, after=True)
        id = create(http)
        assert wait_until(lambda: status(http, id) == "completed" and not server.drain.running, 10)
        assert http.get(f"{PATH}/{id}/content").content[4:8] == b"ftyp"


def test_a_claim_is_held_until_it_would_lapse(tmp_path, breaks):
    with running(tmp_path, slow, lease=0.5) as (http, server):
        breaks(JobStore, "renew", 10)
        id = create(http)
        time.sleep(0.4)
        assert server.engine.cancelled == []
        server.engine.script = video
        breaks(JobStore, "renew", 10**9)
        assert wait_until(lambda: len(server.engine.cancelled) > 0, 5)
        breaks(JobStore, "renew", 0)
        assert wait_until(lambda: status(http, id) == "completed", 20)
        assert sql(tmp_path, "SELECT crashes FROM video_jobs") == [(0,)]


def test_a_video_that_can_never_be_kept_is_not_made_for_ever(tmp_path, breaks):
    with running(tmp_path, patience=0.1) as (http, server):
        breaks(JobFiles, "put", 10**9)
        id = create(http)
        assert wait_until(lambda: status(http, id) == "failed", 20)
        error = http.get(f"{PATH}/{id}").json()["error"]
        assert error["code"] == "server_error" and "could not be kept" in error["message"]
        assert len(server.engine.requests) == 2


def test_a_job_that_cannot_be_completed_now_is_made_again_later(tmp_path):
    with running(tmp_path, patience=0.1, lease=5.0) as (http, server):
        sql(
            tmp_path,
            "CREATE TRIGGER full BEFORE UPDATE OF status ON video_jobs WHEN NEW.status = 'completed' "
            "BEGIN SELECT RAISE(ABORT, 'the disk is full'); END",
        )
        id = create(http)
        assert wait_until(lambda: sql(tmp_path, "SELECT crashes FROM video_jobs") == [(1,)], 10)
        assert status(http, id) == "in_progress"
        sql(tmp_path, "DROP TRIGGER full")
        assert wait_until(lambda: status(http, id) == "completed", 10)
        assert len(server.engine.requests) == 2


def refuse_writes(folder: Path, condition: str) -> None:
    """To such jobs, by whichever server, until `allow_writes`."""
    sql(
        folder,
        f"CREATE TRIGGER away BEFORE UPDATE ON video_jobs WHEN {condition} BEGIN SELECT RAISE(ABORT, 'away'); END",
    )


def allow_writes(folder: Path) -> None:
    sql(folder, "DROP TRIGGER away")


def test_no_server_takes_a_video_that_is_made_and_waits_to_be_written_down(tmp_path):
    """For longer than the lease, after which a server that makes one is taken for dead."""
    with running(tmp_path, waits_for(tmp_path / "go")) as (a, first):
        id = create(a)
        assert wait_until(lambda: len(first.engine.requests) == 1, 5)
        refuse_writes(tmp_path, "NEW.status = 'completed'")
        with running(tmp_path) as (b, second):
            (tmp_path / "go").touch()
            time.sleep(2.0)
            assert status(b, id) == "in_progress"
            allow_writes(tmp_path)
            assert wait_until(lambda: status(b, id) == "completed", 10)
            assert (len(first.engine.requests), len(second.engine.requests)) == (1, 0)


def test_a_server_does_not_take_over_what_it_has_made_itself(tmp_path):
    """The database went away before the video was made: nothing says that it waits to be written down."""
    with running(tmp_path, waits_for(tmp_path / "go"), lease=4.0) as (http, server):
        id = create(http)
        assert wait_until(lambda: len(server.engine.requests) == 1, 5)
        refuse_writes(tmp_path, "NEW.claim = OLD.claim")
        (tmp_path / "go").touch()
        assert wait_until(lambda: len(list((tmp_path / "files").glob("*.jpg"))) == 1, 3.9)
        assert wait_until(lambda: sql(tmp_path, "SELECT lease < unixepoch() FROM video_jobs") == [(1,)], 10)
        time.sleep(1.0)
        allow_writes(tmp_path)
        assert wait_until(lambda: status(http, id) == "completed", 10)
        assert len(server.engine.requests) == 1


def test_what_waiting_does_not_mend_fails_at_once(tmp_path):
    with running(tmp_path, slow) as (http, _):
        body = {"data": {"prompt": "x", "num_frames": "1"}, "files": {"input_reference": PICTURE}}
        id = http.post(PATH, **body).json()["id"]
    (tmp_path / "files" / f"{id}.input").unlink()
    with running(tmp_path) as (http, server):
        assert wait_until(lambda: status(http, id) == "failed", 10)
        assert server.engine.requests == []


def test_the_flags_of_the_job_store_are_its_options(tmp_path: Path, postgresql: str, s3: str) -> None:
    config = ServeConfig(
        model="x", data_dir=tmp_path, database_url=postgresql, files_url=s3, job_ttl=60, disk_budget=0.5, max_queue=7,
        max_videos=3,
    )  # fmt: skip

    async def use() -> VideoOptions | None:
        assert await opened(config, CAPABILITIES) is None  # makes no videos
        return await opened(config, VIDEO_CAPABILITIES)

    async def opened(config: ServeConfig, capabilities: Capabilities) -> VideoOptions | None:
        async with run._stores(config, capabilities) as stores:
            if stores is None:
                return None
            await stores.files.put("a", b"x")
            assert await stores.jobs.waiting() == 0
            return stores.options

    expected = VideoOptions(ttl=60, disk_budget=500_000_000, max_waiting=7, concurrency=3)
    assert asyncio.run(use()) == expected
    assert list(tmp_path.iterdir()) == []  # it is all elsewhere
