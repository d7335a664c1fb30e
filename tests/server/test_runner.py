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

from darkroom.engine.media import encode_picture
from darkroom.engine.messages import Failed, Progress, Status
from darkroom.server.job_files import JobFiles

from .conftest import QUICK, VIDEO_CAPABILITIES, Server, serving
from .engine import ScriptedEngine, failing, slow, video, wait_until

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
    with running(tmp_path, waits_for(tmp_path / "go")) as (http, server):
        ids = [create(http) for _ in range(3)]
        assert wait_until(lambda: len(server.engine.requests) == 2)
        drain = server.drain
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
        drain = server.drain
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


@pytest.mark.timeout(1000)
def test_nothing_is_lost_when_the_server_is_killed_at_any_moment(tmp_path, whole_matrix):
    """6 jobs, or 50 with `--matrix`, and a `kill -9` at a random moment again and again until all are done.

    What was answered with 200 is completed in the end, and completed once: what a killed server had made in part is
    made anew, under another claim, and what was completed is never made again.
    """
    jobs, moments = (50, 12) if whole_matrix else (6, 2)
    chance, kills, interrupted = random.Random(), 0, 0
    accepted: list[str] = []
    was_done: set[str] = set()
    deadline = time.monotonic() + (900 if whole_matrix else 300)
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
        a, first = stack.enter_context(running(tmp_path, waits_for(tmp_path / "go"), renewal=60.0, lease=0.3))
        id = create(a)
        assert wait_until(lambda: len(first.engine.requests) == 1, 5)
        b, second = stack.enter_context(running(tmp_path, video))
        assert wait_until(lambda: status(b, id) == "completed", 10)
        content = b.get(f"{PATH}/{id}/content").content
        (tmp_path / "go").touch()
        assert wait_until(lambda: not first.drain.running, 10)
        assert len(second.engine.requests) == 1
        assert b.get(f"{PATH}/{id}/content").content == content
        assert len(list((tmp_path / "files").glob(f"{id}*"))) == 3


def waits_for(file: Path):
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


# ---- how many wait ---------------------------------------------------------------------------------------------------


def test_no_more_wait_than_may_though_all_come_at_once(tmp_path):
    with running(tmp_path, max_waiting=2) as (http, server), ThreadPoolExecutor(16) as pool:
        server.engine.say(Status(state="restarting"))
        assert wait_until(lambda: server.client.last_status.state == "restarting")

        def post(_: int) -> httpx.Response:
            return http.post(PATH, data={"prompt": "x", "num_frames": "1"}, files={"input_reference": PICTURE})

        answers = list(pool.map(post, range(12)))  # a decoder's process is started for each
        assert sorted(answer.status_code for answer in answers) == [200] * 2 + [429] * 10
        assert all(int(answer.headers["retry-after"]) > 0 for answer in answers if answer.status_code == 429)
        assert len(list((tmp_path / "files").iterdir())) == 2


# ---- jobs that come to nothing ---------------------------------------------------------------------------------------


def test_only_the_job_that_kills_the_workers_is_charged(tmp_path):
    """Two are made at a time. The other one is lost with the first once, and then made by itself."""
    crashes: list[str] = []
    together: list[int] = []
    under_way: set[str] = set()

    def script(message):
        under_way.add(message.id)
        together.append(len(under_way))
        yield Progress(id=message.id, step=1, num_steps=4, seconds=0.1, batch_size=1)
        before = len(crashes)
        if message.request.prompt == "guilty":
            while not crashes and len(under_way) < 2:
                yield 0.02
            yield 0.1
            crashes.append(message.id)
        while not crashes:
            yield 0.02
        yield 0.1
        under_way.discard(message.id)
        if len(crashes) > before:
            yield Failed(id=message.id, error="lost", reason="unavailable")
        else:
            yield from video(message)

    with running(tmp_path, script, lease=30.0) as (http, _):
        guilty, innocent, later = (create(http, prompt=prompt) for prompt in ("guilty", "innocent", "later"))
        assert wait_until(lambda: status(http, guilty) == "failed", 20)
        assert "workers" in http.get(f"{PATH}/{guilty}").json()["error"]["message"]
        assert wait_until(lambda: [status(http, id) for id in (innocent, later)] == ["completed"] * 2, 20)
    assert len(crashes) == 2 and together[:4] == [1, 2, 1, 1]


def test_workers_that_were_lost_before_the_job_began_are_not_its_fault(tmp_path, monkeypatch):
    with running(tmp_path) as (http, server):
        read, times = JobFiles.read, []

        async def read_while_the_workers_go(self, name):
            times.append(name)
            if len(times) <= 3:
                server.engine.say(Status(state="restarting"))
                while server.client.last_status.state == "ready":
                    await asyncio.sleep(0.01)
            return await read(self, name)

        monkeypatch.setattr(JobFiles, "read", read_while_the_workers_go)
        body = {"data": {"prompt": "x", "num_frames": "1"}, "files": {"input_reference": PICTURE}}
        id = http.post(PATH, **body).json()["id"]
        for count in (1, 2, 3):
            assert wait_until(lambda count=count: len(times) == count, 10)
            assert wait_until(lambda: server.client.last_status.state == "restarting", 10)
            time.sleep(0.1)
            server.engine.say(Status(state="ready"))
        assert wait_until(lambda: status(http, id) == "completed", 10)
        assert sql(tmp_path, "SELECT crashes FROM video_jobs") == [(0,)]


def test_workers_that_are_lost_at_once_are_its_fault(tmp_path):
    """As while the prompt is encoded, before there is any step."""
    with running(tmp_path, failing("unavailable")) as (http, server):
        id = create(http)
        assert wait_until(lambda: status(http, id) == "failed", 10)
        assert len(server.engine.requests) == 2
