"""Pictures from outside: what they become, and what is refused."""

from __future__ import annotations

import io
import struct
import zlib
from random import Random
from typing import Any

import numpy as np
import pytest
from PIL import Image

from darkroom.configs import RequestError
from darkroom.configs.pictures import MAX_PIXELS, load_mask, load_picture, picture_size
from tests.golden import picture_file


def save(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_picture_is_read(kind: str) -> None:
    data = save(Image.new("RGB", (30, 20), "red"), kind)
    assert picture_size(data, "image") == (30, 20)
    picture = load_picture(data)
    assert (picture.mode, picture.size) == ("RGB", (30, 20))


@pytest.mark.parametrize(
    ("mode", "expected"), [("L", "RGB"), ("P", "RGB"), ("1", "RGB"), ("I;16", "RGB"), ("LA", "RGBA"), ("RGBA", "RGBA")]
)
def test_any_mode_becomes_colour(mode: str, expected: str) -> None:
    assert load_picture(save(Image.new(mode, (8, 8)))).mode == expected


def test_16_bits_of_grey_are_scaled_and_not_cut_off() -> None:
    ramp = Image.frombytes("I;16", (256, 1), b"".join((257 * i).to_bytes(2, "little") for i in range(256)))
    file = save(ramp)
    assert list(load_picture(file).getchannel("G").tobytes()) == list(range(256))
    assert list(load_mask(file).tobytes()) == list(range(256))


def test_16_bits_of_grey_are_transparent_where_one_value_is() -> None:
    """256 and 257 are told apart, and only the first stands for nothing."""
    pixels = Image.frombytes("I;16", (4, 1), b"".join(value.to_bytes(2, "little") for value in (0, 256, 257, 65535)))
    file = save(pixels, transparency=256)
    assert list(load_picture(file).getchannel("A").tobytes()) == [255, 0, 255, 255]
    assert list(load_picture(file).getchannel("R").tobytes()) == [0, 1, 1, 255]
    assert list(load_mask(file).tobytes()) == [0, 255, 0, 0]


def test_a_transparent_palette_keeps_its_alpha() -> None:
    picture = Image.new("RGB", (8, 8), "red").quantize(2)
    assert load_picture(save(picture, transparency=picture.getpixel((0, 0)))).getchannel("A").getextrema() == (0, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_turned_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = save(Image.new("RGB", (30, 20)), "JPEG", exif=exif)
    size = (20, 30) if orientation >= 5 else (30, 20)
    assert picture_size(data, "image") == size
    assert load_picture(data).size == size


def test_a_mask_is_what_is_transparent() -> None:
    mask = Image.new("RGBA", (8, 8), (255, 255, 255, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 4, 8))
    white = np.asarray(load_mask(save(mask)))
    assert (white[:, :4] == 255).all()
    assert (white[:, 4:] == 0).all()


def test_a_mask_without_alpha_is_what_is_white() -> None:
    mask = picture_file(12, 8, mode="L")
    assert np.array_equal(np.asarray(load_mask(mask)), np.asarray(Image.open(io.BytesIO(mask))))


def png_header(width: int, height: int, empty_chunks: int = 0) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [chunk(b"IHDR", header), chunk(b"teSt", b"") * empty_chunks, chunk(b"IDAT", zlib.compress(b""))]
    return b"".join([b"\x89PNG\r\n\x1a\n", *chunks, chunk(b"IEND", b"")])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is no PNG, JPEG or WebP file"),
        (b"hello", "is no PNG, JPEG or WebP file"),
        (save(Image.new("RGB", (8, 8)), "GIF"), "is no PNG, JPEG or WebP file"),
        (save(Image.new("RGB", (8, 8)), "TIFF"), "is no PNG, JPEG or WebP file"),
        (b"\x89PNG\r\n\x1a\n", "is no PNG, JPEG or WebP file"),
        (png_header(64, 64, empty_chunks=70_000), "is a PNG file of more than 65536 chunks"),
        (png_header(10_000, 10_000), f"10000x10000 pixels; at most {MAX_PIXELS} can be taken"),
        (png_header(60_000, 60_000), f"at most {MAX_PIXELS} can be taken"),
    ],
)
def test_what_is_no_picture_is_refused_by_its_header(data: bytes, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        picture_size(data, "image")
    assert caught.value.param == "image"


@pytest.mark.parametrize("data", [picture_file(64, 64)[:-300], png_header(64, 64)])
def test_a_picture_that_is_cut_off_is_refused(data: bytes) -> None:
    assert picture_size(data, "mask") == (64, 64)
    with pytest.raises(RequestError, match="cannot be decoded: the file is broken"):
        load_mask(data)


def test_an_orientation_that_is_none_leaves_a_picture_as_it_is() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = save(Image.new("RGB", (30, 20)), "JPEG", exif=exif)
    as_text = data.replace(b"\x01\x12\0\x03", b"\x01\x12\0\x02")
    assert as_text != data
    assert picture_size(as_text, "image") == load_picture(as_text).size == (30, 20)


def test_bytes_that_are_changed_at_random_are_a_picture_or_refused() -> None:
    random = Random(5)
    whole = [save(Image.new("RGB", (60, 40), "red"), kind) for kind in ("PNG", "JPEG", "WEBP")]
    refused = 0
    for _ in range(1500):
        data = bytearray(random.choice(whole))
        for _ in range(random.randint(1, 5)):
            place = random.randrange(min(len(data), 200))
            data[place : place + random.randint(0, 4)] = random.randbytes(random.randint(0, 4))
        try:
            picture_size(bytes(data), "image")
            load_picture(bytes(data))
        except RequestError:
            refused += 1
    assert 0 < refused < 1500


def test_the_limit_may_be_lower() -> None:
    assert picture_size(png_header(64, 64), "image", 64 * 64) == (64, 64)
    with pytest.raises(RequestError, match="64x64 pixels; at most 4095 can be taken"):
        picture_size(png_header(64, 64), "image", 4095)
