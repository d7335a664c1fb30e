"""The app: routes, the outermost layer, and the listener that runs as long as it does."""

from __future__ import annotations

import asyncio
import importlib.metadata
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response

from darkroom.configs.capabilities import Capabilities
from darkroom.configs.config import Limits
from darkroom.configs.operations import OperationsConfig

from . import answers, images, models, videos
from .access import AccessLog
from .body import Inflow, Intake
from .client import EngineClient, EngineError
from .context import Context, Shared
from .document import key_needed
from .drain import Drain
from .errors import ErrorEnvelope, http_exception
from .fetch import Fetcher
from .files import FileStore
from .guard import Guard
from .keys import Keys
from .metrics import Metrics
from .middleware import CrossOrigin, Envelope, Outermost
from .runner import VideoRunner
from .traces import Traces
from .trail import Observer
from .video_stores import VideoStores

_VERSION = importlib.metadata.version("darkroom")
_DEFAULTS = OperationsConfig()
_FOR_PAGES = ("x-request-id", "retry-after", "openai-poll-after-ms", "content-range")
"""Headers of answers that a browser lets its pages read."""


def create_app(
    *,
    capabilities: Capabilities,
    served_name: str,
    client: EngineClient,
    operations: OperationsConfig = _DEFAULTS,
    limits: Limits = Limits(),  # noqa: B008 - frozen
    folder: Path | None = None,
    stores: VideoStores | None = None,
) -> FastAPI:
    """The caller closes `client` and `stores`, and tells `client` by `fail_all` when the engine's process has died.

    What is kept on disk for a while goes into a folder of its own in `folder`, or where temporary files go. Raises
    `ConfigError`.
    """
    metrics, files, drain, keys = Metrics(), FileStore(limits, folder), Drain(), Keys.read(operations)
    runner = VideoRunner(stores, model=served_name, client=client, metrics=metrics, drain=drain) if stores else None
    traces = Traces(operations.otlp_endpoint) if operations.otlp_endpoint else None

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(work) for work in (runner and runner.run(), client.listen()) if work]
        yield
        for task in tasks:  # one after the other: the runner tells the engine what it need not go on with
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        files.close()
        if traces:
            await asyncio.to_thread(traces.close)

    failures: dict[int | str, dict[str, Any]] = {kind: {"model": ErrorEnvelope} for kind in ("4XX", "5XX")}
    app = FastAPI(
        title="Darkroom",
        lifespan=lifespan,
        redirect_slashes=False,
        responses=failures,
        docs_url=None,  # these pages load scripts from elsewhere; /openapi.json is the document
        redoc_url=None,
    )
    context = Context(
        capabilities=capabilities,
        served_name=served_name,
        client=client,
        limits=limits,
        inflow=Inflow(limits.max_uploads_mb << 20),
        files=files,
        metrics=metrics,
        drain=drain,
        videos=runner,
        fetcher=Fetcher(operations.allow_remote_media),
    )
    app.state.context = context
    observers: list[Observer] = [AccessLog(with_prompts=operations.log_prompts), *([traces] if traces else [])]
    _add_layers(app, operations, keys, context, observers)
    needed = [key_needed()] if keys.names else []
    routers = (images.router, videos.router, models.router)
    for router in routers:
        app.include_router(router, dependencies=needed)
    app.include_router(answers.router)
    app.add_api_route("/health", health)
    app.add_api_route(
        "/metrics", scrape, response_class=Response, dependencies=needed if operations.protect_metrics else []
    )
    app.add_api_route("/version", version)
    routes = [route for router in (*routers, answers.router, app) for route in router.routes]
    app.add_exception_handler(HTTPException, partial(http_exception, routes))
    return app


def _add_layers(
    app: FastAPI, operations: OperationsConfig, keys: Keys, context: Context, observers: list[Observer]
) -> None:
    """From the inside outwards: refusals are told to pages of other origins too, and everything has an id."""
    app.add_middleware(Intake, inflow=context.inflow)
    app.add_middleware(Guard, config=operations, keys=keys, drain=context.drain)
    app.add_middleware(Envelope, metrics=context.metrics)
    if operations.cors_origin:
        app.add_middleware(
            CrossOrigin,
            allow_origins=operations.cors_origin,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=_FOR_PAGES,
        )
    app.add_middleware(Outermost, metrics=context.metrics, drain=context.drain, observers=observers)


async def health(context: Shared) -> Response:
    """Ready or not, by the engine's own word, unless the server stops."""
    try:
        status = await context.client.status(timeout=2.0)
    except EngineError:
        content: dict[str, object] = {"status": "unresponsive"}
    else:
        content = {"status": status.state, "waiting": status.waiting, "running": status.running}
    if context.drain.is_on:
        content["status"] = "draining"
    if content["status"] == "ready":
        return JSONResponse(content)
    return JSONResponse(content, 503, {"Retry-After": "10"})


async def version() -> dict[str, str]:
    """Of Darkroom."""
    return {"version": _VERSION}


async def scrape(context: Shared) -> Response:
    """For Prometheus."""
    return await context.metrics.scrape(context.client)
