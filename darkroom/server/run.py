"""Run the HTTP server until it is told to stop, over an engine process that lives exactly as long."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import socket
import ssl
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from types import FrameType

import uvicorn
from fastapi import FastAPI
from PIL import Image
from starlette.concurrency import run_in_threadpool

from darkroom.configs.capabilities import Capabilities
from darkroom.configs.config import EngineConfig, ServeConfig
from darkroom.configs.errors import ConfigError
from darkroom.configs.logs import set_up_logging
from darkroom.engine.launch import EngineProcess

from .app import create_app
from .client import EngineClient, EngineError
from .drain import Drain
from .protocol import HttpProtocol
from .tls import tls_context
from .video_stores import VideoOptions, VideoStores, open_videos
from .videos import makes_videos

_STOP_SECONDS = 2
"""What a request that is under way gets to end by itself at an interrupt, and after the drain at SIGTERM."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def run_server(config: ServeConfig, engine_config: EngineConfig, capabilities: Capabilities, table: str) -> int:
    """Serve; returns the exit code. Raises ConfigError for an address that cannot be had."""
    set_up_logging(config.log_level, config.log_format, "server")
    tls = tls_context(config)
    listener = _listen(config)
    url = _url(listener, "https" if tls else "http") + config.root_path
    print(f"{table}\n  {'address':<10} {url}", flush=True)
    for number in _SIGNALS:  # uvicorn handles them, and raises them again when it has stopped
        signal.signal(number, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # until it does: one that comes while this starts is not lost
    with listener, EngineProcess(engine_config) as engine:
        return asyncio.run(_serve(config, capabilities, engine, listener, tls, url))


async def _serve(
    config: ServeConfig,
    capabilities: Capabilities,
    engine: EngineProcess,
    listener: socket.socket,
    tls: ssl.SSLContext | None,
    url: str,
) -> int:
    async with _stores(config, capabilities) as stores:
        return await _run(config, capabilities, engine, listener, tls, url, stores)


@asynccontextmanager
async def _stores(config: ServeConfig, capabilities: Capabilities) -> AsyncIterator[VideoStores | None]:
    if not makes_videos(capabilities):
        yield None
        return
    budget = config.disk_budget
    options = VideoOptions(
        ttl=config.job_ttl,
        disk_budget=None if budget is None else int(budget * 1e9),
        max_waiting=config.max_queue,
        concurrency=config.max_videos,
    )
    folder = config.data_dir.expanduser()
    places = {"database_url": config.database_url, "files_url": config.files_url}
    async with open_videos(folder, **places, options=options) as stores:
        yield stores


async def _run(
    config: ServeConfig,
    capabilities: Capabilities,
    engine: EngineProcess,
    listener: socket.socket,
    tls: ssl.SSLContext | None,
    url: str,
    stores: VideoStores | None,
) -> int:
    with contextlib.closing(EngineClient(engine.address)) as client:
        app = create_app(
            stores=stores,
            capabilities=capabilities,
            served_name=config.served_name,
            client=client,
            operations=config,
            limits=config,
            folder=engine.run_dir,  # which goes when the engine does, however this process ends
        )
        server = _Server(
            uvicorn.Config(
                app,
                http=HttpProtocol,
                ws="none",  # no route speaks it, and what a library for it answers is not the error object
                log_config=None,
                log_level="warning",
                access_log=False,
                date_header=False,
                timeout_graceful_shutdown=_STOP_SECONDS,
                forwarded_allow_ips=config.forwarded_allow_ips,
                ssl_context_factory=(lambda *_: tls) if tls else None,
            ),
            app.state.context.drain,
            config.drain_timeout,
        )
        await _settle(app)
        following = asyncio.create_task(_follow(client, url, server))
        _when_ended(engine, lambda code: _engine_lost(client, server, code))
        await server.serve(sockets=[listener])
        following.cancel()
        return _exit_code(client)


async def _settle(app: FastAPI) -> None:
    """Do now what would block the event loop for tens of milliseconds later: Pillow and anyio load parts of themselves
    at the first picture and file, the document is built when it is first asked for, and the collector would look
    through all that the start has made, again and again."""
    await run_in_threadpool(Image.init)
    app.openapi()
    gc.collect()
    gc.freeze()


class _Server(uvicorn.Server):
    """Sleeps until it is told to stop; uvicorn's own loop looks ten times a second, and renews its Date header.

    SIGTERM lets what runs end, and nothing new begin; an interrupt, or a second signal, does not wait for it.
    """

    def __init__(self, config: uvicorn.Config, drain: Drain, drain_timeout: float) -> None:
        super().__init__(config)
        self._drain = drain
        self._drain_timeout = drain_timeout
        self._told = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        with super().capture_signals():
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            yield

    def stop(self) -> None:
        """At once."""
        self.should_exit = True
        self._drain.hurry()
        self._told.set()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        is_first = not self._captured_signals
        self.force_exit |= self.should_exit and sig == signal.SIGINT
        self._captured_signals.append(sig)
        call = self._told.set if sig == signal.SIGTERM and is_first else self.stop
        self._loop.call_soon_threadsafe(call)  # a signal handler alone does not wake the loop

    async def main_loop(self) -> None:
        await self._told.wait()
        if not self.should_exit:
            await self._drain.finish(self._drain_timeout)
        self.should_exit = True


async def _follow(client: EngineClient, url: str, server: _Server) -> None:
    """Say when the model is loaded, and again after workers were lost; end the server if it cannot be."""
    was_ready = False
    while (status := await client.changed()).state != "failed":
        if (is_ready := status.state == "ready") and not was_ready:
            print(f"ready: {url}/v1", flush=True)
        was_ready = is_ready
    print(f"darkroom: {status.detail}", file=sys.stderr, flush=True)
    server.stop()


def _when_ended(engine: EngineProcess, call: Callable[[int], None]) -> None:
    """Call back in this event loop with the engine's exit code. Without an engine nothing can be served."""
    loop = asyncio.get_running_loop()

    def wait() -> None:
        code = engine.process.wait()
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server has stopped first, as it should
            loop.call_soon_threadsafe(call, code)

    threading.Thread(target=wait, daemon=True).start()  # asyncio.run waits for its own threads; this one outlives it


def _engine_lost(client: EngineClient, server: _Server, code: int) -> None:
    """Answer those who wait, and end."""
    if not server.should_exit:
        client.fail_all(EngineError("unavailable", f"the engine process ended with exit code {code}"))
        server.stop()


def _exit_code(client: EngineClient) -> int:
    if client.last_status.state != "failed":
        return 0
    return 2 if client.last_status.is_config_error else 1


def _listen(config: ServeConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        listener = socket.create_server((config.host, config.port), family=family, backlog=2048)
    except OSError as e:
        raise ConfigError(f"--host {config.host} --port {config.port}: {e.strerror or e}") from None
    # asyncio sets this on the sockets that it makes itself; without it, a kept-alive answer waits 40 ms for an ACK
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _url(listener: socket.socket, scheme: str) -> str:
    host, port = listener.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
