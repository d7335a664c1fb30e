"""What a busy server must not do: block its event loop, hold uploads again and again, let a refusal wait.

`python -m bench.busy [--rounds 5]`, about 2 minutes.

* Event loop: a probe in the server's loop is due each millisecond, and measured is how late it comes, less the time
  that it waited for a core. The server is the product's; its engine's place is taken by a process that answers at once,
  with files that its own encoder makes: of noise, which no PNG can press together, so that every answer is as large as
  it can be.
* Uploads: 50 MB pictures to a real `darkroom serve demo`; the kernel's own account of the server process's peak.
* Refusals: 400s, and 429s of a full queue, from 8 connections, while a picture is drawn whose steps are long.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
from PIL import Image

from darkroom.engine.media import encode_files
from darkroom.engine.messages import Event, Generate, Progress
from tests.server.engine import ScriptedEngine, finished

from .processes import Server
from .tables import Row, p99, print_table, verdict
from .wire import in_own_process, in_turn, wire

GENERATIONS, EDITS, VIDEOS = "/v1/images/generations", "/v1/images/edits", "/v1/videos"
PLACES = 4
"""How many pictures take turns."""
FULL = (PLACES, 1)
"""How many run and wait on a server with `--max-queue 1`."""
LONG = {"prompt": "x", "size": "512x512", "num_inference_steps": 200}
"""A picture that is drawn for longer than anything is measured."""


def main() -> None:
    parser = argparse.ArgumentParser(description="the server's event loop, memory and refusals under load")
    parser.add_argument("--rounds", type=int, default=5, help="of pictures and videos (default 5)")
    rounds = parser.parse_args().rounds
    rows = loop_rows(rounds)
    with Server("--max-queue", "1") as server:
        rows += refusal_rows(server)
    with Server() as server:
        rows += upload_rows(server)
    print_table(rows)


# ---- the event loop ----------------------------------------------------------------------------------------------


def engine(address: Any) -> None:
    """The process in the engine's place."""
    random = np.random.default_rng(5)
    noise = Image.fromarray(random.integers(0, 256, (1024, 1024, 3), dtype=np.uint8))
    frames = [Image.fromarray(frame) for frame in random.integers(0, 256, (9, 480, 832, 3), dtype=np.uint8)]

    def script(message: Generate) -> Iterable[Event | float]:
        for step in range(1, 3):
            yield Progress(id=message.id, step=step, num_steps=2, seconds=0.01, batch_size=1)
            yield 0.01
        request = message.request
        pictures = (frames * 9)[: request.num_frames] if request.output_format == "mp4" else [noise]
        yield finished(message, *encode_files(pictures, request))

    with ScriptedEngine() as running:
        running.script = script
        address.send(running.address)
        threading.Event().wait()


@contextmanager
def probed_server() -> Iterator[tuple[str, subprocess.Popen[str]]]:
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=engine, args=(there,), daemon=True)
    process.start()
    with tempfile.TemporaryDirectory(prefix="darkroom-bench-") as folder:
        command = [sys.executable, "-m", "bench.probed_server", here.recv(), folder]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            try:
                yield server.stdout.readline().split()[1].removesuffix("/v1"), server
            finally:
                server.kill()
                process.kill()


def loop_rows(rounds: int) -> list[Row]:
    with probed_server() as (url, server):
        time.sleep(1.0)  # what starting took is not measured
        spans = [(time.monotonic(), (time.sleep(5.0), time.monotonic())[1])]
        spans += [_round(url) for _ in range(rounds)]
        server.send_signal(signal.SIGTERM)
        assert server.stdout is not None
        late = json.loads(server.stdout.read().splitlines()[-1])
    return _loop_rows([[one[1:] for one in late if start <= one[0] < end] for start, end in spans])


def _loop_rows(spans: list[list[tuple[float, float, float]]]) -> list[Row]:
    """Of (how late, of it waiting for a core, of it computing), in the idle time and in each round."""
    idle, *busy = ([1000 * (late - waited) for late, waited, _ in span] for span in spans)
    worst = [max(span, default=0.0) for span in busy]
    by_clock = [1000 * max((late for late, *_ in span), default=0.0) for span in spans]
    computed = [1000 * max((computed for *_, computed in span), default=0.0) for span in spans[1:]]
    what = "event loop blocked at most, 16 pictures and 2 videos"
    return [
        ("event loop blocked at most, nothing asked for 5 s", f"{max(idle, default=0.0):.1f} ms", ""),
        (f"{what}, each of {len(worst)} rounds", " / ".join(f"{ms:.1f}" for ms in worst) + " ms", ""),
        (f"{what}, the worst round", f"{max(worst):.1f} ms", verdict("20 ms", max(worst) <= 20)),
        ("of it computed by the loop's own thread, at most", f"{max(computed):.1f} ms", ""),
        (
            "by the clock, other processes' time included: idle, each round",
            " / ".join(f"{ms:.0f}" for ms in by_clock),
            "",
        ),
    ]


def _round(url: str) -> tuple[float, float]:
    """Eight answers of one picture, one of eight, and two videos, all at once. -> when it began and ended"""
    start = time.monotonic()
    with httpx.Client(base_url=url, timeout=120) as client, ThreadPoolExecutor(11) as pool:
        asked = [pool.submit(_pictures, client, n) for n in (1,) * 8 + (8,)]
        asked += [pool.submit(_video, client) for _ in range(2)]
        sizes = [one.result() for one in asked]
    assert min(sizes[:9]) > 4_000_000 and sizes[8] > 8 * 4_000_000
    return start, time.monotonic()


def _pictures(client: httpx.Client, n: int) -> int:
    return len(client.post(GENERATIONS, json={"prompt": "x", "n": n}).raise_for_status().content)


def _video(client: httpx.Client) -> int:
    id = client.post(VIDEOS, json={"prompt": "x", "size": "832x480"}).raise_for_status().json()["id"]
    while (status := client.get(f"{VIDEOS}/{id}").json()["status"]) in ("queued", "in_progress"):
        time.sleep(0.05)
    if status != "completed":
        raise RuntimeError(f"a video ended as {status}")
    return len(client.get(f"{VIDEOS}/{id}/content").raise_for_status().content)


# ---- uploads -----------------------------------------------------------------------------------------------------


def upload_rows(server: Server) -> list[Row]:
    picture = _large_picture()
    rows: list[Row] = [("the server process, ready", f"{_memory(server, 'VmRSS'):.0f} MB", "")]
    for number, at_once in ((1, 1), (10, 1), (8, 2), (8, 4)):
        _reset_peak(server)
        with ThreadPoolExecutor(at_once) as pool:
            list(pool.map(lambda _: _upload(server, picture), range(number)))
        peak, after = _memory(server, "VmHWM"), _memory(server, "VmRSS")
        what = f"peak with {number} uploads of {len(picture) / 1e6:.0f} MB, {at_once} at a time"
        rows.append((what, f"{peak:.0f} MB, then {after:.0f} MB", verdict("< 300 MB", peak < 300)))
    return rows


def _large_picture(edge: int = 4080) -> bytes:
    """Noise, so that 50 MB are a picture that is not too large for the limit on pixels."""
    noise = np.random.default_rng(5).integers(0, 256, (edge, edge, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


def _upload(server: Server, picture: bytes) -> None:
    fields = {"prompt": "x", "size": "64x64", "num_inference_steps": "2"}
    answer = httpx.post(f"{server.url}{EDITS}", data=fields, files={"image": picture}, timeout=120)
    answer.raise_for_status()


def _memory(server: Server, name: str) -> float:
    """Of the server process alone, in MB."""
    for line in Path(f"/proc/{server.process.pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"no {name}")


def _reset_peak(server: Server) -> None:
    Path(f"/proc/{server.process.pid}/clear_refs").write_text("5")


# ---- refusals ----------------------------------------------------------------------------------------------------


def refusal_rows(server: Server, connections: int = 8, duration: float = 5.0) -> list[Row]:
    """All places are taken, and the one in the queue too."""
    rows: list[Row] = []
    with ExitStack() as held, httpx.Client(base_url=server.url, timeout=30) as client:
        for load in (*((running, 0) for running in range(1, PLACES + 1)), FULL):
            held.enter_context(_asked_for(server.url))
            _wait(lambda load=load: _load(client) == load)
        _wait(lambda: _step_seconds(client) > 0)
        for what, body, status in (("400s", {**LONG, "n": 0}, b"400"), ("429s of a full queue", LONG, b"429")):
            request = wire("POST", GENERATIONS, body)
            seconds = in_own_process(in_turn, server.url, request, connections, duration, status)
            rate, slowest = len(seconds) / duration, 1000 * max(seconds)
            rows += [
                (f"{what} per second, {connections} connections", f"{rate:.0f}", verdict(">= 500", rate >= 500)),
                (f"{what}: p99 and slowest", f"{1000 * p99(seconds):.1f} and {slowest:.1f} ms", ""),
            ]
        if _load(client) != FULL:
            raise RuntimeError("a picture was finished before the measurement")
        step = 1000 * _step_seconds(client)
    return [("a step of the pictures that are drawn meanwhile", f"{step:.0f} ms", ""), *rows]


def _asked_for(url: str) -> socket.socket:
    """A picture, for as long as the connection is open."""
    parts = urlsplit(url)
    connection = socket.create_connection((parts.hostname or "", parts.port or 80))
    connection.sendall(wire("POST", GENERATIONS, LONG))
    return connection


def _load(client: httpx.Client) -> tuple[int, int]:
    status = client.get("/health").json()
    return status["running"], status["waiting"]


def _step_seconds(client: httpx.Client) -> float:
    """The mean of the steps so far."""
    lines = client.get("/metrics").text.splitlines()
    values = {line.split()[0]: float(line.split()[1]) for line in lines if line.startswith("darkroom_step_seconds_")}
    return values["darkroom_step_seconds_sum"] / max(values["darkroom_step_seconds_count"], 1.0)


def _wait(condition: Any, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError("the server did not come to what was to be measured")
        time.sleep(0.02)


if __name__ == "__main__":
    main()
