"""The server without its engine: `python -m bench.probed_server ENGINE_ADDRESS FOLDER`, with a probe in its event loop.

Prints its URL. At SIGTERM it prints, as one JSON line, the times at which the probe was more than 5 ms late.
"""

from __future__ import annotations

import asyncio
import io
import json
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from darkroom.configs.capabilities import Capabilities
from darkroom.configs.config import ServeConfig
from darkroom.server import run

CAPABILITIES = Capabilities(
    family="bench", tasks=("text-to-image", "text-to-video"), size_multiple=16, min_edge=64, max_pixels=2048 * 2048,
    default_size=(1024, 1024), num_inference_steps=2, min_inference_steps=1, max_inference_steps=50,
    quality_steps={"low": 2, "medium": 2, "high": 2}, guidance_parameter="guidance_scale", guidance_scale=4.0,
    max_guidance=100.0, negative_prompt=" ", max_sequence_length=512, text_window=512, guidance_branches=2,
    fps=16, num_frames=81, max_frames=81, frame_multiple=4, axes=(),
)  # fmt: skip
INTERVAL = 0.001
LATE = 0.005


async def probe(found: list[tuple[float, float, float, float]]) -> None:
    """Sleep a millisecond, for ever. -> (when, how late, of it waiting for a core, of it computing), of what was late

    A loop that is late because another process has its core is not to blame, and the kernel says how long that was. The
    rest it computed itself, or waited for a thread of its own process that held Python's lock.
    """
    with open("/proc/self/schedstat", "rb", buffering=0) as account:
        while True:
            due, before = time.monotonic() + INTERVAL, _spent(account)
            await asyncio.sleep(INTERVAL)
            if (late := time.monotonic() - due) > LATE:
                computed, waited = (now - then for now, then in zip(_spent(account), before, strict=True))
                found.append((due, late, waited, computed))


def _spent(account: io.RawIOBase) -> tuple[float, float]:
    """Seconds that the main thread has computed, and has waited for a core."""
    account.seek(0)
    computed, waited, _ = (account.read() or b"").split()
    return int(computed) / 1e9, int(waited) / 1e9


async def serve(address: str, folder: Path) -> list[tuple[float, float, float, float]]:
    """The product's own server, but for the process that its engine would be."""
    found: list[tuple[float, float, float, float]] = []
    with socket.create_server(("127.0.0.1", 0), backlog=2048) as listener:
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        config = ServeConfig(model="bench", data_dir=folder, max_videos=2)  # type: ignore[call-arg]
        for_ever = SimpleNamespace(wait=threading.Event().wait)
        engine: Any = SimpleNamespace(address=address, run_dir=folder, process=for_ever)
        probing = asyncio.create_task(probe(found))
        await run._serve(config, CAPABILITIES, engine, listener, None, url)
        probing.cancel()
    return found


def main() -> None:
    run.set_up_logging("warning", "text", "server")
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn handles it, and raises it again when it has stopped
    print(json.dumps(asyncio.run(serve(sys.argv[1], Path(sys.argv[2])))), flush=True)


if __name__ == "__main__":
    main()
