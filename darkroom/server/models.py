"""GET /v1/models: the one model that this server serves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastapi import APIRouter

from darkroom.configs.capabilities import Capabilities

from .context import Context, Shared
from .errors import ApiError

router = APIRouter()


@dataclass(frozen=True, kw_only=True)
class ModelObject:
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["darkroom"] = "darkroom"
    capabilities: Capabilities


@dataclass(frozen=True, kw_only=True)
class ModelList:
    object: Literal["list"] = "list"
    data: list[ModelObject]


@router.get("/v1/models")
async def list_models(context: Shared) -> ModelList:
    return ModelList(data=[_model(context)])


@router.get("/v1/models/{id:path}")
async def get_model(id: str, context: Shared) -> ModelObject:
    check_model(id, context)
    return _model(context)


def check_model(id: str | None, context: Context) -> None:
    """Raises `ApiError` 404. None is the served model."""
    if id is not None and id != context.served_name:
        message = f"The model '{id[:200]}' does not exist; this server serves '{context.served_name}'."
        raise ApiError(404, message, param="model", code="model_not_found")


def _model(context: Context) -> ModelObject:
    return ModelObject(id=context.served_name, created=context.started, capabilities=context.capabilities)
