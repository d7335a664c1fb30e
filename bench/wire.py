"""Requests over bare sockets, from a process of their own: a client library takes longer to ask than a server to
answer."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import chain
from typing import Any, TypeVar
from urllib.parse import urlsplit

T = TypeVar("T")


def wire(method: str, path: str, body: Any = None, *headers: str) -> bytes:
    """A request as it goes over the socket."""
    data = b"" if body is None else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", "Host: bench", "Content-Type: application/json", *headers]
    head = "\r\n".join([*lines, f"Content-Length: {len(data)}"])
    return head.encode() + b"\r\n\r\n" + data


def in_own_process(function: Callable[..., T], *args: Any) -> T:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result(timeout=60)


def in_bursts(url: str, request: bytes, connections: int, bursts: int) -> list[list[float]]:
    """All connections ask at once; a pause; again. -> seconds, by burst"""

    async def run() -> list[list[float]]:
        open_ones = [await connect(url) for _ in range(connections)]
        await asyncio.gather(*(ask(one, request) for one in open_ones))
        seconds = []
        for _ in range(bursts):
            await asyncio.sleep(0.2)
            seconds.append(await asyncio.gather(*(ask(one, request) for one in open_ones)))
        return seconds

    return asyncio.run(run())


def in_turn(url: str, request: bytes, connections: int, duration: float, status: bytes) -> list[float]:
    """Every connection asks again as soon as it is answered."""

    async def one(deadline: float) -> list[float]:
        connection, seconds = await connect(url), []
        while time.perf_counter() < deadline:
            seconds.append(await ask(connection, request, status))
        return seconds

    async def run() -> list[float]:
        deadline = time.perf_counter() + duration
        return list(chain.from_iterable(await asyncio.gather(*(one(deadline) for _ in range(connections)))))

    return asyncio.run(run())


Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def connect(url: str) -> Connection:
    parts = urlsplit(url)
    return await asyncio.open_connection(parts.hostname, parts.port)


async def ask(connection: Connection, request: bytes, status: bytes = b"200") -> float:
    """-> seconds until the answer is here, whole."""
    reader, writer = connection
    start = time.perf_counter()
    writer.write(request)
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = int(head.partition(b"content-length:")[2].split(b"\r\n", 1)[0])
    await reader.readexactly(length)
    if head.split(b" ", 2)[1] != status:
        raise RuntimeError(f"expected {status.decode()}: {head.decode()}")
    return time.perf_counter() - start
