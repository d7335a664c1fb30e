"""Forms: what is read, what is refused, and that nothing at all is a failure of the server."""

from __future__ import annotations

import socket
from random import Random

import httpx
import pytest

from darkroom.configs.config import Limits
from tests.golden import picture_file

from .conftest import CAPABILITIES, EDIT, serving

PATH = "/v1/images/edits"
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


def test_forms_that_are_changed_at_random_are_answered(edit):
    """Never with a failure of the server: 200, or a refusal with the envelope."""
    random = Random(7)
    whole = body(part("seed", b"5"), part("stream", b"false"), part("extra_params[steps]", b"4"))
    pieces = [
        b"--b",
        b"\r\n",
        b"--",
        b'"',
        b"name=",
        b"[",
        b"]",
        b"\x00",
        b"\xff",
        b";",
        b"content-length: 3\r\n",
        b"%",
    ]
    seen = set()
    for _ in range(400):
        content = bytearray(whole)
        for _ in range(random.randint(1, 4)):
            place = random.randrange(len(content) + 1)
            place = place if random.random() < 0.3 else random.choice([0, 60, 150, len(content) - 250])
            change = random.choice([*pieces, random.randbytes(random.randint(0, 9))])
            content[place : place + random.choice([0, 0, 1, 5, 60])] = change
        headers = FORM if random.random() < 0.9 else {"content-type": "multipart/form-data; boundary=" + "b" * 3}
        response = post(edit, bytes(content), headers)
        seen.add(response.status_code)
        if response.status_code != 200:
            assert response.status_code in (400, 404, 413), (response.text, bytes(content))
            refusal(response, response.status_code)
    assert seen >= {200, 400}
