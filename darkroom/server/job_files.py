"""Files of videos: in a folder, or under an S3 URL. Knows no database and no HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from pathlib import Path

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore, S3Store

from darkroom.configs.errors import ConfigError

_PIECE = 1024 * 1024
"""Bytes that are read at a time."""
_UNFINISHED = "*#*"
"""What the library names a file while it is being written to a folder."""


class JobFiles:
    """Files by name. A file is there as a whole or not at all."""

    def __init__(self, store: LocalStore | S3Store, folder: Path | None = None) -> None:
        self._store = store
        self._folder = folder

    async def put(self, name: str, data: bytes) -> None:
        await obstore.put_async(self._store, name, data)

    async def read(self, name: str) -> bytes:
        """Raises FileNotFoundError."""
        return bytes(await (await obstore.get_async(self._store, name)).bytes_async())

    async def size(self, name: str) -> int:
        """Raises FileNotFoundError."""
        return int((await obstore.head_async(self._store, name))["size"])

    async def pieces(self, name: str, start: int, end: int) -> AsyncIterator[bytes]:
        """Bytes `start` up to `end`, a piece at a time. Raises FileNotFoundError."""
        result = await obstore.get_async(self._store, name, options={"range": (start, end)})
        async for piece in result.stream(min_chunk_size=_PIECE):
            yield bytes(piece)

    async def delete(self, *names: str) -> None:
        """It does not matter whether they are there."""
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                await obstore.delete_async(self._store, name)

    async def sweep(self, is_wanted: Callable[[str], bool], age: float) -> int:
        """Delete what is not wanted, and older than `age` seconds; returns how much that was.

        What is young may be wanted in a moment: files are written before the database tells of them.
        """
        before = time.time() - age
        unwanted = []
        async for page in obstore.list(self._store):
            old = [meta["path"] for meta in page if meta["last_modified"].timestamp() < before]
            unwanted += [path for path in old if not is_wanted(path)]
        await self.delete(*unwanted)
        return len(unwanted) + await asyncio.to_thread(self._sweep_unfinished, before)

    def _sweep_unfinished(self, before: float) -> int:
        """The listing does not show them: what a server that was killed had begun to write."""
        count = 0
        for file in list(self._folder.glob(_UNFINISHED)) if self._folder else []:
            with contextlib.suppress(FileNotFoundError):  # its server has just finished it
                if file.stat().st_mtime < before:
                    file.unlink()
                    count += 1
        return count


async def open_files(place: str | Path) -> JobFiles:
    """The files in a folder, which is made, or under `s3://bucket/prefix`. Raises `ConfigError`.

    Keys, region and endpoint of S3 are read where every client of it does, such as AWS_ACCESS_KEY_ID.
    """
    try:
        files = _open(place)
        await files.put("check", b"")
        await files.delete("check")
    except (BaseError, OSError, ValueError) as e:
        flag = f"--data-dir {place}" if isinstance(place, Path) else f"--files-url {place}"
        reason = " ".join(str(e).split())[:300]
        raise ConfigError(f"{flag}: cannot be written: {reason}") from None
    return files


def _open(place: str | Path) -> JobFiles:
    if isinstance(place, Path):
        place.mkdir(parents=True, exist_ok=True)
        return JobFiles(LocalStore(place), place)
    if not place.startswith("s3://"):
        raise ValueError("expected 's3://bucket' or 's3://bucket/prefix'")
    store = S3Store.from_url(
        place,
        client_options={"connect_timeout": timedelta(seconds=5), "allow_http": True},  # if the endpoint's URL says so
        retry_config={"max_retries": 3, "retry_timeout": timedelta(seconds=30)},
    )
    return JobFiles(store)
