"""What HTTP and the server process cost, with the demo on one CPU thread.

`python -m bench.http [--rounds 20]`, 1 to 2 minutes. A real `darkroom serve demo`; clients on keep-alive connections.

* Picture: 20 steps at 128x128 through HTTP (JSON in, PNG as base64 out) against the stock diffusers pipeline on the
  same folder in this process, in turn, so that a noisy machine disturbs both alike. The first pictures must be equal.
* Concurrent requests while pictures are drawn: 100 `GET /v1/models` at once, again and again; and faulty generation
  requests from 8 connections, one after the other on each; likewise a wrong key, and a
  key that is over its limit. The clients speak HTTP over bare sockets in a process of their own, because httpx takes
  longer to ask than the server to answer; latencies still include the client's part.
* Process: seconds from the command to ready (the third of three starts, so that the disk is warm), memory, whether
  torch's library is mapped, CPU time of the whole tree while nothing is asked.
"""

from __future__ import annotations

import argparse
import base64
import io
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any, TypeVar

import httpx
import numpy as np
from PIL import Image

from .processes import Server
from .tables import Row, median, p99, print_table, verdict
from .wire import in_bursts, in_own_process, in_turn, wire

T = TypeVar("T")

PICTURE: dict[str, Any] = {
    "prompt": "a green star on a white background",
    "negative_prompt": " ",
    "size": "128x128",
    "num_inference_steps": 20,
    "true_cfg_scale": 2.5,
}
FAULTY = {**PICTURE, "n": 0}
KEY = "sk-bench-0123456789"
IDLE_SECONDS = 10.0
WARM_UP = 3


def main() -> None:
    parser = argparse.ArgumentParser(description="the HTTP server against the stock pipeline, and under load")
    parser.add_argument("--rounds", type=int, default=20, help="pictures from each side (default 20)")
    rounds = parser.parse_args().rounds
    starts = [_start_seconds() for _ in range(2)]
    with Server() as server:
        rows = [
            *process_rows(server, [*starts, server.seconds_to_ready]),
            *picture_rows(server, rounds),
            *concurrent_rows(server),
            *faulty_rows(server),
        ]
    with Server("--api-key", KEY, "--rate-limit", "1/hour") as guarded:
        rows += guarded_rows(guarded)
    print_table(rows)


def _start_seconds() -> float:
    with Server() as server:
        return server.seconds_to_ready


# ---- process -----------------------------------------------------------------------------------------------------


def process_rows(server: Server, starts: list[float]) -> list[Row]:
    memory = server.tree[0].memory_info().rss / 1e6
    has_torch = any("libtorch" in file.path for file in server.tree[0].memory_maps())
    before = _cpu_seconds(server)
    time.sleep(IDLE_SECONDS)
    idle = 1000 * (_cpu_seconds(server) - before)
    return [
        ("from the command to ready, warm disk", f"{starts[-1]:.1f} s", verdict("10 s", starts[-1] <= 10)),
        ("memory of the server process (RSS), ready", f"{memory:.0f} MB", verdict("< 150 MB", memory < 150)),
        ("torch in the server process", "yes" if has_torch else "no", verdict("no", not has_torch)),
        (
            f"CPU time of all processes in {IDLE_SECONDS:g} idle s",
            f"{idle:.0f} ms",
            verdict("0.1 %", idle < IDLE_SECONDS),
        ),
    ]


def _cpu_seconds(server: Server) -> float:
    """Read to the clock tick, 10 ms."""
    times = [process.cpu_times() for process in server.tree]
    return float(sum(one.user + one.system for one in times))


# ---- a picture ---------------------------------------------------------------------------------------------------


def picture_rows(server: Server, rounds: int) -> list[Row]:
    stock = _stock()
    ours, theirs = [], []
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for i in range(-WARM_UP, rounds):
            seconds, answer = _timed(partial(_post, client, i + WARM_UP))
            stock_seconds, picture = _timed(partial(stock, i + WARM_UP))
            _check_equal(answer, picture)
            if i >= 0:
                ours.append(seconds)
                theirs.append(stock_seconds)
    a, b = median(ours), median(theirs)
    limit = 1.05 * b + 0.010
    return [
        (f"20-step 128x128 picture over HTTP, median of {rounds}", f"{1000 * a:.1f} ms", ""),
        (f"the same by the stock pipeline, median of {rounds}", f"{1000 * b:.1f} ms", ""),
        ("HTTP / stock", f"{a / b:.3f}", ""),
        ("HTTP - stock", f"{1000 * (a - b):+.1f} ms", verdict(f"1.05 x + 10 ms = {1000 * limit:.0f} ms", a <= limit)),
    ]


def _timed(call: Callable[[], T]) -> tuple[float, T]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def _post(client: httpx.Client, seed: int) -> Any:
    return client.post("/v1/images/generations", json={**PICTURE, "seed": seed}).raise_for_status().json()


def _stock() -> Callable[[int], Image.Image]:
    """The stock pipeline as a function of the seed, on one thread."""
    import torch
    from diffusers import QwenImagePipeline

    from darkroom.models.checkpoint import DEMO

    torch.set_num_threads(1)
    pipe = QwenImagePipeline.from_pretrained(DEMO, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)

    def draw(seed: int) -> Image.Image:
        picture: Image.Image = pipe(
            PICTURE["prompt"],
            negative_prompt=PICTURE["negative_prompt"],
            true_cfg_scale=PICTURE["true_cfg_scale"],
            num_inference_steps=PICTURE["num_inference_steps"],
            width=128,
            height=128,
            generator=torch.Generator("cpu").manual_seed(seed),
        ).images[0]
        return picture

    return draw


def _check_equal(answer: Any, stock: Image.Image) -> None:
    """Both sides must have done the same work."""
    ours = Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"])))
    if not np.array_equal(np.asarray(ours), np.asarray(stock)):
        raise RuntimeError("the server's picture is not the stock pipeline's")


# ---- requests while pictures are drawn ---------------------------------------------------------------------------


def concurrent_rows(server: Server, connections: int = 100, bursts: int = 20) -> list[Row]:
    with drawing(server):
        seconds = in_own_process(in_bursts, server.url, wire("GET", "/v1/models"), connections, bursts)
    worst = 1000 * median([p99(burst) for burst in seconds])
    everything = list(chain.from_iterable(seconds))
    what = f"{connections} concurrent GET /v1/models while drawing"
    return [
        (f"{what}, p50", f"{1000 * median(everything):.1f} ms", ""),
        (f"{what}, p99 of a burst, median of {bursts}", f"{worst:.1f} ms", verdict("< 50 ms", worst < 50)),
        (f"{what}, p99 of all {len(everything)}", f"{1000 * p99(everything):.1f} ms", ""),
    ]


def faulty_rows(server: Server) -> list[Row]:
    with drawing(server):
        return _refused(server, "400s", wire("POST", "/v1/images/generations", FAULTY), b"400")


def guarded_rows(server: Server) -> list[Row]:
    """The only picture of the hour is long, and is being drawn while the others are refused."""
    wrong = wire("POST", "/v1/images/generations", PICTURE, f"Authorization: Bearer {KEY}x")
    again = wire("POST", "/v1/images/generations", PICTURE, f"Authorization: Bearer {KEY}")
    drawn = {**PICTURE, "size": "512x512", "num_inference_steps": 200}
    headers = {"Authorization": f"Bearer {KEY}"}
    with ThreadPoolExecutor(1) as pool, httpx.Client(base_url=server.url, timeout=0.5, headers=headers) as client:
        stop = threading.Event()
        drawing = pool.submit(_hold, server.url, drawn, headers, stop)
        while client.get("/health").json()["running"] == 0:
            time.sleep(0.05)
        rows = [*_refused(server, "401s", wrong, b"401"), *_refused(server, "429s", again, b"429")]
        if client.get("/health").json()["running"] == 0:
            raise RuntimeError("the picture was finished before the measurement")
        stop.set()
        drawing.result()
    return rows


def _hold(url: str, body: Any, headers: dict[str, str], stop: threading.Event) -> None:
    """Ask for a stream of a picture, and go away when told."""
    with httpx.stream(
        "POST", f"{url}/v1/images/generations", json={**body, "stream": True}, headers=headers, timeout=60
    ) as response:
        response.raise_for_status()
        stop.wait()


def _refused(server: Server, what: str, request: bytes, status: bytes, connections: int = 8) -> list[Row]:
    duration = 5.0
    seconds = in_own_process(in_turn, server.url, request, connections, duration, status)
    rate, what = len(seconds) / duration, f"{what} on {connections} connections while drawing"
    return [
        (f"{what}, per second", f"{rate:.0f}", verdict(">= 500", rate >= 500)),
        (f"{what}, p99", f"{1000 * p99(seconds):.1f} ms", ""),
        (f"{what}, slowest", f"{1000 * max(seconds):.1f} ms", ""),
    ]


@contextmanager
def drawing(server: Server) -> Iterator[None]:
    """Pictures are drawn from before the block begins until it ends."""
    stop, failures = threading.Event(), []

    def draw() -> None:
        try:
            with httpx.Client(base_url=server.url, timeout=60) as client:
                while not stop.is_set():
                    _post(client, 0)
        except Exception as e:
            failures.append(e)

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        time.sleep(0.3)
        yield
    finally:
        stop.set()
        thread.join()
    if failures:
        raise failures[0]


if __name__ == "__main__":
    main()
