from __future__ import annotations

import json

import httpx

from .engine import failing, finished


def test_silence_is_filled_with_comments(http, engine, monkeypatch):
    monkeypatch.setattr("darkroom.server.sse.KEEP_ALIVE", 0.1)

    def script(message):
        yield 0.35
        yield finished(message)

    engine.script = script
    text = http.post("/v1/images/generations", json={"prompt": "x", "stream": True}).text
    comments, _, rest = text.partition("event:")
    assert comments == ": keep-alive\n\n" * 3
    assert rest.count("event:") == 0


def test_the_sdk_skips_them(sdk, engine, monkeypatch):
    monkeypatch.setattr("darkroom.server.sse.KEEP_ALIVE", 0.02)
    engine.script = lambda message: iter([0.1, finished(message)])
    assert len(list(sdk.images.generate(prompt="x", stream=True))) == 1


def test_a_failure_after_the_headers_is_the_last_event(http, engine, monkeypatch):
    monkeypatch.setattr("darkroom.server.sse.KEEP_ALIVE", 0.02)
    engine.script = failing("busy", 0.1)
    response = http.post("/v1/images/generations", json={"prompt": "x", "stream": True})
    assert response.status_code == 200
    name, data = response.text.strip().split("\n")[-2:]
    assert name == "event: error"
    content = json.loads(data.removeprefix("data: "))
    assert set(content) == {"type", "error"}
    assert content["type"] == "error"
    assert content["error"]["code"] == "rate_limit_exceeded"


def test_nothing_in_between_may_hold_the_events_back(http: httpx.Client):
    response = http.post("/v1/images/generations", json={"prompt": "x", "stream": True})
    assert response.headers["cache-control"] == "no-cache"
    assert "content-length" not in response.headers
