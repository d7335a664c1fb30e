"""The engine process: receive, schedule, execute, answer. No torch, no device.

It never blocks on its workers: requests and cancels are heard while a step runs, so that the command after the
present one already knows of them.
"""

from __future__ import annotations

import logging
import shutil
import sys
import time
from pathlib import Path

import msgspec
import zmq

from darkroom.configs.config import EngineConfig
from darkroom.configs.logs import set_up_logging

from .messages import (
    Cancel,
    Command,
    Event,
    Failed,
    Finished,
    Generate,
    Inbound,
    Outbound,
    Ping,
    Status,
    encode,
    from_frames,
)
from .scheduler import Scheduler
from .workers import CommandFailed, LoadFailed, WorkerGroup, WorkersLost, ignore_signals

logger = logging.getLogger(__name__)

_STOP_SECONDS = 1.0


class Engine:
    """One server's queue and workers."""

    def __init__(self, config: EngineConfig, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.context = zmq.Context()
        self.context.linger = 0  # a peer that has died must not keep the engine from ending
        self.socket = self.context.socket(zmq.ROUTER)
        self.socket.set_hwm(0)  # the default drops replies silently; the scheduler bounds the queue
        self.socket.bind(engine_address(run_dir))
        self.workers = WorkerGroup(config, self.context, run_dir)
        self.scheduler = Scheduler(max_waiting=config.max_queue, max_waiting_bytes=config.max_queue_mb << 20)
        self.peers: set[bytes] = set()
        self.senders: dict[str, bytes] = {}
        """Who asked for which request."""
        self.status = Status(state="starting")
        self.command: Command | None = None
        self.sent_at = 0.0

    def run(self) -> None:
        """Until the parent process closes standard input, or the model cannot be loaded."""
        self.workers.start()
        while self._wait():
            self._receive()
            self._collect()
            self._schedule()

    def close(self) -> None:
        self.workers.stop(_STOP_SECONDS)
        self.context.destroy(linger=0)
        shutil.rmtree(self.run_dir, ignore_errors=True)

    def _wait(self) -> bool:
        """Sleep until something happens. False when the parent has gone, which is also how it says goodbye."""
        poller = zmq.Poller()
        for file in (sys.stdin.fileno(), self.socket, *self.workers.files):
            poller.register(file, zmq.POLLIN)
        ready = dict(poller.poll(self._timeout()))
        return sys.stdin.fileno() not in ready

    def _timeout(self) -> int | None:
        """Milliseconds: idle engines sleep for ever, a command has a deadline."""
        if self.workers.deadline is None:
            return None
        return max(0, int((self.workers.deadline - time.monotonic()) * 1000) + 1)

    def _receive(self) -> None:
        while self.socket.poll(0):
            peer, *frames = self.socket.recv_multipart()
            try:
                message = from_frames(frames)
            except msgspec.DecodeError as e:
                logger.error("a message that is none: %s", e)
                continue
            self._handle(peer, message)

    def _handle(self, peer: bytes, message: Inbound) -> None:
        match message:
            case Generate():
                self.senders[message.id] = peer
                if refused := self.scheduler.add(message, time.monotonic()):
                    self._answer(refused)
                elif self.status.state == "failed":
                    self._answer(*self.scheduler.fail_waiting(self.status.detail))
            case Cancel():
                self.senders.pop(message.id, None)
                self.scheduler.cancel(message)
            case Ping():
                self.peers.add(peer)
                self._hide_sockets()
                self._send(peer, self._status())

    def _collect(self) -> None:
        """Take the workers' replies; on the loss of the group, fail what it held and start another."""
        if not self.workers.processes:
            return
        try:
            done = self.workers.receive()
        except CommandFailed as e:
            assert self.command is not None
            self._answer(*self.scheduler.fail(self.command, str(e), e.refusal))
            self.command = None
        except LoadFailed as e:
            self.workers.kill()
            self._set_status(Status(state="failed", detail=str(e), is_config_error=e.is_config_error))
            self._answer(*self.scheduler.fail_waiting(str(e)))
        except WorkersLost as e:
            self._restart(str(e))
        else:
            if done:
                self._finish()
        for encoded in self.workers.take_encoded():
            if event := self.scheduler.encoded(encoded):
                self._answer(event)

    def _finish(self) -> None:
        if self.command is None:  # the ranks have loaded the model
            self._set_status(Status(state="ready"))
            self._hide_sockets()
            return
        now = time.monotonic()
        events = self.scheduler.finish(self.command, self.workers.prepared, now, now - self.sent_at)
        self.command = None
        self._answer(*events)

    def _hide_sockets(self) -> None:
        """Unlink the socket files once everyone is connected, so that none is left however the processes end."""
        if self.peers and self.workers.ready and not self.workers.hidden:
            Path(engine_address(self.run_dir).removeprefix("ipc://")).unlink(missing_ok=True)
            self.workers.hide_sockets()

    def _restart(self, error: str) -> None:
        was_ready = self.workers.ready
        logger.error("workers lost: %s", error)
        self.workers.kill()
        lost = "The workers were lost while the picture was being made."
        self._answer(*self.scheduler.fail_running(self.command, lost))
        self.command = None
        if was_ready:
            self._set_status(Status(state="restarting", detail=error))
            self.workers.start()
        else:  # they never got as far as their first command: another start would end the same way
            self._set_status(Status(state="failed", detail=error))
            self._answer(*self.scheduler.fail_waiting(error))

    def _schedule(self) -> None:
        if self.command is not None or not self.workers.ready:
            return
        if command := self.scheduler.next(time.monotonic()):
            self.command, self.sent_at = command, time.monotonic()
            self.workers.send(command)
        else:
            self.workers.expect_encoded(bool(self.scheduler.encoding))

    def _answer(self, *events: Event) -> None:
        for event in events:
            ended = isinstance(event, Finished | Failed)
            peer = self.senders.pop(event.id, None) if ended else self.senders.get(event.id)
            if peer is not None:
                self._send(peer, event)

    def _set_status(self, status: Status) -> None:
        self.status = status
        for peer in self.peers:
            self._send(peer, self._status())

    def _status(self) -> Status:
        waiting, running = len(self.scheduler.waiting), len(self.scheduler.running) + len(self.scheduler.encoding)
        return msgspec.structs.replace(self.status, waiting=waiting, running=running)

    def _send(self, peer: bytes, message: Outbound) -> None:
        self.socket.send_multipart([peer, encode(message)], copy=False)


def engine_address(run_dir: Path) -> str:
    return f"ipc://{run_dir}/engine"


def main() -> None:
    """`python -m darkroom.engine RUN_DIR`: one line of configuration on standard input, which then stays open."""
    ignore_signals()
    config = EngineConfig.model_validate_json(sys.stdin.readline())
    set_up_logging(config.log_level, config.log_format, "engine")
    engine = Engine(config, Path(sys.argv[1]))
    try:
        engine.run()
    finally:
        engine.close()
