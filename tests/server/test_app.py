from __future__ import annotations

import subprocess
import sys

from darkroom.engine.messages import Status


def test_health_is_the_engines_word(http, engine):
    engine.status = Status(state="ready", waiting=2, running=1)
    response = http.get("/health")
    assert (response.status_code, response.json()) == (200, {"status": "ready", "waiting": 2, "running": 1})
    engine.status = Status(state="starting", detail="/secret")
    response = http.get("/health")
    assert (response.status_code, response.json()["status"]) == (503, "starting")
    assert response.headers["retry-after"] == "10"
    assert "secret" not in response.text


def test_health_of_a_silent_engine(http, engine):
    engine.is_deaf = True
    response = http.get("/health")
    assert (response.status_code, response.json()) == (503, {"status": "unresponsive"})


def test_openapi_lists_the_routes_and_the_fields(http):
    document = http.get("/openapi.json").json()
    assert document["openapi"].startswith("3.")
    assert {"/v1/images/generations", "/v1/models", "/health", "/metrics"} <= set(document["paths"])
    operation = document["paths"]["/v1/images/generations"]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    assert schema["required"] == ["prompt"]
    assert {"n", "size", "stream", "true_cfg_scale", "seed"} <= set(schema["properties"])
    n = schema["properties"]["n"]
    assert n["anyOf"][0]["maximum"] == 10
    assert n["anyOf"][1] == {"type": "null"}
    assert n["default"] == 1
    assert set(operation["responses"]) == {"200", "4XX", "5XX"}
    answer = document["components"]["schemas"]["ImagesResponse"]["properties"]
    assert {"created", "data", "usage", "size", "quality", "background", "output_format"} <= set(answer)
    assert "422" not in str(document["paths"].values())


def test_the_server_imports_no_torch():
    code = (
        "import sys, darkroom.server.app; print(*sorted(m for m in sys.modules if m.startswith(('torch', 'darkroom'))))"
    )
    modules = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert "torch" not in modules
    assert not any(
        module.startswith(("darkroom.models", "darkroom.parallel", "darkroom.engine.w")) for module in modules
    )
