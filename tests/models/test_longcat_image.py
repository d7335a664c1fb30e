"""What the golden tests of every family (tests/test_matrix.py) do not say of LongCat-Image."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from diffusers.pipelines.longcat_image import pipeline_longcat_image

from darkroom.configs import ConfigError, ParallelConfig
from darkroom.models.flux_form import FluxForm
from darkroom.models.longcat_image import LongCatImage, split_quotation
from tests.golden import TOLERANCE, difference, generate, request, worker
from tests.subjects import APOSTROPHES, LONGCAT_IMAGE


@pytest.fixture(scope="module")
def folder(checkpoints: dict[str, Path]) -> Path:
    return checkpoints["longcat_image_4_heads"]


def test_the_processor_is_not_needed(folder: Path, tmp_path: Path) -> None:
    without = tmp_path / "without"
    shutil.copytree(folder, without, ignore=shutil.ignore_patterns("text_processor"))
    with worker(without, ParallelConfig()) as one:
        assert one.model.pipe.text_processor is None
    (without / "transformer").rename(without / "elsewhere")  # what is needed is asked for
    with (
        pytest.raises(ConfigError, match="incomplete: the folder transformer/ is missing"),
        worker(without, ParallelConfig()),
    ):
        pass


def test_guidance_without_its_norm_is_seen(folder: Path) -> None:
    wanted = LONGCAT_IMAGE.requests["square"]
    with worker(folder, ParallelConfig()) as one, patch.object(LongCatImage, "guide", FluxForm.guide):
        [(latents, _)] = generate(one, [wanted]).values()
    stock = LONGCAT_IMAGE.run_stock(LONGCAT_IMAGE.stock(folder), wanted, "latent")
    assert float((latents - stock).abs().max()) > 10 * TOLERANCE


def test_a_batch_of_unequal_prompts_is_each_alone(folder: Path) -> None:
    both = [request("a cat"), request("three tiny yellow stars and a very large orange house " * 4, seed=1)]
    with worker(folder, ParallelConfig()) as one:
        assert difference(generate(one, both, batched=True), generate(one, both)) <= TOLERANCE


def test_a_prompt_that_fits_is_not_cut(checkpoints: dict[str, Path]) -> None:
    """Not even where some of its beginnings do not fit."""
    draw = random.Random(0)
    words = ["quick", "strawberry", "extraordinarily", "'hello'", '"sign"', "it's", "caterpillar", "'big", "house'"]
    with worker(checkpoints["longcat_image_edit_4_heads"], ParallelConfig()) as one:
        model: Any = one.model
        for _ in range(200):
            prompt = " ".join(draw.choices(words, k=12))
            tokens = model._count(prompt)
            assert model._cut(prompt, tokens) == prompt
            assert model._count(model._cut(prompt, tokens - 1)) < tokens


# ---- quotations ------------------------------------------------------------------------------------------------------


def test_apostrophes_are_no_quotes() -> None:
    assert split_quotation("") == []
    assert split_quotation("a cat") == [("a cat", False)]
    assert split_quotation("it's a sign that doesn't say 'it's red' or \"won't\".") == [
        ("it's a sign that doesn't say ", False),
        ("'it's red'", True),
        (" or ", False),
        ('"won\'t"', True),
        (".", False),
    ]


def test_prompts_of_one_apostrophe_are_split_as_diffusers_does() -> None:
    """With several it goes wrong: https://github.com/huggingface/diffusers, 0.42, `split_quotation`."""
    draw = random.Random(0)
    words = [
        "cat",
        "it's",
        "'red",
        "blue'",
        '"a',
        'house"',
        "\u2018far",
        "away\u2019",
        "\u201cno",
        "yes\u201d",
        "rock'n'roll",
    ]
    for _ in range(500):
        prompt = " ".join(["a", *draw.choices(words, k=8)])
        if not ("it's" in prompt and "rock'n" in prompt):
            assert split_quotation(prompt) == pipeline_longcat_image.split_quotation(prompt)


def test_every_process_reads_the_same_prompt(folder: Path) -> None:
    """Whatever order its sets of strings have."""
    code = (
        "import sys; from tests.models.test_longcat_image import tokens_read; "
        f"print(tokens_read({str(folder)!r}, {APOSTROPHES!r}))"
    )
    read = [
        subprocess.check_output([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, text=True)
        for seed in "12"
    ]
    assert read[0] == read[1] == f"{tokens_read(str(folder), APOSTROPHES)}\n"


def tokens_read(folder: str, prompt: str) -> list[int]:
    """What the text encoder gets, padding and all."""
    seen: list[int] = []
    with worker(Path(folder), ParallelConfig()) as one:
        encoder = one.model.pipe.text_encoder
        encoder.register_forward_pre_hook(
            lambda _module, _args, given: seen.extend(given["input_ids"][0].tolist()), with_kwargs=True
        )
        one.model.encode(prompt, 61)  # type: ignore[attr-defined]
    return seen
