"""Golden equality for Wan: one process is the stock pipeline, and every layout of ranks is one process."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from diffusers import WanPipeline

from darkroom.configs import ParallelConfig, Request
from darkroom.models.checkpoint import Checkpoint
from darkroom.models.wan import Wan
from tests import faults, tiny
from tests.golden import TOLERANCE, difference, generate, request, stock_pipeline, worker
from tests.matrix import CELLS, Cell, Expected, Fault, Kind, Kinds, differences, one_process, run_cells
from tests.ranks import run_ranks

NAMES = ("wan_2_1_4_heads", "wan_2_1_5_heads", "wan_2_2", "wan_2_2_small")


@pytest.fixture(scope="module")
def stock(checkpoints: dict[str, Path]) -> dict[str, WanPipeline]:
    return {name: stock_pipeline(WanPipeline, checkpoints[name]) for name in NAMES}


def run_stock(pipe: WanPipeline, request: Request, output_type: str) -> Any:
    return pipe(
        request.prompt,
        negative_prompt=request.negative_prompt,
        guidance_scale=request.guidance_scale,
        guidance_scale_2=request.guidance_scale_2,
        width=request.width,
        height=request.height,
        num_frames=request.num_frames,
        num_inference_steps=request.num_inference_steps,
        max_sequence_length=request.max_sequence_length,
        generator=torch.Generator("cpu").manual_seed(request.seed),
        output_type=output_type,
    ).frames


def video(prompt: str = "a red circle", **values: Any) -> Request:
    small = {"width": 96, "height": 64, "num_frames": 5, "num_inference_steps": 4}
    return request(prompt, **{**small, "guidance_scale": 2.0, **values})  # a VAE of random weights adds to differences


REQUESTS = {
    "5 frames": video("a green star on a white background", seed=7),
    "1 frame": video("two orange squares", num_frames=1),
    "9 frames": video("a  cat &amp; a dog", num_frames=9, max_sequence_length=512),  # cleaned before it is read
    "one step": video("a cat", guidance_scale=1.0, num_inference_steps=1),
    "negative prompt": video("a house", negative_prompt="red, blurry", guidance_scale=2.5, width=64),
    "short window": video("a very long prompt about a tree on the left", max_sequence_length=5),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", REQUESTS)
def test_one_process_is_the_stock_pipeline(
    case: str, name: str, stock: dict[str, WanPipeline], checkpoints: dict[str, Path]
) -> None:
    assert_is_stock(stock[name], checkpoints[name], REQUESTS[case])


@pytest.mark.parametrize("size", [(112, 80), (48, 64)])  # odd numbers of tokens
def test_odd_sizes(size: tuple[int, int], stock: dict[str, WanPipeline], checkpoints: dict[str, Path]) -> None:
    assert_is_stock(stock["wan_2_2"], checkpoints["wan_2_2"], video(width=size[0], height=size[1]))


@pytest.mark.parametrize("scale", [None, 1.0, 2.5])
def test_the_second_transformer_has_a_strength_of_its_own(
    scale: float | None, stock: dict[str, WanPipeline], checkpoints: dict[str, Path]
) -> None:
    assert_is_stock(stock["wan_2_2"], checkpoints["wan_2_2"], video(guidance_scale_2=scale))


def assert_is_stock(pipe: WanPipeline, folder: Path, wanted: Request) -> None:
    with worker(folder, ParallelConfig()) as one:
        [(latents, decoded)] = generate(one, [wanted]).values()
        assert decoded is not None and decoded.shape == (1, 3, wanted.num_frames, wanted.height, wanted.width)
        frames = one.model.pictures(decoded)
    assert torch.equal(latents, run_stock(pipe, wanted, "latent"))
    [expected] = run_stock(pipe, wanted, "pil")
    assert np.array_equal(np.stack([*map(np.asarray, frames)]), np.stack([*map(np.asarray, expected)]))


@pytest.mark.parametrize("name", ["wan_2_1_5_heads", "wan_2_2_small"])
def test_one_process_is_the_stock_pipeline_in_bfloat16(name: str, checkpoints: dict[str, Path]) -> None:
    """The class keeps some layers in fp32, and the latents stay in it."""
    pipe = stock_pipeline(WanPipeline, checkpoints[name], dtype=torch.bfloat16)
    with worker(checkpoints[name], ParallelConfig(), dtype="bfloat16") as one:
        [(latents, decoded)] = generate(one, [video()]).values()
        numbers = one.model.pipe.video_processor.postprocess_video(decoded, output_type="pt")
        assert {x.dtype for x in one.model.pipe.transformer.parameters()} == {torch.bfloat16, torch.float32}
    assert latents.dtype == torch.float32
    assert torch.equal(latents, run_stock(pipe, video(), "latent"))
    assert torch.equal(numbers, run_stock(pipe, video(), "pt"))


@pytest.mark.parametrize("name", ["wan_2_1_4_heads", "wan_2_2_small"])
def test_one_process_decodes_in_tiles_as_the_stock_vae_does(
    name: str, stock: dict[str, WanPipeline], checkpoints: dict[str, Path]
) -> None:
    wanted = video(width=320, height=288, num_inference_steps=1)
    with worker(checkpoints[name], ParallelConfig(vae_use_tiling=True)) as one:
        [(_, decoded)] = generate(one, [wanted]).values()
        numbers = one.model.pipe.video_processor.postprocess_video(decoded, output_type="pt")
    whole = run_stock(stock[name], wanted, "pt")
    stock[name].vae.enable_tiling()
    try:
        assert torch.equal(numbers, run_stock(stock[name], wanted, "pt"))
    finally:
        stock[name].vae.disable_tiling()
    assert not torch.equal(numbers, whole)  # tiles blend into each other: another video


def test_guidance_of_one_strength_is_seen(stock: dict[str, WanPipeline], checkpoints: dict[str, Path]) -> None:
    wanted = video(guidance_scale_2=2.5)
    with worker(checkpoints["wan_2_2"], ParallelConfig()) as one, patch("darkroom.models.wan._is_high_noise", first):
        [(latents, _)] = generate(one, [wanted]).values()
    assert float((latents - run_stock(stock["wan_2_2"], wanted, "latent")).abs().max()) > 10 * TOLERANCE


def first(_sample: Any) -> bool:
    return True


def test_a_batch_over_both_transformers_is_each_alone(checkpoints: dict[str, Path]) -> None:
    """At the second of three steps one sample is below the boundary, at that of four the other is above it."""
    both = [video("a cat", num_inference_steps=3), video("a large orange house", seed=1, max_sequence_length=40)]
    with worker(checkpoints["wan_2_2"], ParallelConfig()) as one:
        assert difference(generate(one, both, batched=True), generate(one, both)) <= TOLERANCE
        assert [one.samples[id].high_noise_steps for id in ("0", "1")] == [1, 2]  # type: ignore[attr-defined]


def test_the_clean_estimate_ends_as_the_video(checkpoints: dict[str, Path]) -> None:
    with worker(checkpoints["wan_2_1_4_heads"], ParallelConfig()) as one:
        generate(one, [video(partial_images=1, num_inference_steps=8)])
        sample = one.samples["0"]
    assert sample.estimate is not None
    assert float((sample.estimate - sample.latents).abs().max()) <= TOLERANCE  # the last step goes to sigma zero


# ---- what a checkpoint says ----------------------------------------------------------------------------------------


def test_capabilities_follow_from_the_checkpoint(checkpoints: dict[str, Path]) -> None:
    first, both, small = (Checkpoint.open(str(checkpoints[NAMES[i]])).capabilities for i in (0, 2, 3))
    assert first == Wan.capabilities
    assert (both.guidance_scale, both.guidance_scale_2, first.guidance_scale_2) == (4.0, 3.0, None)
    assert (both.size_multiple, both.num_frames, both.fps, both.num_inference_steps) == (16, 81, 16, 40)
    assert (small.size_multiple, small.num_frames, small.fps, small.default_size) == (32, 121, 24, (1280, 704))
    for capabilities in (first, both, small):
        assert [edge % capabilities.size_multiple for edge in capabilities.default_size] == [0, 0]
        assert (capabilities.num_frames - 1) % capabilities.frame_multiple == 0


def test_one_of_two_transformers_may_be_absent(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Of a boundary at the end of the schedule, all steps are the second's."""
    assert list(Checkpoint.open(str(checkpoints["wan_2_1_4_heads"])).absent) == ["transformer_2"]
    folder = tiny.wan(tmp_path / "second", boundary=1.0, first=False)
    assert_is_stock(stock_pipeline(WanPipeline, folder), folder, video())


# ---- every layout is one process -----------------------------------------------------------------------------------


def kinds(width: int, height: int, large: tuple[int, int]) -> Kinds:
    """The second of a pair takes one step more: with two transformers, a batch is of both."""
    pair = [
        video("a cat on the left", width=width, height=height, num_inference_steps=3, guidance_scale_2=1.5, seed=3),
        video("three tiny yellow stars", width=width, height=height, seed=4),
    ]
    one = [video("a red heart", width=width, height=height, num_frames=1, guidance_scale=1.0, seed=5)]
    tiles = [video("a blue moon", width=large[0], height=large[1], num_inference_steps=1, seed=6)]
    return {
        "interleaved": Kind(requests=pair),
        "batched": Kind(requests=pair, batched=True),
        "one branch": Kind(requests=one),
        "large": Kind(requests=tiles, tiled=True),
    }


KINDS = dict.fromkeys(NAMES[:3], kinds(112, 80, (320, 272))) | {NAMES[3]: kinds(160, 96, (320, 288))}
"""By checkpoint. Odd numbers of tokens in a frame; and sizes that the checkpoint can make."""


@pytest.fixture(scope="module")
def expected(checkpoints: dict[str, Path]) -> Expected:
    return {key: x for name in NAMES for key, x in one_process({name: checkpoints[name]}, KINDS[name]).items()}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", CELLS)
def test_every_layout_is_one_process(
    size: int, name: str, checkpoints: dict[str, Path], expected: Expected, layouts: dict[int, list[Cell]]
) -> None:
    if size not in layouts:
        pytest.skip("in the whole matrix only: --matrix")
    one = {name: checkpoints[name]}
    worst = differences(run_ranks(run_cells, size, one, layouts[size], nullcontext, KINDS[name]), expected)
    assert len(worst) >= size * len(layouts[size]) * 3
    assert {cell: value for cell, value in worst.items() if value > TOLERANCE} == {}


EVERY = {"interleaved", "batched", "one branch"}


@pytest.mark.parametrize(
    ("fault", "cell", "kinds"),
    [
        (faults.ring_skips_a_hop, {"ring": 2}, EVERY),
        (faults.heads_come_back_in_another_order, {"usp": 2}, EVERY),
        (faults.partial_sums_are_not_reduced, {"tp": 2}, EVERY),
        (faults.norms_are_of_a_rank_alone, {"tp": 2}, EVERY),
        (faults.branches_are_swapped, {"cfg": 2}, {"interleaved", "batched"}),
    ],
)
def test_a_fault_is_seen(
    fault: Fault, cell: Cell, kinds: set[str], checkpoints: dict[str, Path], expected: Expected
) -> None:
    name = "wan_2_2"
    worst = differences(run_ranks(run_cells, 2, {name: checkpoints[name]}, [cell], fault, KINDS[name]), expected)
    assert {kind for (*_, kind), value in worst.items() if value > 10 * TOLERANCE} == kinds


def connected(rank: int, _size: int, folder: Path) -> list[int]:
    """How many attention modules of each transformer are spread."""
    with worker(folder, ParallelConfig.model_validate({"usp": 2}), rank) as one:
        both = (one.model.pipe.transformer, one.model.pipe.transformer_2)
        attending = [[part for part in x.modules() if hasattr(part, "processor")] for x in both]
        return [sum(part.processor._parallel_config is not None for part in parts) for parts in attending]


def test_both_transformers_are_spread(checkpoints: dict[str, Path]) -> None:
    """Alone on its rank, one of them would give the same video, and save nothing."""
    assert run_ranks(connected, 2, checkpoints["wan_2_2"]) == [[2, 2], [2, 2]]
