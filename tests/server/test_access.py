from __future__ import annotations

import logging

import httpx
import pytest

from .conftest import VIDEO_CAPABILITIES, serving
from .engine import video, wait_until

PATH = "/v1/images/generations"
KEY = "sk-0123456789abcdef"


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, "darkroom.server.access")

    def facts() -> list[dict[str, object]]:
        return [record.facts for record in caplog.records if record.name == "darkroom.server.access"]

    return facts


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_one_line(engine, lines, stream):
    with serving(engine, api_key=[KEY]) as server:
        response = httpx.post(
            f"{server.url}{PATH}?token=hidden",
            json={"prompt": "a secret", "n": 2, "stream": stream, "user": "someone", "safety_identifier": "somebody"},
            headers={"authorization": f"Bearer {KEY}"},
        )
    [line] = lines()
    assert line["request_id"] == response.headers["x-request-id"]
    expected = {
        "client": "127.0.0.1", "key": "key-1", "method": "POST", "path": PATH, "status": 200, "size": "128x128",
        "steps": 50, "pictures": 2,
    }  # fmt: skip
    assert {name: line[name] for name in expected} == expected
    assert line["stages"]["denoise"] == 1.0 and line["seconds"] > 0
    for hidden in (KEY, "a secret", "hidden", "someone", "somebody"):
        assert hidden not in str(line)


def test_a_video_is_a_line_when_it_is_asked_for_and_one_when_it_is_made(engine, lines, caplog, tmp_path):
    caplog.set_level(logging.INFO, "darkroom.server.runner")
    engine.script = video

    def made() -> list[dict[str, object]]:
        return [record.facts for record in caplog.records if record.message == "video"]

    with serving(engine, capabilities=VIDEO_CAPABILITIES, folder=tmp_path) as server:
        id = httpx.post(f"{server.url}/v1/videos", json={"prompt": "a secret", "num_frames": 1}).json()["id"]
        assert wait_until(lambda: bool(made()), 10)
    [line] = lines()
    assert (line["video"], line["size"], line["steps"]) == (id, "128x96", 4)
    assert made()[0]["video"] == id and made()[0]["seconds"] > 0
    assert "a secret" not in str([line, made()])


def test_prompts_only_if_asked_for(engine, lines):
    with serving(engine, log_prompts=True) as server:
        httpx.post(f"{server.url}{PATH}", json={"prompt": "a cat"})
    assert lines()[0]["prompt"] == "a cat"


def test_refusals_are_logged_and_what_machines_ask_is_not(http, lines):
    http.post(PATH, json={"prompt": ""})
    http.get("/nowhere/%0aINFO%20forged")
    http.get("/health")
    http.get("/metrics")
    assert [(line["status"], line["path"]) for line in lines()] == [(400, PATH), (404, "/nowhere/%0aINFO%20forged")]


def test_no_key_is_written_anywhere(engine, caplog):
    caplog.set_level(logging.DEBUG)
    with serving(engine, api_key=[KEY]) as server:
        for key in (KEY, KEY + "x"):
            for path in (PATH, "/nowhere"):
                httpx.post(f"{server.url}{path}", json={"prompt": ""}, headers={"authorization": f"Bearer {key}"})
    assert "key-1" in str([vars(record) for record in caplog.records])
    assert KEY not in caplog.text and KEY not in str([vars(record) for record in caplog.records])


def test_whoever_reads_the_log_cannot_fetch_the_pictures(engine, lines):
    with serving(engine) as server:
        url = httpx.post(server.url + PATH, json={"prompt": "x", "response_format": "url"}).json()["data"][0]["url"]
        assert httpx.get(url).status_code == 200
    assert [line["path"] for line in lines()] == [PATH, "/files/{name}"]
    assert url.rpartition("/")[2] not in str(lines())
