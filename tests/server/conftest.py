"""A real uvicorn on a loopback port in front of a scripted engine, one for the whole folder."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from fastapi import FastAPI

from bench import processes
from darkroom.configs.capabilities import Capabilities
from darkroom.configs.config import Limits
from darkroom.configs.operations import OperationsConfig
from darkroom.server.app import create_app
from darkroom.server.client import EngineClient
from darkroom.server.drain import Drain
from darkroom.server.protocol import HttpProtocol
from darkroom.server.video_stores import VideoOptions, VideoStores, open_videos

from .engine import ScriptedEngine, wait_until
from .real import picture_model, video_model

NAME = "darkroom/demo"
CAPABILITIES = Capabilities(
    family="demo",
    tasks=("text-to-image",),
    size_multiple=16,
    min_edge=64,
    max_pixels=1024 * 1024,
    default_size=(128, 128),
    num_inference_steps=50,
    min_inference_steps=1,
    max_inference_steps=200,
    quality_steps={"low": 10, "medium": 25, "high": 50},
    guidance_parameter="true_cfg_scale",
    guidance_scale=4.0,
    max_guidance=100.0,
    negative_prompt=" ",
    max_sequence_length=512,
    text_window=1024,
    guidance_branches=2,
    axes=("cfg", "ring", "ulysses", "tp"),
)

OVER = {"tasks": ("text-to-image", "image-to-image", "inpaint"), "max_images": 1}
EDIT = {"tasks": ("edit",), "max_images": 4, "image_area": 256 * 256}
LAYERED = {"tasks": ("layered",), "max_images": 1, "image_area": 128 * 128, "layers": 3, "max_layers": 8}
VIDEO = {"tasks": ("text-to-video",), "fps": 16, "num_frames": 17, "max_frames": 81, "frame_multiple": 4}


@dataclass
class Server:
    url: str
    engine: ScriptedEngine
    client: EngineClient
    loop: asyncio.AbstractEventLoop
    uvicorn: uvicorn.Server
    app: FastAPI

    @property
    def drain(self) -> Drain:
        drain: Drain = self.app.state.context.drain
        return drain


VIDEO_CAPABILITIES = CAPABILITIES.override(
    {
        "tasks": ("text-to-video", "image-to-video"),
        "max_images": 1,
        "image_area": 128 * 128,
        "default_size": (128, 96),
        "num_inference_steps": 4,
        "guidance_parameter": "guidance_scale",
        "num_frames": 81,
        "frame_multiple": 4,
        "max_frames": 161,
        "guidance_scale_2": 3.0,
        "fps": 16,
    }
)
QUICK = VideoOptions(ttl=3600, max_waiting=8, concurrency=2, lease=0.6, renewal=0.02, pause=0.05, cleaning=3600)


@contextmanager
def serving(
    engine: ScriptedEngine,
    name: str = NAME,
    capabilities: Capabilities = CAPABILITIES,
    limits: Limits | None = None,
    *,
    folder: Path | None = None,
    options: VideoOptions = QUICK,
    database_url: str | None = None,
    files_url: str | None = None,
    **flags: Any,
) -> Iterator[Server]:
    """With the flags of `OperationsConfig`; with a folder for models that make videos."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # asyncio overlooks it where it did not bind
    client = EngineClient(engine.address)
    running: list[Server] = []

    @asynccontextmanager
    async def opened() -> AsyncIterator[VideoStores | None]:
        if folder is None:
            yield None
            return
        async with open_videos(folder, database_url=database_url, files_url=files_url, options=options) as stores:
            yield stores

    async def serve() -> None:
        async with opened() as stores:
            app = create_app(
                capabilities=capabilities,
                served_name=name,
                client=client,
                stores=stores,
                operations=OperationsConfig(**flags),
                limits=limits or Limits(),
            )
            server = uvicorn.Server(
                uvicorn.Config(app, http=HttpProtocol, ws="none", log_config=None, timeout_graceful_shutdown=1)
            )
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            running.append(Server(url, engine, client, asyncio.get_running_loop(), server, app))
            await server.serve(sockets=[listener])

    thread = threading.Thread(target=asyncio.run, args=(serve(),), daemon=True)
    thread.start()
    try:
        assert wait_until(lambda: bool(running) and running[0].uvicorn.started, 10)
        assert wait_until(lambda: client.last_status == engine.status, 10)
        yield running[0]
    finally:
        if running:
            running[0].uvicorn.should_exit = True
        thread.join(10)
        client.close()
        listener.close()
        assert not thread.is_alive(), "the server has not ended"


@pytest.fixture(scope="session")
def _server() -> Iterator[Server]:
    with ScriptedEngine() as engine, serving(engine) as server:
        yield server


@pytest.fixture
def server(_server: Server) -> Server:
    _server.engine.reset()
    if _server.client.last_status.state != "ready":
        _server.engine.say(_server.engine.status)
        assert wait_until(lambda: _server.client.last_status.state == "ready")
    return _server


@pytest.fixture
def engine(server: Server) -> ScriptedEngine:
    return server.engine


@pytest.fixture(scope="session")
def _clients(_server: Server) -> Iterator[tuple[httpx.Client, openai.OpenAI]]:
    with (
        httpx.Client(base_url=_server.url, timeout=10) as http,
        openai.OpenAI(base_url=f"{_server.url}/v1", api_key="any", max_retries=0, timeout=10) as sdk,
    ):
        yield http, sdk


@pytest.fixture
def http(server: Server, _clients: tuple[httpx.Client, openai.OpenAI]) -> httpx.Client:
    return _clients[0]


@pytest.fixture
def sdk(server: Server, _clients: tuple[httpx.Client, openai.OpenAI]) -> openai.OpenAI:
    return _clients[1]


@pytest.fixture(scope="session")
def _others(_server: Server) -> Iterator[dict[str, Server]]:
    """Servers of models that take pictures, over the same engine."""
    with ExitStack() as stack:
        kinds = {"over": OVER, "edit": EDIT, "layered": LAYERED, "video": VIDEO}
        yield {
            kind: stack.enter_context(serving(_server.engine, capabilities=CAPABILITIES.override(values)))
            for kind, values in kinds.items()
        }


@pytest.fixture
def http_of(server: Server, _others: dict[str, Server]) -> Iterator[Callable[[str], httpx.Client]]:
    with ExitStack() as stack:
        yield lambda kind: stack.enter_context(httpx.Client(base_url=_others[kind].url, timeout=10))


@pytest.fixture
def sdk_of(server: Server, _others: dict[str, Server]) -> Iterator[Callable[[str], openai.OpenAI]]:
    with ExitStack() as stack:
        yield lambda kind: stack.enter_context(
            openai.OpenAI(base_url=f"{_others[kind].url}/v1", api_key="any", max_retries=0, timeout=10)
        )


@pytest.fixture
def over(http_of: Callable[[str], httpx.Client]) -> httpx.Client:
    """To a model that draws over pictures."""
    return http_of("over")


@pytest.fixture
def edit(http_of: Callable[[str], httpx.Client]) -> httpx.Client:
    """To a model that edits pictures."""
    return http_of("edit")


@pytest.fixture(scope="session")
def _postgresql() -> Iterator[tuple[Path, int]]:
    """A real server. It does not run as root, so that its folder is another user's."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin")) or [Path(shutil.which("initdb") or "/none/x").parent]
    if not (found[-1] / "initdb").exists():
        pytest.skip("PostgreSQL is not installed: there is no initdb")
    user = {"user": "postgres"} if os.geteuid() == 0 else {}
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))
    if user:
        shutil.chown(folder, "postgres")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": "/", **user}
    try:
        initdb = [found[-1] / "initdb", "-D", folder / "data", "-A", "trust", "-U", "darkroom", "-E", "UTF8"]
        subprocess.run(initdb, check=True, timeout=60, **quiet)
        options = ["-c", "listen_addresses=127.0.0.1", "-c", "fsync=off", "-p", str(port), "-k", str(folder)]
        server = subprocess.Popen([found[-1] / "postgres", "-D", folder / "data", *options], **quiet)
        ready = [found[-1] / "pg_isready", "-h", "127.0.0.1", "-p", str(port)]
        deadline = time.monotonic() + 60
        while subprocess.run(ready, **quiet).returncode and time.monotonic() < deadline:
            time.sleep(0.1)
        yield found[-1], port
        server.send_signal(signal.SIGINT)
        server.wait(30)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def postgresql(_postgresql) -> str:
    """The URL of an empty database."""
    binaries, port = _postgresql
    name = f"t{uuid.uuid4().hex}"
    subprocess.run([binaries / "createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "darkroom", name], check=True)
    return f"postgresql://darkroom:word@127.0.0.1:{port}/{name}"


@pytest.fixture(scope="session")
def _s3(tmp_path_factory) -> Iterator[str]:
    """A real S3 server."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    code = f"from moto.server import main; main(['-H', '127.0.0.1', '-p', '{port}'])"
    log = (tmp_path_factory.mktemp("s3") / "log").open("w")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=log, stderr=log)
    environment = {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ALLOW_HTTP": "true",
    }
    try:
        assert wait_until(lambda: _answers(environment["AWS_ENDPOINT_URL"]), 60)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            yield environment["AWS_ENDPOINT_URL"]
    finally:
        process.kill()
        process.wait()
        log.close()


@pytest.fixture
def s3(_s3) -> str:
    """The URL of an empty bucket's part."""
    name = f"b{uuid.uuid4().hex}"
    httpx.put(f"{_s3}/{name}").raise_for_status()
    return f"s3://{name}/some/prefix"


def _answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


# ---- real servers --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def _real_servers(tmp_path_factory) -> Iterator[tuple[processes.Server, processes.Server]]:
    """Of pictures and of videos. Both start at once: each loads torch."""
    folder = tmp_path_factory.mktemp("real")
    pictures, videos = picture_model(folder / "tiny-pictures"), video_model(folder / "tiny-videos")
    with ThreadPoolExecutor(2) as pool:
        starting = [
            pool.submit(processes.Server, model=str(pictures)),
            pool.submit(processes.Server, "--data-dir", str(folder / "data"), model=str(videos)),
        ]
    with ExitStack() as stack:
        first, second = (stack.enter_context(one.result()) for one in starting)
        yield first, second


@pytest.fixture(scope="session")
def picture_server(_real_servers) -> processes.Server:
    """`darkroom serve` with a model that draws pictures, and over pictures."""
    return _real_servers[0]


@pytest.fixture(scope="session")
def video_server(_real_servers) -> processes.Server:
    """`darkroom serve` with a model that makes videos."""
    return _real_servers[1]
