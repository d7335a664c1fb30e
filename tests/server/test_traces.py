"""Against a real collector's address: an HTTP server that keeps what it is sent."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from darkroom.configs.errors import ConfigError
from darkroom.server.traces import Traces

from .conftest import serving
from .engine import failing

PATH = "/v1/images/generations"
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Collector(ThreadingHTTPServer):
    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.paths: set[str] = set()
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            import gzip

            data = gzip.decompress(data)
        for resource in ExportTraceServiceRequest.FromString(data).resource_spans:
            for scope in resource.scope_spans:
                self.server.spans += scope.spans
        self.server.paths.add(self.path)
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def attributes(span: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in span.attributes}


def test_a_span_for_the_request_and_one_for_each_stage(engine, collector):
    with serving(engine, otlp_endpoint=collector.url, api_key=["sk-secret"]) as server:
        headers = {"traceparent": PARENT, "authorization": "Bearer sk-secret"}
        answer = httpx.post(f"{server.url}{PATH}?q=hidden", json={"prompt": "a secret", "n": 2}, headers=headers)
        httpx.get(f"{server.url}/health")
    assert collector.paths == {"/v1/traces"}
    [request] = [span for span in collector.spans if span.kind == 2]
    assert request.name == f"POST {PATH}"
    assert (request.trace_id.hex(), request.parent_span_id.hex()) == tuple(PARENT.split("-")[1:3])
    about = attributes(request)
    assert (about["http.response.status_code"], about["darkroom.pictures"], about["darkroom.key"]) == (200, 2, "key-1")
    assert about["darkroom.request_id"] == answer.headers["x-request-id"]
    stages = [span for span in collector.spans if span is not request]
    assert [span.name for span in stages] == ["queue", "prepare", "denoise", "decode", "encode"] * 2
    assert all(span.parent_span_id == request.span_id for span in stages)
    denoise = stages[2]
    assert abs(denoise.end_time_unix_nano - denoise.start_time_unix_nano - 0.5e9) < 1e6
    for hidden in ("secret", "hidden"):
        assert hidden not in str(collector.spans)


def test_failures_are_errors_and_hostile_parents_are_none(engine, collector):
    engine.script = failing("internal")
    with serving(engine, otlp_endpoint=f"{collector.url}/other/path") as server:
        assert (
            httpx.post(f"{server.url}{PATH}", json={"prompt": "x"}, headers={"traceparent": b"\xff" * 9}).status_code
            == 500
        )
        assert httpx.get(f"{server.url}/nowhere").status_code == 404
    assert collector.paths == {"/other/path"}
    assert {(span.name, span.status.code, span.parent_span_id) for span in collector.spans} == {
        (f"POST {PATH}", 2, b""), ("GET", 0, b""),
    }  # fmt: skip


def test_no_collector_is_no_trouble(engine):
    with serving(engine, otlp_endpoint="http://127.0.0.1:9") as server:
        assert httpx.post(f"{server.url}{PATH}", json={"prompt": "x"}).status_code == 200
        start = time.monotonic()
    assert time.monotonic() - start < 10


def test_without_the_extra_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
    with pytest.raises(ConfigError, match=r"pip install 'darkroom\[otel\]'"):
        Traces("http://127.0.0.1:4318")
