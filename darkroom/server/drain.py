"""The end of a server that is told to stop: what runs may finish, and nothing new begins."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import ApiError


class Drain:
    """Counts what runs from the start; `is_on` from the moment on that the server was told."""

    def __init__(self) -> None:
        self.is_on = False
        self.running = 0
        self._over = asyncio.Event()

    @contextmanager
    def work(self) -> Iterator[None]:
        """Around one request."""
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1
            if self.is_on and not self.running:
                self._over.set()

    def refuse(self) -> None:
        """Raises `ApiError` 503 once the server was told to stop."""
        if self.is_on:
            message = "The server is stopping, and takes no new work; try again in a few seconds."
            raise ApiError(503, message, headers={"Retry-After": "10"})

    async def finish(self, timeout: float) -> None:
        """Returns when nothing runs, `hurry` was called, or the time is up."""
        self.is_on = True
        if not self.running:
            return
        try:
            async with asyncio.timeout(timeout):
                await self._over.wait()
        except TimeoutError:
            pass

    def hurry(self) -> None:
        """What still runs is not waited for."""
        self._over.set()
