"""What the server measures, for Prometheus."""

from __future__ import annotations

import math

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.responses import Response

from darkroom.engine.messages import Finished, Preview, Progress

from .client import EngineClient, EngineError

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


class Metrics:
    """One app's counters, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "darkroom_requests", "HTTP requests by route and outcome.", ("route", "outcome"), registry=registry
        )
        self.pictures = Counter("darkroom_pictures", "Pictures made.", registry=registry)
        self.ready = Gauge("darkroom_ready", "1 if the engine says so.", registry=registry)
        self.waiting = Gauge("darkroom_queue_depth", "Pictures that wait for their turn.", registry=registry)
        self.running = Gauge("darkroom_running", "Pictures that the workers have in hand.", registry=registry)
        self.stages = Histogram(
            "darkroom_stage_seconds", "Time of a picture by stage.", ("stage",), registry=registry, buckets=_SECONDS
        )
        self.steps = Histogram(
            "darkroom_step_seconds", "Time of a picture's denoising step.", registry=registry, buckets=_SECONDS
        )
        self.batch = Histogram(
            "darkroom_batch_size", "Pictures in a denoising step.", registry=registry, buckets=(1, 2, 4, 8, 16, 32)
        )
        self.usual_seconds: float | None = None
        """What a picture takes of the workers' time, by the last ones: as often a place in the queue becomes free."""

    def count(self, route: str, status: int) -> None:
        """Count one request by the status of its answer, or by the one that it would have got."""
        named = {429: "busy", 499: "cancelled"}
        by_class = "server_error" if status >= 500 else "client_error" if status >= 400 else "ok"
        self.requests.labels(route, named.get(status, by_class)).inc()

    def observe(self, event: Progress | Preview | Finished) -> None:
        match event:
            case Progress():
                self.steps.observe(event.seconds)
                self.batch.observe(event.batch_size)
            case Finished():
                self.pictures.inc()
                for stage, seconds in event.stages.items():
                    self.stages.labels(stage).observe(seconds)
                work = sum(seconds for stage, seconds in event.stages.items() if stage != "queue")
                self.usual_seconds = (work + (self.usual_seconds or work)) / 2

    async def scrape(self, client: EngineClient) -> Response:
        """The gauges are what the engine says now; unknown if it says nothing."""
        try:
            status = await client.status(timeout=2.0)
        except EngineError:
            gauges = 0.0, math.nan, math.nan
        else:
            gauges = float(status.state == "ready"), status.waiting, status.running
        for gauge, value in zip((self.ready, self.waiting, self.running), gauges, strict=True):
            gauge.set(value)
        return Response(generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST)
