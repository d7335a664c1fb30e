from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import pairwise

import httpx
import openai
import pytest

from darkroom.server.errors import ApiError
from darkroom.server.limits import RateLimits, network

from .conftest import serving
from .engine import finished, slow, wait_until

PATH = "/v1/images/generations"


class Clock:
    """`time.monotonic` itself is not to be replaced: the event loops of other tests' servers read it."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def asked(limits: RateLimits, client: str = "a") -> int:
    """0, or the seconds to wait."""
    try:
        with limits.admit(client):
            return 0
    except ApiError as e:
        assert (e.status, e.code, e.headers is not None) == (429, "rate_limit_exceeded", True)
        return int((e.headers or {})["Retry-After"])


def test_no_more_than_n_in_any_period_and_the_wait_is_true(clock: Clock) -> None:
    limits, admitted = RateLimits("5/minute", clock=clock), []
    while clock.now < 1300:
        if wait := asked(limits):
            clock.now += wait - 1  # a second before, it is still too early
            assert asked(limits) == 1
            clock.now += 1
            assert asked(limits) == 0
        admitted.append(clock.now)
        clock.now += 3.7
    assert len(admitted) >= 25
    assert all(admitted[i + 5] - admitted[i] >= 60 for i in range(len(admitted) - 5))


def test_each_client_has_its_own(clock: Clock) -> None:
    limits = RateLimits("1/hour", clock=clock)
    assert [asked(limits, name) for name in ("a", "b", "a", "b")] == [0, 0, 3600, 3600]


def test_refusals_do_not_count(clock: Clock) -> None:
    limits = RateLimits("1/minute", clock=clock)
    assert asked(limits) == 0
    for _ in range(100):
        assert asked(limits) == 60
    clock.now += 60
    assert asked(limits) == 0


def test_at_one_time(clock: Clock) -> None:
    limits = RateLimits(concurrent=2, clock=clock)
    with ExitStack() as running:
        running.enter_context(limits.admit("a"))
        running.enter_context(limits.admit("a"))
        assert asked(limits) == 1
        assert asked(limits, "b") == 0
        clock.now += 10
    assert asked(limits) == 0
    with limits.admit("a"), limits.admit("a"):
        clock.now += 1
        assert 1 <= asked(limits) <= 10  # by what requests took of late, less what the oldest has run


def test_a_request_that_fails_gives_its_place_back() -> None:
    limits = RateLimits(concurrent=1)
    with pytest.raises(KeyError), limits.admit("a"):
        raise KeyError
    assert asked(limits) == 0


def test_what_is_remembered_is_bounded(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("darkroom.server.limits._MOST_CLIENTS", 3)
    limits = RateLimits("1/hour", clock=clock)
    assert asked(limits, "a") == 0
    for name in "bcd":
        asked(limits, name)
    assert len(limits._clients) == 3
    assert asked(limits, "d") > 0


def test_a_network_is_one_client() -> None:
    assert network("2001:db8::1") == network("2001:db8::ffff") != network("2001:db8:0:1::1")
    assert network("192.0.2.1") != network("192.0.2.2")
    assert network("testclient") == "testclient"


# ---- over HTTP -----------------------------------------------------------------------------------------------------


def test_the_sdk_waits_as_it_is_told_and_then_gets_its_picture(engine):
    with serving(engine, rate_limit="2/second") as server:
        sdk = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=2)
        began = [time.monotonic()]
        for _ in range(5):
            assert sdk.images.generate(prompt="x").data
            began.append(time.monotonic())
        assert began[-1] - began[0] >= 1.9
        assert any(b - a > 0.9 for a, b in pairwise(began))
        with pytest.raises(openai.RateLimitError) as caught:
            for _ in range(3):
                sdk.with_options(max_retries=0).images.generate(prompt="x")
        assert (caught.value.code, caught.value.type) == ("rate_limit_exceeded", "rate_limit_error")
        assert caught.value.response.headers["retry-after"] == "1"
        assert caught.value.request_id
        assert server.url and list(sdk.models.list())  # reading is not limited


def test_addresses_are_limited_where_there_are_no_keys(engine):
    with serving(engine, rate_limit="1/hour") as server:

        def post(address: str) -> int:
            headers = {"x-forwarded-for": address}  # which counts from this address: it is a proxy's
            return httpx.post(f"{server.url}{PATH}", json={"prompt": "x"}, headers=headers).status_code

        addresses = ["192.0.2.1", "192.0.2.1", "192.0.2.2", "2001:db8::1", "2001:db8::2"]
        assert [post(address) for address in addresses] == [200, 429, 200, 200, 429]


def test_keys_have_limits_of_their_own_and_leave_again(engine):
    engine.script = slow
    with serving(engine, api_key=["one", "two"], max_concurrent_per_key=1) as server, ThreadPoolExecutor(1) as pool:
        url = f"{server.url}{PATH}"

        def post(key: str, **options: object) -> httpx.Response:
            headers = {"authorization": f"Bearer {key}"}
            return httpx.post(url, json={"prompt": "x"}, headers=headers, **{"timeout": 30, **options})  # type: ignore[arg-type]

        held = pool.submit(pytest.raises, httpx.ReadTimeout, post, "one", timeout=1.0)
        assert wait_until(lambda: len(engine.requests) == 1)
        refused = post("one")
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert int(refused.headers["retry-after"]) >= 1
        engine.script = lambda message: [finished(message)]
        assert post("two").status_code == 200
        held.result()
        assert wait_until(lambda: post("one").status_code == 200)
