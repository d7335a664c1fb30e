"""Golden equality for LongCat-Image: one process is the stock pipeline, and every layout of ranks is one process."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from diffusers import LongCatImagePipeline

from darkroom.configs import ConfigError, ParallelConfig, Request
from darkroom.models.flux_form import FluxForm
from darkroom.models.longcat_image import LongCatImage
from tests import faults
from tests.golden import TOLERANCE, difference, generate, request, stock_pipeline, worker
from tests.matrix import CELLS, Cell, Expected, Fault, differences, one_process, run_cells
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def folders(checkpoints: dict[str, Path]) -> dict[str, Path]:
    return {name: checkpoints[name] for name in ("longcat_image_4_heads", "longcat_image_5_heads")}


@pytest.fixture(scope="module")
def stock(folders: dict[str, Path]) -> LongCatImagePipeline:
    return stock_pipeline(LongCatImagePipeline, folders["longcat_image_4_heads"], text_processor=None)


def run_stock(pipe: LongCatImagePipeline, request: Request, output_type: str) -> Any:
    pipe.tokenizer_max_length = request.max_sequence_length
    return pipe(
        request.prompt,
        negative_prompt=request.negative_prompt,
        guidance_scale=request.guidance_scale,
        width=request.width,
        height=request.height,
        num_inference_steps=request.num_inference_steps,
        generator=torch.Generator("cpu").manual_seed(request.seed),
        output_type=output_type,
        enable_prompt_rewrite=False,
    ).images


REQUESTS = {
    "square": request("a green star on a white background", width=128, height=128, seed=7),
    "full window": request("two orange squares", max_sequence_length=512),
    "one step": request("a cat", guidance_scale=1.0, num_inference_steps=1),
    "no negative prompt": request("two small blue cats", negative_prompt="", guidance_scale=4.5),
    "negative prompt": request("a house", negative_prompt="red, blurry", guidance_scale=2.5, num_inference_steps=5),
    "letters": request("a sign that says 'a cat'", negative_prompt='"red"'),  # quoted: one token a letter
    "short window": request("a very long prompt about a tree on the left", max_sequence_length=5),
}


@pytest.mark.parametrize("case", REQUESTS)
def test_one_process_is_the_stock_pipeline(case: str, stock: LongCatImagePipeline, folders: dict[str, Path]) -> None:
    wanted = REQUESTS[case]
    with worker(folders["longcat_image_4_heads"], ParallelConfig()) as one:
        [(latents, decoded)] = generate(one, [wanted]).values()
        assert decoded is not None
        [picture] = one.model.pictures(decoded)
    assert torch.equal(latents, run_stock(stock, wanted, "latent"))
    assert np.array_equal(np.asarray(picture), np.asarray(run_stock(stock, wanted, "pil")[0]))


def test_the_processor_is_not_needed(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "without"
    shutil.copytree(folders["longcat_image_4_heads"], folder, ignore=shutil.ignore_patterns("text_processor"))
    with worker(folder, ParallelConfig()) as one:
        assert one.model.pipe.text_processor is None
    (folder / "transformer").rename(folder / "elsewhere")  # what is needed is asked for
    with (
        pytest.raises(ConfigError, match="incomplete: the folder transformer/ is missing"),
        worker(folder, ParallelConfig()),
    ):
        pass


def test_guidance_without_its_norm_is_seen(stock: LongCatImagePipeline, folders: dict[str, Path]) -> None:
    wanted = REQUESTS["square"]
    with (
        worker(folders["longcat_image_4_heads"], ParallelConfig()) as one,
        patch.object(LongCatImage, "guide", FluxForm.guide),
    ):
        [(latents, _)] = generate(one, [wanted]).values()
    assert float((latents - run_stock(stock, wanted, "latent")).abs().max()) > 10 * TOLERANCE


def test_a_batch_of_unequal_prompts_is_each_alone(folders: dict[str, Path]) -> None:
    both = [request("a cat"), request("three tiny yellow stars and a very large orange house " * 4, seed=1)]
    with worker(folders["longcat_image_4_heads"], ParallelConfig()) as one:
        assert difference(generate(one, both, batched=True), generate(one, both)) <= TOLERANCE


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> Expected:
    return one_process(folders)


@pytest.mark.parametrize("size", CELLS)
def test_every_layout_is_one_process(
    size: int, folders: dict[str, Path], expected: Expected, layouts: dict[int, list[Cell]]
) -> None:
    if size not in layouts:
        pytest.skip("in the whole matrix only: --matrix")
    worst = differences(run_ranks(run_cells, size, folders, layouts[size]), expected)
    assert len(worst) >= size * len(layouts[size]) * len(folders) * 3
    assert {cell: value for cell, value in worst.items() if value > TOLERANCE} == {}


EVERY = {"interleaved", "batched", "one branch"}


@pytest.mark.parametrize(
    ("fault", "cell", "kinds"),
    [
        (faults.ring_skips_a_hop, {"ring": 2}, EVERY),
        (faults.heads_come_back_in_another_order, {"usp": 2}, EVERY),
        (faults.partial_sums_are_not_reduced, {"tp": 2}, EVERY),
        (faults.parts_are_cut_as_one, {"tp": 2}, EVERY),
        (faults.branches_are_swapped, {"cfg": 2}, {"interleaved", "batched"}),
    ],
)
def test_a_fault_is_seen(
    fault: Fault, cell: Cell, kinds: set[str], folders: dict[str, Path], expected: Expected
) -> None:
    one = {"longcat_image_4_heads": folders["longcat_image_4_heads"]}
    worst = differences(run_ranks(run_cells, 2, one, [cell], fault), expected)
    assert {kind for (*_, kind), value in worst.items() if value > 10 * TOLERANCE} == kinds
