"""Pictures in requests: whichever way they come, and which do not come in."""

from __future__ import annotations

import asyncio
import base64
import io
import struct
import time
import zlib

import httpx
import pytest
from PIL import Image

from darkroom.configs.config import Limits
from darkroom.configs.errors import RequestError
from darkroom.server.body import Inflow, Share
from darkroom.server.errors import ApiError
from darkroom.server.fetch import Fetcher
from darkroom.server.form import Form
from darkroom.server.uploads import from_form, from_json, take
from tests.golden import picture_file

from .conftest import CAPABILITIES, EDIT, OVER, Server, serving

EDITS, VARIATIONS = "/v1/images/edits", "/v1/images/variations"
PICTURE = picture_file(64, 64)
INVALID, MISSING = "invalid_value", "missing_required_parameter"


def save(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *extra: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"".join([b"\x89PNG\r\n\x1a\n", header, *extra, chunk(b"IDAT", zlib.compress(b"")), chunk(b"IEND", b"")])


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def refusal(response, param, code=INVALID, status=400) -> str:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")
    assert len(error["message"]) < 1000
    return error["message"]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "L", "P", "1", "I;16", "CMYK"])
def test_every_mode_is_taken(edit, mode):
    file = save(Image.new(mode, (64, 64)), "JPEG" if mode == "CMYK" else "PNG")
    assert edit.post(EDITS, data={"prompt": "x"}, files={"image": file}).status_code == 200


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_picture_is_known_by_its_content(edit, engine, kind):
    file = save(Image.new("RGB", (64, 64)), kind)
    files = {"image": ("text.txt", file, "application/pdf")}
    assert edit.post(EDITS, data={"prompt": "x"}, files=files).status_code == 200
    assert engine.requests[0].request.images == (file,)


def test_a_photograph_of_12_megapixels_is_taken_at_once(edit):
    file = save(Image.new("RGB", (4000, 3000), "red"), "JPEG")
    started = time.monotonic()
    assert edit.post(EDITS, data={"prompt": "x"}, files={"image": file}).status_code == 200
    assert time.monotonic() - started < 2  # the header is read, and no more


HOSTILE = {
    "empty": b"",
    "text": b"hello",
    "truncated": PICTURE[:20],
    "svg": b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="1" height="1"/>',
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "pdf": b"%PDF-1.4\n",
    "gif": save(Image.new("RGB", (64, 64)), "GIF"),
    "tiff": save(Image.new("RGB", (64, 64)), "TIFF"),
    "ico": save(Image.new("RGB", (64, 64)), "ICO"),
    "bmp": save(Image.new("RGB", (64, 64)), "BMP"),
    "zip": b"PK\x03\x04" + bytes(100),
    "900 megapixels": png(30_000, 30_000),
    "a giant": png(2**31 - 1, 2**31 - 1),
    "a line": png(2**26 + 1, 1),
    "no pixels": png(0, 0),
    "a giant webp": b"RIFF\x1a\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\xff" * 6,
    "text bomb": png(64, 64, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 28)))),
    "chunks": png(64, 64, chunk(b"teSt", b"") * 1_000_000),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("path", [EDITS, VARIATIONS])
def test_hostile_files_end_at_the_header(over, engine, path, name):
    data = {"prompt": "x"} if path == EDITS else {}
    started = time.monotonic()
    refusal(over.post(path, data=data, files={"image": HOSTILE[name]}), "image")
    assert time.monotonic() - started < 3
    if path == EDITS:
        refusal(over.post(path, data=data, files={"image": PICTURE, "mask": HOSTILE[name]}), "mask")
        response = over.post(path, json={"prompt": "x", "images": [{"image_url": data_url(HOSTILE[name])}]})
        refusal(response, "images")
    assert engine.requests == []


@pytest.mark.parametrize(
    ("files", "param", "code"),
    [
        ([], "image", MISSING),
        ([("mask", PICTURE)], "image", MISSING),
        ([("image", PICTURE)] * 5, "image", INVALID),
        ([("image[]", PICTURE)] * 17, "image", INVALID),
        ([("image", PICTURE)] * 16, "image", INVALID),
        ([("image", PICTURE), ("mask", PICTURE), ("mask_image", picture_file(64, 64, 3))], "mask", INVALID),
        ([("image", PICTURE), ("markup", PICTURE)], "markup", INVALID),
        ([("image", PICTURE), ("mask", PICTURE)], "mask", INVALID),
    ],
)
def test_numbers_of_pictures(edit, engine, files, param, code):
    response = edit.post(EDITS, data={"prompt": "x"}, files=[*files, ("user", (None, "x"))])
    refusal(response, param, code)
    assert engine.requests == []


def test_no_model_is_sent_more_than_16(_server: Server) -> None:
    many = CAPABILITIES.override({**EDIT, "max_images": 30})
    with serving(_server.engine, capabilities=many) as server:
        for number, status in ((16, 200), (17, 400)):
            files = [("prompt", (None, "x")), *[("image[]", PICTURE)] * number]
            assert httpx.post(server.url + EDITS, files=files).status_code == status
            body = {"prompt": "x", "images": [GOOD] * number}
            assert httpx.post(server.url + EDITS, json=body).status_code == status


def test_a_variation_is_of_one_picture(over, engine):
    refusal(over.post(VARIATIONS, files=[("image", PICTURE)] * 2), "image")
    refusal(over.post(VARIATIONS, files={"image": PICTURE, "mask": PICTURE}), "mask", "unknown_parameter")
    refusal(over.post(VARIATIONS, files={"user": (None, "x")}), "image", MISSING)
    assert engine.requests == []


GOOD = {"image_url": data_url(PICTURE)}
REMOTE = [
    "https://example.com/a.png",
    "http://127.0.0.1:1/a.png",
    "http://169.254.169.254/latest/meta-data",
    "file:///etc/passwd",
    "FILE:///etc/passwd",
    "//host/a.png",
    "ftp://example.com/a.png",
    "/etc/passwd",
    "",
    "x" * 100_000,
]


@pytest.mark.parametrize("url", REMOTE, ids=lambda url: url[:20])
def test_nothing_is_fetched_from_elsewhere(edit, engine, url):
    assert "fetches nothing" in refusal(
        edit.post(EDITS, json={"prompt": "x", "images": [{"image_url": url}]}), "images"
    )
    response = edit.post(EDITS, data={"prompt": "x", "url": url}, files={"user": (None, "x")})
    assert "fetches nothing" in refusal(response, "url")
    assert engine.requests == []


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({}, "images", MISSING),
        ({"images": None}, "images", MISSING),
        ({"images": []}, "images", INVALID),
        ({"images": [GOOD] * 17}, "images", INVALID),
        ({"images": [GOOD] * 5}, "images", INVALID),
        ({"images": GOOD}, "images", "invalid_type"),
        ({"images": ["x"]}, "images", "invalid_type"),
        ({"images": [{}]}, "images", MISSING),
        ({"images": [{"file_id": "file-1"}]}, "images", INVALID),
        ({"images": [{**GOOD, "file_id": "file-1"}]}, "images", INVALID),
        ({"images": [{**GOOD, "detail": "high"}]}, "images", "unknown_parameter"),
        ({"images": [{"image_url": 5}]}, "images", "invalid_type"),
        ({"images": [{"image_url": "data:image/png,x"}]}, "images", INVALID),
        ({"images": [{"image_url": "data:image/png;base64"}]}, "images", INVALID),
        ({"images": [{"image_url": "data:image/png;base64,%%%%"}]}, "images", INVALID),
        ({"images": [{"image_url": "data:image/png;base64,\u00e9"}]}, "images", INVALID),
        ({"images": [{"image_url": "data:image/png;base64,AAA"}]}, "images", INVALID),
        ({"images": [{"image_url": "data:image/png;base64,"}]}, "images", INVALID),
        ({"images": [{"image_url": "data:image/png;base64," + "A" * (21 << 20)}]}, "images", "string_above_max_length"),
        ({"images": [GOOD], "mask": "x"}, "mask", "invalid_type"),
        ({"images": [GOOD], "mask": {}}, "mask", MISSING),
        ({"images": [GOOD], "mask": {"file_id": "x"}}, "mask", INVALID),
        ({"images": [GOOD], "mask": GOOD}, "mask", INVALID),
        ({"images": [GOOD], "image": GOOD}, "image", "unknown_parameter"),
        ({"images": [GOOD], "markup": GOOD}, "markup", INVALID),
    ],
    ids=lambda value: str(value)[:60],
)
def test_references_that_lead_nowhere(edit, engine, fields, param, code):
    refusal(edit.post(EDITS, json={"prompt": "x", **fields}), param, code)
    assert engine.requests == []


def test_data_urls_in_a_form(edit, engine):
    large = png(64, 32, chunk(b"teSt", bytes(1 << 20)))
    fields = {"prompt": "x", "url[]": [data_url(PICTURE), data_url(large)]}
    response = edit.post(EDITS, data=fields, files={"user": (None, "x")})
    assert response.status_code == 200, response.text
    assert engine.requests[0].request.images == (PICTURE, large)
    for broken in ("data:image/png;base64,\u00e9", "data:image/png;base64,A", "data:,x"):
        refusal(edit.post(EDITS, data={"prompt": "x", "url": broken}, files={"user": (None, "x")}), "url")


def test_a_picture_of_a_bad_shape_is_named_as_it_was_sent(edit, engine):
    thin = png(3, 900)
    files = {"image": PICTURE, "url": (None, data_url(thin))}
    for param, request in {
        "image": {"data": {"prompt": "x"}, "files": {"image": thin}},
        "url": {"data": {"prompt": "x"}, "files": files},
        "images": {"json": {"prompt": "x", "images": [GOOD, {"image_url": data_url(thin)}]}},
    }.items():
        assert refusal(edit.post(EDITS, **request), param).startswith(f"'{param}' has 3x900 pixels; ")
    assert engine.requests == []


class Hosts(Fetcher):
    """The fetcher's own tests are of what it fetches; here it is which URLs it is asked for."""

    def __init__(self, *hosts: str, content: bytes = PICTURE) -> None:
        super().__init__(hosts)
        self.content = content
        self.asked: list[tuple[str, str]] = []

    async def fetch_picture(self, url: str, *, param: str = "image_url") -> bytes:
        self.asked.append((url, param))
        return self.content


REMOTE_URL = "https://a.example/a.png"


def a_share(held: int = 0, most: int = 1 << 30) -> Share:
    """Of a request whose body had so many bytes."""
    share = Share(Inflow(most))
    share.add(held)
    return share


def test_pictures_from_allowed_hosts_alone_are_asked_for() -> None:
    other = picture_file(32, 32)
    references = [{"image_url": REMOTE_URL}, {"image_url": data_url(other)}]
    hosts = Hosts("a.example")
    pictures = asyncio.run(take(from_json(references, {"image_url": REMOTE_URL}), hosts, Limits(), a_share()))
    assert (pictures.images, pictures.mask) == ((PICTURE, other), PICTURE)
    assert hosts.asked == [(REMOTE_URL, "mask")]  # once
    form = Form(files={"url": [REMOTE_URL.encode(), data_url(other).encode()], "image": [other]})
    hosts = Hosts("a.example")
    assert asyncio.run(take(from_form(form), hosts, Limits(), a_share())).images == (other, PICTURE, other)
    assert hosts.asked == [(REMOTE_URL, "url")]
    none = Hosts()
    with pytest.raises(RequestError, match="fetches nothing"):
        asyncio.run(take(from_form(form), none, Limits(), a_share()))
    assert none.asked == []


def test_what_is_fetched_is_no_more_than_may_be_sent() -> None:
    urls = [{"image_url": f"https://a.example/{i}.png"} for i in range(4)]
    hosts = Hosts("a.example", content=PICTURE.ljust(1 << 19, b"x"))
    with pytest.raises(ApiError, match="larger than 1048576 bytes") as caught:
        asyncio.run(take(from_json(urls, None), hosts, Limits(max_upload_mb=1), a_share()))
    assert (caught.value.status, caught.value.param) == (413, "images")
    two, limits, share = from_json(urls[:2], None), Limits(max_upload_mb=1), a_share()
    assert len(asyncio.run(take(two, hosts, limits, share)).images) == 2
    assert share.held == 1 << 20  # with the body it is
    with pytest.raises(ApiError, match="larger than 1048576 bytes"):
        asyncio.run(take(two, hosts, limits, a_share(held=1)))


def test_what_is_fetched_counts_among_what_all_requests_have() -> None:
    hosts = Hosts("a.example", content=PICTURE.ljust(1 << 19, b"x"))
    with pytest.raises(ApiError, match="of 1048576 bytes are being taken in already") as caught:
        asyncio.run(take(from_json([{"image_url": REMOTE_URL}], None), hosts, Limits(), a_share(1 << 20, 1 << 20)))
    assert (caught.value.status, caught.value.headers) == (429, {"Retry-After": "5"})


def test_what_cannot_be_for_this_model_is_refused_before_anything_is_fetched(_server: Server) -> None:
    with (
        serving(
            _server.engine,
            capabilities=CAPABILITIES.override(EDIT),
            limits=Limits(max_queue=4),
            allow_remote_media=["localhost"],
        ) as server,
        httpx.Client(base_url=server.url, timeout=10) as http,
    ):
        remote = {"image_url": "https://localhost/a.png"}  # which the fetcher would refuse
        body = {"prompt": "x", "images": [remote]}
        assert "not public" in refusal(http.post(EDITS, json=body), "images")
        response = http.post(EDITS, json={**body, "model": "nope"})
        assert response.status_code == 404 and response.json()["error"]["code"] == "model_not_found"
        refusal(http.post(EDITS, json={**body, "images": [remote] * 5}), "images")
        refusal(http.post(EDITS, json={**body, "mask": remote}), "mask")
        for n in (5, 99):  # more than can wait, and more than may be asked for
            refusal(http.post(EDITS, json={**body, "n": n}), "n", "integer_above_max_value")
        form = [("url", (None, remote["image_url"]))] * 120
        refusal(http.post(EDITS, files=form), "prompt", MISSING)
        refusal(http.post(EDITS, files=[*form, ("prompt", (None, "x"))]), "url")
        refusal(http.post(VARIATIONS, files=form[:1]), "model")


def test_a_variation_may_be_of_a_picture_elsewhere(_server: Server) -> None:
    with serving(_server.engine, capabilities=CAPABILITIES.override(OVER), allow_remote_media=["localhost"]) as server:
        files = {"url": (None, "https://localhost/a.png")}
        assert "not public" in refusal(httpx.post(server.url + VARIATIONS, files=files), "url")


def test_an_edit_asks_the_fetcher_which_refuses_this_machine(_server: Server) -> None:
    edits = CAPABILITIES.override(EDIT)
    with serving(_server.engine, capabilities=edits, allow_remote_media=["localhost"]) as server:
        for url, message in (("https://localhost/a.png", "not public"), ("https://b.example/a.png", "")):
            body = {"prompt": "x", "images": [{"image_url": url}]}
            answer = httpx.post(f"{server.url}/v1/images/edits", json=body)
            assert answer.status_code == 400
            error = answer.json()["error"]
            assert error["param"] == "images" and message in error["message"]
            assert "fetches nothing" not in error["message"]
