from __future__ import annotations

import socket
from contextlib import ExitStack

import httpx
import pytest

from darkroom.configs.config import Limits

from .conftest import serving
from .engine import wait_until

PATH = "/v1/images/generations"
JSON = {"content-type": "application/json"}


def refusal(response, status: int, code: str | None = None) -> str:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert len(error["message"]) < 1000
    return error["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"prompt=x",
        b'{"prompt": "x"',
        b'{"prompt": "x"} {}',
        b'{"prompt": "x", "seed": NaN}',
        b'{"prompt": "x", "seed": Infinity}',
        b'{"prompt": "x", "true_cfg_scale": 1e999}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\\udc00 \\ud800"}',
        b'{"prompt": "\xff"}',
        b'{"prompt": "\xed\xa0\x80"}',
        '{"prompt": "x"}'.encode("utf-16"),
        b'\xef\xbb\xbf{"prompt": "x"}',
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a":' * 100_000,
        b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}",
        b"[]",
        b"null",
        b'"prompt"',
    ],
    ids=lambda body: repr(body[:24]),
)
def test_what_is_not_a_json_object_is_400(http, engine, body):
    refusal(http.post(PATH, content=body, headers=JSON), 400)
    assert engine.requests == []


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "x", "a": [' + b"{}," * 100_000 + b"{}]}",
        b"{" + b",".join(b'"%d":1' % i for i in range(100_000)) + b"}",
        b'{"prompt": "x", "a": ' + b"[" * 90_000 + b"]" * 90_000 + b"}",
    ],
    ids=["items", "members", "depth"],
)
def test_what_would_take_long_to_decode_is_not_decoded(http, engine, body):
    assert "commas and brackets" in refusal(http.post(PATH, content=body, headers=JSON), 400)
    assert engine.requests == []


def test_of_many_unknown_members_the_first_is_named(http):
    body = {"prompt": "x", **{f"a{i}": i for i in range(30_000)}}
    response = http.post(PATH, json=body)
    assert refusal(response, 400, "unknown_parameter").startswith("Unknown parameter: 'a0'. Known: background, ")
    assert response.json()["error"]["param"] == "a0"


def test_prompts_may_be_full_of_commas(http, engine):
    body = {"prompt": "," * 32_000, "negative_prompt": "[" * 32_000}
    assert http.post(PATH, json=body).status_code == 200
    assert engine.requests[0].request.prompt == body["prompt"]


def test_many_bodies_at_once_are_not_read_into_memory(engine):
    head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 1500000\r\n\r\n"
    with serving(engine, limits=Limits(max_upload_mb=2, max_uploads_mb=2)) as server, ExitStack() as stack:
        address = server.url.removeprefix("http://").split(":")
        slow = [stack.enter_context(socket.create_connection(address, timeout=5)) for _ in range(2)]
        for connection in slow:
            connection.sendall(head.encode() + b" " * 1_000_000)
        context = server.app.state.context
        assert wait_until(lambda: context.inflow.held == 2_000_000)
        response = httpx.post(server.url + PATH, content=b" " * 200_000, headers=JSON)
        assert "being taken in already" in refusal(response, 429, "rate_limit_exceeded")
        assert response.headers["retry-after"] == "5"
        slow[0].close()
        assert wait_until(lambda: context.inflow.held == 1_000_000)
        assert httpx.post(server.url + PATH, json={"prompt": "x"}).status_code == 200
        assert context.inflow.held == 1_000_000


def test_the_last_of_duplicate_keys_wins(http, engine):
    assert http.post(PATH, content=b'{"prompt": "a", "prompt": "b"}', headers=JSON).status_code == 200
    assert engine.requests[0].request.prompt == "b"


@pytest.mark.parametrize(
    "content_type", ["application/json", "application/json; charset=utf-8", "Application/JSON ;charset=UTF-8"]
)
def test_json_content_types(http, content_type):
    response = http.post(PATH, content=b'{"prompt": "x"}', headers={"content-type": content_type})
    assert response.status_code == 200


@pytest.mark.parametrize("content_type", ["", "text/plain", "multipart/form-data", "application/jsonp", "x" * 9000])
def test_other_content_types_are_415(http, content_type):
    response = http.post(PATH, content=b'{"prompt": "x"}', headers={"content-type": content_type})
    refusal(response, 415, "unsupported_content_type")


def test_no_content_type_is_415(http):
    request = http.build_request("POST", PATH, content=b'{"prompt": "x"}')
    assert "content-type" not in request.headers
    refusal(http.send(request), 415, "unsupported_content_type")


def test_a_declared_length_over_the_limit_is_413_before_the_body_is_sent(server):
    with socket.create_connection(server.url.removeprefix("http://").split(":"), timeout=5) as connection:
        head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 99999999\r\n\r\n"
        connection.sendall(head.encode())
        answer = b""
        while b"request_too_large" not in answer:
            data = connection.recv(65536)
            assert data, answer
            answer += data
    assert answer.startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize("megabytes", [3, 40])
def test_a_body_over_the_limit_is_413(http, megabytes):
    refusal(http.post(PATH, content=b" " * (megabytes << 20), headers=JSON), 413, "request_too_large")


def test_a_chunked_body_over_the_limit_is_413(http):
    response = http.post(PATH, content=iter([b" " * (1 << 20)] * 3), headers=JSON)
    refusal(response, 413, "request_too_large")


def test_a_chunked_body_within_the_limit_is_read(http):
    assert http.post(PATH, content=iter([b'{"prompt":', b' "x"}']), headers=JSON).status_code == 200


@pytest.mark.parametrize("sent", [b"", b'{"prompt":'])
def test_a_body_that_does_not_arrive_is_408(server, monkeypatch, sent):
    monkeypatch.setattr("darkroom.server.body._BODY_SECONDS", -1.7)  # and two seconds more for two megabytes
    with socket.create_connection(server.url.removeprefix("http://").split(":"), timeout=5) as connection:
        head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n"
        connection.sendall(head.encode() + sent)
        answer = b""
        while b"did not arrive" not in answer:
            data = connection.recv(65536)
            assert data, answer
            answer += data
    assert answer.startswith(b"HTTP/1.1 408") and b'"type":"invalid_request_error"' in answer
