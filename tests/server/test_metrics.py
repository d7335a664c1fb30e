from __future__ import annotations

import math

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from darkroom.engine.messages import Status

from .conftest import serving
from .engine import failing, slow, wait_until

PATH = "/v1/images/generations"


@pytest.fixture
def fresh(engine):
    with serving(engine) as server, httpx.Client(base_url=server.url, timeout=10) as client:
        yield client


def scrape(http) -> dict[tuple[str, ...], float]:
    response = http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items(), reverse=True))): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def test_a_picture_is_measured(fresh):
    fresh.post(PATH, json={"prompt": "x", "n": 2})
    metrics = scrape(fresh)
    assert metrics["darkroom_pictures_total",] == 2
    assert metrics["darkroom_step_seconds_count",] == 4
    assert metrics["darkroom_step_seconds_sum",] == 1.0
    assert metrics["darkroom_batch_size_sum",] == 8
    assert metrics["darkroom_stage_seconds_sum", "denoise"] == 1.0
    assert {name[1] for name in metrics if name[0] == "darkroom_stage_seconds_count"} == {
        "queue", "prepare", "denoise", "decode", "encode",
    }  # fmt: skip


def test_outcomes(fresh, engine):
    fresh.post(PATH, json={"prompt": "x"})
    fresh.post(PATH, json={"prompt": "x", "stream": True})
    fresh.post(PATH, json={"prompt": ""})
    fresh.post(PATH, content=b" " * (3 << 20), headers={"content-type": "application/json"})
    engine.script = failing("internal")
    fresh.post(PATH, json={"prompt": "x"})
    engine.script = failing("busy")
    fresh.post(PATH, json={"prompt": "x", "stream": True})
    engine.script = slow
    for stream in (False, True):
        with pytest.raises(httpx.ReadTimeout):
            fresh.post(PATH, json={"prompt": "x", "stream": stream}, timeout=0.1)
    fresh.get("/nowhere")
    fresh.get("/v1/models/darkroom%2Fdemo")
    counts = {
        (PATH, "ok"): 2,
        (PATH, "client_error"): 2,
        (PATH, "server_error"): 1,
        (PATH, "busy"): 1,
        (PATH, "cancelled"): 2,
        ("unknown", "client_error"): 1,
        ("/v1/models/{id:path}", "ok"): 1,
    }
    assert wait_until(lambda: scrape(fresh).get(("darkroom_requests_total", PATH, "cancelled")) == 2)
    metrics = scrape(fresh)
    got = {name[1:]: value for name, value in metrics.items() if name[0] == "darkroom_requests_total"}
    assert got.pop(("/metrics", "ok")) >= 1
    assert got == counts


def test_a_late_failure_of_a_stream_counts_as_one(fresh, engine, monkeypatch):
    monkeypatch.setattr("darkroom.server.sse.KEEP_ALIVE", 0.02)
    engine.script = failing("unavailable", 0.1)
    assert fresh.post(PATH, json={"prompt": "x", "stream": True}).status_code == 200
    assert wait_until(lambda: scrape(fresh).get(("darkroom_requests_total", PATH, "server_error")) == 1)


def test_the_queue_is_the_engines(fresh, engine):
    engine.status = Status(state="ready", waiting=3, running=2)
    metrics = scrape(fresh)
    assert [metrics[f"darkroom_{name}",] for name in ("ready", "queue_depth", "running")] == [1, 3, 2]
    engine.status = Status(state="restarting")
    assert scrape(fresh)["darkroom_ready",] == 0


def test_a_silent_engine_leaves_the_queue_unknown(fresh, engine):
    engine.is_deaf = True
    metrics = scrape(fresh)
    assert metrics["darkroom_ready",] == 0
    assert math.isnan(metrics["darkroom_queue_depth",])
