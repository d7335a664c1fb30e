"""Pictures under a URL, and what is counted; the other answers are in test_images.py."""

from __future__ import annotations

import asyncio
import re
import time

import httpx
import openai
import pytest

from darkroom.configs.config import Limits
from darkroom.configs.operations import OperationsConfig
from darkroom.server.app import create_app
from darkroom.server.client import EngineClient
from tests.golden import picture_file

from .conftest import CAPABILITIES, NAME, OVER, serving
from .engine import finished, wait_until

PATH, EDITS, VARIATIONS = "/v1/images/generations", "/v1/images/edits", "/v1/images/variations"
PICTURE = picture_file(96, 80)


def test_the_sdk_gets_urls_that_can_be_fetched(sdk, server):
    answer = sdk.images.generate(prompt="x", n=2, response_format="url", output_format="webp", extra_body={"seed": 5})
    assert [item.b64_json for item in answer.data] == [None, None]
    assert len({item.url for item in answer.data}) == 2
    for i, item in enumerate(answer.data):
        assert re.fullmatch(re.escape(server.url) + r"/files/[A-Za-z0-9_-]{43}\.webp", item.url)
        response = httpx.get(item.url)  # without a key
        assert (response.status_code, response.content) == (200, b"picture %d" % (5 + i))
        assert response.headers["content-type"] == "image/webp"
        assert response.headers["x-content-type-options"] == "nosniff"
        head = httpx.head(item.url)
        assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", "9")


def test_a_part_of_a_picture(http):
    url = http.post(PATH, json={"prompt": "x", "seed": 5, "response_format": "url"}).json()["data"][0]["url"]
    whole = http.get(url)
    assert (whole.headers["accept-ranges"], whole.headers["content-length"]) == ("bytes", "9")
    part = http.get(url, headers={"range": "bytes=2-4", "if-range": whole.headers["etag"]})
    assert (part.status_code, part.content, part.headers["content-range"]) == (206, b"ctu", "bytes 2-4/9")
    assert (part.headers["content-type"], part.headers["cache-control"]) == ("image/png", "private, max-age=3600")
    assert http.get(url, headers={"range": "bytes=2-4", "if-range": '"other"'}).content == whole.content
    head = http.head(url, headers={"range": "bytes=2-4"})
    assert (head.status_code, head.headers["content-length"]) == (200, "9")
    beyond = http.get(url, headers={"range": "bytes=9-"})
    assert (beyond.status_code, beyond.headers["content-range"]) == (416, "bytes */9")
    assert set(beyond.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(("path", "data"), [(EDITS, {"prompt": "x"}), (VARIATIONS, {})])
def test_edits_and_variations_too(over, path, data):
    response = over.post(path, data={**data, "response_format": "url"}, files={"image": PICTURE})
    [item] = response.json()["data"]
    assert set(item) == {"url", "seed"}
    assert httpx.get(item["url"]).content == b"picture %d" % item["seed"]


def test_a_url_is_at_the_host_that_was_asked(http):
    for host in ("localhost:8000", "pictures.example.com", "[::1]:80"):
        answer = http.post(PATH, json={"prompt": "x", "response_format": "url"}, headers={"host": host}).json()
        assert answer["data"][0]["url"].startswith(f"http://{host}/files/")


@pytest.mark.parametrize("host", ["", "a b", "[::1", "x/y", "user@host", "a:b", "a" * 300, "\xe9", 'x"><script>', "x?"])
def test_a_host_that_is_none_is_not_repeated(http, server, host):
    headers = {b"host": host.encode("latin1")}
    response = http.post(PATH, json={"prompt": "x", "response_format": "url"}, headers=headers)
    assert response.status_code == 200, response.text
    assert response.json()["data"][0]["url"].startswith(f"{server.url}/files/")


def test_a_url_has_the_servers_scheme_and_root(engine):
    async def use():
        client = EngineClient(engine.address)
        operations = OperationsConfig(root_path="/pictures")
        app = create_app(capabilities=CAPABILITIES, served_name=NAME, client=client, operations=operations)
        listener = asyncio.create_task(client.listen())
        while client.last_status.state != "ready":
            await asyncio.sleep(0.01)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="https://example.com/pictures") as http:
            answer = await http.post(PATH, json={"prompt": "x", "response_format": "url"})
            url = answer.json()["data"][0]["url"]
            fetched = await http.get(url)
        listener.cancel()
        app.state.context.files.close()
        client.close()
        return url, fetched.status_code

    url, status = asyncio.run(use())
    assert url.startswith("https://example.com/pictures/files/")
    assert status == 200


@pytest.mark.parametrize(
    "name", ["x.png", "x", "..", "%2e%2e%2fetc%2fpasswd", "..%2f..%2fetc%2fpasswd", "%00", "a/b", "x" * 5000]
)
def test_other_names_are_404(http, name):
    response = http.get(f"/files/{name}")
    assert response.status_code == 404
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert len(response.text) < 1000


def test_a_file_expires_and_the_oldest_makes_room(engine):
    limits = Limits(url_seconds=1, url_storage_mb=1)
    engine.script = lambda message: [finished(message, bytes(600_000))]
    with serving(engine, limits=limits) as server, httpx.Client(base_url=server.url) as http:

        def url():
            return http.post(PATH, json={"prompt": "x", "response_format": "url"}).json()["data"][0]["url"]

        first = url()
        assert httpx.get(first).status_code == 200
        started, second = time.monotonic(), url()
        assert httpx.get(first).status_code == 404
        assert httpx.get(second).status_code == 200
        assert wait_until(lambda: httpx.get(second).status_code == 404, 5)
        assert time.monotonic() - started > 0.5
        engine.script = lambda message: [finished(message, bytes(1 << 21))]
        response = http.post(PATH, json={"prompt": "x", "response_format": "url"})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "response_format")


@pytest.mark.parametrize("n", [1, 3])
def test_usage_counts_what_was_sent_in_once(over, sdk_of, n):
    answer = over.post(EDITS, data={"prompt": "x", "n": str(n)}, files={"image": PICTURE}).json()
    assert answer["usage"] == {
        "input_tokens": 23,
        "input_tokens_details": {"text_tokens": 7, "image_tokens": 16},
        "output_tokens": 64 * n,
        "output_tokens_details": {"text_tokens": 0, "image_tokens": 64 * n},
        "total_tokens": 23 + 64 * n,
    }


def test_a_stream_and_a_url_do_not_go_together(sdk):
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.images.generate(prompt="x", stream=True, response_format="url")
    assert caught.value.param == "response_format"


def test_files_are_gone_with_the_server(engine, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with serving(engine, capabilities=CAPABILITIES.override(OVER)) as server:
        httpx.post(server.url + PATH, json={"prompt": "x", "response_format": "url"})
        assert len(list(tmp_path.glob("darkroom-*/*.png"))) == 1
    assert list(tmp_path.iterdir()) == []
