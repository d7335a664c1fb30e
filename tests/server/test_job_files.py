from __future__ import annotations

import asyncio
import os
import threading
import time

import pytest
from obstore.store import LocalStore

from darkroom.configs.errors import ConfigError
from darkroom.server.job_files import JobFiles, open_files


@pytest.fixture(params=["folder", "s3"])
def place(request, tmp_path):
    return tmp_path / "a" / "b" if request.param == "folder" else request.getfixturevalue("s3")


def test_files(place):
    data = os.urandom(3 * 1024 * 1024)

    async def use():
        files = await open_files(place)
        await files.put("a.mp4", b"old")
        await files.put("a.mp4", data)
        assert await files.size("a.mp4") == len(data)
        assert await files.read("a.mp4") == data
        for start, end in ((0, len(data)), (5, 6), (100, 2_500_000)):
            assert b"".join([piece async for piece in files.pieces("a.mp4", start, end)]) == data[start:end]
        await files.delete("a.mp4", "b.mp4")
        for missing in (files.size("a.mp4"), files.read("a.mp4"), anext(files.pieces("a.mp4", 0, 1))):
            with pytest.raises(FileNotFoundError):
                await missing

    asyncio.run(use())


def test_a_sweep_takes_what_is_old_and_not_wanted(place):
    async def use():
        files = await open_files(place)
        for name in ("wanted", "unwanted"):
            await files.put(name, b"x")
        assert await files.sweep(lambda name: name == "wanted", 60) == 0
        await asyncio.sleep(1.1)
        assert await files.sweep(lambda name: name == "wanted", 1) == 1
        assert await files.read("wanted") == b"x"
        with pytest.raises(FileNotFoundError):
            await files.read("unwanted")

    asyncio.run(use())


def test_a_sweep_takes_what_was_left_half_written(tmp_path):
    async def use() -> int:
        files = await open_files(tmp_path)
        for name, age in (("a.mp4#1", 100), ("b.mp4#1", 0)):
            (tmp_path / name).write_bytes(b"x")
            os.utime(tmp_path / name, (time.time() - age,) * 2)
        return await files.sweep(lambda _: True, 60)

    assert asyncio.run(use()) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["b.mp4#1"]


def test_a_large_folder_does_not_hold_up_the_event_loop(tmp_path):
    threads = []

    class Watched(type(tmp_path)):
        def glob(self, pattern):
            threads.append(threading.get_ident())
            return super().glob(pattern)

    asyncio.run(JobFiles(LocalStore(tmp_path), Watched(tmp_path)).sweep(lambda _: True, 60))
    assert threads and threading.get_ident() not in threads


def test_what_is_finished_during_a_sweep_is_left(tmp_path):
    class Watched(type(tmp_path)):
        def glob(self, pattern):
            return [tmp_path / "gone.mp4#1", *super().glob(pattern)]

    (tmp_path / "a.mp4#1").write_bytes(b"x")
    assert asyncio.run(JobFiles(LocalStore(tmp_path), Watched(tmp_path)).sweep(lambda _: True, -60)) == 1


def test_places_that_cannot_be_written(tmp_path, s3):
    (tmp_path / "file").write_text("")
    for place, words in (
        (tmp_path / "file", "--data-dir"),
        ("ftp://host/x", "expected 's3://bucket"),
        ("s3://no-such-bucket/x", "--files-url s3://no-such-bucket/x"),
    ):
        with pytest.raises(ConfigError) as caught:
            asyncio.run(open_files(place))
        assert words in str(caught.value) and "secret" not in str(caught.value)
