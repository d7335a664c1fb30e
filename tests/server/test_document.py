"""What `/openapi.json` says beyond FastAPI's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from .conftest import VIDEO_CAPABILITIES, serving
from .engine import ScriptedEngine


def document(engine: ScriptedEngine, **flags: Any) -> dict[str, Any]:
    with serving(engine, **flags) as server:
        return dict(httpx.get(f"{server.url}/openapi.json").json())


def operations(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {f"{method} {path}": one for path, item in document["paths"].items() for method, one in item.items()}


@pytest.mark.parametrize("protect", [False, True])
def test_a_server_with_keys_says_which_routes_need_one(engine: ScriptedEngine, protect: bool) -> None:
    found = document(engine, api_key=["sk-1"], protect_metrics=protect)
    assert found["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    needed = {name for name, operation in operations(found).items() if operation.get("security") == [{"key": []}]}
    expected = {name for name in operations(found) if " /v1/" in name}
    assert needed == expected | ({"get /metrics"} if protect else set()) and expected


def test_a_server_without_keys_says_nothing_of_them(engine: ScriptedEngine) -> None:
    found = document(engine)
    assert "securitySchemes" not in found["components"]
    assert not any("security" in operation for operation in operations(found).values())


def test_bodies_and_queries_of_videos(engine: ScriptedEngine, tmp_path: Path) -> None:
    found = operations(document(engine, capabilities=VIDEO_CAPABILITIES, folder=tmp_path))
    content = found["post /v1/videos"]["requestBody"]["content"]
    form, json = (content[kind]["schema"] for kind in ("multipart/form-data", "application/json"))
    assert form["properties"]["input_reference"] == {"type": "string", "format": "binary"}
    reference = json["properties"]["input_reference"]["anyOf"][0]
    assert set(reference["properties"]) == {"image_url", "file_id"} and reference["additionalProperties"] is False
    assert form["required"] == json["required"] == ["prompt"] and set(form["properties"]) == set(json["properties"])
    assert {one["name"] for one in found["get /v1/videos"]["parameters"]} == {"after", "limit", "order"}
    [key] = found["post /v1/videos"]["parameters"]
    assert (key["name"], key["in"], key["schema"]["maxLength"]) == ("Idempotency-Key", "header", 255)
    [id, variant] = found["get /v1/videos/{id}/content"]["parameters"]
    assert (id["name"], variant["schema"]["enum"]) == ("id", ["video", "thumbnail", "spritesheet"])


def test_bodies_of_edits(engine: ScriptedEngine) -> None:
    found = operations(document(engine))
    content = found["post /v1/images/edits"]["requestBody"]["content"]
    form, json = (content[kind]["schema"] for kind in ("multipart/form-data", "application/json"))
    assert (form["required"], json["required"]) == (["image", "prompt"], ["images", "prompt"])
    assert form["properties"]["mask"]["format"] == "binary" and "images" not in form["properties"]
    assert json["properties"]["images"]["anyOf"][0]["items"]["properties"].keys() == {"image_url", "file_id"}
