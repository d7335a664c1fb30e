from __future__ import annotations

import asyncio
import io
import time
from typing import Any

import psutil
import pytest
from PIL import Image

from darkroom.configs.errors import RequestError
from darkroom.server.decoder import Decoder
from darkroom.server.errors import ApiError
from tests.golden import picture_file


def check(*files: bytes, **limits: Any) -> list[object]:
    async def run() -> list[object]:
        one = Decoder(**limits)
        return await asyncio.gather(*(one.check_whole(file, "image") for file in files), return_exceptions=True)

    return asyncio.run(run())


def save(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
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


def processes() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "darkroom.server.decoder" in child.cmdline()]


def long_to_decode() -> bytes:
    """A JPEG file of some kilobytes that goes over its pixels a thousand times: 10 seconds or more."""
    file = save(Image.new("L", (4096, 4096)), "JPEG", progressive=True)
    last = file[file.rindex(b"\xff\xda") : -2]
    return file[:-2] + last * 1000 + file[-2:]


def test_memory_has_an_end() -> None:
    [error] = check(save(Image.new("RGBA", (8192, 8192)), "PNG"), memory=400 << 20)
    assert isinstance(error, RequestError) and "it needs too much memory" in str(error)


def test_a_file_that_takes_too_long_is_known_by_its_use_of_the_processor() -> None:
    [error] = check(long_to_decode(), cpu_seconds=1)
    assert isinstance(error, RequestError) and "it takes too long" in str(error)


def test_a_machine_that_is_too_busy_is_not_the_files_fault() -> None:
    started = time.monotonic()
    [error] = check(picture_file(64, 64), seconds=0.01)
    assert isinstance(error, ApiError) and (error.status, error.headers) == (503, {"Retry-After": "10"})
    assert time.monotonic() - started < 5 and not processes()  # it was killed, and waited for


def test_a_process_that_is_killed_is_not_the_files_fault() -> None:
    """As by the kernel, when the machine has no memory left."""

    async def run() -> None:
        checking = asyncio.create_task(Decoder().check_whole(long_to_decode(), "image"))
        async with asyncio.timeout(10):
            while not (found := processes()):
                await asyncio.sleep(0.01)
        found[0].kill()
        await checking

    with pytest.raises(RuntimeError, match="ended with -9"):
        asyncio.run(run())


def test_a_process_that_does_not_start_is_not_the_files_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONHOME", "/nowhere")
    [error] = check(picture_file(64, 64))
    assert isinstance(error, RuntimeError) and "ended with 1: " in str(error) and "encodings" in str(error)
    assert len(str(error)) < 2100
