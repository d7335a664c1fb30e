"""A real DEALER socket that speaks the server's side of the wire, and a look at a tree of processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import zmq

from darkroom.configs import EngineConfig, Request
from darkroom.configs.devices import resolve_device
from darkroom.engine.messages import (
    Event,
    Failed,
    Finished,
    Generate,
    Inbound,
    Outbound,
    Ping,
    Progress,
    Status,
    decode_outbound,
    encode,
)

PATIENCE = 60.0
"""Seconds after which something that should happen has not: the machine is shared."""


def config(model: Path | str, **values: Any) -> EngineConfig:
    return resolve_device(
        EngineConfig.check({"model": str(model), "device": "cpu", "dtype": "float32", "log_level": "error", **values})
    )


class Peer:
    def __init__(self, address: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.set_hwm(0)
        self._socket.connect(address)

    def send(self, message: Inbound) -> None:
        self._socket.send(encode(message))

    def generate(self, **requests: Request) -> None:
        for id, request in requests.items():
            self.send(Generate(id=id, request=request))

    def receive(self, seconds: float = PATIENCE) -> Outbound:
        assert self._socket.poll(int(seconds * 1000)), f"the engine has said nothing for {seconds:g} s"
        message: Outbound = decode_outbound(self._socket.recv())
        return message

    def has_mail(self, seconds: float) -> bool:
        return bool(self._socket.poll(int(seconds * 1000)))

    def status(self, *wanted: str) -> Status:
        """Ask, and wait until the engine is in one of the `wanted` states, or any without. Drops everything else."""
        self.send(Ping())
        while not isinstance(message := self.receive(), Status) or (wanted and message.state not in wanted):
            pass
        return message

    def events(self, *ids: str) -> Iterator[Event]:
        """The events of these requests until all have ended."""
        open_ids = set(ids)
        while open_ids:
            event = self.receive()
            if isinstance(event, Status) or event.id not in open_ids:
                continue
            if isinstance(event, Finished | Failed):
                open_ids.discard(event.id)
            yield event

    def endings(self, *ids: str) -> dict[str, Finished | Failed]:
        return {event.id: event for event in self.events(*ids) if isinstance(event, Finished | Failed)}

    def first_progress(self, *ids: str) -> None:
        """Wait until every one of these has taken a step."""
        waiting = set(ids)
        while waiting:
            if isinstance(event := self.receive(), Progress):
                waiting.discard(event.id)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        self._context.destroy(linger=0)


def eventually(condition: Callable[[], bool], seconds: float = PATIENCE) -> bool:
    """Whether it became true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def tree(pid: int) -> list[psutil.Process]:
    """A process and all that it has started, which may outlive it."""
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def have_gone(processes: list[psutil.Process]) -> bool:
    return eventually(lambda: not any(is_alive(process) for process in processes))


def is_alive(process: psutil.Process) -> bool:
    """A zombie is not: it waits for its parent, which is the test."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def workers(engine: int) -> list[psutil.Process]:
    """The worker processes: in order of rank, for they are started in it."""
    direct = psutil.Process(engine).children()
    forked = set(psutil.Process(engine).children(recursive=True)) - set(direct)
    return sorted(forked, key=lambda process: process.pid)


def sockets(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_socket()]
