from __future__ import annotations

import asyncio

import httpx
import pytest
from fastapi import FastAPI, Request
from pydantic import BaseModel

from darkroom.server.form import numbers_in, read_form
from darkroom.server.metrics import Metrics
from darkroom.server.middleware import Outermost

HEAD = {"content-type": "multipart/form-data; boundary=b"}


def client(limit: int = 10_000) -> httpx.AsyncClient:
    app = FastAPI()
    app.add_middleware(Outermost, metrics=Metrics())

    @app.post("/")
    async def echo(request: Request) -> dict[str, str]:
        return {key: repr(value) for key, value in (await read_form(request, limit)).items()}

    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


async def post(limit: int = 10_000, **request) -> httpx.Response:
    async with client(limit) as http:
        return await http.post("/", **request)


def send(limit: int = 10_000, **request) -> httpx.Response:
    return asyncio.run(post(limit, **request))


def part(head: str, body: bytes = b"x") -> bytes:
    return b"--b\r\n%b\r\n\r\n%b\r\n" % (head.encode(), body)


def test_text_files_and_members():
    response = send(data={"a": "ü", "b[c]": "1", "b[d]": "2"}, files={"e": ("../../etc/passwd", b"\x00\xff")})
    assert response.json() == {"a": "'ü'", "b": "{'c': '1', 'd': '2'}", "e": repr(b"\x00\xff")}


def test_a_form_without_files():
    assert send(files={"a": (None, "x")}).json() == {"a": "'x'"}


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (b"", HEAD),
        (b"nothing like it", HEAD),
        (part('Content-Disposition: form-data; name="a"'), HEAD),  # it does not end
        (b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--\r\n", HEAD),
        (part('Content-Disposition: form-data; name="a"') * 2 + b"--b--\r\n", HEAD),
        (part('Content-Disposition: form-data; name="a"', b"\xff") + b"--b--\r\n", HEAD),
        (part('Content-Disposition: form-data; name="a"\r\n' + "x: y\r\n" * 100) + b"--b--\r\n", HEAD),
        (b"".join(part(f'Content-Disposition: form-data; name="a{i}"') for i in range(150)) + b"--b--\r\n", HEAD),
        (b"".join(part(f'Content-Disposition: form-data; name="a[{i}]"') for i in range(150)) + b"--b--\r\n", HEAD),
        (
            b"".join(part(f'Content-Disposition: form-data; name="a{i}"; filename="f"') for i in range(150)) + b"--b--",
            HEAD,
        ),
        (b"x", {"content-type": "multipart/form-data"}),
        (b"x", {"content-type": "multipart/form-data; boundary=" + "b" * 5000}),
    ],
)
def test_forms_that_are_none(body, headers):
    response = send(content=body, headers=headers, limit=20_000)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["message"]


def test_too_large():
    assert send(data={"a": "x" * 20_000}, files={"b": b"x"}).status_code == 413
    assert send(content=iter_bytes(20_000), headers=HEAD).status_code == 413


async def iter_bytes(size: int):
    yield b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\n'
    for _ in range(size // 1000):
        yield b"x" * 1000


def test_another_content_type():
    assert send(json={}).json()["error"]["code"] == "unsupported_content_type"


class Numbers(BaseModel):
    whole: int | None = None
    real: float = 0.0
    text: str = ""


@pytest.mark.parametrize(
    ("text", "number"),
    [("5", 5), ("-5", -5), ("2.5", 2.5), ("1e3", 1000.0), ("18446744073709551615", 2**64 - 1)],
)
def test_numbers(text, number):
    assert numbers_in({"whole": text, "real": text, "text": text}, Numbers) == {
        "whole": number,
        "real": number,
        "text": text,
    }


@pytest.mark.parametrize("text", ["", "nan", "inf", "-inf", "1e999", "0x10", "1_0", "true", "null", "9" * 5000])
def test_what_is_no_number(text):
    assert numbers_in({"whole": text}, Numbers) == {"whole": text}
