"""Latents to pictures and videos by the causal VAEs, against their own decode."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from darkroom.configs import ParallelConfig
from darkroom.models import video
from darkroom.models.autoencoder_causal import decode_latents, encode_tiling, statistics, tiling
from tests.golden import worker


@pytest.mark.parametrize(("name", "frames"), [("qwen_image_4_heads", 1), ("wan_2_1_4_heads", 2), ("wan_2_2_small", 2)])
@pytest.mark.parametrize("size", [(6, 8), (27, 34)])  # one tile, and several that end unevenly
def test_a_decode_is_the_stock_tiled_one(
    size: tuple[int, int], name: str, frames: int, checkpoints: dict[str, Path]
) -> None:
    latents = torch.randn(1, 16, frames, *size, generator=torch.Generator().manual_seed(0))
    with worker(checkpoints[name], ParallelConfig(vae_use_tiling=True)) as one:
        model, vae = one.model, one.model.vae
        if name.startswith("qwen"):
            decoded = decode_latents(model, latents)
        else:
            decoded = decode_latents(model, latents, partial(video.finish, vae), first_chunk=True)
        mean, std = statistics(vae, latents)
        vae.enable_tiling()
        wanted = vae.decode(latents / (1.0 / std) + mean).sample
    assert decoded is not None
    assert torch.equal(decoded, wanted)


@pytest.mark.parametrize("name", ["qwen_image_4_heads", "wan_2_1_4_heads"])
def test_latents_that_are_not_scaled_are_seen(name: str, checkpoints: dict[str, Path]) -> None:
    latents = torch.randn(1, 16, 1, 6, 8, generator=torch.Generator().manual_seed(0))
    with worker(checkpoints[name], ParallelConfig()) as one:
        decoded = decode_latents(one.model, latents)
        unscaled = one.model.vae.decode(latents).sample
    assert decoded is not None and not torch.equal(decoded, unscaled)


@pytest.mark.parametrize(
    ("name", "tile", "stride", "scale"),
    [("qwen_image_4_heads", 256, 192, 8), ("wan_2_1_4_heads", 256, 192, 8), ("wan_2_2_small", 128, 96, 8)],
)
def test_tiles_are_of_the_sizes_of_the_vae(
    name: str, tile: int, stride: int, scale: int, checkpoints: dict[str, Path]
) -> None:
    """In the pixels that the decoder returns, each of which the small model's VAE makes 2x2 of."""
    with worker(checkpoints[name], ParallelConfig()) as one:
        tiles = tiling(one.model.vae)
    assert (tiles.tile, tiles.stride, tiles.scale) == ((tile, tile), (stride, stride), scale)


@pytest.mark.parametrize("name", ["qwen_image_4_heads", "wan_2_1_4_heads", "wan_2_2_small"])
@pytest.mark.parametrize(
    "size", [(64, 96), (272, 320), *(pytest.param(size, marks=pytest.mark.matrix) for size in ((256, 400), (528, 288)))]
)
def test_an_encode_is_the_stock_tiled_one(size: tuple[int, int], name: str, checkpoints: dict[str, Path]) -> None:
    frames = 1 if name.startswith("qwen") else 5
    pixels = torch.rand(1, 3, frames, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with worker(checkpoints[name], ParallelConfig(vae_use_tiling=True)) as one:
        encoded = one.model.encoder.encode(pixels).latent_dist.mode()
        one.model.vae.enable_tiling()
        wanted = one.model.vae.encode(pixels).latent_dist.mode()
    assert torch.equal(encoded, wanted)


def test_tiles_that_are_encoded_are_of_pixels(checkpoints: dict[str, Path]) -> None:
    """The small model's VAE folds 2x2 of them before it counts 256."""
    with worker(checkpoints["wan_2_2_small"], ParallelConfig()) as one:
        tiles = encode_tiling(one.model.vae)
    assert (tiles.tile, tiles.stride, tiles.scale, tiles.above) == ((512, 512), (384, 384), 16, (256, 256))


def test_a_rank_without_the_vae_decodes_nothing(checkpoints: dict[str, Path]) -> None:
    with (
        worker(checkpoints["qwen_image_4_heads"], ParallelConfig()) as one,
        patch.object(one.model, "patches", None),
    ):
        assert decode_latents(one.model, torch.zeros(1, 16, 1, 4, 4)) is None
