"""A server process for videos over a light engine: `python -m tests.server.video_server FOLDER`. Prints its URL."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

from .conftest import QUICK, VIDEO_CAPABILITIES, serving
from .engine import ScriptedEngine, video


def main(folder: Path) -> None:
    with ScriptedEngine() as engine:
        engine.script = video
        # What is killed while a video is written down holds its job for as long as the patience: here no 5 minutes.
        options = replace(QUICK, max_waiting=1000, concurrency=3, lease=2.0, patience=5.0)
        with serving(engine, capabilities=VIDEO_CAPABILITIES, folder=folder, options=options) as server:
            print(server.url, flush=True)
            time.sleep(600)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
