"""What the golden tests of every family (tests/test_matrix.py) do not say of Z-Image."""

from __future__ import annotations

from pathlib import Path

from darkroom.configs import ParallelConfig
from tests.golden import TOLERANCE, difference, generate, request, worker


def test_a_batch_of_unequal_prompts_is_each_alone(checkpoints: dict[str, Path]) -> None:
    both = [request("a cat"), request("three tiny yellow stars and a very large orange house " * 4, seed=1)]
    with worker(checkpoints["z_image_4_heads"], ParallelConfig()) as one:
        assert difference(generate(one, both, batched=True), generate(one, both)) <= TOLERANCE
