"""OpenTelemetry: a span for each request, and below it one for each stage of each picture. Needs the `otel` extra."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any
from urllib.parse import urlsplit

from darkroom.configs.errors import ConfigError
from darkroom.engine.messages import Finished

from .trail import Trail

_QUIET = ("/health", "/metrics")
_FLUSH_MILLISECONDS = 2000


class Traces:
    """Spans are made after a request has ended, from what is known of it, and sent by a thread of their own."""

    def __init__(self, endpoint: str) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError:
            raise ConfigError("--otlp-endpoint: needs OpenTelemetry: pip install 'darkroom[otel]'") from None
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        if urlsplit(endpoint).path in ("", "/"):
            endpoint = f"{endpoint.rstrip('/')}/v1/traces"
        self._provider = TracerProvider(resource=Resource.create({"service.name": "darkroom"}), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint, timeout=2)))
        self._tracer = self._provider.get_tracer("darkroom")
        self._propagator = TraceContextTextMapPropagator()

    def __call__(self, trail: Trail, scope: MutableMapping[str, Any], seconds: float) -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        route = getattr(scope.get("route"), "path", None)
        if route in _QUIET:
            return
        span = self._tracer.start_span(
            f"{scope['method']} {route}" if route else scope["method"],
            context=self._propagator.extract(_parent(scope["headers"])),
            kind=SpanKind.SERVER,
            start_time=_nanoseconds(trail.began),
            attributes=_about(trail, scope, route),
        )
        if (trail.status or 500) >= 500:
            span.set_status(Status(StatusCode.ERROR))
        inside = set_span_in_context(span)
        for ended, picture in trail.made:
            self._add_stages(inside, ended, picture)
        span.end(_nanoseconds(trail.began + seconds))

    def close(self) -> None:
        """Send what is left, if someone takes it soon."""
        self._provider.force_flush(_FLUSH_MILLISECONDS)
        self._provider.shutdown()

    def _add_stages(self, inside: Any, ended: float, picture: Finished) -> None:
        """One after another, up to the picture's end; what it waited between its steps is not any stage's."""
        start = ended - sum(picture.stages.values())
        for stage, seconds in picture.stages.items():
            attributes: dict[str, str | float] = {"darkroom.seconds": seconds, "darkroom.picture": picture.id}
            span = self._tracer.start_span(stage, inside, start_time=_nanoseconds(start), attributes=attributes)
            start += seconds
            span.end(_nanoseconds(start))


def _about(trail: Trail, scope: MutableMapping[str, Any], route: str | None) -> dict[str, str | int]:
    """By OpenTelemetry's own names where it has any. Neither prompts nor query strings."""
    about: dict[str, str | int | None] = {
        "http.request.method": scope["method"],
        "http.route": route,
        "http.response.status_code": trail.status,
        "darkroom.request_id": trail.id,
        "darkroom.key": trail.owner,
        "darkroom.pictures": len(trail.made),
    }
    if asked := trail.asked:
        about |= {"darkroom.size": f"{asked.width}x{asked.height}", "darkroom.steps": asked.num_inference_steps}
    return {name: value for name, value in about.items() if value is not None}


def _parent(headers: list[tuple[bytes, bytes]]) -> dict[str, str]:
    """The client's own span, if it has one."""
    return {
        name.decode(): value.decode("latin-1") for name, value in headers if name in (b"traceparent", b"tracestate")
    }


def _nanoseconds(unix_seconds: float) -> int:
    return int(unix_seconds * 1e9)
