from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from starlette.types import Receive, Scope, Send

from darkroom.configs.operations import OperationsConfig
from darkroom.server.drain import Drain
from darkroom.server.guard import Guard
from darkroom.server.keys import Keys
from darkroom.server.trail import KEY as KEY_OF_TRAIL
from darkroom.server.trail import Trail

from .conftest import Server, serving
from .engine import ScriptedEngine, slow

PATH = "/v1/images/generations"
KEY = "sk-0123456789abcdef"


@pytest.fixture(scope="module")
def _guarded() -> Iterator[tuple[Server, httpx.Client]]:
    with (
        ScriptedEngine() as engine,
        serving(engine, api_key=[KEY, "sk-other"], protect_docs=True, root_path="/images") as server,
        httpx.Client(base_url=server.url, timeout=30) as client,
    ):
        yield server, client


@pytest.fixture
def guarded(_guarded: tuple[Server, httpx.Client]) -> Server:
    _guarded[0].engine.reset()
    return _guarded[0]


@pytest.fixture
def http(guarded: Server, _guarded: tuple[Server, httpx.Client]) -> httpx.Client:
    return _guarded[1]


def raw(url: str, request: bytes) -> bytes:
    """The first bytes of the answer to a request that no client library would send."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port or 80), timeout=30) as connection:
        connection.sendall(request)
        return connection.recv(4096)


def test_the_sdk_with_the_key_without_it_and_with_another(guarded):
    sdk = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=KEY, max_retries=0)
    assert sdk.images.generate(prompt="x").data and list(sdk.models.list())
    for key in ("sk-nope", KEY[:-1], KEY + "x"):
        with pytest.raises(openai.AuthenticationError) as caught:
            sdk.with_options(api_key=key).images.generate(prompt="x")
        assert (caught.value.code, caught.value.type, caught.value.param) == (
            "invalid_api_key", "invalid_request_error", None,
        )  # fmt: skip
        assert caught.value.request_id and key not in caught.value.message
    assert len(guarded.engine.requests) == 1


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", PATH),
        ("GET", PATH),
        ("PUT", PATH),
        ("OPTIONS", PATH),
        ("HEAD", "/v1/models"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/x"),
        ("GET", "/v1/nowhere"),
        ("GET", "/%76%31/models"),
        ("GET", "/images/v1/models"),
        ("GET", "/images/%76%31/models"),
        ("GET", "/openapi.json"),
        ("GET", "/images/openapi.json"),
    ],
)
@pytest.mark.parametrize("header", [None, "Bearer nope"])
def test_all_of_it_needs_the_key(http, method, path, header):
    response = http.request(method, path, headers={"authorization": header} if header else {})
    assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")
    assert response.headers["x-request-id"]
    assert method == "HEAD" or response.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize(
    "path",
    ["//v1/models", "/v1//models", "/V1/models", "/x/../v1/models", "/images/images/v1/models", "/v1", "/v1;x/models"],
)
def test_no_other_spelling_of_a_path_leads_past_the_guard(guarded, path):
    answer = raw(guarded.url, f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    assert answer.split()[1] in (b"401", b"404")


@pytest.mark.parametrize("path", ["/health", "/metrics", "/version", "/images/health"])
def test_what_needs_no_key(http, path):
    assert http.get(path).status_code == 200


@pytest.mark.parametrize(
    "path", ["/v1/models", "/images/v1/models", "/v1/models/darkroom%2Fdemo", "/images/openapi.json"]
)
def test_with_the_key_and_whether_or_not_the_proxy_cuts_its_prefix_off(http, path):
    assert http.get(path, headers={"authorization": f"bearer {KEY}"}).status_code == 200


def test_the_document_says_where_it_is_served(http):
    document = http.get("/openapi.json", headers={"authorization": f"Bearer {KEY}"}).json()
    assert document["servers"] == [{"url": "/images"}]


def test_metrics_may_need_a_key_and_pages_need_none_without(engine):
    with serving(engine, api_key=[KEY], protect_metrics=True) as server:
        assert httpx.get(f"{server.url}/metrics").status_code == 401
        assert httpx.get(f"{server.url}/metrics", headers={"authorization": f"Bearer {KEY}"}).status_code == 200
        assert httpx.get(f"{server.url}/openapi.json").status_code == 200


@pytest.mark.parametrize(
    "value", [b"Bearer \xff\xfe", b"Bearer \xc3\xa4" + KEY.encode(), b"\xff", b"Bearer", b"Bearer " + b"a" * 50_000]
)
def test_hostile_headers_are_401(guarded, value):
    request = b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: " + value + b"\r\n\r\n"
    assert raw(guarded.url, request).split()[1] == b"401"


def test_two_keys_at_once_are_401(guarded):
    header = f"Authorization: Bearer {KEY}\r\n"
    answer = raw(guarded.url, f"GET /v1/models HTTP/1.1\r\nHost: x\r\n{header}{header}\r\n".encode())
    assert answer.split()[1] == b"401"


def test_the_body_is_not_waited_for(guarded):
    """The refusal comes while not one byte of the gigabyte has been sent."""
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000000000\r\n\r\n"
    assert raw(guarded.url, head.encode()).split()[1] == b"401"


def test_a_refusal_does_not_wait_for_a_generation(guarded, http):
    guarded.engine.script = slow
    with pytest.raises(httpx.ReadTimeout):
        http.post(PATH, json={"prompt": "x"}, headers={"authorization": f"Bearer {KEY}"}, timeout=0.3)
    assert http.post(PATH, json={"prompt": "x"}).status_code == 401


def test_cors_is_off_unless_origins_are_named(http):
    headers = {"origin": "https://a.example", "access-control-request-method": "POST"}
    assert http.options(PATH, headers=headers).status_code == 401
    assert not any(name.startswith("access-control") for name in http.get("/health", headers=headers).headers)


def test_a_client_that_has_gone_already_is_no_error() -> None:
    """uvicorn knows no address of a connection that was reset before it was looked at."""
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["path"])

    guard = Guard(app, OperationsConfig(rate_limit="9/second"), Keys.read(OperationsConfig()), Drain())
    scope = {"type": "http", "path": PATH, "method": "POST", "headers": [], "client": None, KEY_OF_TRAIL: Trail("x")}
    asyncio.run(guard(scope, None, None))  # type: ignore[arg-type]
    assert seen == [PATH]
