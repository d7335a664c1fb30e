from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import httpx
import pytest

from darkroom.engine.messages import Status

from .conftest import serving


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


def test_the_version(http):
    assert http.get("/version").json() == {"version": importlib.metadata.version("darkroom")}


@pytest.mark.parametrize("origins", [["https://a.example", "https://b.example"], ["*"]])
def test_pages_of_named_origins_may_ask_and_read_refusals_too(engine, origins):
    with serving(engine, cors_origin=origins, api_key=["sk-1"]) as server, httpx.Client(base_url=server.url) as client:
        asked = {
            "origin": "https://a.example",
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,content-type,x-stainless-os",
        }
        preflight = client.options("/v1/images/generations", headers=asked)
        assert preflight.status_code == 200
        assert "x-stainless-os" in preflight.headers["access-control-allow-headers"]
        for headers in ({}, {"authorization": "Bearer sk-1"}):
            answer = client.post("/v1/images/generations", headers=headers | {"origin": "https://a.example"})
            assert answer.status_code in (401, 415)
            assert answer.headers["access-control-allow-origin"] in ("*", "https://a.example")
            assert "x-request-id" in answer.headers["access-control-expose-headers"]
            assert "access-control-allow-credentials" not in answer.headers
        other = client.get("/health", headers={"origin": "https://evil.example"})
        assert other.headers.get("access-control-allow-origin") == ("*" if origins == ["*"] else None)
        assert all(answer.headers["x-request-id"] for answer in (preflight, other))


@pytest.mark.parametrize(
    ("asked", "words"),
    [({"origin": "https://evil.example"}, "origin"), ({"access-control-request-method": "PUT"}, "method")],
)
def test_refused_preflights_have_an_id_and_the_error_object(engine, asked, words):
    with serving(engine, cors_origin=["https://a.example"], api_key=["sk-1"]) as server:
        headers = {"origin": "https://a.example", "access-control-request-method": "POST", **asked}
        refused = httpx.options(f"{server.url}/v1/images/generations", headers=headers)
        assert refused.status_code == 400
        assert refused.headers["x-request-id"].startswith("req_") and "Origin" in refused.headers["vary"]
        allowed = refused.headers.get("access-control-allow-origin")
        assert allowed == (None if words == "origin" else "https://a.example")
        error = refused.json()["error"]
        assert (error["message"], error["type"]) == (f"Disallowed CORS {words}.", "invalid_request_error")


def test_what_is_off_is_not_imported():
    code = "import sys, darkroom.server.app; print('opentelemetry.sdk' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"
