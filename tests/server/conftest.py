"""A real uvicorn on a loopback port in front of a scripted engine, one for the whole folder."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from darkroom.configs.capabilities import Capabilities
from darkroom.configs.config import Limits
from darkroom.configs.operations import OperationsConfig
from darkroom.server.app import create_app
from darkroom.server.client import EngineClient

from .engine import ScriptedEngine, wait_until

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


@contextmanager
def serving(
    engine: ScriptedEngine,
    name: str = NAME,
    capabilities: Capabilities = CAPABILITIES,
    limits: Limits | None = None,
    **flags: Any,
) -> Iterator[Server]:
    """With the flags of `OperationsConfig`."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # asyncio overlooks it where it did not bind
    client = EngineClient(engine.address)
    app = create_app(
        capabilities=capabilities,
        served_name=name,
        client=client,
        operations=OperationsConfig(**flags),
        limits=limits or Limits(),
    )
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=1))
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        await server.serve(sockets=[listener])

    thread = threading.Thread(target=asyncio.run, args=(serve(),), daemon=True)
    thread.start()
    try:
        assert wait_until(lambda: server.started and client.last_status == engine.status, 10)
        yield Server(f"http://127.0.0.1:{listener.getsockname()[1]}", engine, client, loops[0], server)
    finally:
        server.should_exit = True
        thread.join()
        client.close()
        listener.close()


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
