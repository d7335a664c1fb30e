"""Wan from a picture, beyond the golden matrix: its other checkpoints, tiles, and what a checkpoint says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanImageToVideoPipeline

from darkroom.configs import ConfigError, ParallelConfig
from darkroom.configs.request import SamplingParams
from darkroom.models.checkpoint import Checkpoint
from tests import tiny
from tests.golden import TOLERANCE, from_stock, generate, stock_pipeline, worker
from tests.subjects import TALL, WAN_IMAGE_TO_VIDEO, from_a_picture, run_wan

NAMES = ("wan_image_to_video_2_1", "wan_image_to_video_2_2", "wan_image_to_video_2_2_small")


@pytest.fixture(scope="module")
def stock(checkpoints: dict[str, Path]) -> dict[str, Any]:
    return {name: stock_pipeline(WanImageToVideoPipeline, checkpoints[name]) for name in NAMES}


@pytest.mark.parametrize("name", NAMES[1:])  # the matrix has the first
@pytest.mark.parametrize("case", WAN_IMAGE_TO_VIDEO.requests)
def test_one_process_is_the_stock_pipeline(
    case: str, name: str, stock: dict[str, Any], checkpoints: dict[str, Path]
) -> None:
    assert from_stock(checkpoints[name], WAN_IMAGE_TO_VIDEO.requests[case], stock[name], run_wan) == (0.0, 0)


@pytest.mark.parametrize("name", NAMES)
def test_one_process_is_the_stock_pipeline_in_bfloat16(name: str, checkpoints: dict[str, Path]) -> None:
    pipe = stock_pipeline(WanImageToVideoPipeline, checkpoints[name], dtype=torch.bfloat16)
    with worker(checkpoints[name], ParallelConfig(), dtype="bfloat16") as one:
        [(latents, _)] = generate(one, [from_a_picture()]).values()
    assert torch.equal(latents, run_wan(pipe, from_a_picture(), "latent"))


@pytest.mark.matrix
@pytest.mark.parametrize("name", NAMES)
def test_one_process_encodes_in_tiles_as_the_stock_vae_does(
    name: str, stock: dict[str, Any], checkpoints: dict[str, Path]
) -> None:
    """416 pixels are two tiles for the small model's VAE too, though one holds 512."""
    wanted = from_a_picture(width=416, height=288, num_inference_steps=1, guidance_scale=1.0)
    with worker(checkpoints[name], ParallelConfig(vae_use_tiling=True)) as one:
        [(latents, _)] = generate(one, [wanted]).values()
    whole = run_wan(stock[name], wanted, "latent")
    stock[name].vae.enable_tiling()
    try:
        assert torch.equal(latents, run_wan(stock[name], wanted, "latent"))
    finally:
        stock[name].vae.disable_tiling()
    assert not torch.equal(latents, whole)  # tiles blend into each other: another picture


def test_the_small_model_begins_with_a_picture_under_its_other_name(
    stock: dict[str, Any], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """As it is published, its pipeline is that of text to video."""
    folder = tiny.wan(tmp_path / "text_to_video", small=True)
    pipe = stock[NAMES[2]]
    assert from_stock(folder, from_a_picture(), pipe, run_wan) == (0.0, 0)
    capabilities = Checkpoint.open(str(folder)).capabilities
    assert capabilities.tasks == ("text-to-video", "image-to-video")
    tasks = [
        capabilities.resolve("a cat", SamplingParams(images=images)).task for images in ((), from_a_picture().images)
    ]
    assert tasks == ["text-to-video", "image-to-video"]


def test_a_short_window_is_what_is_cut_off(checkpoints: dict[str, Path]) -> None:
    """2.1 always takes 512 tokens: the stock pipeline, asked for fewer, mistakes the picture's for the text's."""
    with worker(checkpoints[NAMES[0]], ParallelConfig()) as one:
        short, same = (
            generate(one, [from_a_picture(prompt, max_sequence_length=window, guidance_scale=1.0)])["0"][0]
            for prompt, window in (("a cat", 6), ("a cat", 512))
        )
        other = generate(one, [from_a_picture("a cat", max_sequence_length=3, guidance_scale=1.0)])["0"][0]
    assert float((short - same).abs().max()) <= TOLERANCE
    assert float((other - same).abs().max()) > 10 * TOLERANCE


# ---- what a checkpoint says ------------------------------------------------------------------------------------------


def test_capabilities_follow_from_the_checkpoint(checkpoints: dict[str, Path]) -> None:
    first, both, small = (Checkpoint.open(str(checkpoints[name])).capabilities for name in NAMES)
    assert first == WAN_IMAGE_TO_VIDEO.family.capabilities
    assert (both.guidance_scale, both.guidance_scale_2, both.num_inference_steps) == (3.5, 3.5, 40)
    assert (small.image_area, small.num_frames, small.fps, small.size_multiple) == (1280 * 704, 121, 24, 32)
    assert {x.tasks for x in (first, both, small)} == {("image-to-video",)}
    request = first.resolve("a cat", SamplingParams(images=(TALL,)))
    assert (request.width, request.height) == (512, 768)  # of 90x130 pixels, and about 480x832 large


def test_a_picture_needs_its_encoder(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoints[NAMES[0]], tmp_path / "model"))
    index = folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "image_encoder": [None, None]}))
    with pytest.raises(ConfigError, match="names no image_encoder, and the transformer needs one"):
        Checkpoint.open(str(folder))
