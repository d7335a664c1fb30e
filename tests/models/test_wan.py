"""Wan beyond the golden matrix: its other checkpoints, precisions, tiles, and what a checkpoint says."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline

from darkroom.configs import ParallelConfig
from darkroom.models.checkpoint import Checkpoint
from darkroom.models.wan import Wan
from tests.golden import from_stock, generate, stock_pipeline, worker
from tests.matrix import Cell, Kind, Kinds, OneProcess, differences, run_cells, unequal
from tests.ranks import run_ranks
from tests.subjects import WAN, run_wan, video

NAMES = ("wan_2_1_4_heads", "wan_2_1_5_heads", "wan_2_2", "wan_2_2_small")
CASES = ("5 frames", "1 frame", "one step", "negative prompt")


@pytest.fixture(scope="module")
def stock(checkpoints: dict[str, Path]) -> dict[str, WanPipeline]:
    return {name: stock_pipeline(WanPipeline, checkpoints[name]) for name in NAMES}


@pytest.mark.parametrize("name", ["wan_2_1_4_heads", "wan_2_1_5_heads", "wan_2_2_small"])  # the matrix has 2.2 itself
@pytest.mark.parametrize("case", CASES)
def test_one_process_is_the_stock_pipeline(
    case: str, name: str, stock: dict[str, WanPipeline], checkpoints: dict[str, Path]
) -> None:
    assert from_stock(checkpoints[name], WAN.requests[case], stock[name], run_wan) == (0.0, 0)


@pytest.mark.parametrize("name", ["wan_2_1_5_heads", "wan_2_2_small"])
def test_one_process_is_the_stock_pipeline_in_bfloat16(name: str, checkpoints: dict[str, Path]) -> None:
    """The class keeps some layers in fp32, and the latents stay in it."""
    pipe = stock_pipeline(WanPipeline, checkpoints[name], dtype=torch.bfloat16)
    with worker(checkpoints[name], ParallelConfig(), dtype="bfloat16") as one:
        [(latents, decoded)] = generate(one, [video()]).values()
        numbers = one.model.pipe.video_processor.postprocess_video(decoded, output_type="pt")
        assert {x.dtype for x in one.model.pipe.transformer.parameters()} == {torch.bfloat16, torch.float32}
    assert latents.dtype == torch.float32
    assert torch.equal(latents, run_wan(pipe, video(), "latent"))
    assert torch.equal(numbers, run_wan(pipe, video(), "pt"))


@pytest.mark.parametrize("name", [pytest.param("wan_2_1_4_heads", marks=pytest.mark.matrix), "wan_2_2_small"])
def test_one_process_decodes_in_tiles_as_the_stock_vae_does(
    name: str, stock: dict[str, WanPipeline], checkpoints: dict[str, Path]
) -> None:
    wanted = video(width=320, height=288, num_inference_steps=1)
    with worker(checkpoints[name], ParallelConfig(vae_use_tiling=True)) as one:
        [(_, decoded)] = generate(one, [wanted]).values()
        numbers = one.model.pipe.video_processor.postprocess_video(decoded, output_type="pt")
    whole = run_wan(stock[name], wanted, "pt")
    stock[name].vae.enable_tiling()
    try:
        assert torch.equal(numbers, run_wan(stock[name], wanted, "pt"))
    finally:
        stock[name].vae.disable_tiling()
    assert not torch.equal(numbers, whole)  # tiles blend into each other: another video


# ---- what a checkpoint says ----------------------------------------------------------------------------------------


def test_capabilities_follow_from_the_checkpoint(checkpoints: dict[str, Path]) -> None:
    first, both, small = (Checkpoint.open(str(checkpoints[NAMES[i]])).capabilities for i in (0, 2, 3))
    assert first == Wan.capabilities
    assert (both.guidance_scale, both.guidance_scale_2, first.guidance_scale_2) == (4.0, 3.0, None)
    assert (both.size_multiple, both.num_frames, both.fps, both.num_inference_steps) == (16, 81, 16, 40)
    assert (small.size_multiple, small.num_frames, small.fps, small.default_size) == (32, 121, 24, (1280, 704))
    assert [(each.max_edge, each.max_frames) for each in (both, small)] == [(1024 * 16, 241), (1024 * 32, 241)]
    for capabilities in (first, both, small):
        assert [edge % capabilities.size_multiple for edge in capabilities.default_size] == [0, 0]
        assert (capabilities.num_frames - 1) % capabilities.frame_multiple == 0


# ---- on ranks ------------------------------------------------------------------------------------------------------


ODD: Kinds = {"odd": Kind(requests=[video(width=112, height=80, num_frames=9)])}


@pytest.mark.parametrize("cell", [{"usp": 2}, {"ring": 2}])
def test_an_odd_number_of_tokens_is_shared(cell: Cell, checkpoints: dict[str, Path]) -> None:
    """Which the sizes that 2.2's small model can make too do not have."""
    one = {"wan_2_1_5_heads": checkpoints["wan_2_1_5_heads"]}
    assert unequal(differences(run_ranks(run_cells, 2, one, [cell], nullcontext, ODD), OneProcess(one, ODD))) == {}
