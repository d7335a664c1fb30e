"""One rank's worker, without sockets. That its pictures are right is shown by tests/models."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from darkroom.configs import ParallelConfig
from darkroom.engine.messages import Decode, Drop, Prepare, Prepared, Step
from darkroom.engine.worker import Worker
from darkroom.models.checkpoint import DEMO
from tests.golden import generate, picture_file, request, worker


@pytest.fixture(scope="module")
def one() -> Iterator[Worker]:
    with worker(DEMO, ParallelConfig()) as one:
        yield one


@pytest.fixture(autouse=True)
def _empty(one: Worker) -> Iterator[None]:
    yield
    one.samples.clear()


def test_prepare_tells_the_facts(one: Worker) -> None:
    requests = (request("a cat"), request("two small blue cats", width=128, height=64, num_inference_steps=7))
    short, long = one.execute(Prepare(ids=("a", "b"), requests=requests))
    assert short == Prepared(num_steps=3, text_tokens=short.text_tokens, image_tokens=7 * 5)
    assert long == Prepared(num_steps=7, text_tokens=long.text_tokens, image_tokens=8 * 4)
    assert 0 < short.text_tokens < long.text_tokens


def test_pictures_that_are_sent_in_are_counted(one: Worker) -> None:
    over = request(task="image-to-image", images=(picture_file(112, 80),), strength=0.7)
    [facts] = one.execute(Prepare(ids=("a",), requests=(over,)))
    assert (facts.input_image_tokens, facts.image_tokens) == (7 * 5, 7 * 5)


def test_steps_of_one_sample_leave_the_others(one: Worker) -> None:
    one.execute(Prepare(ids=("a", "b"), requests=(request("a cat"), request("a dog"))))
    before = one.samples["b"].latents.clone()
    assert one.execute(Step(ids=("a",))) == ()
    assert (one.samples["a"].step, one.samples["b"].step) == (1, 0)
    assert torch.equal(one.samples["b"].latents, before)


@pytest.mark.parametrize("command", [Step(ids=("z",)), Decode(ids=("z",))])
def test_an_unknown_id_is_refused_and_harms_nothing(one: Worker, command: Step | Decode) -> None:
    one.execute(Prepare(ids=("a",), requests=(request(),)))
    with pytest.raises(KeyError, match="z"):
        one.decode(command) if isinstance(command, Decode) else one.execute(command)
    one.execute(Step(ids=("a",)))
    assert one.samples["a"].step == 1


def test_drop_forgets_and_does_not_mind_the_unknown(one: Worker) -> None:
    one.execute(Prepare(ids=("a", "b"), requests=(request(), request())))
    one.execute(Drop(ids=("z", "a")))
    assert list(one.samples) == ["b"]


def test_a_preview_is_decoded_from_the_estimate(one: Worker) -> None:
    one.execute(Prepare(ids=("a",), requests=(request(partial_images=1, num_inference_steps=4),)))
    sample = one.samples["a"]
    one.execute(Step(ids=("a",)))
    assert sample.estimate is not None
    picture, preview = one.decode(Decode(ids=("a",))), one.decode(Decode(ids=("a",), preview=0))
    [expected] = one.model.decode([sample], [sample.estimate])
    assert preview is not None
    assert torch.equal(preview[0], expected)
    assert not torch.equal(preview, picture)
    assert one.samples["a"] is sample


def test_no_estimate_is_kept_where_no_preview_is_wanted(one: Worker) -> None:
    generate(one, [request()])
    assert one.samples["0"].estimate is None
