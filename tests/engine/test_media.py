from __future__ import annotations

import io
from typing import Literal

import av
import numpy as np
import pytest
from PIL import Image

from darkroom.engine.media import encode_files, encode_picture, encode_preview, encode_video
from tests.golden import request

SIZE = {"width": 128, "height": 96}


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    """Smooth colours with some noise: something that lossy formats can save on."""
    y, x = np.mgrid[0:96, 0:128]
    noise = np.random.default_rng(0).integers(0, 20, (96, 128))
    return Image.fromarray(np.stack([x + noise, 2 * y, 200 - x], axis=-1).astype(np.uint8))


def encode(picture: Image.Image, output_format: Literal["png", "jpeg", "webp"], quality: int = 100) -> bytes:
    return encode_picture(picture, output_format, quality)


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


@pytest.fixture(scope="module")
def frames(picture: Image.Image) -> list[Image.Image]:
    """A picture that moves."""
    pixels = np.asarray(picture)
    return [Image.fromarray(np.roll(pixels, 8 * i, axis=1)) for i in range(9)]


def test_a_video_is_its_frames(frames: list[Image.Image]) -> None:
    data = encode_video(frames, 12)
    assert data[4:8] == b"ftyp"
    assert data.index(b"moov") < data.index(b"mdat")  # it plays while it is being fetched
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        assert (stream.codec.name, stream.width, stream.height, stream.average_rate) == ("h264", 128, 96, 12)
        decoded = [frame.to_ndarray(format="rgb24").astype(int) for frame in container.decode(stream)]
        assert container.duration == pytest.approx(9 / 12 * 1e6, rel=0.01)
    assert len(decoded) == len(frames)
    for got, frame in zip(decoded, frames, strict=True):
        assert np.abs(got - np.asarray(frame, int)).mean() < 6
    assert np.abs(decoded[0] - np.asarray(frames[4], int)).mean() > 12  # and not another's


def test_a_request_has_a_file_for_each_picture_or_one_video(frames: list[Image.Image]) -> None:
    assert len(encode_files(frames, request(**SIZE, output_format="png"))) == 9
    [video] = encode_files(frames, request(**SIZE, output_format="mp4", fps=8, num_frames=9))
    assert video == encode_video(frames, 8)


@pytest.mark.parametrize("output_format", ["mp4", "png"])
def test_a_video_of_another_length_is_no_answer(frames: list[Image.Image], output_format: str) -> None:
    with pytest.raises(RuntimeError, match="made 9 frames where 5 were asked for"):
        encode_files(frames, request(**SIZE, output_format=output_format, fps=8, num_frames=5))


def test_a_picture_of_another_size_is_no_answer(picture: Image.Image) -> None:
    with pytest.raises(RuntimeError, match="made 128x96 where 96x128 were asked for"):
        encode_files([picture], request(width=96, height=128))


def test_a_preview_is_one_picture(frames: list[Image.Image]) -> None:
    assert decode(encode_preview(frames, request(output_format="mp4", fps=8))).format == "PNG"
    assert decode(encode_preview(frames, request(output_format="webp"))).format == "WEBP"
