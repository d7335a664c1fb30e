"""Golden equality for Z-Image: one process is the stock pipeline, and every layout of ranks is one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ZImagePipeline

from darkroom.configs import ParallelConfig, Request
from tests import faults
from tests.golden import TOLERANCE, difference, generate, request, stock_pipeline, worker
from tests.matrix import CELLS, Cell, Expected, Fault, differences, one_process, run_cells
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def folders(checkpoints: dict[str, Path]) -> dict[str, Path]:
    return {name: checkpoints[name] for name in ("z_image_4_heads", "z_image_5_heads")}


def run_stock(pipe: ZImagePipeline, request: Request, output_type: str) -> Any:
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
    "turbo": request("a green star on a white background", guidance_scale=0.0, width=128, height=128, seed=7),
    "one step": request("a cat", guidance_scale=0.0, num_inference_steps=1),
    "weak guidance": request("a cat", negative_prompt="red", guidance_scale=0.5),  # half a difference, on top of one
    "guidance": request("two small blue cats", negative_prompt="red", guidance_scale=4.0),
    "short window": request("a very long prompt about a tree", guidance_scale=0.0, max_sequence_length=9),
}


@pytest.mark.parametrize("case", REQUESTS)
def test_one_process_is_the_stock_pipeline(case: str, folders: dict[str, Path]) -> None:
    """Bit for bit without guidance; the stock pipeline batches the two branches, which rounds otherwise."""
    wanted, folder = REQUESTS[case], folders["z_image_4_heads"]
    pipe = stock_pipeline(ZImagePipeline, folder)
    with worker(folder, ParallelConfig()) as one:
        [(latents, decoded)] = generate(one, [wanted]).values()
        assert decoded is not None
        [picture] = one.model.pictures(decoded)
    off = float((latents - run_stock(pipe, wanted, "latent")).abs().max())
    assert off <= (TOLERANCE if wanted.guidance_scale > 0 else 0.0)
    levels = np.abs(np.asarray(picture).astype(int) - np.asarray(run_stock(pipe, wanted, "pil")[0]).astype(int))
    assert levels.max() <= (1 if wanted.guidance_scale > 0 else 0)


def test_a_batch_of_unequal_prompts_is_each_alone(folders: dict[str, Path]) -> None:
    both = [request("a cat"), request("three tiny yellow stars and a very large orange house " * 4, seed=1)]
    with worker(folders["z_image_4_heads"], ParallelConfig()) as one:
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
        (faults.branches_are_swapped, {"cfg": 2}, {"interleaved", "batched"}),
    ],
)
def test_a_fault_is_seen(
    fault: Fault, cell: Cell, kinds: set[str], folders: dict[str, Path], expected: Expected
) -> None:
    one = {"z_image_4_heads": folders["z_image_4_heads"]}
    worst = differences(run_ranks(run_cells, 2, one, [cell], fault), expected)
    assert {kind for (*_, kind), value in worst.items() if value > 10 * TOLERANCE} == kinds
