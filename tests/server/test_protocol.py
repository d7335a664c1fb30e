from __future__ import annotations

import contextlib
import json
import logging
import re
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator

import httpx
import pytest
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from darkroom.server.protocol import HEAD_BYTES, HEAD_FIELDS, HttpProtocol

from .conftest import Server
from .engine import finished, wait_until

GET = b"GET /version HTTP/1.1\r\nhost: x\r\n"
POST = b"POST /v1/images/generations HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
PROMPT = b'{"prompt": "x"}'
CHUNKED = POST + b"transfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n" % (len(PROMPT), PROMPT)
PIECE = 256 * 1024
"""What the event loop reads at once, at most."""


class Client:
    """One connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.file = connection.makefile("rb")

    def send(self, data: bytes) -> None:
        with contextlib.suppress(ConnectionError):  # refused before all of it was sent; the answer can be read
            self.socket.sendall(data)

    def send_for_ever(self, piece: bytes) -> None:
        """Until there is an answer."""
        for _ in range((64 << 20) // len(piece)):
            if select.select([self.socket], [], [], 0)[0]:
                return
            self.send(piece)
        raise AssertionError("64 MB were taken")

    def answer(self) -> httpx.Response:
        status = int(self.file.readline().split()[1])
        headers = [(k, v.strip()) for k, _, v in (line.partition(b":") for line in iter(self.file.readline, b"\r\n"))]
        response = httpx.Response(status, headers=headers)
        content = self.file.read(int(response.headers["content-length"]))
        return httpx.Response(status, headers=headers, content=content)

    def refusal(self, status: int, code: str | None) -> str:
        """The next answer is this one, and the last."""
        answer = self.answer()
        assert (answer.status_code, answer.headers["content-type"]) == (status, "application/json")
        assert re.fullmatch(r"req_[0-9a-f]{32}", answer.headers["x-request-id"])
        assert answer.headers["connection"] == "close" and "date" in answer.headers
        error = answer.json()["error"]
        assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", None, code)
        assert self.is_closed()
        return str(error["message"])

    def is_closed(self) -> bool:
        """With nothing more to read."""
        try:
            return self.file.read(1) == b""
        except ConnectionError:
            return True


@pytest.fixture
def connect(server: Server) -> Iterator[Callable[[], Client]]:
    with contextlib.ExitStack() as stack:

        def connect() -> Client:
            address = server.uvicorn.servers[0].sockets[0].getsockname()
            client = Client(stack.enter_context(socket.create_connection(address, timeout=10)))
            stack.enter_context(client.file)
            return client

        yield connect


@pytest.fixture
def client(connect: Callable[[], Client]) -> Client:
    return connect()


@pytest.fixture
def accepted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes the parser was given, in each piece."""
    sizes: list[int] = []
    parse = HttpProtocol._parse

    def counting(self: HttpProtocol, data: bytes) -> None:
        sizes.append(len(data))
        parse(self, data)

    monkeypatch.setattr(HttpProtocol, "_parse", counting)
    return sizes


# ---- how large -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [1, 2, 20])
def test_a_head_within_the_limit_is_answered(client: Client, pieces: int) -> None:
    head = GET + b"a: %b\r\n\r\n" % (b"x" * (HEAD_BYTES - 100))
    for i in range(pieces):
        client.send(head[len(head) * i // pieces : len(head) * (i + 1) // pieces])
        time.sleep(0.002)
    assert client.answer().status_code == 200


@pytest.mark.parametrize(
    "head",
    [
        GET + b"a: %b\r\n\r\n" % (b"x" * HEAD_BYTES),
        GET + b"%b: a\r\n\r\n" % (b"x" * HEAD_BYTES),
        GET + b"a: %b\r\n" % (b"x" * 1000) * 70 + b"\r\n",
        b"GET /%b HTTP/1.1\r\n\r\n" % (b"x" * HEAD_BYTES),
        b"GET /?%b HTTP/1.1\r\na: %b\r\n\r\n" % (b"x" * (HEAD_BYTES // 2), b"x" * (HEAD_BYTES // 2)),
        GET + b"a:b\r\n" * (HEAD_FIELDS + 1) + b"\r\n",
        b"\r\n" * HEAD_BYTES,
    ],
    ids=["value", "name", "values", "url", "both", "number", "empty lines"],
)
@pytest.mark.parametrize("step", [1 << 20, 1000])
def test_a_head_over_the_limit_is_431(connect: Callable[[], Client], head: bytes, step: int) -> None:
    client = connect()
    for i in range(0, len(head), step):
        client.send(head[i : i + step])
    assert str(HEAD_BYTES) in client.refusal(431, "headers_too_large")


@pytest.mark.parametrize(
    ("begin", "piece"),
    [
        (GET, b"a:b\r\n"),
        (GET + b"a: ", b"x"),
        (GET, b"x"),
        (GET + b"a:", b" "),
        (b"GET /", b"x"),
        (b"", b"\r\n"),
    ],
    ids=["headers", "value", "name", "space", "url", "empty lines"],
)
def test_a_head_without_an_end_is_431_and_is_not_kept(
    client: Client, accepted: list[int], begin: bytes, piece: bytes
) -> None:
    client.send(begin)
    client.send_for_ever(piece * 16_384)
    client.refusal(431, "headers_too_large")
    assert sum(accepted) <= HEAD_BYTES + PIECE


def test_the_next_head_is_held_to_it_too_and_the_answers_before_it_are_given(
    client: Client, accepted: list[int]
) -> None:
    client.send(GET + b"\r\n")
    assert client.answer().status_code == 200
    client.send((GET + b"\r\n") * 3 + GET + b"a: ")
    for _ in range(3):
        assert client.answer().status_code == 200
    client.send_for_ever(b"x" * 16_384)
    client.refusal(431, "headers_too_large")
    assert sum(accepted) <= HEAD_BYTES + 2 * PIECE


def test_a_head_that_is_refused_behind_a_request_at_work_waits_for_its_answer(client: Client, server: Server) -> None:
    go = threading.Event()

    def script(message):
        while not go.is_set():
            yield 0.01
        yield finished(message)

    server.engine.script = script
    client.send(POST + b"content-length: %d\r\n\r\n%b" % (len(PROMPT), PROMPT) + GET + b"a: " + b"x" * PIECE * 2)
    assert wait_until(lambda: bool(server.engine.requests))
    time.sleep(0.1)
    assert not server.engine.cancelled
    go.set()
    answer = client.answer()
    assert (answer.status_code, answer.headers["connection"]) == (200, "close")
    assert client.is_closed()


def test_small_requests_on_one_connection_are_all_answered(client: Client) -> None:
    for _ in range(100):
        client.send(GET + b"a: %b\r\n\r\n" % (b"x" * 1000))
        assert client.answer().status_code == 200


@pytest.mark.parametrize("step", [1 << 20, 999])
def test_small_requests_at_once_are_all_answered(client: Client, step: int) -> None:
    one = GET + b"a: %b\r\n\r\n" % (b"x" * 1000)
    body = POST + b"content-length: %d\r\n\r\n%b" % (len(PROMPT), PROMPT)
    requests = (one + body) * 100
    sender = threading.Thread(
        target=lambda: [client.send(requests[i : i + step]) for i in range(0, len(requests), step)]
    )
    sender.start()
    assert [client.answer().status_code for _ in range(200)] == [200] * 200
    sender.join()


@pytest.mark.parametrize("begin", [b"content-length: 1000000\r\n\r\n", b"transfer-encoding: chunked\r\n\r\nf4240\r\n"])
def test_a_body_is_no_head(client: Client, begin: bytes) -> None:
    client.send(POST + begin)
    for _ in range(1000):
        client.send(b" " * 1000)
    client.send(b"\r\n0\r\n\r\n" if b"chunked" in begin else b"")
    assert client.answer().json()["error"]["message"].startswith("The body is not valid JSON")


# ---- trailers ------------------------------------------------------------------------------------------------------


def test_trailers_are_read_over_and_are_no_headers(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[bytes]] = []
    complete = HttpToolsProtocol.on_message_complete

    def looking(self: HttpToolsProtocol) -> None:
        seen.append([name for name, _ in self.headers])
        complete(self)

    monkeypatch.setattr(HttpToolsProtocol, "on_message_complete", looking)
    for _ in range(2):
        client.send(CHUNKED + b"authorization: b\r\nlast: c\r\n\r\n")
        assert client.answer().status_code == 200
    assert seen == [[b"host", b"content-type", b"transfer-encoding"]] * 2


@pytest.mark.parametrize("piece", [b"a:b\r\n", b"x"])
def test_trailers_without_an_end_are_431(client: Client, accepted: list[int], server: Server, piece: bytes) -> None:
    client.send(CHUNKED)
    client.send_for_ever(piece * 16_384)
    client.refusal(431, "headers_too_large")
    assert sum(accepted) <= HEAD_BYTES + 2 * PIECE
    assert server.engine.requests == []


def test_no_second_answer_is_given_to_one_request(client: Client) -> None:
    client.send(GET + b"transfer-encoding: chunked\r\n\r\n")
    assert client.answer().status_code == 200
    client.send(b"not a number\r\n")
    assert client.is_closed()


# ---- how long ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [b"G", b"GET /v1/mo", GET, GET + b"authorization: Bea"])
@pytest.mark.parametrize("is_first", [True, False])
def test_a_head_that_does_not_arrive_is_408(
    connect: Callable[[], Client], monkeypatch: pytest.MonkeyPatch, part: bytes, is_first: bool
) -> None:
    monkeypatch.setattr("darkroom.server.protocol._HEAD_SECONDS", 0.3)
    client, started = connect(), time.monotonic()
    if not is_first:
        client.send(GET + b"\r\n")
        assert client.answer().status_code == 200
    client.send(part)
    assert "within 0.3 seconds" in client.refusal(408, None)
    assert time.monotonic() - started < 5


def test_a_byte_now_and_then_gives_no_more_time(connect: Callable[[], Client], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("darkroom.server.protocol._HEAD_SECONDS", 0.3)
    client = connect()
    for byte in GET:
        if select.select([client.socket], [], [], 0.05)[0]:
            break
        client.send(bytes([byte]))
    else:
        raise AssertionError("the whole head was taken")
    client.refusal(408, None)


@pytest.mark.parametrize("sent", [b"", b"\r\n"])
def test_a_connection_on_which_nothing_is_asked_is_closed(
    connect: Callable[[], Client], monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr("darkroom.server.protocol._HEAD_SECONDS", 0.3)
    client = connect()
    client.send(sent)
    assert client.is_closed()


@pytest.mark.parametrize("sent", [b"", b"\r\n", b" ", GET[:9]])
def test_an_idle_connection_has_uvicorns_own_time(
    connect: Callable[[], Client], server: Server, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    """Also with an empty line, with what is left of a body that was answered, and with a head that came too early."""
    monkeypatch.setattr(server.uvicorn.config, "timeout_keep_alive", 0.3)
    client = connect()
    length = b"content-length: 100\r\n" if sent == b" " else b""
    client.send(GET + length + b"\r\n" + (sent if sent.startswith(b"G") else b""))
    assert client.answer().status_code == 200
    client.send(sent if not sent.startswith(b"G") else b"")
    assert client.is_closed()


def test_work_may_take_longer_than_a_head(
    connect: Callable[[], Client], server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("darkroom.server.protocol._HEAD_SECONDS", 0.2)
    server.engine.script = lambda message: iter([0.6, finished(message)])
    client = connect()
    client.send(POST + b"content-length: %d\r\n\r\n%b" % (len(PROMPT), PROMPT) + GET[:9])
    assert client.answer().status_code == 200
    client.send(GET[9:] + b"\r\n")
    assert client.answer().status_code == 200


# ---- what is no HTTP -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01",
        b"hello\r\n\r\n",
        b"GET /version HTTP/one\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\n\r\n",
        b"GET http://[x HTTP/1.1\r\n\r\n",
        GET + b"no colon\r\n\r\n",
        GET + b"content-length: 1\r\ntransfer-encoding: chunked\r\n\r\n",
        GET + b"content-length: -1\r\n\r\n",
        POST + b"transfer-encoding: chunked\r\n\r\nnot a number\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"CONNECT x:443 HTTP/1.1\r\nhost: x:443\r\n\r\n",
    ],
    ids=lambda sent: repr(sent[:24]),
)
def test_what_is_not_http_is_400(connect: Callable[[], Client], sent: bytes) -> None:
    client = connect()
    client.send(sent)
    client.refusal(400, "invalid_http")


def test_a_refusal_is_a_line_of_the_log(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "darkroom.server.protocol")
    client.send(b"hello\r\n\r\n")
    answer = client.answer()
    assert client.is_closed()  # which comes after the line
    [line] = [record.facts for record in caplog.records if record.name == "darkroom.server.protocol"]
    id = answer.headers["x-request-id"]
    assert line == {"request_id": id, "client": "127.0.0.1", "status": 400, "code": "invalid_http"}
    assert json.loads(answer.content)["error"]["code"] == "invalid_http"


def test_a_refusal_is_counted_once(connect: Callable[[], Client], server: Server) -> None:
    counts = server.app.state.context.metrics.registry.get_sample_value

    def count(*labels: str) -> float:
        return counts("darkroom_requests_total", dict(zip(("route", "outcome"), labels, strict=True))) or 0.0

    before, path = count("unknown", "client_error"), "/v1/images/generations"
    cancelled = count(path, "cancelled")
    client = connect()
    client.send(GET + b"a: %b\r\n\r\n" % (b"x" * HEAD_BYTES))
    client.refusal(431, "headers_too_large")
    assert count("unknown", "client_error") == before + 1
    client = connect()
    client.send(POST + b"transfer-encoding: chunked\r\n\r\nno number\r\n")
    client.refusal(400, "invalid_http")
    assert wait_until(lambda: count(path, "cancelled") == cancelled + 1)  # the app had it already
    assert count("unknown", "client_error") == before + 1


H2C = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAEAAEAA\r\n"
"""Java's client asks for HTTP/2 so, with each request that has no TLS."""


@pytest.mark.parametrize("pieces", [1, 2, 200])
@pytest.mark.parametrize("is_chunked", [False, True])
def test_what_asks_for_another_protocol_is_a_request_like_others(
    client: Client, server: Server, pieces: int, is_chunked: bool
) -> None:
    length = b"content-length: %d\r\n\r\n%b" % (len(PROMPT), PROMPT)
    sent = (CHUNKED + b"\r\n" if is_chunked else POST + length).replace(b"host: x\r\n", b"host: x\r\n" + H2C)
    sent += sent + GET + b"connection: upgrade\r\nupgrade: websocket\r\n\r\n" + GET + b"\r\n"
    for i in range(pieces):
        client.send(sent[len(sent) * i // pieces : len(sent) * (i + 1) // pieces])
    assert [client.answer().status_code for _ in range(4)] == [200] * 4
    assert [message.request.prompt for message in server.engine.requests] == ["x", "x"]


def test_a_body_behind_a_wish_for_another_protocol_is_no_request(client: Client) -> None:
    body = GET + b"\r\n"
    client.send(POST + H2C + b"content-length: %d\r\n\r\n" % len(body))
    client.send(body)
    assert client.answer().json()["error"]["message"].startswith("The body is not valid JSON")
    client.send(GET + b"\r\n")
    assert "version" in client.answer().json()


def test_the_head_is_bounded_as_before(client: Client) -> None:
    client.send(GET + H2C + b"a: b\r\n" * (HEAD_FIELDS - 4) + b"\r\n")
    assert client.answer().status_code == 200
    client.send(GET + H2C + b"a: b\r\n" * HEAD_FIELDS + b"\r\n")
    client.refusal(431, "headers_too_large")
