"""Start and end an engine process. Used by the server and by the offline API; imports no torch."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from zmq import IPC_PATH_MAX_LEN

from darkroom.configs.config import EngineConfig
from darkroom.configs.devices import worker_environment
from darkroom.configs.errors import ConfigError

from .engine import engine_address

_STOP_SECONDS = 2.5


class EngineProcess:
    """An engine and its workers, which end with this process, however it ends: its standard input is their lifeline.

    The sockets lie in a folder that only this user can enter.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.run_dir = _make_run_dir()
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "darkroom.engine", str(self.run_dir)],  # -P: no code from the current folder
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env=worker_environment(),
            process_group=0,
        )
        assert self.process.stdin is not None
        self.process.stdin.write(config.model_dump_json().encode() + b"\n")
        self.process.stdin.flush()

    @property
    def address(self) -> str:
        return engine_address(self.run_dir)

    def stop(self) -> None:
        """Close the lifeline, wait, and kill what is left."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)  # its fork server too, which is deaf while it imports torch
            self.process.wait()
        shutil.rmtree(self.run_dir, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()


def _make_run_dir() -> Path:
    """A private folder for the sockets. Raises ConfigError where none can be made."""
    try:
        run_dir = Path(tempfile.mkdtemp(prefix="darkroom-"))
    except OSError as e:
        raise ConfigError(f"no temporary folder for the sockets can be made: {e.strerror or e}; set TMPDIR") from None
    longest = f"{run_dir}/workers99/replies"
    if len(longest.encode()) > IPC_PATH_MAX_LEN:
        run_dir.rmdir()
        raise ConfigError(
            f"the temporary folder's path is too long for sockets ({len(longest)} characters of at most "
            f"{IPC_PATH_MAX_LEN}); set TMPDIR to a shorter one"
        )
    return run_dir
