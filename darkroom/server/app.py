"""The app: routes, the outermost layer, and the listener that runs as long as it does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response

from darkroom.configs.capabilities import Capabilities
from darkroom.configs.config import Limits

from . import answers, images, models
from .client import EngineClient, EngineError
from .context import Context, Shared
from .errors import ErrorEnvelope, http_exception
from .files import FileStore
from .middleware import Outermost


def create_app(
    *,
    capabilities: Capabilities,
    served_name: str,
    client: EngineClient,
    limits: Limits = Limits(),  # noqa: B008 - frozen
    folder: Path | None = None,
) -> FastAPI:
    """The caller closes `client`, and tells it by `fail_all` when the engine's process has died.

    What is kept on disk for a while goes into a folder of its own in `folder`, or where temporary files go.
    """
    files = FileStore(limits, folder)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        listener = asyncio.create_task(client.listen())
        yield
        listener.cancel()
        await asyncio.gather(listener, return_exceptions=True)
        files.close()

    failures: dict[int | str, dict[str, Any]] = {kind: {"model": ErrorEnvelope} for kind in ("4XX", "5XX")}
    app = FastAPI(
        title="Darkroom",
        lifespan=lifespan,
        redirect_slashes=False,
        responses=failures,
        docs_url=None,  # these pages load scripts from elsewhere; /openapi.json is the document
        redoc_url=None,
    )
    app.state.context = context = Context(
        capabilities=capabilities, served_name=served_name, client=client, limits=limits, files=files
    )
    app.add_middleware(Outermost, metrics=context.metrics)
    app.add_exception_handler(HTTPException, http_exception)
    app.include_router(images.router)
    app.include_router(answers.router)
    app.include_router(models.router)
    app.add_api_route("/health", health)
    app.add_api_route("/metrics", metrics, response_class=Response)
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


async def metrics(context: Shared) -> Response:
    """For Prometheus."""
    return await context.metrics.scrape(context.client)
