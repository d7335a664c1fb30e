from __future__ import annotations

import asyncio

import pytest

from darkroom.configs.config import Limits
from darkroom.configs.errors import RequestError
from darkroom.server.files import FileStore

MEGABYTE = bytes(1 << 20)


def limits(**values) -> Limits:
    return Limits(**{"url_storage_mb": 3, **values})


def folders(parent):
    return list(parent.iterdir())


async def keep(store: FileStore, data: bytes) -> str:
    [name] = await store.keep([data], "png")
    return name


def test_a_file_is_kept_and_read(tmp_path):
    async def use():
        store = FileStore(limits(), tmp_path)
        assert folders(tmp_path) == []  # nothing is made before there is something to keep
        name = await keep(store, b"picture")
        assert name.endswith(".png") and len(name) > 40
        assert await store.read(name) == b"picture"
        assert name != await keep(store, b"picture")
        assert folders(tmp_path)[0].stat().st_mode & 0o077 == 0
        store.close()
        assert await store.read(name) is None
        assert folders(tmp_path) == []

    asyncio.run(use())


def test_only_names_that_were_given_out_are_looked_up(tmp_path):
    async def use():
        store = FileStore(limits(), tmp_path)
        await keep(store, b"picture")
        (folders(tmp_path)[0] / "other.png").write_bytes(b"secret")
        for name in ("", ".", "..", "other.png", "../x", "/etc/passwd", "\0", "x" * 100_000):
            assert await store.read(name) is None
        store.close()

    asyncio.run(use())


def test_after_its_time_a_file_is_gone_from_the_disk(tmp_path):
    async def use():
        store = FileStore(limits().model_copy(update={"url_seconds": 0.05}), tmp_path)
        name = await keep(store, b"picture")
        await asyncio.sleep(0.2)
        assert await store.read(name) is None
        assert store.size == 0
        assert folders(folders(tmp_path)[0]) == []
        store.close()

    asyncio.run(use())


def test_the_oldest_make_room(tmp_path):
    async def use():
        store = FileStore(limits(), tmp_path)
        names = [await keep(store, MEGABYTE) for _ in range(5)]
        assert [await store.read(name) is not None for name in names] == [False, False, True, True, True]
        assert store.size == 3 << 20
        assert len(folders(folders(tmp_path)[0])) == 3
        store.close()

    asyncio.run(use())


def test_many_at_once_stay_within_the_budget(tmp_path):
    async def use():
        store = FileStore(limits(), tmp_path)
        await asyncio.gather(*[keep(store, MEGABYTE) for _ in range(20)])
        assert store.size == 3 << 20
        assert len(folders(folders(tmp_path)[0])) == 3
        store.close()

    asyncio.run(use())


def test_what_can_never_be_kept_is_refused(tmp_path):
    async def use():
        store = FileStore(limits(), tmp_path)
        name = await keep(store, b"x")
        with pytest.raises(RequestError, match="b64_json"):
            await keep(store, MEGABYTE * 4)
        assert await store.read(name) == b"x"
        store.close()

    asyncio.run(use())


def test_files_of_one_answer_are_kept_together_or_not_at_all(tmp_path):
    async def use():
        store = FileStore(limits(), tmp_path)
        first = await keep(store, MEGABYTE)
        names = await store.keep([MEGABYTE, MEGABYTE, MEGABYTE[:-1]], "png")
        assert [await store.read(name) is not None for name in (first, *names)] == [False, True, True, True]
        with pytest.raises(RequestError, match="b64_json"):
            await store.keep([MEGABYTE] * 4, "png")
        assert all([await store.read(name) for name in names])
        store.close()

    asyncio.run(use())


def test_a_disk_that_fails_takes_no_room(tmp_path):
    async def use():
        store = FileStore(limits(), tmp_path)
        await keep(store, b"x")
        folders(tmp_path)[0].rename(tmp_path / "away")
        with pytest.raises(FileNotFoundError):
            await store.keep([MEGABYTE, MEGABYTE], "png")
        assert store.size == 1
        store.close()

    asyncio.run(use())
