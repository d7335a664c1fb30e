"""Pictures that are answered as a URL: kept for a while, within a budget, under names that nobody can guess."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from darkroom.configs.config import Limits
from darkroom.configs.errors import RequestError


class FileStore:
    """Lives in a folder of its own, which is made for the first file."""

    def __init__(self, limits: Limits, parent: Path | None = None) -> None:
        self.seconds = limits.url_seconds
        self.budget = limits.url_storage_mb << 20
        self.parent = parent
        self.size = 0
        self._folder: Path | None = None
        self._kept: OrderedDict[str, tuple[int, asyncio.TimerHandle]] = OrderedDict()

    async def keep(self, files: Sequence[bytes], ending: str) -> list[str]:
        """Their names. The oldest make room; raises `RequestError` where not all of these can be kept together."""
        size = sum(map(len, files))
        if size > self.budget:
            message = f"The pictures are too large to be kept, with {size} bytes of {self.budget}: ask for 'b64_json'."
            raise RequestError(message, param="response_format")
        while self.size + size > self.budget:
            self._drop(next(iter(self._kept)))
        names = [self._book(len(data), ending) for data in files]
        try:
            for name, data in zip(names, files, strict=True):
                await asyncio.to_thread(self._path(name).write_bytes, data)
        except BaseException:
            for name in names:
                self._drop(name)
            raise
        for name in names:
            if name not in self._kept:  # others took its room meanwhile
                self._unlink(name)
        return names

    def _book(self, size: int, ending: str) -> str:
        name = f"{secrets.token_urlsafe(32)}.{ending}"
        self._kept[name] = size, asyncio.get_running_loop().call_later(self.seconds, self._drop, name)
        self.size += size
        return name

    async def read(self, name: str) -> bytes | None:
        """None for what is not there, or no longer. Only names that were given out are ever looked up."""
        if name not in self._kept:
            return None
        try:
            return await asyncio.to_thread(self._path(name).read_bytes)
        except FileNotFoundError:  # its time was up meanwhile
            return None

    def close(self) -> None:
        for _, timer in self._kept.values():
            timer.cancel()
        self._kept.clear()
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="darkroom-", dir=self.parent))
        return self._folder / name

    def _drop(self, name: str) -> None:
        if name in self._kept:
            size, timer = self._kept.pop(name)
            timer.cancel()
            self.size -= size
            self._unlink(name)

    def _unlink(self, name: str) -> None:
        with contextlib.suppress(OSError):
            self._path(name).unlink()
