"""What the golden tests of every family (tests/test_matrix.py) do not say of LongCat-Image."""

from __future__ import annotations

import shutil
from pathlib import Path
from unittest.mock import patch

import pytest

from darkroom.configs import ConfigError, ParallelConfig
from darkroom.models.flux_form import FluxForm
from darkroom.models.longcat_image import LongCatImage
from tests.golden import TOLERANCE, difference, generate, request, worker
from tests.subjects import LONGCAT_IMAGE


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
