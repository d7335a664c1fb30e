"""What a model's capabilities accept, it can run, or refuses: on several GPUs any other error ends the workers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from darkroom.configs import ParallelConfig, RequestError, SamplingParams
from darkroom.configs.capabilities import Capabilities
from darkroom.engine.messages import Drop, Prepare, Step
from darkroom.engine.worker import Worker
from tests.golden import picture_file, worker
from tests.subjects import SUBJECTS

LONG = "a cat and a dog " * 2_000
"""As many characters as a request may have."""
SHAPES = [(1, 1), (10, 1990), (1990, 10), (4000, 10), (9, 1800), (100_000, 1)]
"""Of pictures that come with a request."""


def sizes(options: Capabilities) -> list[dict[str, Any]]:
    """The longest edge beside the shortest, both ways; and all frames."""
    unit = options.size_multiple
    short = -(-options.min_edge // unit) * unit
    most = 16_384 if options.layers else options.max_edge or 99_999  # what layers are made of takes a minute to encode
    long = min(most, options.max_pixels // short) // unit * unit
    one_layer = {"layers": 1} if options.layers else {}
    extremes = [{"width": long, "height": short, **one_layer}, {"width": short, "height": long, **one_layer}]
    if options.fps:
        extremes.append({"width": short, "height": short, "num_frames": options.max_frames})
    return extremes


def cases(options: Capabilities, tokens: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(prompt, parameters) of each extreme."""
    pictures: list[dict[str, Any]] = [{}] if {"text-to-image", "text-to-video"} & set(options.tasks) else []
    if options.max_images:
        pictures.append({"images": (picture_file(96, 64),) * options.max_images})
    small = {"width": 64, "height": 64}
    yield from (("a cat", {**size, **pictures[0]}) for size in sizes(options))
    for brought in pictures:
        yield LONG, {**small, **brought}
        yield from ((f"a {token} cat", {**small, **brought}) for token in tokens)
        if options.takes_negative_prompt:
            negative = {"negative_prompt": " ".join([*tokens, LONG]), options.guidance_parameter: 2.0}
            yield "a cat", {**small, **brought, **negative}
    if options.max_images:
        yield from (("a cat", {**small, "images": (picture_file(*shape),)}) for shape in SHAPES)


def run(one: Worker, prompt: str, params: dict[str, Any]) -> bool:
    """One step of it. False where it is refused."""
    options = one.model.options
    few = {"num_frames": 1} if options.fps else {}
    steps = options.min_inference_steps
    try:
        wanted = options.resolve(prompt, SamplingParams(num_inference_steps=steps, seed=0, **{**few, **params}))
        one.execute(Prepare(ids=("a",), requests=(wanted,)))
    except RequestError:
        return False
    one.execute(Step(ids=("a",)))
    one.execute(Drop(ids=("a",)))
    return True


def nothing_seen(query: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return torch.zeros_like(query)


@pytest.mark.parametrize("name", SUBJECTS)
def test_what_is_accepted_is_run_or_refused(name: str, checkpoints: dict[str, Path]) -> None:
    """Attention costs nothing here: it is the sizes that matter."""
    folder = checkpoints[f"{name}_{next(iter(SUBJECTS[name].variants))}"]
    with (
        worker(folder, ParallelConfig()) as one,
        patch.object(torch.nn.functional, "scaled_dot_product_attention", nothing_seen),
    ):
        # as published: the demo's, which some tiny checkpoints have, is for small pictures, and overflows
        one.model.pipe.scheduler.register_to_config(base_image_seq_len=256, max_image_seq_len=8192)
        tokenizers = [part for key, part in one.model.pipe.components.items() if key.startswith("tokenizer") and part]
        tokens = {token for each in tokenizers for token in [*each.all_special_tokens, *each.get_added_vocab()]}
        runs = [run(one, *case) for case in cases(one.model.options, sorted(tokens))]
    assert all(runs[:2]) and sum(runs) > len(runs) / 2  # the limits are no tighter than they must be
