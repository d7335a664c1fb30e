"""The group of worker processes, seen from the engine: one command under way, a reply from every rank.

Replies are awaited from all ranks: equal errors on all are one request's fault; anything else (a rank that died, that
hangs, or that failed alone while the others wait for it in a collective) breaks the group, and it is killed whole.
"""

from __future__ import annotations

import importlib
import logging
import multiprocessing as mp
import os
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing import connection
from pathlib import Path

import zmq

from darkroom.configs.config import EngineConfig
from darkroom.models import MODELS

from .messages import Command, Done, Encoded, Error, Exit, Loaded, Prepared, decode_reply, encode

logger = logging.getLogger(__name__)

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
    """Every rank refused the command alike; the group is whole."""


class WorkerGroup:
    """N processes that obey as one. Never blocks: `start`, `send`, and `receive` whenever `files` are readable."""

    def __init__(self, config: EngineConfig, context: zmq.Context[zmq.Socket[bytes]], run_dir: Path) -> None:
        self.config = config
        self.context = context
        self.run_dir = run_dir
        self.generation = 0
        self.processes: list[mp.process.BaseProcess] = []
        self.commands: list[zmq.Socket[bytes]] = []
        self.replies: zmq.Socket[bytes] | None = None
        self.awaited: dict[int, Error | None] = {}
        """Ranks that have not answered the command under way are absent."""
        self.prepared: tuple[Prepared, ...] = ()
        self.deadline: float | None = None
        self.encoded: list[Encoded] = []
        self.ready = False

    @property
    def files(self) -> list[zmq.Socket[bytes] | int]:
        """What to poll for: replies, and the processes' ends."""
        sentinels = [process.sentinel for process in self.processes]
        return [*([self.replies] if self.replies else []), *sentinels]

    def start(self) -> None:
        """Start the processes; `receive` tells when all have loaded."""
        self.generation += 1
        folder = self.run_dir / f"workers{self.generation}"
        folder.mkdir()
        self.replies = self._bind(zmq.PULL, f"ipc://{folder}/replies")
        self.commands = [self._bind(zmq.PUSH, f"ipc://{folder}/{rank}") for rank in range(self.config.world_size)]
        spawn = _process_context(self.config)
        self.processes = [
            spawn.Process(  # type: ignore[attr-defined]
                target=_worker_main,
                args=(self.config.model_dump_json(), rank, str(folder), os.getpid()),
                name=f"worker {rank}",
            )
            for rank in range(self.config.world_size)
        ]
        for process in self.processes:
            process.start()
        self.awaited, self.ready, self.deadline = {}, False, None

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
            socket.send(data, zmq.DONTWAIT)

    def receive(self) -> bool:
        """Take what has come. True when the command under way (or loading) is done by every rank.

        Raises CommandFailed when all ranks refused it, WorkersLost when the group is broken.
        """
        assert self.replies is not None
        while self.replies.poll(0):
            match decode_reply(self.replies.recv()):
                case Encoded() as encoded:
                    self.encoded.append(encoded)
                case Error(rank=rank, is_config_error=is_config_error) as error:
                    self._failed(error) if self.ready else self._not_loaded(error, is_config_error)
                    self.awaited[rank] = error
                case Done(rank=rank, prepared=prepared):
                    self.awaited[rank] = None
                    self.prepared = self.prepared or prepared
                case Loaded(rank=rank):
                    self.awaited[rank] = None
        self._check_alive()
        return self._all_answered()

    def take_encoded(self) -> Iterator[Encoded]:
        while self.encoded:
            yield self.encoded.pop(0)

    def _failed(self, error: Error) -> None:
        self.deadline = min(self.deadline or float("inf"), time.monotonic() + _ALONE)
        logger.error("rank %d: %s", error.rank, error.error)

    def _not_loaded(self, error: Error, is_config_error: bool) -> None:
        raise LoadFailed(error.error, is_config_error=is_config_error)

    def _all_answered(self) -> bool:
        if len(self.awaited) < self.config.world_size:
            return False
        self.ready, self.deadline = True, None
        errors = [error for error in self.awaited.values() if error]
        self.awaited = {}
        if not errors:
            return True
        if len(errors) < self.config.world_size:
            raise WorkersLost(f"rank {errors[0].rank} failed alone: {errors[0].error}")
        raise CommandFailed(errors[0].error)

    def _check_alive(self) -> None:
        for process in self.processes:
            if process.exitcode is not None:
                raise WorkersLost(f"{process.name} ended with exit code {process.exitcode}")
        if self.deadline is not None and time.monotonic() > self.deadline:
            silent = [str(rank) for rank in range(self.config.world_size) if rank not in self.awaited]
            raise WorkersLost(f"rank {', '.join(silent)} did not answer in time")

    def kill(self) -> None:
        """End every process at once, and forget the group."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        for socket in [*self.commands, *([self.replies] if self.replies else [])]:
            socket.close()
        self.processes, self.commands, self.replies, self.encoded = [], [], None, []
        self.ready, self.deadline = False, None

    def stop(self, seconds: float) -> None:
        """Let the workers end by themselves, for at most `seconds`."""
        if self.ready:
            self.send(Exit())
            connection.wait([process.sentinel for process in self.processes], seconds)
        self.kill()


def _process_context(config: EngineConfig) -> mp.context.BaseContext:
    """On CPUs the workers fork from one process that has imported torch and the model's classes: start-up costs that
    once. CUDA does not survive a fork, so there each worker starts afresh."""
    if config.device == "cuda":
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    families = set(MODELS.values())
    modules = {component.module for family in families for component in family.components.values()}
    context.set_forkserver_preload(["darkroom.engine.worker", *sorted(modules)])
    return context


def _worker_main(config: str, rank: int, folder: str, engine: int) -> None:
    """The worker process's main function. Ends with the engine, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the server drains by itself
    threading.Thread(target=_end_with_parent, daemon=True).start()
    parsed = EngineConfig.model_validate_json(config)
    logging.basicConfig(level=parsed.log_level.upper(), format=f"%(levelname)s worker {rank}: %(message)s")
    worker = importlib.import_module("darkroom.engine.worker")  # torch: must not be imported by the engine process
    addresses = (f"ipc://{folder}/{rank}", f"ipc://{folder}/replies")
    worker.run_worker(parsed, rank, addresses, Path(folder) / "rendezvous")


def _end_with_parent() -> None:
    """Even in the middle of a collective that no one will ever answer."""
    parent = mp.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
