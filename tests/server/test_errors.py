from __future__ import annotations

import httpx
import msgspec
import openai
import pytest

from darkroom.configs.errors import RequestError
from darkroom.engine.messages import Status
from darkroom.server.client import EngineError
from darkroom.server.errors import ApiError, to_api_error

from .conftest import serving
from .engine import failing, finished


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/v1",
        "/v1/image/generations",
        "/v1/images/generations/",
        "/v1/chat/completions",
        "/v1/files",
        "/v1/batches",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_unknown_routes_are_404(http, method, path):
    response = http.request(method, path)
    assert response.status_code == 404
    error = response.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", None, None)
    assert path in error["message"]


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", "/v1/images/generations", "POST"),
        ("PUT", "/v1/images/generations", "POST"),
        ("POST", "/v1/models", "GET"),
        ("PUT", "/v1/videos", "GET, POST"),
        ("PUT", "/v1/videos/video_1", "DELETE, GET"),
        ("PUT", "/files/x.png", "GET, HEAD"),
        ("DELETE", "/v1/models/darkroom/demo", "GET"),
        ("POST", "/health", "GET"),
        ("PROPFIND", "/metrics", "GET"),
    ],
)
def test_other_methods_are_405_and_say_what_is_allowed(http, method, path, allow):
    response = http.request(method, path)
    assert response.status_code == 405
    assert response.headers["allow"] == allow
    assert response.json()["error"]["code"] == "method_not_supported"


@pytest.mark.parametrize(
    ("reason", "error", "kind", "code", "header"),
    [
        ("internal", openai.InternalServerError, "server_error", None, ("x-should-retry", "false")),
        ("unavailable", openai.InternalServerError, "server_error", None, ("retry-after", "10")),
        ("busy", openai.RateLimitError, "rate_limit_error", "rate_limit_exceeded", ("retry-after", "1")),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engine_refuses(sdk, engine, reason, error, kind, code, header, stream):
    sdk.images.generate(prompt="x")  # takes 0.6 s by its own word, after which there is a place in the queue
    engine.script = failing(reason)
    with pytest.raises(error) as caught:
        sdk.images.generate(prompt="x", stream=stream)
    assert caught.value.status_code == {"internal": 500, "unavailable": 503, "busy": 429}[reason]
    assert (caught.value.type, caught.value.code, caught.value.param) == (kind, code, None)
    assert caught.value.response.headers[header[0]] == header[1]
    assert "secret" not in str(caught.value)


def test_a_full_queue_says_how_long_a_picture_takes(engine):
    def script(message):
        yield msgspec.structs.replace(finished(message), stages={"queue": 900.0, "denoise": 40.0, "decode": 1.3})

    def post(server):
        return httpx.post(f"{server.url}/v1/images/generations", json={"prompt": "x"}, timeout=30)

    with serving(engine) as server:
        engine.script = failing("busy")
        assert post(server).headers["retry-after"] == "5"  # nothing is known yet
        engine.script = script
        assert post(server).status_code == 200
        engine.script = failing("busy")
        answer = post(server)
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "42")
        assert "Try again in 42 s." in answer.json()["error"]["message"]


@pytest.mark.parametrize("state", ["starting", "restarting", "failed"])
def test_an_engine_that_is_not_ready_is_503_but_nonsense_is_still_400(http, engine, state):
    engine.say(Status(state=state))
    assert http.get("/health").status_code == 503
    response = http.post("/v1/images/generations", json={"prompt": "x"})
    assert (response.status_code, response.headers["retry-after"]) == (503, "10")
    assert http.post("/v1/images/generations", json={"prompt": ""}).status_code == 400
    assert engine.requests == []


def test_a_bug_is_500_and_shows_nothing(http, server, monkeypatch, caplog):
    def bug(**_):
        raise ValueError("secret")

    monkeypatch.setattr("darkroom.server.images.Look", bug)
    response = http.post("/v1/images/generations", json={"prompt": "x"})
    assert response.status_code == 500
    assert response.headers["x-should-retry"] == "false"
    assert response.json()["error"]["type"] == "server_error"
    assert "secret" not in response.text
    assert response.headers["x-request-id"] in caplog.text
    assert "ValueError: secret" in caplog.text


@pytest.mark.parametrize(
    ("error", "status", "param", "code"),
    [
        (ApiError(418, "x", param="p", code="c"), 418, "p", "c"),
        (RequestError("x", param="size"), 400, "size", "invalid_value"),
        (EngineError("busy", "x"), 429, None, "rate_limit_exceeded"),
        (ValueError("x"), 500, None, None),
    ],
)
def test_every_exception_has_an_answer(error, status, param, code):
    answer = to_api_error(error)
    assert (answer.status, answer.param, answer.code) == (status, param, code)
