"""Forms: what is read, what is refused, and that nothing at all is a failure of the server."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from darkroom.configs.config import Limits
from tests.golden import picture_file

from .chance import examples
from .conftest import CAPABILITIES, EDIT, VIDEO_CAPABILITIES, serving
from .engine import ScriptedEngine, video

PATH, VARIATIONS = "/v1/images/edits", "/v1/images/variations"
PICTURE = picture_file(64, 64)
FORM = {"content-type": "multipart/form-data; boundary=b"}
INVALID, TYPE = "invalid_value", "invalid_type"


def part(name: str, value: bytes = b"x", header: str = "") -> bytes:
    head = f'--b\r\nContent-Disposition: form-data; name="{name}"{header}\r\n\r\n'
    return head.encode("latin1") + value + b"\r\n"


IMAGE = part("image", PICTURE, '; filename="upload"\r\nContent-Type: application/octet-stream')
END = b"--b--\r\n"


def body(*parts: bytes) -> bytes:
    return b"".join([IMAGE, part("prompt"), *parts, END])


def post(http, content, headers=FORM):
    return http.post(PATH, content=content, headers=headers)


def refusal(response, status: int = 400) -> dict:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert len(error["message"]) < 1000
    return error


@pytest.mark.parametrize(
    "content",
    [
        body(),
        body() + b"\r\n",
        body() + b"epilogue",
        b"\r\n" + body(),
        b"preamble\r\n" + body(),
        body(part("n", b"1"), part("n", b"1")),
        body(part("stream", b"False"), part("seed", b"5")),
        body(part("seed", b"18446744073709551615")),
        body(part("true_cfg_scale", b"4")),
        body(part("true_cfg_scale", b"2.5e0")),
        body(part("extra_body", b'{"seed": 5, "negative_prompt": null}')),
        body(part("seed", b"5", "\r\nContent-Transfer-Encoding: 8bit\r\nContent-Type: text/plain; charset=utf-8")),
        body(part("image[]", PICTURE), part("image", PICTURE, "; filename=../../x.svg")),
        body(part("image", PICTURE, '; filename="\xe9\xff.png"\r\nContent-Type: image/svg+xml')),
        b"".join([part("image", PICTURE), part("prompt", b"x\r\n--a\r\n--\r\r\n"), END]),
    ],
)
def test_what_clients_send_is_read(edit, engine, content):
    response = post(edit, content)
    assert response.status_code == 200, response.text
    assert engine.requests[0].request.images[0] == PICTURE


def test_a_body_comes_in_any_pieces(edit, engine):
    content = body(part("seed", b"5"))
    for size in (1, 7, len(content) - 3):
        pieces = iter([content[i : i + size] for i in range(0, len(content), size)])
        assert post(edit, pieces).status_code == 200
        assert (engine.requests[-1].request.seed, engine.requests[-1].request.images) == (5, (PICTURE,))


@pytest.mark.parametrize(
    ("content", "param", "code"),
    [
        (b"", None, None),
        (b"--b", None, None),
        (b"hello", None, None),
        (b"{}", None, None),
        (IMAGE, None, None),
        (IMAGE + part("prompt"), None, None),
        (body()[:-6], None, None),
        (b"--b\r\n\r\nx\r\n" + END, None, None),
        (b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n" + END, None, INVALID),
        (b"--b\r\nContent-Disposition: attachment; name=prompt\r\n\r\nx\r\n" + END, None, None),
        (b"--b\nContent-Disposition: form-data; name=prompt\n\nx\n" + END, None, None),
        (b"--b\r\n" + b"x" * 10_000, None, None),
        (b"--b\r\n" + b"x: y\r\n" * 100, None, None),
        (body(part("prompt", b"y")), "prompt", INVALID),
        (body(part("n", b"1"), part("n", b"2")), "n", INVALID),
        (body(part("seed", b"1"), part("seed[]", b"1")), "seed", INVALID),
        (body(part("seed[]", b"1")), "seed", TYPE),
        (body(part("seed[a]", b"1"), part("seed", b"1")), "seed", INVALID),
        (body(part("steps", b"4"), part("num_inference_steps", b"5")), "num_inference_steps", INVALID),
        (body(part("seed", b"1"), part("extra_params[seed]", b"2")), "seed", INVALID),
        (body(part("extra_params", b"[1]")), "extra_params", TYPE),
        (body(part("extra_params", b'{"seed": NaN}')), "extra_params", TYPE),
        (body(part("extra_params", b"[" * 100_000)), "extra_params", TYPE),
        (body(part("prompt[", b"x")), "prompt[", INVALID),
        (body(part("a" + "[b]" * 5, b"x")), "a" + "[b]" * 5, INVALID),
        (body(part("", b"x")), None, INVALID),
        (body(part("negative_prompt", b"\xff")), "negative_prompt", INVALID),
        (body(part("negative_prompt", b"\xed\xa0\x80")), "negative_prompt", INVALID),
        (body(part("seed", b"1", "\r\nContent-Transfer-Encoding: base64")), "seed", INVALID),
        (body(part("seed", b"1", "\r\nContent-Length: 5")), None, None),
        (body(part("promt")), "promt", "unknown_parameter"),
        (body(part("\xe9" * 200)), "\xe9" * 80, "unknown_parameter"),
    ],
    ids=lambda value: repr(value)[-40:],
)
def test_what_is_no_form_or_no_single_meaning_is_400(edit, engine, content, param, code):
    error = refusal(post(edit, content))
    assert (error["param"], error["code"]) == (param, code)
    assert engine.requests == []


@pytest.mark.parametrize(
    ("name", "text"),
    [(name, text) for name in ("n", "seed", "num_inference_steps") for text in ("", "1.0", "1e0", "0x1", "1_0", " 1")]
    + [("n", text) for text in ("\uff11", "+1", "9" * 5000, "nan", "null", "true")]
    + [("true_cfg_scale", text) for text in ("nan", "inf", "-inf", "1e999", "", "1,5", "\u0661", "9" * 500, ".5", "1.")]
    + [("stream", text) for text in ("yes", "", "2", "null")],
)
def test_numbers_and_booleans_are_strict(edit, engine, name, text):
    error = refusal(post(edit, body(part(name, text.encode()))))
    assert (error["param"], error["code"]) == (name, TYPE)
    assert engine.requests == []


@pytest.mark.parametrize(
    "boundary", ["", "; boundary=", '; boundary=""', "; boundary=\xe9", "; Boundary=c", "; boundary=" + "x" * 8000]
)
def test_boundaries_that_are_none(edit, boundary):
    headers = {b"content-type": b"multipart/form-data" + boundary.encode("latin1")}
    refusal(post(edit, body(), headers))


def test_a_declared_length_over_the_limit_is_413_before_the_body_is_sent(edit):
    address = (edit.base_url.host, edit.base_url.port)
    with socket.create_connection(address, timeout=5) as connection:
        head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-type: {FORM['content-type']}\r\ncontent-length: 999999999"
        connection.sendall(f"{head}\r\n\r\n".encode())
        answer = b""
        while b"request_too_large" not in answer:
            data = connection.recv(65536)
            assert data, answer
            answer += data
    assert answer.startswith(b"HTTP/1.1 413")


@pytest.fixture(scope="module")
def small(_server):
    """A server with low limits."""
    limits = Limits(max_upload_mb=2, max_image_mb=1, max_image_pixels=64 * 64, max_form_fields=8, max_field_kb=1)
    with serving(_server.engine, capabilities=CAPABILITIES.override(EDIT), limits=limits) as server:
        yield server


@pytest.fixture
def http(small, server):
    with httpx.Client(base_url=small.url, timeout=10) as client:
        yield client


def test_within_the_limits(http):
    assert post(http, body(*[part("image", PICTURE)] * 3)).status_code == 200


@pytest.mark.parametrize(
    ("content", "status", "param"),
    [
        (body(part("image", b"x" * (1 << 20) + b"x")), 413, "image"),
        (body(part("negative_prompt", b"x" * 1025)), 413, "negative_prompt"),
        (body(part("mask", b"x" * (1 << 20)), part("markup", b"x" * (1 << 20))), 413, None),
        (body(part("image", picture_file(65, 64))), 400, "image"),
        (body(*[part("n", b"1")] * 9), 400, None),
    ],
)
def test_every_limit_is_kept(http, engine, content, status, param):
    assert refusal(post(http, content), status)["param"] == param
    assert refusal(post(http, iter([content[:99], content[99:]])), status)["param"] == param
    assert engine.requests == []


# ---- forms that chance has drawn -------------------------------------------------------------------------------------

FIELDS = (
    "prompt", "n", "seed", "size", "stream", "strength", "extra_params", "extra_body", "user", "image", "image[]",
    "mask", "url", "input_reference", "num_frames", "seconds", "lora[name]", "loras[][name]", "extra_params[steps]",
    "image[0]", "", "[", "]", "a" + "[b]" * 9, "\xe9", "\x00", "a b", "x" * 300, "../../etc/passwd", '"',
    "name; filename=x", "%s",
)  # fmt: skip
FILES = (
    "",
    '; filename="upload"',
    "; filename=..\\..\\x",
    '; filename="',
    "; filename*=UTF-8''%e2%82%ac",
    "; filename=\xff",
)
HEADERS = (
    b"", b"Content-Type: application/octet-stream\r\n", b"Content-Type: multipart/mixed; boundary=c\r\n",
    b"Content-Transfer-Encoding: base64\r\n", b"Content-Transfer-Encoding: 8bit\r\n", b"Content-Length: 3\r\n",
    b"Content-Length: 99999999999\r\n", b"Content-Type: text/plain; charset=utf-16\r\n", b"x" * 9000 + b": y\r\n",
    b"a: b\r\n" * 20, b"folded: x\r\n y\r\n", b"no colon\r\n", b": no name\r\n", b"\x00: \xff\r\n",
    b'Content-Disposition: form-data; name="user"\r\n',
)  # fmt: skip
NESTED = b'--c\r\nContent-Disposition: form-data; name="image"\r\n\r\nx\r\n--c--\r\n'
VALUES = (
    b"x", b"", b"1", b"-1", b"true", b"64x64", b"nan", b"9" * 5000, b"{}", b'{"seed": 5}', b"[" * 50_000, b"\xff\xfe",
    PICTURE, PICTURE[:50], PICTURE[:-30], b"\x89PNG\r\n\x1a\n", NESTED, b"--b", b"\r\n--b", b"\r\n--b-",
    b"\r\n--bb\r\n",
    bytes(300 << 10), bytes(2 << 20), b"\r\n" * 1000, b"data:image/png;base64,AAAA", b"http://169.254.169.254/",
)  # fmt: skip
DISPOSITIONS = ("form-data; ", "form-data; ", "form-data; ", "attachment; ", "", "form-data", "form-data; name=x; ")
BOUNDARIES = (
    ("boundary=b",), ("boundary=b",), ("boundary=b",), ("boundary=b",), ('boundary="b"',), ("boundary=bb",),
    ("boundary=b", "charset=utf-8"), ("boundary=",), (), ('boundary="b',), ("boundary=b", "boundary=c"),
    ("boundary=" + "b" * 71,),
    ("BOUNDARY=b",), ("boundary=\xff",), ("boundary=--b",),
)  # fmt: skip


@st.composite
def drawn_parts(draw: st.DrawFn) -> bytes:
    """A part as a client sends it, or nearly."""
    name, value = draw(st.sampled_from(FIELDS)), draw(st.sampled_from(VALUES) | st.binary(max_size=40))
    head = f'Content-Disposition: {draw(st.sampled_from(DISPOSITIONS))}name="{name}"{draw(st.sampled_from(FILES))}'
    lines = b"".join([head.encode("latin1"), b"\r\n", draw(st.sampled_from(HEADERS))])
    return b"".join([b"--b\r\n", lines, b"\r\n", value, b"\r\n"])


@st.composite
def drawn_forms(draw: st.DrawFn) -> tuple[str, bytes]:
    """(content type, body): mostly a form that would be taken, to which something has been done."""
    parts = [IMAGE, part("prompt")] if draw(st.booleans()) else []
    parts += draw(st.lists(drawn_parts(), max_size=4))
    if parts and draw(st.booleans()):
        twice = draw(st.sampled_from(parts))
        parts += [twice] * draw(st.sampled_from((1, 2, 150 if len(twice) < 5000 else 3)))
    content = bytearray(b"".join([draw(st.sampled_from((b"", b"", b"preamble\r\n", b"\r\n"))), *parts, END]))
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(content)))
        gone = draw(st.sampled_from((0, 0, 1, 5, 60, len(content))))
        content[place : place + gone] = draw(
            st.sampled_from((b"--b", b"\r\n", b"\n", b"--", b"\x00", b"'")) | st.binary(max_size=9)
        )
    return "; ".join(("multipart/form-data", *draw(st.sampled_from(BOUNDARIES)))), bytes(content)


@pytest.fixture(scope="module")
def routes(_others, tmp_path_factory) -> Iterator[list[str]]:
    """Those that read forms."""
    with ScriptedEngine() as engine:
        engine.script = video
        folder = tmp_path_factory.mktemp("videos")
        with serving(engine, capabilities=VIDEO_CAPABILITIES, folder=folder) as videos:
            over = _others["over"].url
            yield [_others["edit"].url + PATH, over + PATH, over + VARIATIONS, videos.url + "/v1/videos"]


def failures(routes: list[str]) -> list[float]:
    """How many requests each server takes for failures of its own."""
    pages = [httpx.get(httpx.URL(route).copy_with(path="/metrics")).text for route in routes]
    lines = [[line for line in page.splitlines() if 'outcome="server_error"' in line] for page in pages]
    return [sum(float(line.split()[-1]) for line in page) for page in lines]


def test_forms_that_chance_has_drawn_are_answered(routes, server, whole_matrix):
    """Whole or in pieces: in time, with success or with a refusal, and never with a failure of the server."""
    seen: Counter[int] = Counter()
    before = failures(routes)

    with httpx.Client(timeout=10) as client:

        @examples(5000 if whole_matrix else 250)
        @given(route=st.sampled_from(routes), form=drawn_forms(), size=st.sampled_from((None, None, 1 << 16, 100)))
        def send(route, form, size) -> None:
            kind, content = form
            whole = size is None or len(content) > 1000 * size
            sent = content if whole else (content[i : i + size] for i in range(0, len(content), size))
            response = client.post(route, content=sent, headers={b"content-type": kind.encode("latin1")})
            seen[response.status_code] += 1
            if response.status_code != 200:
                assert response.status_code in (400, 413, 429), (response.text, content[:2000])
                refusal(response, response.status_code)

        send()
    assert failures(routes) == before
    assert {200, 400} <= set(seen), seen


def test_forms_that_end_in_the_middle_are_no_failures(routes, server, whole_matrix):
    """The client promises more than it sends, and closes its side, or all of the connection."""
    before = failures(routes)

    @examples(1000 if whole_matrix else 60)
    @given(route=st.sampled_from(routes), form=drawn_forms(), share=st.floats(0, 0.99), is_half=st.booleans())
    def send(route, form, share, is_half) -> None:
        url, (kind, content) = httpx.URL(route), form
        head = f"POST {url.path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(content) + 1}\r\ncontent-type: {kind}"
        with socket.create_connection((url.host, url.port), timeout=10) as connection:
            connection.sendall(head.encode("latin1") + b"\r\n\r\n")
            with suppress(ConnectionError):  # refused, and closed, before all of it has come
                connection.sendall(content[: int(share * len(content))])
                if is_half:
                    connection.shutdown(socket.SHUT_WR)
                    assert not connection.recv(65536).startswith(b"HTTP/1.1 5")

    send()
    assert [httpx.post(route, content=b"").status_code for route in routes] == [415] * 4  # they are there, and hear
    assert failures(routes) == before
