"""What the OpenAPI document says of what routes read themselves, and of keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import Security
from fastapi.params import Depends
from fastapi.security import HTTPBearer
from pydantic import BaseModel

from .idempotency import HEADER, LONGEST

Schema = dict[str, Any]


def body(**schemas: Schema) -> dict[str, Any]:
    """For a route's `openapi_extra`: the schemas of its body as `json` and as `form`."""
    kinds = {"json": "application/json", "form": "multipart/form-data"}
    content = {kinds[kind]: {"schema": schema} for kind, schema in schemas.items()}
    key = {"name": HEADER, "in": "header", "schema": {"type": "string", "minLength": 1, "maxLength": LONGEST}}
    return {"requestBody": {"required": True, "content": content}, "parameters": [key]}


def form_schema(
    model: type[BaseModel], files: Sequence[str], without: Sequence[str] = (), required: Sequence[str] = ()
) -> Schema:
    """Of the model's fields, beside those that are files."""
    schema = model.model_json_schema()
    file = {"type": "string", "format": "binary"}
    fields = {name: field for name, field in schema["properties"].items() if name not in (*without, *files)}
    needed = [*required, *schema.get("required", ())]
    return {**schema, "properties": {**dict.fromkeys(files, file), **fields}, "required": needed}


def query(**schemas: Schema) -> dict[str, Any]:
    """For a route's `openapi_extra`: what may follow the question mark."""
    return {"parameters": [{"name": name, "in": "query", "schema": schema} for name, schema in schemas.items()]}


def key_needed() -> Depends:
    """For a router's `dependencies`: checks nothing, since the guard has done so before the body is read."""
    dependency: Depends = Security(
        HTTPBearer(scheme_name="key", description="A key that the operator has given out.", auto_error=False)
    )
    return dependency
