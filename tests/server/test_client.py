from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from typing import NoReturn

import msgspec
import pytest

from darkroom.configs.errors import RequestError
from darkroom.configs.request import Request
from darkroom.engine.messages import Failed, Finished, Preview, Progress, Refusal, Status
from darkroom.server.client import EngineClient, EngineError, interleave

from .engine import ScriptedEngine, failing, slow, wait_until

REQUEST = Request(
    prompt="a red circle",
    negative_prompt=" ",
    width=128,
    height=128,
    num_inference_steps=2,
    guidance_scale=4.0,
    max_sequence_length=512,
    seed=3,
    partial_images=1,
)


@pytest.fixture
def engine() -> Iterator[ScriptedEngine]:
    with ScriptedEngine() as engine:
        yield engine


@asynccontextmanager
async def connected(engine: ScriptedEngine) -> AsyncIterator[EngineClient]:
    client = EngineClient(engine.address)
    listener = asyncio.create_task(client.listen())
    try:
        while await client.changed() != engine.status:
            pass
        yield client
    finally:
        listener.cancel()
        await asyncio.gather(listener, return_exceptions=True)
        client.close()


def run(engine: ScriptedEngine, test: Callable[[EngineClient], Awaitable[None]]) -> None:
    async def main() -> None:
        async with connected(engine) as client, asyncio.timeout(5):
            await test(client)

    asyncio.run(main())


async def first_event(client: EngineClient) -> None:
    async with aclosing(client.generate(REQUEST)) as events:
        await anext(events)


def test_events_come_in_order_and_the_last_is_finished(engine):
    async def test(client):
        events = [event async for event in client.generate(REQUEST)]
        assert [type(event) for event in events] == [Progress, Preview, Progress, Finished]
        assert events[-1].files[0] == b"picture 3"

    run(engine, test)
    assert [message.request for message in engine.requests] == [REQUEST]
    assert engine.cancelled == []


def test_ids_are_unique_and_answers_reach_their_own_caller(engine):
    async def one(client, seed):
        return [event async for event in client.generate(REQUEST.picture(seed))][-1].files[0]

    async def test(client):
        images = await asyncio.gather(*(one(client, i) for i in range(20)))
        assert images == [b"picture %d" % (3 + i) for i in range(20)]

    run(engine, test)
    assert len({message.id for message in engine.requests}) == 20


def test_what_the_workers_find_wrong_with_a_request_is_its_own_fault(engine):
    refusal = Refusal(message="'image' is broken", param="image", code="invalid_value")
    engine.script = lambda message: iter([Failed(id=message.id, error="RequestError: ...", refusal=refusal)])

    async def test(client):
        with pytest.raises(RequestError, match="'image' is broken") as caught:
            await first_event(client)
        assert (caught.value.param, caught.value.code) == ("image", "invalid_value")

    run(engine, test)
    assert engine.cancelled == []


@pytest.mark.parametrize("reason", ["internal", "unavailable", "busy"])
def test_failed_is_raised_with_its_reason(engine, reason):
    engine.script = failing(reason, error="why")

    async def test(client):
        with pytest.raises(EngineError, match="why") as caught:
            await first_event(client)
        assert caught.value.reason == reason

    run(engine, test)
    assert engine.cancelled == []


def test_closing_the_iterator_cancels(engine):
    engine.script = slow

    async def test(client):
        await first_event(client)
        assert wait_until(lambda: engine.cancelled == [engine.requests[0].id])

    run(engine, test)


def test_cancelling_the_consumer_cancels(engine):
    engine.script = slow

    async def consume(client):
        async for _ in client.generate(REQUEST):
            pass

    async def test(client):
        task = asyncio.create_task(consume(client))
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert wait_until(lambda: engine.cancelled == [engine.requests[0].id])

    run(engine, test)


def test_status_asks_the_engine_and_is_remembered(engine):
    engine.status = Status(state="ready", waiting=3, running=1)

    async def test(client):
        assert await client.status(timeout=1) == engine.status == client.last_status

    run(engine, test)


def test_status_gives_up_on_a_silent_engine(engine):
    async def test(client):
        engine.is_deaf = True
        with pytest.raises(EngineError, match="has not answered") as caught:
            await client.status(timeout=0.05)
        assert caught.value.reason == "unavailable"

    run(engine, test)


def test_changed_misses_no_last_word(engine):
    async def test(client):
        for state in ("restarting", "ready", "restarting", "failed"):
            engine.say(Status(state=state))
        while (await client.changed()).state != "failed":
            pass

    run(engine, test)


def test_nothing_is_sent_to_an_engine_that_is_not_ready(engine):
    engine.status = Status(state="starting")

    async def test(client):
        with pytest.raises(EngineError, match="starting"):
            await first_event(client)

    run(engine, test)
    assert engine.requests == []


def test_fail_all_ends_every_wait_and_refuses_what_comes_after(engine):
    engine.script = slow

    async def consume(client):
        return [event async for event in client.generate(REQUEST)]

    async def test(client):
        engine.is_deaf = True
        waits = [asyncio.create_task(coroutine) for coroutine in (consume(client), consume(client), client.status(9))]
        await asyncio.sleep(0.05)
        client.fail_all(EngineError("unavailable", "exit code 9"))
        results = await asyncio.gather(*waits, return_exceptions=True)
        assert [str(result) for result in results] == ["exit code 9"] * 3
        with pytest.raises(EngineError, match="failed"):
            await first_event(client)
        assert (await client.changed()).detail == "exit code 9"

    run(engine, test)


@pytest.mark.parametrize(
    ("state", "before", "began"),
    [
        ("ready", (), True),
        ("restarting", (), True),
        ("failed", (), False),
        ("failed", (Progress(id="", step=1, num_steps=2, seconds=0.1, batch_size=1),), True),
    ],
)
def test_an_error_tells_whether_the_workers_had_the_picture(engine, state, before, began):
    """An engine that cannot go on says so first, and then fails what has only waited."""

    def script(message):
        yield from (msgspec.structs.replace(event, id=message.id) for event in before)
        engine.say(Status(state=state))
        yield 0.05
        yield Failed(id=message.id, error="lost", reason="unavailable")

    async def test(client):
        engine.script = script
        with pytest.raises(EngineError) as caught:
            async for _ in client.generate(REQUEST):
                pass
        assert caught.value.began is began
        if state != "ready":
            with pytest.raises(EngineError) as caught:
                await first_event(client)
            assert not caught.value.began

    run(engine, test)


def test_fail_all_keeps_what_the_engine_said_of_its_failure(engine):
    async def test(client):
        engine.say(Status(state="failed", detail="no such file", is_config_error=True))
        while (await client.changed()).state != "failed":
            pass
        client.fail_all(EngineError("unavailable", "exit code 2"))
        assert client.last_status.is_config_error

    run(engine, test)


def test_a_message_that_cannot_be_read_fails_the_waiting(engine, caplog):
    engine.script = slow

    async def main():
        client = EngineClient(engine.address)
        listener = asyncio.create_task(client.listen())
        await client.changed()
        wait = asyncio.create_task(first_event_after_progress(client))
        await asyncio.sleep(0.05)
        engine.say(b"\xc1 not msgpack")
        with pytest.raises(EngineError) as caught:
            await wait
        assert caught.value.reason == "internal"
        await asyncio.gather(listener, return_exceptions=True)
        client.close()

    async def first_event_after_progress(client):
        async for _ in client.generate(REQUEST):
            pass

    asyncio.run(main())
    assert "listening" in caplog.text


async def numbers(count: int, closed: list[int], error: Exception | None = None) -> AsyncGenerator[int, None]:
    try:
        for number in range(count):
            await asyncio.sleep(0.001)
            yield number
        if error:
            raise error
        await asyncio.sleep(3600 if count == 0 else 0)
    finally:
        closed.append(count)


async def never() -> NoReturn:
    await asyncio.sleep(3600)
    raise AssertionError


def test_interleave_gives_the_events_of_all():
    async def main():
        closed = []
        got = [pair async for pair in interleave([numbers(2, closed), numbers(3, closed)], never)]
        assert sorted(got) == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]
        assert sorted(closed) == [2, 3]

    asyncio.run(main())


def test_interleave_ends_all_when_one_fails():
    async def main():
        closed = []
        with pytest.raises(ValueError, match="broken"):
            async for _ in interleave([numbers(1, closed, ValueError("broken")), numbers(0, closed)], never):
                pass
        assert sorted(closed) == [0, 1]

    asyncio.run(main())


def test_interleave_ends_all_when_the_watch_says_so():
    async def watch():
        await asyncio.sleep(0.01)
        raise KeyError("gone")

    async def main():
        closed = []
        with pytest.raises(KeyError):
            async for _ in interleave([numbers(0, closed), numbers(0, closed)], watch):
                pass
        assert closed == [0, 0]

    asyncio.run(main())


def test_interleave_closed_early_closes_all():
    async def main():
        closed = []
        async with aclosing(interleave([numbers(5, closed), numbers(5, closed)], never)) as events:
            await anext(events)
        assert closed == [5, 5]

    asyncio.run(main())
