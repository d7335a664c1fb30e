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


def test_a_file_is_kept_and_read(tmp_path):
    async def use():
        store = FileStore(limits(), tmp_path)
        assert folders(tmp_path) == []  # nothing is made before there is something to keep
        name = await store.keep(b"picture", "png")
        assert name.endswith(".png") and len(name) > 40
        assert await store.read(name) == b"picture"
        assert name != await store.keep(b"picture", "png")
        assert folders(tmp_path)[0].stat().st_mode & 0o077 == 0
        store.close()
        assert await store.read(name) is None
        assert folders(tmp_path) == []

    asyncio.run(use())


def test_only_names_that_were_given_out_are_looked_up(tmp_path):
    async def use():
        store = FileStore(limits(), tmp_path)
        await store.keep(b"picture", "png")
        (folders(tmp_path)[0] / "other.png").write_bytes(b"secret")
        for name in ("", ".", "..", "other.png", "../x", "/etc/passwd", "\0", "x" * 100_000):
            assert await store.read(name) is None
        store.close()

    asyncio.run(use())


def test_after_its_time_a_file_is_gone_from_the_disk(tmp_path):
    async def use():
        store = FileStore(limits().model_copy(update={"url_seconds": 0.05}), tmp_path)
        name = await store.keep(b"picture", "png")
        await asyncio.sleep(0.2)
        assert await store.read(name) is None
        assert store.size == 0
        assert folders(folders(tmp_path)[0]) == []
        store.close()

    asyncio.run(use())


def test_the_oldest_make_room(tmp_path):
    async def use():
        store = FileStore(limits(), tmp_path)
        names = [await store.keep(MEGABYTE, "png") for _ in range(5)]
        assert [await store.read(name) is not None for name in names] == [False, False, True, True, True]
        assert store.size == 3 << 20
        assert len(folders(folders(tmp_path)[0])) == 3
        store.close()

    asyncio.run(use())


def test_many_at_once_stay_within_the_budget(tmp_path):
    async def use():
        store = FileStore(limits(), tmp_path)
        await asyncio.gather(*[store.keep(MEGABYTE, "png") for _ in range(20)])
        assert store.size == 3 << 20
        assert len(folders(folders(tmp_path)[0])) == 3
        store.close()

    asyncio.run(use())


def test_what_can_never_be_kept_is_refused(tmp_path):
    async def use():
        store = FileStore(limits(), tmp_path)
        name = await store.keep(b"x", "png")
        with pytest.raises(RequestError, match="b64_json"):
            await store.keep(MEGABYTE * 4, "png")
        assert await store.read(name) == b"x"
        store.close()

    asyncio.run(use())
