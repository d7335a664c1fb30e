from __future__ import annotations

import asyncio
import os
import random
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from PIL import Image

from darkroom.configs.capabilities import Capabilities
from darkroom.configs.config import ServeConfig
from darkroom.configs.errors import ConfigError
from darkroom.engine.media import encode_picture
from darkroom.engine.messages import Progress
from darkroom.server import run
from darkroom.server.runner import VideoOptions, open_videos

from .conftest import CAPABILITIES, QUICK, VIDEO_CAPABILITIES, Server, serving
from .engine import ScriptedEngine, slow, video, wait_until

PATH = "/v1/videos"
PICTURE = encode_picture(Image.new("RGB", (64, 48), "red"), "png", 100)
ROOT = Path(__file__).parents[2]


@contextmanager
def running(folder: Path, script=video, **options) -> Iterator[tuple[httpx.Client, Server]]:
    """A server with an engine of its own."""
    places = {name: options.pop(name) for name in ("database_url", "files_url") if name in options}
    with ScriptedEngine() as engine:
        engine.script = script
        settings = replace(QUICK, **options)
        with (
            serving(engine, capabilities=VIDEO_CAPABILITIES, folder=folder, options=settings, **places) as server,
            httpx.Client(base_url=server.url, timeout=30) as http,
        ):
            yield http, server


def create(http, **fields) -> str:
    return str(http.post(PATH, json={"prompt": "x", "num_frames": 1, "size": "64x64", **fields}).json()["id"])


def status(http, id: str) -> str:
    response = http.get(f"{PATH}/{id}")
    return str(response.json()["status"]) if response.status_code == 200 else str(response.status_code)


def sql(folder: Path, statement: str) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(folder / "videos.sqlite")) as database, database:
        return database.execute(statement).fetchall()


# ---- ends and beginnings ---------------------------------------------------------------------------------------------


def test_a_stopped_server_leaves_its_work_to_the_next(tmp_path):
    with running(tmp_path, slow) as (http, server):
        ids = [create(http) for _ in range(3)]
        assert wait_until(lambda: len(server.engine.requests) == 2)
    with running(tmp_path) as (http, _):
        started = time.monotonic()
        assert wait_until(lambda: [status(http, id) for id in ids] == ["completed"] * 3, 10)
        assert time.monotonic() - started < 5  # and not when a claim has lapsed
    with running(tmp_path) as (http, server):
        assert [status(http, id) for id in ids] == ["completed"] * 3
        assert http.get(f"{PATH}/{ids[0]}/content").content[4:8] == b"ftyp"
        assert server.engine.requests == []


def test_a_server_that_drains_ends_what_it_has_begun_and_takes_nothing_new(tmp_path):
    with running(tmp_path, _waits_for(tmp_path / "go")) as (http, server):
        ids = [create(http) for _ in range(3)]
        assert wait_until(lambda: len(server.engine.requests) == 2)
        drain = server.uvicorn.config.app.state.context.drain
        draining = asyncio.run_coroutine_threadsafe(drain.finish(60), server.loop)
        assert wait_until(lambda: drain.is_on)
        refused = http.post(PATH, json={"prompt": "x"})
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "10")
        assert not draining.done() and [status(http, id) for id in ids[:2]] == ["in_progress"] * 2
        (tmp_path / "go").touch()
        draining.result(30)
        assert [status(http, id) for id in ids] == ["completed", "completed", "queued"]
        assert len(server.engine.requests) == 2
    with running(tmp_path) as (http, server):
        assert wait_until(lambda: status(http, ids[2]) == "completed", 10)
        assert len(server.engine.requests) == 1


def test_what_does_not_end_in_time_is_parked(tmp_path):
    with running(tmp_path, slow) as (http, server):
        id = create(http)
        assert wait_until(lambda: len(server.engine.requests) == 1)
        drain = server.uvicorn.config.app.state.context.drain
        started = time.monotonic()
        asyncio.run_coroutine_threadsafe(drain.finish(0.3), server.loop).result(30)
        assert 0.25 < time.monotonic() - started < 5
    with running(tmp_path) as (http, _):
        assert wait_until(lambda: status(http, id) == "completed", 10)


def test_progress_does_not_fall_when_it_begins_again(tmp_path):
    def far(message):
        yield Progress(id=message.id, step=3, num_steps=4, seconds=0.1, batch_size=1)
        yield 3600.0

    with running(tmp_path, far) as (http, _):
        id = create(http)
        assert wait_until(lambda: http.get(f"{PATH}/{id}").json()["progress"] == 74, 5)
    with running(tmp_path, slow) as (http, server):
        assert wait_until(lambda: len(server.engine.requests) == 1, 5)
        time.sleep(0.2)
        assert http.get(f"{PATH}/{id}").json()["progress"] == 74


@contextmanager
def process(folder: Path) -> Iterator[httpx.Client]:
    """A server that is killed in the end."""
    command = [sys.executable, "-m", "tests.server.video_server", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment) as server:
        assert server.stdout is not None
        try:
            with httpx.Client(base_url=server.stdout.readline().strip(), timeout=10) as http:
                yield http
        finally:
            server.kill()


def submit_some(http: httpx.Client, accepted: list[str], count: int) -> None:
    """Until the server is gone. Only what was answered counts as accepted."""
    for _ in range(count):
        try:
            response = http.post(PATH, json={"prompt": "x", "num_frames": 1, "size": "64x64", "steps": 20})
        except (httpx.TransportError, RuntimeError):  # the server is gone, or the client closed after it
            return
        accepted.append(response.json()["id"])


def keep_account(folder: Path) -> None:
    """From now on the database itself writes down each time that a job is completed, by whomever."""
    sql(folder, "CREATE TABLE completions (id TEXT, claim TEXT)")
    sql(
        folder,
        "CREATE TRIGGER account AFTER UPDATE OF status ON video_jobs WHEN NEW.status = 'completed' "
        "BEGIN INSERT INTO completions VALUES (NEW.id, NEW.claim); END",
    )


@pytest.mark.timeout(400)
def test_nothing_is_lost_when_the_server_is_killed_at_any_moment(tmp_path, whole_matrix):
    """10 jobs, or 50 with `--matrix`, and a `kill -9` at a random moment again and again until all are done.

    What was answered with 200 is completed in the end, and completed once: what a killed server had made in part is
    made anew, under another claim, and what was completed is never made again.
    """
    jobs, moments = (50, 12) if whole_matrix else (10, 3)
    chance, kills, interrupted = random.Random(), 0, 0
    accepted: list[str] = []
    was_done: set[str] = set()
    deadline = time.monotonic() + 300
    with process(tmp_path):
        keep_account(tmp_path)
    with ThreadPoolExecutor(1) as pool:
        while len(accepted) < jobs or not set(accepted) <= was_done or kills <= moments or not interrupted:
            assert time.monotonic() < deadline, f"{len(was_done)} of {len(accepted)} are done after {kills} kills"
            with process(tmp_path) as http:
                count = max(min(10, jobs - len(accepted)), 0 if interrupted else 3)
                submitting = pool.submit(submit_some, http, accepted, count)
                time.sleep(chance.uniform(0.0, 0.6) if kills < moments or not interrupted else 3.0)
                listed = http.get(PATH, params={"limit": 100}).json()["data"]
            submitting.result()
            kills += 1
            interrupted += sum(video["status"] == "in_progress" for video in listed)
            done = {video["id"] for video in listed if video["status"] == "completed"}
            assert was_done <= done, "a finished video is no longer finished"
            assert not [video for video in listed if video["status"] == "failed"]
            was_done = done
    with process(tmp_path) as http:
        for id in accepted:
            assert http.get(f"{PATH}/{id}/content").content[4:8] == b"ftyp"
    rows = sql(tmp_path, "SELECT id, claim FROM video_jobs WHERE status = 'completed'")
    assert set(accepted) <= {id for id, _ in rows}
    assert sorted(sql(tmp_path, "SELECT id, claim FROM completions")) == sorted(rows)
    print(f"{len(accepted)} jobs accepted, {kills} kills, {interrupted} jobs interrupted by them, none lost")


# ---- several servers over one database -------------------------------------------------------------------------------


def test_two_servers_share_the_work_and_make_each_video_once(tmp_path):
    calm = {"max_waiting": 100, "lease": 30.0}
    with running(tmp_path, **calm) as (a, first), running(tmp_path, **calm) as (b, second):
        ids = [create(random.choice((a, b))) for _ in range(30)]
        assert wait_until(lambda: {status(a, id) for id in ids} == {"completed"}, 60)
        made = [message.request.seed for server in (first, second) for message in server.engine.requests]
        assert len(made) == len(set(made)) == 30
        assert first.engine.requests and second.engine.requests
        assert {status(b, id) for id in ids} == {"completed"}
        assert len(list((tmp_path / "files").glob("*.mp4"))) == 30


def test_what_another_server_holds_is_cancelled_by_a_delete(tmp_path):
    with running(tmp_path, slow) as (a, first), running(tmp_path, slow, concurrency=1) as (b, _):
        ids = [create(a) for _ in range(3)]
        assert wait_until(lambda: [status(a, id) for id in ids] == ["in_progress"] * 3, 5)
        for id in ids:
            assert b.delete(f"{PATH}/{id}").status_code == 200
        assert wait_until(lambda: len(first.engine.cancelled) == len(first.engine.requests), 5)


def test_a_server_that_says_nothing_loses_its_job_and_cannot_end_it(tmp_path):
    """Its claim is gone: what it makes of the job in the end is thrown away."""
    with ExitStack() as stack:
        a, first = stack.enter_context(running(tmp_path, _waits_for(tmp_path / "go"), renewal=60.0, lease=0.3))
        id = create(a)
        assert wait_until(lambda: len(first.engine.requests) == 1, 5)
        b, second = stack.enter_context(running(tmp_path, video))
        assert wait_until(lambda: status(b, id) == "completed", 10)
        content = b.get(f"{PATH}/{id}/content").content
        (tmp_path / "go").touch()
        assert wait_until(lambda: not first.runner.is_working, 10)
        assert len(second.engine.requests) == 1
        assert b.get(f"{PATH}/{id}/content").content == content
        assert len(list((tmp_path / "files").glob(f"{id}*"))) == 3


def _waits_for(file: Path):
    def script(message):
        while not file.exists():
            yield 0.02
        yield from video(message)

    return script


@pytest.mark.parametrize("place", ["postgresql", "s3"])
def test_jobs_and_files_that_are_elsewhere(tmp_path, place, request):
    found = request.getfixturevalue(place)
    flag = {"database_url": found} if place == "postgresql" else {"files_url": found}
    with running(tmp_path, slow, **flag) as (http, server):
        id = str(http.post(PATH, data={"prompt": "\u4e16"}, files={"input_reference": PICTURE}).json()["id"])
        assert wait_until(lambda: len(server.engine.requests) == 1, 5)
    with running(tmp_path, **flag) as (http, server):
        assert wait_until(lambda: status(http, id) == "completed", 20)
        assert server.engine.requests[0].request.images == (PICTURE,)
        whole = http.get(f"{PATH}/{id}/content").content
        assert whole[4:8] == b"ftyp"
        assert http.get(f"{PATH}/{id}/content", headers={"range": "bytes=-9"}).content == whole[-9:]
        assert http.get(f"{PATH}/{id}/content", params={"variant": "thumbnail"}).content[8:12] == b"WEBP"
        assert http.delete(f"{PATH}/{id}").status_code == 200
        assert status(http, id) == "404"
    elsewhere = "videos.sqlite" if place == "postgresql" else "files"
    assert not (tmp_path / elsewhere).exists()


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


def test_the_first_to_be_completed_go_when_the_budget_is_spent(tmp_path):
    with running(tmp_path) as (http, _):
        ids = [create(http) for _ in range(4)]
        assert wait_until(lambda: {status(http, id) for id in ids} == {"completed"}, 10)
    size = sum(file.stat().st_size for file in (tmp_path / "files").iterdir())
    with running(tmp_path, disk_budget=size * 3 // 4, cleaning=0.1) as (http, _):
        assert wait_until(lambda: status(http, min(ids)) == "404", 10)
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
