"""Feed messages, compare commands: no process, no clock."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count

import pytest

from darkroom.configs import Request
from darkroom.engine.messages import (
    Cancel,
    Command,
    Decode,
    Drop,
    Encoded,
    EncodingFailed,
    Event,
    Failed,
    Finished,
    FromEncoder,
    Generate,
    Prepare,
    Prepared,
    Preview,
    Progress,
    Refusal,
    Step,
)
from darkroom.engine.scheduler import Scheduler
from tests.golden import request

SECONDS = 0.5
"""How long every command takes."""


def generate(id: str, steps: int = 2, previews: int = 0) -> Generate:
    return Generate(id=id, request=request(num_inference_steps=steps, partial_images=previews, seed=ord(id[0])))


def facts(wanted: Request) -> Prepared:
    return Prepared(num_steps=wanted.num_inference_steps, text_tokens=7, image_tokens=35)


def finish(scheduler: Scheduler, command: Command, now: float = 0.0) -> list[Event]:
    prepared = tuple(map(facts, command.requests)) if isinstance(command, Prepare) else ()
    return scheduler.finish(command, prepared, now, SECONDS)


def encoded(id: str, preview: int | None = None) -> Encoded:
    return Encoded(id=id, files=(b"%s" % id.encode(),), seconds=SECONDS, preview=preview)


def prepare(*messages: Generate) -> Prepare:
    return Prepare(ids=tuple(m.id for m in messages), requests=tuple(m.request for m in messages))


def step(id: str) -> Step:
    return Step(ids=(id,))


def decode(id: str, preview: int | None = None) -> Decode:
    return Decode(ids=(id,), preview=preview)


def drop(*ids: str) -> Drop:
    return Drop(ids=ids)


def filled(*messages: Generate, max_running: int = 4, max_waiting: int = 256) -> Scheduler:
    scheduler = Scheduler(max_running=max_running, max_waiting=max_waiting)
    for message in messages:
        assert scheduler.add(message, now=0.0) is None
    return scheduler


def commands(scheduler: Scheduler, limit: int = 1000) -> Iterator[Command]:
    """Every command, done at once; pictures are encoded at once."""
    for _ in range(limit):
        if not (command := scheduler.next(0.0)):
            return
        yield command
        finish(scheduler, command)
        if isinstance(command, Decode):
            for id in command.ids:
                scheduler.encoded(encoded(id, command.preview))


def until(scheduler: Scheduler, kind: type[Command]) -> Command:
    """The first command of this kind, handed out and not yet done."""
    while not isinstance(command := scheduler.next(0.0), kind):
        assert command
        finish(scheduler, command)
    return command


# ---- the order of commands -----------------------------------------------------------------------------------------


def test_one_request_from_start_to_end() -> None:
    a = generate("a", steps=3)
    assert list(commands(filled(a))) == [prepare(a), step("a"), step("a"), step("a"), decode("a"), drop("a")]


def test_there_is_nothing_to_do_without_requests() -> None:
    assert Scheduler().next(0.0) is None


def test_a_short_request_does_not_wait_for_a_long_one() -> None:
    long, short = generate("l", steps=50), generate("s", steps=2)
    order = list(commands(filled(long, short)))
    assert order[:6] == [prepare(long), prepare(short), step("l"), step("s"), step("l"), step("s")]
    assert order.index(decode("s")) < 8
    assert order[-2:] == [decode("l"), drop("l")]


def test_three_requests_take_turns() -> None:
    order = [c.ids[0] for c in commands(filled(*map(generate, "abc"))) if isinstance(c, Step)]
    assert order == ["a", "b", "c", "a", "b", "c"]


def test_a_newcomer_is_prepared_between_two_steps() -> None:
    a, b = generate("a", steps=9), generate("b")
    scheduler = filled(a)
    finish(scheduler, until(scheduler, Step))
    scheduler.add(b, now=0.0)
    assert scheduler.next(0.0) == prepare(b)


def test_places_are_taken_first_come_first_served() -> None:
    messages = [generate(id, steps=i + 2) for i, id in enumerate("abcde")]
    order = list(commands(filled(*messages, max_running=2)))
    assert [c.ids[0] for c in order if isinstance(c, Prepare)] == list("abcde")
    running: set[str] = set()
    for command in order:
        running |= set(command.ids) if isinstance(command, Prepare) else set()
        running -= set(command.ids) if isinstance(command, Drop) else set()
        assert len(running) <= 2


def test_memory_is_given_back_before_more_is_taken() -> None:
    a, b = generate("a"), generate("b")
    order = list(commands(filled(a, b, max_running=1)))
    assert order.index(drop("a")) + 1 == order.index(prepare(b))


# ---- previews ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "previews", "after"),
    [
        (8, 0, []),
        (8, 1, [4]),
        (8, 3, [2, 4, 6]),
        (20, 3, [5, 10, 15]),
        (10, 3, [3, 5, 8]),
        (4, 3, [1, 2, 3]),
        (3, 3, [1, 2]),  # never at the last step, which gives the picture itself
        (2, 3, [1]),
    ],
)
def test_previews_are_spread_evenly(steps: int, previews: int, after: list[int]) -> None:
    done, shown = 0, []
    for command in commands(filled(generate("a", steps, previews))):
        done += isinstance(command, Step)
        if isinstance(command, Decode) and command.preview is not None:
            assert command.preview == len(shown)
            shown.append(done)
    assert shown == after


def test_a_preview_is_told_even_when_its_encoder_is_late() -> None:
    scheduler = filled(generate("a", steps=2, previews=1))
    finish(scheduler, until(scheduler, Decode))
    finish(scheduler, until(scheduler, Drop))  # the picture itself is decoded by now
    assert scheduler.encoded(encoded("a", preview=0)) == Preview(id="a", index=0, image=b"a")
    assert isinstance(scheduler.encoded(encoded("a")), Finished)


# ---- events --------------------------------------------------------------------------------------------------------


def test_progress_counts_steps() -> None:
    scheduler = filled(generate("a", steps=2))
    finish(scheduler, until(scheduler, Prepare))
    expected = Progress(id="a", step=1, num_steps=2, seconds=SECONDS, batch_size=1)
    assert finish(scheduler, until(scheduler, Step)) == [expected]


def test_a_finished_picture_says_where_the_time_went() -> None:
    scheduler = Scheduler()
    scheduler.add(generate("a", steps=3, previews=1), now=10.0)
    while command := scheduler.next(0.0):
        finish(scheduler, command, now=12.0)
    event = scheduler.encoded(encoded("a"))
    assert event == Finished(
        id="a",
        files=(b"a",),
        seed=ord("a"),
        text_tokens=7,
        image_tokens=35,
        stages={
            "queue": 2.0 - SECONDS,
            "prepare": SECONDS,
            "denoise": 3 * SECONDS,
            "decode": 2 * SECONDS,
            "encode": SECONDS,
        },
    )
    assert scheduler.encoded(encoded("a")) is None


def test_the_encoder_may_be_faster_than_the_last_rank() -> None:
    scheduler = filled(generate("a"))
    command = until(scheduler, Decode)
    assert scheduler.encoded(encoded("a")) is None
    [event] = finish(scheduler, command)
    assert isinstance(event, Finished)
    assert event.stages["decode"] == event.stages["encode"] == SECONDS
    assert list(commands(scheduler)) == [drop("a")]


# ---- cancel --------------------------------------------------------------------------------------------------------


def test_cancel_while_waiting() -> None:
    scheduler = filled(generate("a"), generate("b"))
    scheduler.cancel(Cancel(id="a"))
    assert [c for c in commands(scheduler) if "a" in c.ids] == []


@pytest.mark.parametrize("kind", [Prepare, Step, Decode])
def test_cancel_while_a_command_is_under_way(kind: type[Command]) -> None:
    scheduler = filled(generate("a"))
    command = until(scheduler, kind)
    scheduler.cancel(Cancel(id="a"))
    assert finish(scheduler, command) == []
    assert list(commands(scheduler)) == [drop("a")]
    assert scheduler.encoded(encoded("a")) is None


@pytest.mark.parametrize("kind", [Prepare, Step, Decode])
def test_cancel_while_a_command_fails(kind: type[Command]) -> None:
    scheduler = filled(generate("a"))
    command = until(scheduler, kind)
    scheduler.cancel(Cancel(id="a"))
    assert scheduler.fail(command, "no") == []
    assert list(commands(scheduler)) == [drop("a")]


def test_cancel_while_encoding() -> None:
    scheduler = filled(generate("a"))
    finish(scheduler, until(scheduler, Decode))
    scheduler.cancel(Cancel(id="a"))
    assert list(commands(scheduler)) == [drop("a")]
    assert scheduler.encoded(encoded("a")) is None


def test_cancel_after_the_encoder_was_faster() -> None:
    scheduler = filled(generate("a"))
    command = until(scheduler, Decode)
    scheduler.encoded(encoded("a"))
    scheduler.cancel(Cancel(id="a"))
    assert finish(scheduler, command) == []
    assert list(commands(scheduler)) == [drop("a")]


def test_cancel_between_steps_leaves_the_others_alone() -> None:
    scheduler = filled(generate("a", steps=9), generate("b", steps=2))
    finish(scheduler, until(scheduler, Step))
    scheduler.cancel(Cancel(id="a"))
    assert list(commands(scheduler)) == [drop("a"), step("b"), step("b"), decode("b"), drop("b")]


def test_cancel_of_what_is_not_known_or_has_ended() -> None:
    scheduler = filled(generate("a"))
    scheduler.cancel(Cancel(id="z"))
    assert len(list(commands(scheduler))) == 5
    scheduler.cancel(Cancel(id="a"))
    assert scheduler.next(0.0) is None


# ---- failures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Prepare, Step, Decode])
def test_a_refused_command_fails_its_request_alone(kind: type[Command]) -> None:
    scheduler = filled(generate("a"), generate("b"), max_running=1)
    assert scheduler.fail(until(scheduler, kind), "no") == [Failed(id="a", error="no")]
    assert [type(c) for c in commands(scheduler)] == [Drop, Prepare, Step, Step, Decode, Drop]


def test_a_command_that_is_the_clients_fault_is_told_so() -> None:
    scheduler = filled(generate("a"))
    refusal = Refusal(message="the file is broken", param="image", code="invalid_value")
    failed = scheduler.fail(until(scheduler, Prepare), "the file is broken", refusal)
    assert failed == [Failed(id="a", error="the file is broken", refusal=refusal)]


@pytest.mark.parametrize("preview", [None, 0])
def test_a_picture_that_cannot_be_encoded_fails_its_request(preview: int | None) -> None:
    scheduler = filled(generate("a", previews=1))
    while (command := until(scheduler, Decode)).preview != preview:
        finish(scheduler, command)
    finish(scheduler, command)
    assert scheduler.encoded(EncodingFailed(id="a", error="no")) == Failed(id="a", error="no")
    assert list(commands(scheduler)) == [drop("a")]
    assert scheduler.encoded(EncodingFailed(id="a", error="no")) is None


def test_a_picture_that_cannot_be_encoded_before_the_last_rank_is_done() -> None:
    scheduler = filled(generate("a"))
    command = until(scheduler, Decode)
    assert scheduler.encoded(EncodingFailed(id="a", error="no")) == Failed(id="a", error="no")
    assert finish(scheduler, command) == []
    assert list(commands(scheduler)) == [drop("a")]


def test_a_lost_group_fails_what_it_held_and_keeps_what_waits() -> None:
    waiting = generate("w")
    scheduler = filled(generate("e"), generate("r", steps=9), max_running=2)
    finish(scheduler, until(scheduler, Decode))  # "e" is being encoded, "r" is running
    command = until(scheduler, Step)
    scheduler.add(waiting, now=0.0)
    failed = scheduler.fail_running(command, "lost")
    assert {event.id: (event.error, event.reason) for event in failed} == {
        "r": ("lost", "unavailable"),
        "e": ("lost", "unavailable"),
    }
    assert list(commands(scheduler)) == [prepare(waiting), step("w"), step("w"), decode("w"), drop("w")]


def test_what_was_being_prepared_when_the_group_was_lost_is_not_tried_again() -> None:
    """It may be what broke the group: it would break the next one too, for ever."""
    scheduler = filled(generate("a"), generate("b"))
    command = until(scheduler, Prepare)
    assert scheduler.fail_running(command, "lost") == [Failed(id="a", error="lost", reason="unavailable")]
    assert next(commands(scheduler)) == prepare(generate("b"))


def test_a_model_that_cannot_be_loaded_fails_what_waits() -> None:
    scheduler = filled(generate("a"), generate("b"))
    failed = [Failed(id=id, error="no weights", reason="unavailable") for id in "ab"]
    assert scheduler.fail_waiting("no weights") == failed
    assert scheduler.next(0.0) is None


def test_the_queue_is_bounded_by_the_pictures_that_wait_with_it() -> None:
    def with_pictures(id: str, num_bytes: int) -> Generate:
        return Generate(id=id, request=request(images=(bytes(num_bytes - 1),), mask=b"x"))

    scheduler = Scheduler(max_waiting_bytes=100)
    assert scheduler.add(with_pictures("a", 101), now=0.0) is None  # alone, it is as much as one request may have
    refused = scheduler.add(with_pictures("b", 2), now=0.0)
    assert refused == Failed(id="b", error="the pictures that wait take all the room", reason="busy")
    assert scheduler.add(generate("c"), now=0.0) is None
    finish(scheduler, until(scheduler, Prepare))
    assert scheduler.add(with_pictures("d", 100), now=0.0) is None


def test_the_queue_is_bounded() -> None:
    scheduler = filled(generate("a"), generate("b"), max_waiting=2)
    refused = scheduler.add(generate("c"), now=0.0)
    assert refused == Failed(id="c", error="2 requests are waiting already", reason="busy")
    finish(scheduler, until(scheduler, Prepare))
    assert scheduler.add(generate("d"), now=0.0) is None
    assert {c.ids[0] for c in commands(scheduler)} == set("abd")


# ---- any interleaving ----------------------------------------------------------------------------------------------


@dataclass
class World:
    """Clients, workers and an encoder thread that act in any order, by chance."""

    chance: random.Random
    scheduler: Scheduler = field(default_factory=lambda: Scheduler(max_running=3, max_waiting=6))
    names: Iterator[int] = field(default_factory=count)
    open: set[str] = field(default_factory=set)
    endings: dict[str, int] = field(default_factory=dict)
    held: set[str] = field(default_factory=set)
    """What the workers hold for certain."""
    doubtful: set[str] = field(default_factory=set)
    """What they may hold: they failed to prepare it."""
    command: Command | None = None
    encoder: deque[FromEncoder] = field(default_factory=deque)

    def act(self, action: str) -> None:
        match action:
            case "add":
                message = generate(f"{next(self.names)}", self.chance.randint(2, 5), self.chance.randint(0, 3))
                self.open.add(message.id)
                self.endings[message.id] = 0
                if refused := self.scheduler.add(message, 0.0):
                    self.hear(refused)
            case "cancel" if self.open:
                id = self.chance.choice(sorted(self.open))
                self.end(id)
                self.scheduler.cancel(Cancel(id=id))
            case "encode" if self.encoder:
                if event := self.scheduler.encoded(self.encoder.popleft()):
                    self.hear(event)
            case "command" if not self.command:
                if command := self.scheduler.next(0.0):
                    self.obey(command)
            case "finish" if self.command:
                command, self.command = self.command, None
                self.hear(*finish(self.scheduler, command))
            case "fail" if isinstance(self.command, Prepare | Step):
                command, self.command = self.command, None
                if isinstance(command, Prepare):
                    self.held -= set(command.ids)
                    self.doubtful |= set(command.ids)
                self.hear(*self.scheduler.fail(command, "no"))
            case "lose":
                command, self.command = self.command, None
                self.held, self.doubtful = set(), set()
                self.encoder.clear()
                self.hear(*self.scheduler.fail_running(command, "lost"))

    def obey(self, command: Command) -> None:
        self.command = command
        match command:
            case Prepare(ids=ids):
                assert self.held.isdisjoint(ids)
                self.held |= set(ids)
            case Drop(ids=ids):
                assert set(ids) <= self.held | self.doubtful
                assert len(set(ids)) == len(ids)
                self.held -= set(ids)
                self.doubtful -= set(ids)
            case Step(ids=ids) | Decode(ids=ids):
                assert set(ids) <= self.held
        if isinstance(command, Decode):  # the encoder may be done at any time from now on
            for id in command.ids:
                broken = self.chance.random() < 0.1
                self.encoder.append(EncodingFailed(id=id, error="no") if broken else encoded(id, command.preview))

    def hear(self, *events: Event) -> None:
        for event in events:
            assert event.id in self.open
            if isinstance(event, Finished | Failed):
                self.end(event.id)

    def end(self, id: str) -> None:
        self.endings[id] += 1
        self.open.remove(id)


ACTIONS = {"add": 3, "cancel": 1, "encode": 3, "command": 10, "finish": 10, "fail": 0.3, "lose": 0.1}


@pytest.mark.parametrize("seed", range(20))
def test_every_request_ends_once_and_no_command_names_what_is_not_held(seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(20):
        world = World(chance)
        for action in chance.choices(list(ACTIONS), list(ACTIONS.values()), k=150):
            world.act(action)
        for _ in range(500):  # no more come, and none is cancelled
            world.act(chance.choice(["encode", "command", "finish"]))
        assert world.open == set()
        assert set(world.endings.values()) <= {1}
        assert world.held == world.doubtful == set()
        assert not world.scheduler.encoding and not world.scheduler.running and not world.scheduler.waiting
