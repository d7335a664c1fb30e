"""The app: routes, the outermost layer, and the listener that runs as long as it does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response

from darkroom.configs.capabilities import Capabilities

from . import images, models, videos
from .client import EngineClient, EngineError
from .context import Context, Shared
from .errors import ErrorEnvelope, http_exception
from .metrics import Metrics
from .middleware import Outermost
from .runner import VideoRunner, VideoStores


def create_app(
    *, capabilities: Capabilities, served_name: str, client: EngineClient, stores: VideoStores | None = None
) -> FastAPI:
    """The caller closes `client` and `stores`, and tells `client` by `fail_all` when the engine's process has died."""
    metrics = Metrics()
    runner = VideoRunner(stores, model=served_name, client=client, metrics=metrics) if stores else None

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(work) for work in (runner and runner.run(), client.listen()) if work]
        yield
        for task in tasks:  # one after the other: the runner tells the engine what it need not go on with
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    failures: dict[int | str, dict[str, Any]] = {kind: {"model": ErrorEnvelope} for kind in ("4XX", "5XX")}
    app = FastAPI(
        title="Darkroom",
        lifespan=lifespan,
        redirect_slashes=False,
        responses=failures,
        docs_url=None,  # these pages load scripts from elsewhere; /openapi.json is the document
        redoc_url=None,
    )
    app.state.context = Context(
        capabilities=capabilities, served_name=served_name, client=client, metrics=metrics, videos=runner
    )
    app.add_middleware(Outermost, metrics=metrics)
    app.add_exception_handler(HTTPException, http_exception)
    app.include_router(images.router)
    app.include_router(videos.router)
    app.include_router(models.router)
    app.add_api_route("/health", health)
    app.add_api_route("/metrics", scrape, response_class=Response)
    return app


async def health(context: Shared) -> Response:
    """Ready or not, by the engine's own word."""
    try:
        status = await context.client.status(timeout=2.0)
    except EngineError:
        content: dict[str, object] = {"status": "unresponsive"}
    else:
        content = {"status": status.state, "waiting": status.waiting, "running": status.running}
    if content["status"] == "ready":
        return JSONResponse(content)
    return JSONResponse(content, 503, {"Retry-After": "10"})


async def scrape(context: Shared) -> Response:
    """For Prometheus."""
    return await context.metrics.scrape(context.client)
