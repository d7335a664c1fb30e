from __future__ import annotations

import asyncio
import io
import subprocess
import sys
import time

import psutil
import pytest
from PIL import Image

from darkroom.configs.errors import RequestError
from darkroom.server import decoder
from darkroom.server.decoder import Decoder
from tests.golden import picture_file


def check(*files: bytes) -> list[object]:
    async def run() -> list[object]:
        one = Decoder()
        return await asyncio.gather(*(one.check_whole(file, "image") for file in files), return_exceptions=True)

    return asyncio.run(run())


def save(picture: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return buffer.getvalue()


def test_whole_pictures_pass_and_broken_ones_are_named() -> None:
    whole = picture_file(64, 64)
    assert (
        check(whole, save(Image.new("RGB", (64, 64)), "JPEG"), save(Image.new("RGBA", (64, 64)), "WEBP")) == [None] * 3
    )
    for error in check(whole[:-30], whole[: len(whole) // 2], b"", b"text"):
        assert isinstance(error, RequestError) and str(error) == "'image' cannot be decoded: the file is broken."


def test_the_largest_picture_that_is_let_in_has_room() -> None:
    assert check(save(Image.new("RGBA", (8192, 8192)), "PNG")) == [None]


def test_memory_and_time_have_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "_SECONDS", 0.01)
    started = time.monotonic()
    [error] = check(picture_file(64, 64))
    assert isinstance(error, RequestError) and time.monotonic() - started < 5
    left = [child.cmdline() for child in psutil.Process().children()]
    assert not any("darkroom.server.decoder" in words for words in left)  # it was killed, and waited for
    large = save(Image.new("RGBA", (9000, 9000)), "PNG")
    code = "from darkroom.server import decoder; decoder._MEMORY = 400 << 20; decoder.main()"
    done = subprocess.run([sys.executable, "-c", code], input=large, capture_output=True)
    assert done.returncode and b"MemoryError" in done.stderr
