from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.golden import picture_file

from .conftest import VIDEO_CAPABILITIES, serving
from .engine import ScriptedEngine, slow, video, wait_until
from .test_runner import sql

IMAGES, VIDEOS = "/v1/images/generations", "/v1/videos"
PICTURE = picture_file(64, 48)


def keyed(key: str) -> dict[str, str]:
    return {"idempotency-key": key}


@pytest.fixture
def videos(tmp_path: Path) -> Iterator[httpx.Client]:
    with (
        ScriptedEngine() as engine,
        serving(engine, capabilities=VIDEO_CAPABILITIES, folder=tmp_path) as server,
        httpx.Client(base_url=server.url, timeout=30) as client,
    ):
        engine.script = slow
        yield client


def seeds(http: httpx.Client, key: str, **fields: Any) -> list[int]:
    answer = http.post(IMAGES, json={"prompt": "x", **fields}, headers=keyed(key))
    assert answer.status_code == 200, answer.text
    return [item["seed"] for item in answer.json()["data"]]


def test_pictures_that_are_asked_for_again_are_the_same(http: httpx.Client) -> None:
    first = seeds(http, "a", n=2)
    assert first == seeds(http, "a", n=2) and first[1] == first[0] + 1
    assert seeds(http, "b") != first[:1] != seeds(http, "c")
    assert seeds(http, "a", seed=5) == [5]


def test_a_key_is_its_owners_own(engine: ScriptedEngine) -> None:
    with serving(engine, api_key=["sk-1", "sk-2"]) as server:
        one, two = (
            httpx.Client(base_url=server.url, headers={"authorization": f"Bearer sk-{number}"}) for number in (1, 2)
        )
        with one, two:
            assert seeds(one, "a") == seeds(one, "a") != seeds(two, "a")


@pytest.mark.parametrize("key", ["", "x" * 256])
def test_keys_that_are_none(http: httpx.Client, videos: httpx.Client, engine: ScriptedEngine, key: str) -> None:
    for client, path in ((http, IMAGES), (videos, VIDEOS)):
        refused = client.post(path, json={"prompt": "x"}, headers=keyed(key))
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "Idempotency-Key")
    assert engine.requests == []


def ask(http: httpx.Client, key: str | None, **fields: Any) -> httpx.Response:
    file = {"input_reference": fields.pop("picture", PICTURE)}
    data = {"prompt": "x", "num_frames": "5", **fields}
    return http.post(VIDEOS, data=data, files=file, headers=keyed(key) if key else {})


def test_a_video_that_is_asked_for_again_is_the_same_job(videos: httpx.Client, tmp_path: Path) -> None:
    first = ask(videos, "a").json()
    again = ask(videos, "a").json()
    assert (again["id"], again["seed"]) == (first["id"], first["seed"])
    assert len({ask(videos, key).json()["id"] for key in ("b", None, None)} | {first["id"]}) == 4
    assert len(list((tmp_path / "files").glob("*.input"))) == 4
    for other in ({"prompt": "y"}, {"seed": "3"}, {"picture": picture_file(64, 48, 3)}):
        refused = ask(videos, "a", **other)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "Idempotency-Key"), other
    videos.delete(f"{VIDEOS}/{first['id']}")
    assert ask(videos, "a").json()["id"] != first["id"]


def test_a_video_whose_picture_is_gone_is_not_made_twice(videos: httpx.Client, tmp_path: Path) -> None:
    first = ask(videos, "a").json()["id"]
    (tmp_path / "files" / f"{first}.input").unlink()
    assert ask(videos, "a").json()["id"] == first
    assert ask(videos, "a", prompt="y").status_code == 400


def test_a_video_that_was_asked_for_before_an_upgrade_is_the_same_job(videos: httpx.Client, tmp_path: Path) -> None:
    ids = {key: ask(videos, key).json()["id"] for key in ("a", "b", "c")}
    fewer, more = ("json_remove(request, '$.stills', '$.strength')", "json_insert(request, '$.later', 5)")
    for key, stored in (("a", fewer), ("b", more), ("c", "json_remove(request, '$.prompt')")):
        sql(tmp_path, f"UPDATE video_jobs SET request = {stored} WHERE id = '{ids[key]}'")
    for key in ("a", "b"):
        assert ask(videos, key).json()["id"] == ids[key]
        assert ask(videos, key, prompt="y").status_code == 400
    cannot_be_read = ask(videos, "c")
    assert (cannot_be_read.status_code, cannot_be_read.json()["error"]["param"]) == (400, "Idempotency-Key")


def test_a_remix_too(videos: httpx.Client) -> None:
    source = ask(videos, None).json()["id"]
    path = f"{VIDEOS}/{source}/remix"
    ids = {videos.post(path, json={"prompt": "y"}, headers=keyed("a")).json()["id"] for _ in range(2)}
    assert len(ids) == 1 and source not in ids
    other = ask(videos, None, seed="4").json()["id"]
    refused = videos.post(f"{VIDEOS}/{other}/remix", json={"prompt": "y"}, headers=keyed("a"))
    assert refused.status_code == 400


@pytest.mark.parametrize("place", ["sqlite", "postgresql"])
def test_of_many_at_once_and_on_two_servers_there_is_one_job(
    tmp_path: Path, place: str, request: pytest.FixtureRequest
) -> None:
    url = request.getfixturevalue("postgresql") if place == "postgresql" else None
    with (
        ScriptedEngine() as engine,
        serving(engine, capabilities=VIDEO_CAPABILITIES, folder=tmp_path, database_url=url) as one,
        serving(engine, capabilities=VIDEO_CAPABILITIES, folder=tmp_path, database_url=url) as two,
        ThreadPoolExecutor(8) as pool,
        httpx.Client(timeout=30) as http,
    ):
        engine.script = video

        def post(i: int) -> httpx.Response:
            server = (one, two)[i % 2]
            body = {"data": {"prompt": "x", "num_frames": "1"}, "files": {"input_reference": PICTURE}}
            return http.post(server.url + VIDEOS, headers=keyed("a"), **body)

        for server in (one, two):  # FastAPI builds its routes at the first request, and not in two threads at a time
            assert http.get(server.url + VIDEOS).json()["data"] == []
        answers = list(pool.map(post, range(16)))
        assert {answer.status_code for answer in answers} == {200}
        [id] = {answer.json()["id"] for answer in answers}
        assert wait_until(lambda: http.get(f"{two.url}{VIDEOS}/{id}").json()["status"] == "completed", 20)
        assert len(engine.requests) == 1 and len(list((tmp_path / "files").glob("*.input"))) == 1
        assert post(1).json()["status"] == "completed"  # what is done is not done again
