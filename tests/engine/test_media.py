from __future__ import annotations

import io
from typing import Literal

import numpy as np
import pytest
from PIL import Image

from darkroom.engine.media import encode_picture
from tests.golden import request


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    """Smooth colours with some noise: something that lossy formats can save on."""
    y, x = np.mgrid[0:96, 0:128]
    noise = np.random.default_rng(0).integers(0, 20, (96, 128))
    return Image.fromarray(np.stack([x + noise, 2 * y, 200 - x], axis=-1).astype(np.uint8))


def encode(picture: Image.Image, output_format: Literal["png", "jpeg", "webp"], quality: int = 100) -> bytes:
    return encode_picture(picture, request(output_format=output_format, output_compression=quality))


def decode(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


@pytest.mark.parametrize(
    ("output_format", "start"), [("png", b"\x89PNG\r\n\x1a\n"), ("jpeg", b"\xff\xd8\xff"), ("webp", b"RIFF")]
)
def test_the_bytes_are_of_the_format(
    picture: Image.Image, output_format: Literal["png", "jpeg", "webp"], start: bytes
) -> None:
    data = encode(picture, output_format)
    assert data.startswith(start)
    decoded = decode(data)
    assert (decoded.format, decoded.size, decoded.mode) == (output_format.upper(), (128, 96), "RGB")
    error = np.abs(np.asarray(decoded, int) - np.asarray(picture, int))
    assert error.mean() < 5


def test_png_loses_nothing(picture: Image.Image) -> None:
    assert np.array_equal(decode(encode(picture, "png")), picture)
    assert encode(picture, "png", 0) == encode(picture, "png", 100)


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_quality_changes_size(picture: Image.Image, output_format: Literal["jpeg", "webp"]) -> None:
    sizes = [len(encode(picture, output_format, quality)) for quality in (0, 50, 100)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[2] / 4


def test_a_picture_with_alpha_becomes_a_jpeg(picture: Image.Image) -> None:
    assert decode(encode(picture.convert("RGBA"), "jpeg")).mode == "RGB"
