"""What the benchmarks start: a real server as a child, a group of real workers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import zmq

from darkroom.configs import EngineConfig
from darkroom.configs.devices import worker_environment
from darkroom.engine.messages import Command
from darkroom.engine.workers import WorkerGroup

# ---- a server ----------------------------------------------------------------------------------------------------


class Server:
    """`darkroom serve MODEL` as a child process with one thread per worker, on a port of its own choice."""

    def __init__(self, *flags: str, model: str = "demo") -> None:
        start = time.monotonic()
        command = [sys.executable, "-m", "darkroom", "serve", model, "--port", "0", "--log-level", "warning", *flags]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        try:
            self.url = self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        self.seconds_to_ready = time.monotonic() - start

    def _wait_until_ready(self) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("ready: "):
                return line.split()[1].removesuffix("/v1")
        raise RuntimeError(f"the server ended with exit code {self.process.wait()} before it was ready")

    @property
    def tree(self) -> list[psutil.Process]:
        """The server, its engine and the engine's children."""
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def stop(self) -> None:
        """End it, and whatever it may have left behind."""
        tree = self.tree if self.process.poll() is None else []
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for process in psutil.wait_procs(tree, 5)[1]:
            process.kill()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


# ---- workers -----------------------------------------------------------------------------------------------------


class Workers:
    """The engine's own `WorkerGroup` over real processes on CPU ranks, driven by blocking calls.

    The values are those of `EngineConfig`. As a context manager it waits until all ranks have loaded.
    """

    def __init__(self, **values: object) -> None:
        os.environ.update(worker_environment())
        config = EngineConfig.check({"model": "demo", "device": "cpu", "dtype": "float32", **values})
        self.folder = Path(tempfile.mkdtemp(prefix="darkroom-bench-"))
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.group = WorkerGroup(config, self.context, self.folder)

    def run(self, command: Command) -> float:
        """Send a command, wait for every rank's answer. -> seconds"""
        start = time.perf_counter()
        self.group.send(command)
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        """As the engine waits: a poll over replies and the processes' ends."""
        done = False
        while not done:
            poller = zmq.Poller()
            for file in self.group.files:
                poller.register(file, zmq.POLLIN)
            poller.poll()
            done = self.group.receive()

    def __enter__(self) -> Workers:
        try:
            self.group.start()
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.group.stop(1.0)
        self.context.destroy(linger=0)
        shutil.rmtree(self.folder, ignore_errors=True)
