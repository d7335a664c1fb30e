"""What the golden tests of every family (tests/test_matrix.py) do not say of Ovis-Image."""

from __future__ import annotations

from pathlib import Path

from darkroom.configs import ParallelConfig
from tests.golden import TOLERANCE, difference, generate, request, worker
from tests.subjects import OVIS_IMAGE


def test_the_prompt_begins_where_the_pipeline_cuts(checkpoints: dict[str, Path]) -> None:
    """Of this tokenizer too, 28 tokens stand before the colon that the real one keeps."""
    stock = OVIS_IMAGE.stock(checkpoints["ovis_image_4_heads"])
    [text] = stock._get_messages("a cat")
    tokens = stock.tokenizer.tokenize(text)
    assert tokens[stock.user_prompt_begin_id :][:3] == [":", "Ġa", "Ġcat"]


def test_a_batch_of_unequal_prompts_is_each_alone(checkpoints: dict[str, Path]) -> None:
    both = [request("a cat"), request("three tiny yellow stars and a very large orange house " * 4, seed=1)]
    with worker(checkpoints["ovis_image_4_heads"], ParallelConfig()) as one:
        assert difference(generate(one, both, batched=True), generate(one, both)) <= TOLERANCE
