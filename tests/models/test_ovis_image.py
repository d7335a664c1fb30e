"""Golden equality for Ovis-Image: one process is the stock pipeline, and every layout of ranks is one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import OvisImagePipeline

from darkroom.configs import ParallelConfig, Request
from tests import faults
from tests.golden import TOLERANCE, difference, generate, request, stock_pipeline, worker
from tests.matrix import CELLS, Cell, Expected, Fault, differences, one_process, run_cells
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def folders(checkpoints: dict[str, Path]) -> dict[str, Path]:
    return {name: checkpoints[name] for name in ("ovis_image_4_heads", "ovis_image_5_heads")}


@pytest.fixture(scope="module")
def stock(folders: dict[str, Path]) -> OvisImagePipeline:
    return stock_pipeline(OvisImagePipeline, folders["ovis_image_4_heads"])


def run_stock(pipe: OvisImagePipeline, request: Request, output_type: str) -> Any:
    return pipe(
        request.prompt,
        negative_prompt=request.negative_prompt,
        guidance_scale=request.guidance_scale,
        width=request.width,
        height=request.height,
        num_inference_steps=request.num_inference_steps,
        max_sequence_length=request.max_sequence_length,
        generator=torch.Generator("cpu").manual_seed(request.seed),
        output_type=output_type,
    ).images


REQUESTS = {
    "square": request("a green star on a white background", width=128, height=128, seed=7),
    "full window": request("two orange squares", max_sequence_length=256),
    "one step": request("a cat", guidance_scale=1.0, num_inference_steps=1),
    "no negative prompt": request("two small blue cats", negative_prompt=""),
    "negative prompt": request("a house", negative_prompt="red, blurry", guidance_scale=2.5, num_inference_steps=5),
    "short window": request("a very long prompt about a tree on the left", max_sequence_length=5),
}


@pytest.mark.parametrize("case", REQUESTS)
def test_one_process_is_the_stock_pipeline(case: str, stock: OvisImagePipeline, folders: dict[str, Path]) -> None:
    wanted = REQUESTS[case]
    with worker(folders["ovis_image_4_heads"], ParallelConfig()) as one:
        [(latents, decoded)] = generate(one, [wanted]).values()
        assert decoded is not None
        [picture] = one.model.pictures(decoded)
    assert torch.equal(latents, run_stock(stock, wanted, "latent"))
    assert np.array_equal(np.asarray(picture), np.asarray(run_stock(stock, wanted, "pil")[0]))


def test_the_prompt_begins_where_the_pipeline_cuts(stock: OvisImagePipeline) -> None:
    """Of this tokenizer too, 28 tokens stand before the colon that the real one keeps."""
    [text] = stock._get_messages("a cat")
    tokens = stock.tokenizer.tokenize(text)
    assert tokens[stock.user_prompt_begin_id :][:3] == [":", "Ġa", "Ġcat"]


def test_a_batch_of_unequal_prompts_is_each_alone(folders: dict[str, Path]) -> None:
    both = [request("a cat"), request("three tiny yellow stars and a very large orange house " * 4, seed=1)]
    with worker(folders["ovis_image_4_heads"], ParallelConfig()) as one:
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
    one = {"ovis_image_4_heads": folders["ovis_image_4_heads"]}
    worst = differences(run_ranks(run_cells, 2, one, [cell], fault), expected)
    assert {kind for (*_, kind), value in worst.items() if value > 10 * TOLERANCE} == kinds
