from __future__ import annotations

import asyncio
import base64
import io
import json
import sqlite3
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import av
import httpx
import msgspec
import openai
import psutil
import pytest
from PIL import Image

from darkroom.configs.config import Limits
from darkroom.engine.messages import Progress, Refusal, Status
from darkroom.server.jobs import Job

from .conftest import NAME, QUICK, VIDEO_CAPABILITIES, Server, serving
from .engine import ScriptedEngine, failing, finished, slow, video, wait_until
from .test_jobs import REQUEST
from .test_uploads import HOSTILE, data_url

PATH = "/v1/videos"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("videos")


@pytest.fixture(scope="module")
def _video_server(folder) -> Iterator[Server]:
    with ScriptedEngine() as engine, serving(engine, capabilities=VIDEO_CAPABILITIES, folder=folder) as server:
        yield server


@pytest.fixture
def server(_video_server) -> Iterator[Server]:
    engine = _video_server.engine
    engine.reset()
    engine.script = video
    if _video_server.client.last_status.state != "ready":
        engine.say(engine.status)
        assert wait_until(lambda: _video_server.client.last_status.state == "ready")
    yield _video_server
    with httpx.Client(base_url=_video_server.url) as http:
        while found := http.get(PATH, params={"limit": 100}).json()["data"]:
            for one in found:
                http.delete(f"{PATH}/{one['id']}")
    assert wait_until(lambda: not _video_server.drain.running)
    time.sleep(0.02)  # what was sent to the engine arrives before the next test


@pytest.fixture
def engine(server) -> ScriptedEngine:
    return server.engine


@pytest.fixture
def http(server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=10) as client:
        yield client


@pytest.fixture
def sdk(server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=10) as client:
        yield client


def create(http, **fields):
    response = http.post(PATH, json={"prompt": "a red ball", "num_frames": 5, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def ended(http, id):
    assert wait_until(lambda: http.get(f"{PATH}/{id}").json()["status"] in ("completed", "failed"), 10)
    return http.get(f"{PATH}/{id}").json()


def refused(response, status=400, param=None, code=None):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert param is None or error["param"] == param, error
    assert code is None or error["code"] == code, error
    return error["message"]


def sql(folder: Path, statement: str) -> None:
    with closing(sqlite3.connect(folder / "videos.sqlite")) as database, database:
        database.execute(statement)


def picture(size=(64, 48), file_format="PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, file_format)
    return buffer.getvalue()


def facts(data: bytes) -> tuple[int, int, int, float]:
    """(width, height, frames, frames per second) of a video."""
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        return stream.width, stream.height, sum(1 for _ in container.decode(stream)), float(stream.average_rate)


# ---- create, retrieve ------------------------------------------------------------------------------------------------


def test_the_object_is_the_contracts(http, engine):
    before = int(time.time())
    made = create(http, seed=2**64 - 1, fps=8, size="64x96")
    id = made.pop("id")
    assert id.startswith("video_") and before <= made.pop("created_at") <= time.time()
    assert made == {
        "object": "video",
        "model": NAME,
        "status": "queued",
        "progress": 0,
        "completed_at": None,
        "expires_at": None,
        "prompt": "a red ball",
        "size": "64x96",
        "seconds": "1",
        "remixed_from_video_id": None,
        "error": None,
        "num_frames": 5,
        "fps": 8,
        "seed": 2**64 - 1,
    }
    done = ended(http, id)
    assert (done["status"], done["progress"], done["error"]) == ("completed", 100, None)
    assert before <= done["completed_at"] <= time.time() and done["expires_at"] == done["completed_at"] + 3600
    content = http.get(f"{PATH}/{id}/content")
    assert content.headers["content-type"] == "video/mp4"
    assert facts(content.content) == (64, 96, 5, 8.0)
    assert engine.requests[0].request.output_format == "mp4"


@pytest.mark.parametrize(
    ("fields", "frames", "fps", "seconds"),
    [
        ({}, 65, 16, "4"),
        ({"seconds": "5"}, 81, 16, "5"),
        ({"seconds": 5}, 81, 16, "5"),
        ({"seconds": "4", "fps": 24}, 97, 24, "4"),
        ({"num_frames": 81}, 81, 16, "5"),
        ({"num_frames": 81, "seconds": "5"}, 81, 16, "5"),
        ({"video_frames": 9}, 9, 16, "1"),
        ({"target_video_length": 1, "fps": 60}, 1, 60, "1"),
        ({"seconds": "1", "fps": 1}, 1, 1, "1"),
        ({"fps": 60}, 161, 60, "3"),
        ({"video_params": {"num_frames": 17, "fps": 4}}, 17, 4, "4"),
    ],
)
def test_length_in_seconds_or_frames(http, engine, fields, frames, fps, seconds):
    engine.script = slow
    made = http.post(PATH, json={"prompt": "x", **fields}).json()
    assert (made["num_frames"], made["fps"], made["seconds"]) == (frames, fps, seconds)


def test_extensions_reach_the_engine(http, engine):
    create(
        http,
        negative_prompt="blue",
        steps=3,
        guidance_scale=2,
        guidance_scale_2=3.5,
        seed=0,
        width=64,
        height=80,
        max_sequence_length=64,
        extra_params={"cfg": 2},
        user="somebody",
        safety_identifier="somebody",
        n=1,
    )
    assert wait_until(lambda: bool(engine.requests))
    request = engine.requests[0].request
    assert (request.negative_prompt, request.num_inference_steps, request.guidance_scale) == ("blue", 3, 2.0)
    assert (request.guidance_scale_2, request.seed, request.width, request.height) == (3.5, 0, 64, 80)
    assert (request.max_sequence_length, request.task) == (64, "text-to-video")


def test_a_null_is_a_default(http, engine):
    engine.script = slow
    nullable = ["model", "seconds", "size", "input_reference", "seed", "fps", "n", "steps", "extra_body"]
    made = http.post(PATH, json={"prompt": "x", **dict.fromkeys(nullable)}).json()
    assert (made["size"], made["num_frames"]) == ("128x96", 65)


@pytest.mark.parametrize(
    "reference",
    [
        {"files": {"input_reference": ("a.png", picture(), "image/png")}},
        {"files": {"input_reference": ("upload", picture(file_format="JPEG"), "application/octet-stream")}},
        {"json": {"image_url": "data:image/png;base64," + base64.b64encode(picture()).decode()}},
        {"form": {"image_url": "data:image/png;base64," + base64.b64encode(picture()).decode()}},
        {"brackets": "data:image/png;base64," + base64.b64encode(picture()).decode()},
    ],
)
def test_a_video_begins_with_a_picture(http, engine, reference):
    fields = {"prompt": "x", "num_frames": "5"}
    if "json" in reference:
        body = {"json": {"prompt": "x", "num_frames": 5, "input_reference": reference["json"]}}
    elif "brackets" in reference:
        body = {"data": {**fields, "input_reference[image_url]": reference["brackets"]}, "files": {"n": (None, "1")}}
    elif "form" in reference:
        body = {"data": {**fields, "input_reference": json.dumps(reference["form"])}, "files": {"seed": (None, "1")}}
    else:
        body = {"data": fields, "files": reference["files"]}
    made = http.post(PATH, **body)
    assert made.status_code == 200, made.text
    assert ended(http, made.json()["id"])["status"] == "completed"
    request = engine.requests[0].request
    assert request.task == "image-to-video" and Image.open(io.BytesIO(request.images[0])).size == (64, 48)
    assert made.json()["size"] == f"{request.width}x{request.height}" == "160x96"


def test_a_page_has_20_videos_unless_it_is_told(tmp_path):
    many = replace(QUICK, max_waiting=30)
    with (
        ScriptedEngine() as engine,
        serving(engine, capabilities=VIDEO_CAPABILITIES, folder=tmp_path, options=many) as server,
        httpx.Client(base_url=server.url) as http,
    ):
        engine.script = slow
        for _ in range(21):
            create(http)
        page = http.get(PATH).json()
        assert (len(page["data"]), page["has_more"]) == (20, True)


def test_the_fetcher_refuses_this_machine(tmp_path):
    with (
        ScriptedEngine() as engine,
        serving(engine, capabilities=VIDEO_CAPABILITIES, folder=tmp_path, allow_remote_media=["localhost"]) as server,
        httpx.Client(base_url=server.url) as http,
    ):
        for url, words in (("https://localhost/a.png", "not public"), ("https://b.example/a.png", "localhost")):
            reference = {"image_url": url}
            assert words in refused(
                http.post(PATH, json={"prompt": "x", "input_reference": reference}), param="input_reference"
            )
            files = {"input_reference": (None, json.dumps(reference))}
            assert words in refused(http.post(PATH, data={"prompt": "x"}, files=files), param="input_reference")


def test_there_is_no_audio_track(http):
    id = ended(http, create(http)["id"])["id"]
    with av.open(io.BytesIO(http.get(f"{PATH}/{id}/content").content)) as container:
        assert [(stream.type, stream.codec_context.name) for stream in container.streams] == [("video", "h264")]
    refused(http.post(PATH, json={"prompt": "x", "generate_sound": True}), 400, "generate_sound", "unknown_parameter")


def test_progress_comes_from_the_steps_and_never_falls(http, engine):
    seen: list[int] = []

    def script(message):
        for step, until in ((1, 24), (2, 49), (1, 49), (3, 74)):
            yield Progress(id=message.id, step=step, num_steps=4, seconds=0.1, batch_size=1)
            while until not in seen:
                yield 0.01
        yield list(video(message))[-1]

    engine.script = script
    id = create(http)["id"]
    while (now := http.get(f"{PATH}/{id}")).json()["status"] not in ("completed", "failed"):
        assert now.headers["openai-poll-after-ms"] == "1000"
        seen.append(now.json()["progress"])
    assert seen == sorted(seen) and {24, 49, 74} <= set(seen)
    assert now.json()["progress"] == 100 and "openai-poll-after-ms" not in now.headers


def test_no_more_are_made_at_a_time_than_the_operator_says(http, engine):
    engine.script = slow
    ids = [create(http)["id"] for _ in range(4)]
    assert wait_until(lambda: len(engine.requests) == 2)
    statuses = [http.get(f"{PATH}/{id}").json()["status"] for id in ids]
    assert statuses == ["in_progress", "in_progress", "queued", "queued"]


def test_too_many_that_wait_are_refused(http, engine):
    ended(http, create(http)["id"])
    engine.say(Status(state="restarting"))
    time.sleep(0.1)
    for _ in range(8):
        create(http)
    response = http.post(PATH, json={"prompt": "x"})
    refused(response, 429, code="rate_limit_exceeded")
    assert int(response.headers["retry-after"]) == 1  # the scripted videos take 0.6 s by their own word
    refused(http.post(PATH, json={"prompt": ""}), 400, "prompt")


# ---- failures --------------------------------------------------------------------------------------------------------


def test_a_failed_job_is_a_success_over_http(http, engine):
    engine.script = failing("internal", 0.01)
    failed = ended(http, create(http)["id"])
    assert failed["status"] == "failed" and failed["completed_at"] is None and failed["expires_at"]
    assert set(failed["error"]) == {"code", "message"} and failed["error"]["code"] == "server_error"
    assert "secret" not in str(failed)
    refused(http.get(f"{PATH}/{failed['id']}/content"), 404)


def test_what_only_the_workers_can_refuse_is_the_requests_fault(http, engine):
    refusal = Refusal(message="'image' cannot be decoded.", param="image", code="invalid_value")
    engine.script = failing("internal", refusal=refusal)
    failed = ended(http, create(http)["id"])
    assert failed["error"] == {"code": "invalid_value", "message": "'image' cannot be decoded."}


def test_a_job_that_loses_the_workers_is_tried_once_more(http, engine):
    engine.script = failing("unavailable")
    failed = ended(http, create(http)["id"])
    assert failed["status"] == "failed" and "workers" in failed["error"]["message"]
    assert len(engine.requests) == 2


def test_a_busy_engine_is_asked_again(http, engine, monkeypatch):
    monkeypatch.setattr("darkroom.server.runner._BUSY_SECONDS", 0.1)
    engine.script = lambda message: (failing("busy") if len(engine.requests) < 3 else video)(message)
    assert ended(http, create(http)["id"])["status"] == "completed"


def test_a_file_that_is_no_video_fails(http, engine):
    engine.script = lambda message: iter([finished(message, b"no video")])
    assert ended(http, create(http)["id"])["error"]["code"] == "server_error"


def test_what_is_queued_waits_for_the_model(http, engine):
    engine.say(Status(state="starting"))
    time.sleep(0.1)
    id = create(http)["id"]
    time.sleep(0.2)
    assert http.get(f"{PATH}/{id}").json()["status"] == "queued"
    engine.say(Status(state="ready"))
    assert ended(http, id)["status"] == "completed"


# ---- content ---------------------------------------------------------------------------------------------------------


def test_thumbnail_and_spritesheet(http):
    id = ended(http, create(http, num_frames=81, size="128x96")["id"])["id"]
    thumbnail = http.get(f"{PATH}/{id}/content", params={"variant": "thumbnail"})
    assert thumbnail.headers["content-type"] == "image/webp"
    opened = Image.open(io.BytesIO(thumbnail.content))
    assert (opened.format, opened.size) == ("WEBP", (128, 96))
    sheet = http.get(f"{PATH}/{id}/content", params={"variant": "spritesheet"})
    assert sheet.headers["content-type"] == "image/jpeg"
    opened = Image.open(io.BytesIO(sheet.content)).convert("L")
    assert (opened.format, opened.size) == (None, (512, 384))
    greys = [opened.getpixel((64 + 128 * (i % 4), 48 + 96 * (i // 4))) for i in range(16)]
    assert greys == sorted(greys) and greys[0] < 5 and greys[-1] > 250
    refused(http.get(f"{PATH}/{id}/content", params={"variant": "sound"}), 400, "variant")


def test_parts_of_a_video(http):
    id = ended(http, create(http)["id"])["id"]
    url = f"{PATH}/{id}/content"
    whole = http.get(url)
    size = len(whole.content)
    assert (whole.headers["accept-ranges"], whole.headers["content-length"]) == ("bytes", str(size))
    part = http.get(url, headers={"range": "bytes=4-7"})
    assert (part.status_code, part.content) == (206, b"ftyp")
    assert part.headers["content-range"] == f"bytes 4-7/{size}"
    rest = http.get(url, headers={"range": "bytes=100-", "if-range": whole.headers["etag"]})
    assert rest.content == whole.content[100:]
    assert http.get(url, headers={"range": "bytes=100-", "if-range": '"other"'}).content == whole.content
    assert http.get(url, headers={"range": "bytes=-10"}).content == whole.content[-10:]
    beyond = http.get(url, headers={"range": f"bytes={size}-"})
    refused(beyond, 416)
    assert beyond.headers["content-range"] == f"bytes */{size}"


def test_content_of_what_is_not_finished(http, engine):
    engine.script = slow
    refused(http.get(f"{PATH}/{create(http)['id']}/content"), 404, code="video_not_completed")


# ---- delete ----------------------------------------------------------------------------------------------------------


def test_delete_cancels_and_frees_the_place(http, engine, server):
    engine.script = slow
    ids = [create(http)["id"] for _ in range(3)]
    assert wait_until(lambda: len(engine.requests) == 2)
    assert http.delete(f"{PATH}/{ids[0]}", headers={"content-type": "application/json"}).json() == {
        "id": ids[0],
        "object": "video.deleted",
        "deleted": True,
    }
    assert wait_until(lambda: engine.cancelled == [engine.requests[0].id] and len(engine.requests) == 3)
    refused(http.get(f"{PATH}/{ids[0]}"), 404)
    refused(http.delete(f"{PATH}/{ids[0]}"), 404)


def test_delete_removes_the_files(http, folder):
    made = http.post(PATH, data={"prompt": "x", "num_frames": "5"}, files={"input_reference": picture()}).json()
    ended(http, made["id"])
    assert len(list(folder.glob(f"files/{made['id']}*"))) == 4
    http.delete(f"{PATH}/{made['id']}")
    assert list(folder.glob("files/*")) == []


# ---- list ------------------------------------------------------------------------------------------------------------


def test_an_empty_list(http):
    assert http.get(PATH).json() == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}


def test_pages(http, engine):
    engine.script = slow
    ids = [create(http)["id"] for _ in range(5)]
    page = http.get(PATH, params={"limit": 2}).json()
    shown = [video["id"] for video in page["data"]]
    assert (page["first_id"], page["last_id"], page["has_more"]) == (shown[0], shown[1], True)
    newest = sorted(ids, reverse=True)
    assert shown == newest[:2]
    http.delete(f"{PATH}/{shown[1]}")  # a cursor that is gone goes on
    page = http.get(PATH, params={"limit": "3", "after": shown[1]}).json()
    assert ([video["id"] for video in page["data"]], page["has_more"]) == (newest[2:], False)
    page = http.get(PATH, params={"order": "asc", "limit": 1}).json()
    assert page["data"][0]["id"] == newest[-1]
    assert http.get(PATH, params={"limit": 0}).json()["has_more"] is False
    assert http.get(PATH, params={"after": newest[-1]}).json()["data"] == []


def test_a_list_of_the_longest_prompts_leaves_the_event_loop_its_turns(http, server):
    """None of them computes for longer than 20 ms."""
    prompt = "\x01\U0001f600" * 16_000  # which are 10 bytes of JSON a pair
    request = msgspec.structs.replace(REQUEST, prompt=prompt, negative_prompt=prompt)
    jobs = [Job.new(request, model="m", seconds="4")[0] for _ in range(100)]

    async def add() -> None:
        for job in jobs:
            await server.app.state.context.videos.jobs.add(job)

    async def watch() -> float:
        longest, before = 0.0, time.thread_time()
        while not is_over.is_set():
            await asyncio.sleep(0)
            longest, before = max(longest, time.thread_time() - before), time.thread_time()
        return longest

    assert http.get(PATH).json()["data"] == []  # FastAPI builds its routes at the first request
    asyncio.run_coroutine_threadsafe(add(), server.loop).result(30)
    is_over = threading.Event()
    watching = asyncio.run_coroutine_threadsafe(watch(), server.loop)
    listed = http.get(PATH, params={"limit": 100}).json()["data"]
    is_over.set()
    assert watching.result(5) < 0.02
    assert [video["prompt"] for video in listed] == [prompt] * 100


@pytest.mark.parametrize("stored", ['{"prompt": "old", "width": 64, "height": 48, "x": 1}', "nonsense"])
def test_a_job_of_another_version_is_listed_with_the_others(http, engine, folder, stored):
    engine.script = slow
    ids = [create(http)["id"] for _ in range(3)]
    sql(folder, f"UPDATE video_jobs SET request = '{stored}' WHERE id = '{ids[1]}'")
    shown = {video["id"]: video for video in http.get(PATH).json()["data"]}
    assert set(shown) == set(ids) and shown[ids[0]]["prompt"] == "a red ball"
    expected = ("old", "64x48") if stored != "nonsense" else ("", "0x0")
    assert (shown[ids[1]]["prompt"], shown[ids[1]]["size"]) == expected
    assert http.get(f"{PATH}/{ids[1]}").json()["prompt"] == expected[0]


@pytest.mark.parametrize(
    ("query", "status", "param"),
    [
        ("limit=-1", 400, "limit"),
        ("limit=101", 400, "limit"),
        ("limit=x", 400, "limit"),
        ("limit=%D9%A3", 400, "limit"),
        ("limit=99999999999999999999", 400, "limit"),
        ("order=up", 400, "order"),
        ("after=video_x", 404, "after"),
        ("after=%00", 404, "after"),
        ("after=';drop table video_jobs", 404, "after"),
    ],
)
def test_lists_that_cannot_be(http, query, status, param):
    refused(http.get(f"{PATH}?{query}"), status, param)


# ---- remix, and what no model does -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["json", "form"])
def test_remix_keeps_all_but_the_prompt(http, engine, kind):
    files = {"input_reference": picture()}
    source = http.post(PATH, data={"prompt": "x", "num_frames": "5", "seed": "7", "fps": "8"}, files=files).json()
    ended(http, source["id"])
    body = {"json": {"prompt": "y"}} if kind == "json" else {"files": {"prompt": (None, "y")}}
    remix = http.post(f"{PATH}/{source['id']}/remix", **body).json()
    assert remix["remixed_from_video_id"] == source["id"] and remix["id"] != source["id"]
    kept = ("seed", "size", "num_frames", "fps", "seconds", "model")
    assert [remix[name] for name in kept] == [source[name] for name in kept]
    assert ended(http, remix["id"])["status"] == "completed"
    first, second = (message.request for message in engine.requests)
    assert (first.prompt, second.prompt, first.images) == ("x", "y", second.images)
    for bad in ({}, {"prompt": " "}, {"prompt": 1}, {"prompt": "x" * 32_001}):
        refused(http.post(f"{PATH}/{source['id']}/remix", json=bad), 400, "prompt")
    refused(http.post(f"{PATH}/video_none/remix", json={"prompt": "y"}), 404)


def test_a_remix_of_what_is_gone_or_cannot_be_read(http, engine, folder):
    engine.script = slow
    source = http.post(PATH, data={"prompt": "x", "num_frames": "5"}, files={"input_reference": picture()}).json()["id"]
    (folder / "files" / f"{source}.input").unlink()
    message = refused(http.post(f"{PATH}/{source}/remix", json={"prompt": "y"}), 404, "id", "video_not_found")
    assert "picture" in message
    other = create(http)["id"]
    sql(folder, f"UPDATE video_jobs SET request = '{{}}' WHERE id = '{other}'")
    assert "version" in refused(http.post(f"{PATH}/{other}/remix", json={"prompt": "y"}), 400, "id")


@pytest.mark.parametrize("what", ["edits", "extensions", "characters"])
def test_what_takes_videos_is_refused(http, what):
    message = refused(http.post(f"{PATH}/{what}", json={"prompt": "x", "video": {"id": "video_1"}}))
    assert NAME in message
    refused(http.post(f"{PATH}/{what}", data={"prompt": "x"}, files={"video": b"x"}))


def test_unknown_ids_and_methods(http):
    refused(http.get(f"{PATH}/characters/char_1"), 404)
    for id in ("video_1", "..%2F..%2Fetc%2Fpasswd", "%00", "x" * 1000, "edits"):
        refused(http.get(f"{PATH}/{id}"), 404)
        refused(http.delete(f"{PATH}/{id}"), 404)
        refused(http.get(f"{PATH}/{id}/content"), 404)
    response = http.put(PATH)
    refused(response, 405, code="method_not_supported")
    assert response.headers["allow"]


# ---- hostile input ---------------------------------------------------------------------------------------------------


INVALID, TYPE, BELOW, ABOVE = "invalid_value", "invalid_type", "integer_below_min_value", "integer_above_max_value"
SIZES = ("100x100", "0x0", "99999x99999", "128X96", "128x96\n", "+128x96", "\uff11\uff12\uff18x96", "1_28x96", "128")
LENGTHS = ("0", "-1", "1e9", "99999", "4.5", "", "\u0664", "4\n", "+4", "04", " 4", "4_0", "nan", 0, -1, 10**4000, "11")
URLS = (
    "file:///etc/passwd", "http://169.254.169.254/", "https://localhost/a.png", "gopher://x/", "//x/a.png",
    "/etc/passwd", "", "data:image/png;base64,%%%", "data:image/png;base64,aGVsbG8=", "data:,x",
    "data:image/svg+xml;base64,PHN2Zy8+",
)  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"prompt": None}, "prompt", "missing_required_parameter"),
        ({"prompt": " "}, "prompt", INVALID),
        ({"prompt": "x" * 32_001}, "prompt", "string_above_max_length"),
        ({"prompt": 5}, "prompt", TYPE),
        *(({"seconds": value}, "seconds", INVALID) for value in LENGTHS),
        *(({"seconds": value}, "seconds", TYPE) for value in (4.5, True, ["4"])),
        ({"seconds": "5", "num_frames": 17}, "num_frames", INVALID),
        ({"num_frames": 6}, "num_frames", INVALID),
        *(({"num_frames": value}, "num_frames", BELOW) for value in (0, -3, -(10**4000))),
        *(({"num_frames": value}, "num_frames", ABOVE) for value in (165, 10**30, 10**4000)),
        *(({"num_frames": value}, "num_frames", TYPE) for value in ("5", 5.5, True)),
        *(({"fps": value}, "fps", BELOW) for value in (0, -1)),
        *(({"fps": value}, "fps", ABOVE) for value in (61, 10**30, 10**4000)),
        *(({"fps": value}, "fps", TYPE) for value in ("16", 16.0)),
        *(({"size": value}, "size", INVALID) for value in SIZES),
        ({"size": [128, 96]}, "size", TYPE),
        ({"size": "128x96", "width": 64}, "width", INVALID),
        ({"width": 10**4000}, "width", ABOVE),
        ({"width": 10**4000, "height": 10**4000}, "width", ABOVE),
        ({"height": -64}, "size", INVALID),
        ({"model": "other"}, "model", "model_not_found"),
        ({"model": 5}, "model", TYPE),
        ({"seed": -1}, "seed", BELOW),
        ({"seed": 2**64}, "seed", ABOVE),
        ({"seed": 10**4000}, "seed", ABOVE),
        ({"n": 0}, "n", BELOW),
        ({"n": 2}, "n", ABOVE),
        ({"num_inference_steps": 0}, "num_inference_steps", BELOW),
        ({"num_inference_steps": 100_000}, "num_inference_steps", ABOVE),
        ({"steps": 10**4000}, "num_inference_steps", ABOVE),
        ({"guidance_scale": 1e6}, "guidance_scale", INVALID),
        ({"guidance_scale": 10**400}, "guidance_scale", TYPE),
        ({"guidance_scale_2": 1e6}, "guidance_scale_2", INVALID),
        ({"true_cfg_scale": 3.0}, "true_cfg_scale", INVALID),
        ({"cfg": 2, "guidance_scale": 3}, "guidance_scale", INVALID),
        ({"max_sequence_length": 10**4000}, "max_sequence_length", ABOVE),
        ({"output_path": "/etc/passwd"}, "output_path", "unknown_parameter"),
        ({"x" * 100_000: 1}, "x" * 80, "unknown_parameter"),
        ({"input_reference": "/etc/passwd"}, "input_reference", TYPE),
        *(({"input_reference": {"image_url": url}}, "input_reference", INVALID) for url in URLS),
        ({"input_reference": {"file_id": "file_1"}}, "input_reference", None),
        ({"input_reference": {}}, "input_reference", "missing_required_parameter"),
        ({"input_reference": []}, "input_reference", TYPE),
        ({"extra_body": 5}, "extra_body", TYPE),
        ({"video_params": [1]}, "video_params", TYPE),
    ],
    ids=lambda value: str(value)[:40],
)
def test_fields_that_cannot_be(http, engine, fields, param, code):
    body = {"prompt": "x", **fields}
    status = 404 if param == "model" and code != TYPE else 400
    response = http.post(PATH, content=json.dumps(body), headers={"content-type": "application/json"})
    assert len(refused(response, status, param, code)) < 1000
    assert http.get(PATH).json()["data"] == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"fps": "nan"}, "fps"),
        ({"guidance_scale": "nan"}, "guidance_scale"),
        ({"guidance_scale": "inf"}, "guidance_scale"),
        ({"guidance_scale": "1e999"}, "guidance_scale"),
        ({"num_frames": "1_7"}, "num_frames"),
        ({"num_frames": "\u0665"}, "num_frames"),
        ({"num_frames": "9" * 5000}, "num_frames"),
        ({"seed": "true"}, "seed"),
        ({"extra_params[fps]": "x"}, "fps"),
        ({"extra_params": "{"}, "extra_params"),
        ({"extra_params": '{"a":' * 10_000}, "extra_params"),
        ({"input_reference": "text"}, "input_reference"),
        ({"input_reference[image_url]": "http://169.254.169.254/"}, "input_reference"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_forms_that_cannot_be(http, fields, param):
    code = INVALID if param == "input_reference" else TYPE
    response = http.post(PATH, data={"prompt": "x", **fields}, files={"user": (None, "x")})
    assert len(refused(response, 400, param, code)) < 1000


def test_a_form_is_text_and_numbers(http, engine):
    data = {"prompt": "ü 世界", "num_frames": "5", "seconds": "", "guidance_scale": "2.5", "extra_params[seed]": "9"}
    del data["seconds"]
    response = http.post(PATH, data=data, files={"extra_body": (None, '{"fps": 8}')})
    assert response.status_code == 200, response.text
    assert (response.json()["prompt"], response.json()["seed"], response.json()["fps"]) == ("ü 世界", 9, 8)


@pytest.mark.parametrize("content", [b"", b"GIF89a", picture()[:-30], b"%PDF-1.7", b"<svg/>", bytes(10_000)])
def test_pictures_that_are_none(http, content):
    message = refused(http.post(PATH, data={"prompt": "x"}, files={"input_reference": content}), 400, "input_reference")
    assert "input_reference" in message


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"input_reference": '{"image_url": "https://example.com/a.png"}'}, "fetches nothing"),
        ({"input_reference": '{"image_url": "data:image/png;base64,AAAA", "file_id": "x"}'}, "no Files API"),
        ({"input_reference[file_id]": "x"}, "no Files API"),
        ({"input_reference": "{}"}, "expected an 'image_url'"),
        ({"input_reference": "{"}, "should be a JSON object"),
        ({"input_reference": ""}, "no PNG"),
        ({"input_reference": "{}", "input_reference[image_url]": "x"}, "more than once"),
    ],
)
def test_references_of_a_form_that_lead_nowhere(http, fields, words):
    files = {"user": (None, "x")}
    assert words in refused(http.post(PATH, data={"prompt": "x", **fields}, files=files), 400, "input_reference")


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pictures_end_at_the_header(http, name):
    started = time.monotonic()
    refused(http.post(PATH, data={"prompt": "x"}, files={"input_reference": HOSTILE[name]}), 400, "input_reference")
    body = {"prompt": "x", "input_reference": {"image_url": data_url(HOSTILE[name])}}
    refused(http.post(PATH, json=body), 400, "input_reference")
    assert time.monotonic() - started < 3


def test_the_operators_limits_are_of_this_picture_too(tmp_path):
    with (
        ScriptedEngine() as engine,
        serving(
            engine,
            capabilities=VIDEO_CAPABILITIES,
            folder=tmp_path,
            limits=Limits(max_image_pixels=64 * 47, max_upload_mb=1),
        ) as server,
        httpx.Client(base_url=server.url) as http,
    ):
        message = refused(
            http.post(PATH, data={"prompt": "x"}, files={"input_reference": picture()}), 400, "input_reference"
        )
        assert "3008" in message
        for body in ({"json": {"prompt": "x" * (1 << 20)}}, {"data": {"prompt": "x"}, "files": {"a": bytes(1 << 20)}}):
            refused(http.post(PATH, **body), 413, code="request_too_large")


def test_a_request_counts_while_its_picture_is_decoded(http, server):
    file = picture(size=(8192, 8192))  # takes a second or so
    inflow = server.app.state.context.inflow
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(http.post, PATH, data={"prompt": "x"}, files={"input_reference": file}, timeout=60)
        running = psutil.Process().children
        assert wait_until(lambda: any("darkroom.server.decoder" in child.cmdline() for child in running()), 10)
        assert inflow.held > len(file)
        assert answer.result().status_code == 200
    assert wait_until(lambda: inflow.held == 0)


def test_content_types(http):
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        refused(
            http.post(PATH, content=b"prompt=x", headers={"content-type": kind}), 415, code="unsupported_content_type"
        )


# ---- OpenAI's SDK ----------------------------------------------------------------------------------------------------


def test_the_sdk(sdk, tmp_path):
    made = sdk.videos.create_and_poll(
        prompt="a red ball", model=NAME, seconds="4", size="64x64", extra_body={"fps": 4}, poll_interval_ms=50
    )
    assert (made.status, made.progress, made.seconds, made.size, made.error) == ("completed", 100, "4", "64x64", None)
    content = sdk.videos.download_content(made.id)
    assert facts(content.read()) == (64, 64, 17, 4.0)
    content.write_to_file(tmp_path / "a.mp4")
    assert (tmp_path / "a.mp4").read_bytes() == content.content
    thumbnail = sdk.videos.download_content(made.id, variant="thumbnail").content
    assert Image.open(io.BytesIO(thumbnail)).format == "WEBP"
    with sdk.videos.with_streaming_response.download_content(made.id, variant="video") as response:
        assert b"".join(response.iter_bytes()) == content.content
    remix = sdk.videos.remix(made.id, prompt="a blue ball")
    assert remix.remixed_from_video_id == made.id
    assert sdk.videos.poll(remix.id, poll_interval_ms=50).status == "completed"
    assert [video.id for video in sdk.videos.list(limit=1)] == [remix.id, made.id]
    assert [video.id for video in sdk.videos.list(limit=1, order="asc")] == [made.id, remix.id]
    deleted = sdk.videos.delete(made.id)
    assert (deleted.id, deleted.deleted, deleted.object) == (made.id, True, "video.deleted")
    with pytest.raises(openai.NotFoundError):
        sdk.videos.retrieve(made.id)


def test_the_sdk_sends_a_picture(sdk, engine, tmp_path):
    (tmp_path / "a.png").write_bytes(picture())
    for reference in (picture(), tmp_path / "a.png", ("a.png", picture(), "image/png")):
        made = sdk.videos.create(prompt="x", input_reference=reference, extra_body={"num_frames": 5})
        assert sdk.videos.poll(made.id, poll_interval_ms=20).status == "completed"
    assert {message.request.images for message in engine.requests} == {(picture(),)}


def test_the_sdk_polls_a_failed_job(sdk, engine):
    engine.script = failing("internal")
    failed = sdk.videos.create_and_poll(prompt="x", poll_interval_ms=20)
    assert failed.status == "failed" and failed.error.code == "server_error"


def test_the_async_sdk(server):
    async def use() -> bytes:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as sdk:
            made = await sdk.videos.create_and_poll(prompt="x", seconds="1", poll_interval_ms=20)
            assert made.status == "completed"
            assert [video.id async for video in sdk.videos.list(limit=1)] == [made.id]
            content = await sdk.videos.download_content(made.id)
            assert (await sdk.videos.delete(made.id)).deleted
            return content.read()

    assert facts(asyncio.run(use())) == (128, 96, 17, 16.0)
