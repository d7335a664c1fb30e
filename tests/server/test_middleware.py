from __future__ import annotations

import re
import threading

import httpx
import pytest

from .conftest import serving
from .engine import slow, wait_until

ID = re.compile(r"req_[0-9a-f]{32}")


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/v1/models", None),
        ("GET", "/health", None),
        ("GET", "/metrics", None),
        ("GET", "/openapi.json", None),
        ("GET", "/nowhere", None),
        ("DELETE", "/v1/models/x", None),
        ("POST", "/v1/images/generations", {"prompt": "x"}),
        ("POST", "/v1/images/generations", {"prompt": "x", "stream": True}),
        ("POST", "/v1/images/generations", {"prompt": ""}),
        ("POST", "/v1/images/generations", None),
    ],
)
def test_every_answer_has_an_id_of_its_own(http, method, path, body):
    responses = [http.request(method, path, json=body, headers={"x-request-id": "mine"}) for _ in range(2)]
    ids = [response.headers.get_list("x-request-id") for response in responses]
    assert all(len(values) == 1 and ID.fullmatch(values[0]) for values in ids)
    assert ids[0] != ids[1]


def test_the_id_of_an_internal_error_is_in_the_answer(http, monkeypatch):
    monkeypatch.setattr("darkroom.server.images.read_json", None)
    response = http.post("/v1/images/generations", json={})
    assert response.status_code == 500
    assert ID.fullmatch(response.headers["x-request-id"])


@pytest.mark.parametrize("stream", [False, True])
def test_a_server_that_stops_answers_what_it_could_not_drain(engine, stream):
    engine.script = slow
    answers: list[httpx.Response] = []

    def post(url: str) -> None:
        answers.append(httpx.post(f"{url}/v1/images/generations", json={"prompt": "x", "stream": stream}, timeout=10))

    with serving(engine) as server:
        client = threading.Thread(target=post, args=(server.url,))
        client.start()
        assert wait_until(lambda: bool(engine.requests))
    client.join()
    if stream:
        assert answers[0].text.startswith(
            'event: error\ndata: {"type":"error","error":{"message":"The model is not ready'
        )
    else:
        assert (answers[0].status_code, answers[0].headers["retry-after"]) == (503, "10")
