"""Against a real HTTPS server on this machine; what is otherwise refused, its address, is allowed by injection."""

from __future__ import annotations

import asyncio
import base64
import gc
import ipaddress
import ssl
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
import trustme

from darkroom.configs.config import Limits
from darkroom.configs.errors import RequestError
from darkroom.engine.messages import Event, Generate
from darkroom.server.body import Inflow, Share
from darkroom.server.errors import ApiError
from darkroom.server.fetch import Fetcher, is_public
from darkroom.server.uploads import Pictures, Sent, Source, take
from tests.golden import picture_file

from .conftest import CAPABILITIES, EDIT, Server, serving
from .engine import finished, wait_until

PICTURE = b"\x89PNG" + b"x" * 5000


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.seen.append((self.path, self.headers["host"], self.headers.get("authorization")))
        name, _, rest = self.path[1:].partition("?")
        if name == "to":
            self.answer(302, b"secret", location=rest)
        elif name == "loop":
            self.answer(301, b"", location="/loop")
        elif name == "endless":
            self.send_response(200)
            self.end_headers()
            try:
                while True:
                    self.wfile.write(b"x" * 65536)
            except OSError:
                pass
        elif name == "slow":
            time.sleep(3)
        elif name == "late":
            time.sleep(0.5)
            self.answer(200, GOOD)
        elif name == "drip":
            self.send_response(200)
            self.end_headers()
            try:
                for _ in range(100):
                    self.wfile.write(b"x")
                    time.sleep(0.05)
            except OSError:
                pass
        elif name == "zip":
            self.answer(200, b"x", content_encoding="gzip")
        elif name == "gated":
            self.server.gate.wait(30)
            self.answer(200, GOOD)
        elif name == "png":
            self.answer(200, GOOD)
        else:
            self.answer(200 if name == "picture" else 404, PICTURE)

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        for header, value in headers.items():
            self.send_header(header.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


class Site(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        pass  # clients that go away are what some tests are about


class World:
    """Two names, one of them good for nothing; a name server that says what the test wants."""

    def __init__(self) -> None:
        authority = trustme.CA()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("good.test", "cdn.good.test").configure_cert(context)
        self.server: Any = Site(("127.0.0.1", 0), Handler)
        self.server.seen = []
        self.server.gate = threading.Event()
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.port = self.server.server_address[1]
        self.trust = ssl.create_default_context()
        authority.configure_trust(self.trust)
        self.names: dict[str, Sequence[str]] = {
            "good.test": ["127.0.0.1"], "cdn.good.test": ["127.0.0.1"], "private.good.test": ["10.0.0.7"],
            "metadata.good.test": ["169.254.169.254"], "both.good.test": ["127.0.0.1", "10.0.0.7"],
            "other.good.test": ["127.0.0.1"],
        }  # fmt: skip
        self.asked: list[str] = []

    async def resolve(self, host: str, port: int) -> Sequence[str]:
        self.asked.append(host)
        if host not in self.names:
            raise OSError("no such name")
        return self.names[host]

    def fetcher(self, **options: Any) -> Fetcher:
        hosts = options.pop("hosts", [f"good.test:{self.port}", f"*.good.test:{self.port}"])
        home = ipaddress.ip_address("127.0.0.1")
        return Fetcher(
            hosts,
            **{"resolve": self.resolve, "trust": self.trust, "is_allowed": lambda a: a == home or is_public(a)}
            | options,
        )

    def fetch(self, path: str, host: str = "good.test", **options: Any) -> bytes:
        return asyncio.run(self.fetcher(**options).fetch_picture(f"https://{host}:{self.port}/{path}"))


@pytest.fixture(scope="module")
def _world() -> Iterator[World]:
    world = World()
    thread = threading.Thread(target=world.server.serve_forever, daemon=True)
    thread.start()
    yield world
    world.server.shutdown()
    world.server.server_close()
    thread.join()
    with warnings.catch_warnings():  # clients that went away left sockets to be collected: now, not in another test
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture
def world(_world: World) -> World:
    _world.server.seen.clear()
    _world.server.gate.clear()
    _world.asked.clear()
    return _world


@pytest.mark.parametrize("host", ["good.test", "GOOD.test", "good.test.", "cdn.good.test"])
def test_a_picture_of_an_allowed_host(world: World, host: str) -> None:
    assert world.fetch("picture", host) == PICTURE
    assert world.server.seen[0][0] == "/picture"
    assert world.server.seen[0][1].lower().rstrip(".").startswith(host.lower().rstrip("."))


def test_a_redirect_to_an_allowed_host_is_followed(world: World) -> None:
    assert world.fetch(f"to?https://cdn.good.test:{world.port}/picture") == PICTURE
    assert world.fetch("to?/picture") == PICTURE
    assert world.asked == ["good.test", "cdn.good.test", "good.test", "good.test"]  # each is resolved anew


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://good.test/picture", "https"),
        ("file:///etc/passwd", "https"),
        ("ftp://good.test/x", "https"),
        ("gopher://good.test/x", "https"),
        ("//good.test/x", "https"),
        ("", "https"),
        ("https://evil.test/x", "on a host that"),
        ("https://good.test.evil.test:PORT/x", "on a host that"),
        ("https://evilgood.test:PORT/x", "on a host that"),
        ("https://good.test:1/x", "on a host that"),
        ("https://good.test/x", "on a host that"),  # 443 is not what the operator named
        ("https://good.test:PORT@evil.test/x", "name or password"),
        ("https://user:pw@good.test:PORT/x", "name or password"),
        ("https://evil.test\\@good.test:PORT/x", "fetched|on a host|password"),
        ("https://127.0.0.1:PORT/x", "on a host that"),
        ("https://2130706433:PORT/x", "on a host that"),
        ("https://0x7f.1:PORT/x", "on a host that"),
        ("https://[::1]:PORT/x", "on a host that"),
        ("https://[::ffff:127.0.0.1]:PORT/x", "on a host that"),
        ("https://ⓖood.evil:PORT/x", "fetched|on a host"),
        ("https://good.test\r\nx: y:PORT/", "fetched|on a host"),
        ("https://good.test:99999/", "fetched|on a host"),
        ("https://" + "a" * 70_000, "fetched|on a host"),
        ("https://private.good.test:PORT/x", "not public"),
        ("https://metadata.good.test:PORT/x", "not public"),
        ("https://both.good.test:PORT/x", "not public"),
        ("https://nowhere.good.test:PORT/x", "cannot be fetched"),
        ("https://other.good.test:PORT/picture", "cannot be fetched"),  # the certificate is not that name's
    ],
)
@pytest.mark.parametrize("way", ["at once", "by a redirect"])
def test_what_is_refused_is_not_asked_for(world: World, url: str, words: str, way: str) -> None:
    url = url.replace("PORT", str(world.port))
    if way == "by a redirect" and (
        not url or "\n" in url or len(url) > 1000 or url.startswith("//") or not url.isascii()
    ):
        pytest.skip("no such header")
    with pytest.raises(RequestError) as caught:
        if way == "at once":
            asyncio.run(world.fetcher().fetch_picture(url, param="images"))
        else:
            world.fetch(f"to?{url}")
    message = str(caught.value)
    assert any(word in message for word in words.split("|")), message
    assert "secret" not in message and len(message) < 300
    assert [path for path, *_ in world.server.seen if not path.startswith("/to")] == []


@pytest.mark.parametrize(
    ("path", "options", "words"),
    [
        ("endless", {}, "larger than 20971520 bytes"),
        ("picture", {"most_bytes": 5003}, "larger than 5003 bytes"),
        ("loop", {}, "more than 3 times"),
        ("slow", {"seconds": 0.5}, "within 0.5 seconds"),
        ("drip", {"seconds": 0.5}, "within 0.5 seconds"),
        ("nothing", {}, "cannot be fetched"),
        ("zip", {}, "cannot be fetched"),
    ],
)
def test_what_an_allowed_host_cannot_do(world: World, path: str, options: Any, words: str) -> None:
    start = time.monotonic()
    with pytest.raises(RequestError, match=words) as caught:
        world.fetch(path, **options)
    assert caught.value.param == "image_url" and time.monotonic() - start < 10


def test_a_pictures_time_begins_when_it_is_fetched(world: World) -> None:
    """Of the pictures of one request the last ones wait for the first, and no other request for all of them."""

    async def run() -> tuple[Pictures, bytes, int]:
        fetcher, url = world.fetcher(seconds=1.5), f"https://good.test:{world.port}/late"
        sent = Sent(tuple(Source("images", f"{url}?{i}") for i in range(16)))  # together they take longer than that
        taking = asyncio.create_task(take(sent, fetcher, Limits(), Share(Inflow(1 << 20))))
        await asyncio.sleep(0.1)
        other = await fetcher.fetch_picture(url)
        begun = len(world.server.seen)
        return await taking, other, begun

    pictures, other, begun = asyncio.run(run())
    assert pictures.images == (GOOD,) * 16 and other == GOOD and begun < 16


def test_who_finds_no_place_is_told_to_come_again(world: World) -> None:
    async def run() -> list[object]:
        fetcher, url, tasks = world.fetcher(seconds=1.0), f"https://good.test:{world.port}/slow", []
        for pause, number in ((0.0, 8), (0.2, 8), (0.2, 1)):  # all places; those next in line; and one more
            await asyncio.sleep(pause)
            tasks += [asyncio.create_task(fetcher.fetch_picture(url)) for _ in range(number)]
        return await asyncio.gather(*tasks, return_exceptions=True)

    *fetched, last = asyncio.run(run())
    assert all(isinstance(error, RequestError) and "within 1 seconds" in str(error) for error in fetched)
    assert isinstance(last, ApiError) and "Too many pictures are being fetched" in str(last)
    assert (last.status, last.headers) == (429, {"Retry-After": "1"})


def test_off_unless_hosts_are_named() -> None:
    with pytest.raises(RequestError, match="this server fetches none"):
        asyncio.run(Fetcher().fetch_picture("https://good.test/x"))


def test_a_name_that_changes_its_mind_is_not_asked_twice(world: World) -> None:
    """The connection goes to the address that was checked, whatever the name says next."""
    answers = iter([["127.0.0.1"], ["10.0.0.7"]])

    async def resolve(host: str, port: int) -> Sequence[str]:
        return next(answers)

    assert world.fetch("picture", resolve=resolve) == PICTURE


def test_the_next_address_is_tried(world: World) -> None:
    async def resolve(host: str, port: int) -> Sequence[str]:
        return ["127.0.0.2", "127.0.0.1"]  # nobody listens at the first

    assert world.fetch("picture", resolve=resolve, is_allowed=lambda address: address.is_loopback) == PICTURE


def test_the_products_own_check_refuses_this_machine(world: World) -> None:
    with pytest.raises(RequestError, match="not public"):
        world.fetch("picture", is_allowed=is_public)
    assert world.server.seen == []


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.1.2.3", "0.0.0.0", "0.1.2.3", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1",
        "169.254.169.254", "169.254.0.1", "100.64.0.1", "100.100.100.200", "168.63.129.16", "192.0.0.192", "192.0.2.1",
        "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255",
        "192.88.99.1",
        "::ffff:169.254.169.254", "::", "::1", "::127.0.0.1", "::8.8.8.8", "::ffff:127.0.0.1", "::ffff:8.8.8.8",
        "64:ff9b::7f00:1", "64:ff9b::808:808", "64:ff9b:1::1", "2002:7f00:1::", "2002:808:808::1", 
        "2001::1", "2001:db8::1",
        "fe80::1", "fe80::1%eth0", "fec0::1", "fc00::1", "fd00:ec2::254", "ff02::1", "100::1", "3fff::1", "5f00::1",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "172.32.0.1", "2606:4700::1111", "2a00:1450:4001::1"])
def test_addresses_that_are(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


# ---- by the routes ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def edits(_world: World, _server: Server) -> Iterator[str]:
    """The address of edits on a server that fetches from the world's hosts, which are on this machine."""
    capabilities = CAPABILITIES.override({**EDIT, "tasks": ("edit", "inpaint")})
    with serving(_server.engine, capabilities=capabilities, allow_remote_media=["good.test"]) as server:
        state = server.uvicorn.config.app.state
        state.context = replace(state.context, fetcher=_world.fetcher())
        yield f"{server.url}/v1/images/edits"


GOOD = picture_file(64, 64)
WAYS = {
    "images": lambda url: {"json": {"prompt": "x", "images": [{"image_url": url}]}},
    "mask": lambda url: {"json": {"prompt": "x", "images": [{"image_url": DATA}], "mask": {"image_url": url}}},
    "url": lambda url: {"data": {"prompt": "x", "url": url}, "files": {"user": (None, "x")}},
}
DATA = "data:image/png;base64," + base64.b64encode(GOOD).decode()


@pytest.mark.parametrize("param", WAYS)
@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("https://good.test:PORT/to?https://private.good.test:PORT/picture", "not public"),
        ("https://good.test:PORT/to?https://metadata.good.test:PORT/latest/meta-data", "not public"),
        ("https://good.test:PORT/to?https://both.good.test:PORT/picture", "not public"),
        ("https://good.test:PORT/to?https://169.254.169.254/latest/meta-data", "on a host that"),
        ("https://good.test:PORT/to?https://127.0.0.1:PORT/picture", "on a host that"),
        ("https://good.test:PORT/to?https://[::1]:PORT/picture", "on a host that"),
        ("https://good.test:PORT/to?https://[::ffff:169.254.169.254]/", "on a host that"),
        ("https://good.test:PORT/to?https://evil.test/picture", "on a host that"),
        ("https://good.test:PORT/to?https://good.test:1/picture", "on a host that"),
        ("https://good.test:PORT/to?https://good.test:PORT@evil.test/", "name or password"),
        ("https://good.test:PORT/to?http://good.test:PORT/picture", "https"),
        ("https://good.test:PORT/to?file:///etc/passwd", "https"),
        ("https://good.test:PORT/to?ftp://good.test/x", "https"),
        ("https://good.test:PORT/to?/to?/to?/to?/picture", "more than 3 times"),
        ("https://good.test:PORT/loop", "more than 3 times"),
        ("https://good.test:PORT/nothing", "cannot be fetched"),
        ("https://good.test:PORT/endless", "larger than"),
        ("https://private.good.test:PORT/picture", "not public"),
        ("http://169.254.169.254/latest/meta-data", "https"),
        ("file:///etc/passwd", "https"),
    ],
)
def test_no_way_in_leads_inside(world: World, edits: str, param: str, url: str, words: str) -> None:
    answer = httpx.post(edits, timeout=30, **WAYS[param](url.replace("PORT", str(world.port))))
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["param"], error["code"], error["type"]) == (param, "invalid_value", "invalid_request_error")
    assert words in error["message"] and "secret" not in error["message"]
    assert {path.partition("?")[0] for path, *_ in world.server.seen} <= {"/to", "/loop", "/nothing", "/endless"}


@pytest.mark.parametrize("path", ["png", "to?/png", "to?/to?/to?/png"])
def test_every_way_in_takes_what_is_allowed(world: World, edits: str, server: Server, path: str) -> None:
    for param, body in WAYS.items():
        answer = httpx.post(edits, timeout=30, **body(f"https://good.test:{world.port}/{path}"))
        assert answer.status_code == 200, (param, answer.text)
        asked = server.engine.requests[-1].request
        assert (asked.mask if param == "mask" else asked.images[0]) == GOOD


def test_a_request_counts_until_the_engine_has_it(world: World, server: Server) -> None:
    """Not only while it is read: it is in memory while its pictures are fetched, and no longer while it is drawn."""
    drawn = threading.Event()

    def script(message: Generate) -> Iterator[Event | float]:
        while not drawn.is_set():
            yield 0.01
        yield finished(message)

    server.engine.script = script
    limits, edits = Limits(max_upload_mb=2, max_uploads_mb=2), CAPABILITIES.override(EDIT)
    with (
        serving(server.engine, capabilities=edits, limits=limits, allow_remote_media=["good.test"]) as one,
        httpx.Client(base_url=one.url, timeout=30) as http,
        ThreadPoolExecutor(1) as pool,
    ):
        state = one.app.state
        state.context = replace(state.context, fetcher=world.fetcher())
        urls = [f"https://good.test:{world.port}/{name}" for name in ("png", "gated")]
        files = {"image": GOOD.ljust(1_500_000, b"x")}
        first = http.build_request("POST", "/v1/images/edits", data={"prompt": "x", "url[]": urls}, files=files)
        size = int(first.headers["content-length"]) + len(GOOD)
        answer = pool.submit(http.send, first)
        assert wait_until(lambda: state.context.inflow.held == size, 10)
        refused = http.post("/v1/images/edits", data={"prompt": "x"}, files=files)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "5")
        world.server.gate.set()
        assert wait_until(lambda: len(server.engine.requests) == 1, 10)
        assert wait_until(lambda: state.context.inflow.held == 0) and not answer.done()
        drawn.set()
        assert answer.result().status_code == 200
        assert http.post("/v1/images/edits", data={"prompt": "x"}, files=files).status_code == 200
        assert state.context.inflow.held == 0
