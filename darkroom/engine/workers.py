"""The group of worker processes, seen from the engine: one command under way, a reply from every rank.

Replies are awaited from all ranks: equal errors on all are one request's fault; anything else (a rank that died, that
hangs, or that failed alone while the others wait for it in a collective) breaks the group, and it is killed whole.
Several GPUs are killed for any error: what a rank enqueued before it would meet the next request's collectives.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing as mp
import os
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing import connection
from pathlib import Path
from typing import Any

import zmq

from darkroom.configs.config import EngineConfig
from darkroom.configs.logs import set_up_logging
from darkroom.models.checkpoint import Checkpoint

from .messages import (
    Command,
    Done,
    Encoded,
    EncodingFailed,
    Error,
    Exit,
    FromEncoder,
    Loaded,
    Prepared,
    Refusal,
    decode_reply,
    encode,
)

_ALONE = 5.0
"""Seconds that the other ranks get to fail in the same way as one that failed."""


class WorkersLost(Exception):
    """The group is broken: a rank died, hangs, or failed alone."""


class LoadFailed(WorkersLost):
    """The model could not be loaded; starting again would not help."""

    def __init__(self, message: str, *, is_config_error: bool) -> None:
        super().__init__(message)
        self.is_config_error = is_config_error


class CommandFailed(Exception):
    """Every rank refused the command alike; the group is whole. `refusal` is set where the client is at fault."""

    def __init__(self, message: str, refusal: Refusal | None = None) -> None:
        super().__init__(message)
        self.refusal = refusal


class WorkerGroup:
    """N processes that obey as one: `start`, `send`, and `receive` whenever `files` are readable. None of them waits,
    but for the first `start` on CPUs, which takes as long as importing torch."""

    def __init__(self, config: EngineConfig, context: zmq.Context[zmq.Socket[bytes]], run_dir: Path) -> None:
        self.config = config
        self.context = context
        self.run_dir = run_dir
        self.spawn: Any = _process_context(config)
        self.generation = 0
        self.processes: list[mp.process.BaseProcess] = []
        self.commands: list[zmq.Socket[bytes]] = []
        self.replies: zmq.Socket[bytes] | None = None
        self.awaited: dict[int, Error | None] = {}
        """Ranks that have not answered the command under way are absent."""
        self.prepared: tuple[Prepared, ...] = ()
        self.deadline: float | None = None
        self.encoded: list[FromEncoder] = []
        self.ready = False
        self.hidden = False
        """Whether the socket files are gone."""

    @property
    def files(self) -> list[zmq.Socket[bytes] | int]:
        """What to poll for: replies, and the processes' ends."""
        sentinels = [process.sentinel for process in self.processes]
        return [*([self.replies] if self.replies else []), *sentinels]

    def start(self) -> None:
        """Start the processes; `receive` tells when all have loaded."""
        self.generation += 1
        folder = self._folder
        folder.mkdir()
        self.replies = self._bind(zmq.PULL, f"ipc://{folder}/replies")
        self.commands = [self._bind(zmq.PUSH, f"ipc://{folder}/{rank}") for rank in range(self.config.world_size)]
        self.processes = [
            self.spawn.Process(
                target=_worker_main,
                args=(self.config.model_dump_json(), rank, str(folder)),
                name=f"worker {rank}",
            )
            for rank in range(self.config.world_size)
        ]
        for process in self.processes:
            process.start()
        self.awaited, self.ready, self.deadline, self.hidden = {}, False, None, False

    def hide_sockets(self) -> None:
        """Unlink their files, which no rank needs any longer once it is connected."""
        for file in self._folder.iterdir():
            if file.is_socket():
                file.unlink()
        self.hidden = True

    @property
    def _folder(self) -> Path:
        """Of this generation's sockets."""
        return self.run_dir / f"workers{self.generation}"

    def _bind(self, kind: int, address: str) -> zmq.Socket[bytes]:
        socket = self.context.socket(kind)
        socket.set_hwm(0)
        socket.bind(address)
        return socket

    def send(self, command: Command) -> None:
        """The same bytes to every rank. The answer comes by `receive`."""
        data = encode(command)
        self.awaited, self.prepared = {}, ()
        self.deadline = time.monotonic() + self.config.step_timeout
        for socket in self.commands:
            with contextlib.suppress(zmq.Again):  # this rank has just died: `receive` will tell
                socket.send(data, zmq.DONTWAIT)

    def expect_encoded(self, is_expected: bool) -> None:
        """Call while no command is under way: the encoder thread has a deadline too."""
        if not is_expected:
            self.deadline = None
        elif self.deadline is None:
            self.deadline = time.monotonic() + self.config.step_timeout

    def receive(self) -> bool:
        """Take what has come. True when the command under way (or loading) is done by every rank.

        Raises CommandFailed when all ranks refused it, LoadFailed when one could not load, WorkersLost when the group
        is broken.
        """
        assert self.replies is not None
        while self.replies.poll(0):
            match decode_reply(self.replies.recv()):
                case Encoded() | EncodingFailed() as encoded:
                    self.encoded.append(encoded)
                case Error(rank=rank) as error:
                    self.awaited[rank] = error
                    self.deadline = min(self.deadline or float("inf"), time.monotonic() + _ALONE)
                case Done(rank=rank, prepared=prepared):
                    self.awaited[rank] = None
                    self.prepared = self.prepared or prepared
                case Loaded(rank=rank):
                    self.awaited[rank] = None
        if not self.ready:
            self._check_loading()
        self._check_alive()
        return self._all_answered()

    def take_encoded(self) -> Iterator[FromEncoder]:
        while self.encoded:
            yield self.encoded.pop(0)

    def _check_loading(self) -> None:
        if errors := [error for error in self.awaited.values() if error]:
            cause = max(errors, key=lambda error: error.is_config_error)  # the others may have failed for its sake
            raise LoadFailed(cause.error, is_config_error=cause.is_config_error)

    def _all_answered(self) -> bool:
        if len(self.awaited) < self.config.world_size:
            return False
        self.ready, self.deadline = True, None
        errors = [error for error in self.awaited.values() if error]
        self.awaited = {}
        if not errors:
            return True
        first = errors[0]
        if len(errors) < self.config.world_size:
            raise WorkersLost(f"rank {first.rank} failed alone: {first.error}")
        if any(error.error != first.error for error in errors):
            raise WorkersLost(f"the ranks failed differently; rank {first.rank}: {first.error}")
        if self.config.device == "cuda" and self.config.world_size > 1 and not first.refusal:
            raise WorkersLost(f"every rank failed: {first.error}")
        raise CommandFailed(first.error, first.refusal)

    def _check_alive(self) -> None:
        for process in self.processes:
            if process.exitcode is not None:
                raise WorkersLost(f"{process.name} ended with exit code {process.exitcode}")
        if self.deadline is not None and time.monotonic() > self.deadline:
            silent = [str(rank) for rank in range(self.config.world_size) if rank not in self.awaited]
            failed = [f"; rank {rank} failed: {error.error}" for rank, error in self.awaited.items() if error]
            raise WorkersLost(f"rank {', '.join(silent)} did not answer in time{''.join(failed)}")

    def kill(self) -> None:
        """End every process at once, and forget the group."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
            process.close()  # closes its lifeline too: a worker that outlives the fork server looks dead, and is not
        for socket in [*self.commands, *([self.replies] if self.replies else [])]:
            socket.close()
        self.processes, self.commands, self.replies, self.encoded = [], [], None, []
        self.ready, self.deadline = False, None

    def stop(self, seconds: float) -> None:
        """Let the workers end by themselves, for at most `seconds`."""
        if self.ready:
            self.send(Exit())
            deadline = time.monotonic() + seconds
            for process in self.processes:
                process.join(max(0.0, deadline - time.monotonic()))
        self.kill()


def _process_context(config: EngineConfig) -> mp.context.BaseContext:
    """On CPUs the workers fork from one process that has imported torch and the model's classes: start-up costs that
    once. CUDA does not survive a fork, so there each worker starts afresh."""
    if config.device == "cuda":
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    components = Checkpoint.open(config.model, config.revision).family.components
    modules = {component.module for component in components.values()}
    context.set_forkserver_preload(["darkroom.engine.worker", *sorted(modules)])
    return context


def _worker_main(config: str, rank: int, folder: str) -> None:
    """The worker process's main function. Ends with the engine, however that ends."""
    ignore_signals()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    parsed = EngineConfig.model_validate_json(config)
    set_up_logging(parsed.log_level, parsed.log_format, f"worker {rank}")
    worker = importlib.import_module("darkroom.engine.worker")  # torch: must not be imported by the engine process
    addresses = (f"ipc://{folder}/{rank}", f"ipc://{folder}/replies")
    worker.run_worker(parsed, rank, addresses, Path(folder) / "rendezvous")


def ignore_signals() -> None:
    """Ctrl-C reaches the whole terminal, and a service manager's SIGTERM every process: the server drains by itself,
    and ends the others by closing the engine's standard input."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _end_with_parent() -> None:
    """Even in the middle of a collective that no one will ever answer."""
    parent = mp.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
