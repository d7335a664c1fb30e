from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from darkroom.engine.messages import Event, Generate
from darkroom.server.drain import Drain
from darkroom.server.errors import ApiError

from .conftest import serving
from .engine import finished, wait_until

PATH = "/v1/images/generations"


def test_nothing_that_runs_is_nothing_to_wait_for() -> None:
    asyncio.run(Drain().finish(60))


@pytest.mark.parametrize("way", ["done", "hurry", "timeout"])
def test_it_ends_with_the_work_or_with_the_time(way: str) -> None:
    async def run() -> float:
        drain = Drain()
        drain.refuse()
        with drain.work():
            finishing = asyncio.create_task(drain.finish(0.2 if way == "timeout" else 60))
            await asyncio.sleep(0.05)
            with pytest.raises(ApiError) as caught:
                drain.refuse()
            assert (caught.value.status, caught.value.headers) == (503, {"Retry-After": "10"})
            if way == "hurry":
                drain.hurry()
            if way != "done":
                await finishing
        start = time.monotonic()
        await finishing
        return time.monotonic() - start

    assert asyncio.run(run()) < 5


def test_what_runs_ends_and_nothing_new_begins(engine):
    may_end = threading.Event()

    def script(message: Generate) -> Iterator[Event | float]:
        while not may_end.is_set():
            yield 0.05
        yield finished(message)

    engine.script = script
    with serving(engine) as server, ThreadPoolExecutor(1) as pool:
        drain = server.uvicorn.config.app.state.context.drain
        running = pool.submit(httpx.post, f"{server.url}{PATH}", json={"prompt": "x"}, timeout=60)
        assert wait_until(lambda: bool(engine.requests))
        draining = asyncio.run_coroutine_threadsafe(drain.finish(60), server.loop)
        assert wait_until(lambda: drain.is_on)
        health = httpx.get(f"{server.url}/health")
        assert (health.status_code, health.json()["status"]) == (503, "draining")
        refused = httpx.post(f"{server.url}{PATH}", json={"prompt": "x"})
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "10")
        assert (refused.headers["connection"], refused.json()["error"]["type"]) == ("close", "server_error")
        assert httpx.get(f"{server.url}/v1/models").status_code == 200
        assert not draining.done()
        may_end.set()
        assert running.result(30).status_code == 200
        draining.result(30)
        assert len(engine.requests) == 1
