"""The served OpenAPI document holds: real servers are asked all that it describes, and answer as it says.

Requests are made from the document by schemathesis, such as fit it and such as do not. Half of those that fit are
steered to what a model of any kind would take, so that successes are seen as well as refusals.
"""

from __future__ import annotations

import io
import time
from collections import Counter
from contextlib import suppress

import pytest
import requests
import schemathesis
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from PIL import Image
from schemathesis import Case, CheckFunction, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.schemas import APIOperation, BaseSchema
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from bench.processes import Server
from tests.golden import picture_file

from .chance import examples

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
KEPT = ("prompt", "n", "output_format", "response_format", "stream", "user", "quality", "seconds", "image", "limit")
"""Fields that are not steered."""
PICTURES = (picture_file(64, 64), picture_file(80, 48, 1), b"", b"GIF89a", picture_file(64, 64)[:100])


def _webp() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), "red").save(buffer, "WEBP")
    return buffer.getvalue()


schemathesis.openapi.format("binary", st.sampled_from([*PICTURES[:2], *PICTURES, _webp()]))


class Prober:
    """Asks one server, and keeps account of its answers."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.http = requests.Session()
        self.schema: BaseSchema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
        self.answers: Counter[tuple[str, int]] = Counter()
        """By operation and status."""
        self.model = self.http.get(f"{server.url}/v1/models").json()["data"][0]["id"]
        self.ids: list[str] = []
        """Of videos that were accepted."""
        self.files: list[str] = []

    @property
    def operations(self) -> list[APIOperation]:
        """Those that delete come last: the others need something to be there."""
        return sorted(
            (result.ok() for result in self.schema.get_all_operations()), key=lambda one: one.method == "delete"
        )

    def ask(self, case: Case, *more: CheckFunction) -> None:
        response = case.call_and_validate(session=self.http, checks=[*CHECKS, *more], timeout=60)
        self.answers[case.operation.label, response.status_code] += 1
        assert response.headers["x-request-id"][0].startswith("req_")
        assert response.status_code not in (429, 503) or int(response.headers["retry-after"][0]) <= 120
        if response.status_code == 200 and case.method == "POST":
            self._remember(response)

    def _remember(self, response: schemathesis.Response) -> None:
        if not response.headers["content-type"][0].startswith("application/json"):
            return
        made = response.json()
        self.ids += [made["id"]] if "id" in made else []
        self.files += [item["url"].rpartition("/")[2] for item in made.get("data", ()) if "url" in item]

    def steer(self, case: Case, data: st.DataObject) -> None:
        """What no document can say: names of what exists, and what the served model takes."""
        ids = [self.model] if "/models/" in case.path else self.ids
        for name, known in (("id", ids), ("name", self.files)):
            if known and name in case.path_parameters:
                case.path_parameters[name] = data.draw(st.sampled_from(known[-20:]))
        if isinstance(case.body, dict):
            body = {name: value for name, value in case.body.items() if name in KEPT and value is not None}
            case.body = {**body, "prompt": body.get("prompt") or "x"}
            if "/images/" in case.path and not body.get("stream"):
                case.body["response_format"] = data.draw(st.sampled_from(("b64_json", "url")))


def probe(prober: Prober, operation: APIOperation, count: int) -> None:
    fitting = operation.as_strategy(generation_mode=GenerationMode.POSITIVE)

    @examples(count)
    @given(case=fitting, data=st.data())
    def ask_what_fits(case: Case, data: st.DataObject) -> None:
        if data.draw(st.booleans()):
            prober.steer(case, data)
        prober.ask(case)

    @examples(count)
    @given(case=operation.as_strategy(generation_mode=GenerationMode.NEGATIVE))
    def ask_what_does_not(case: Case) -> None:
        prober.ask(case, negative_data_rejection)

    ask_what_fits()
    with suppress(Unsatisfiable):  # nothing can be wrong about a request that has no parameters
        ask_what_does_not()


def until_one_is_made(prober: Prober) -> None:
    """A video, where any was accepted: so that there is content to ask for."""
    deadline = time.monotonic() + 30
    while prober.ids and time.monotonic() < deadline:
        listed = prober.http.get(f"{prober.server.url}/v1/videos", params={"limit": 100}).json()["data"]
        if done := [video["id"] for video in listed if video["status"] == "completed"]:
            prober.ids += done
            return
        time.sleep(0.05)


SUCCEED = {
    "picture_server": ("generations", "edits", "variations", "models/{id}", "files/{name}"),
    "video_server": ("POST /v1/videos", "GET /v1/videos", "videos/{id}", "content", "remix", "DELETE"),
}
"""Parts of the names of operations that must have been seen to succeed."""


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("kind", SUCCEED)
def test_every_answer_is_as_the_document_says(
    kind: str, request: pytest.FixtureRequest, subtests: pytest.Subtests, whole_matrix: bool
) -> None:
    """With `--matrix` more than 5,000 requests, on two servers; else 300."""
    prober = Prober(request.getfixturevalue(kind))
    with prober.http:
        for operation in prober.operations:
            until_one_is_made(prober)
            with subtests.test(operation.label):
                probe(prober, operation, 150 if whole_matrix else 8)
        assert prober.http.get(f"{prober.server.url}/health").json()["status"] == "ready"
    print(f"{kind}: {prober.answers.total()} requests: {dict(sorted(prober.answers.items()))}")
    assert prober.answers.total() >= (2500 if whole_matrix else 140)
    succeeded = [name for name, status in prober.answers if status == 200]
    assert [part for part in SUCCEED[kind] if not any(part in name for name in succeeded)] == []
