"""Latents to pictures by AutoencoderKL, against the VAE's own decode."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from darkroom.configs import ParallelConfig
from darkroom.engine.worker import Worker
from darkroom.models.autoencoder_kl import decode_latents, encode_picture, tiling
from tests.golden import worker


@pytest.fixture(scope="module")
def tiled(checkpoints: dict[str, Path]) -> Iterator[Worker]:
    with worker(checkpoints["z_image_4_heads"], ParallelConfig(vae_use_tiling=True)) as one:
        yield one


@pytest.mark.parametrize("size", [(10, 14), (34, 40)])  # one tile, and several that end unevenly
def test_a_decode_is_the_stock_tiled_one(size: tuple[int, int], tiled: Worker) -> None:
    vae = tiled.model.vae
    latents = torch.randn(1, 16, *size, generator=torch.Generator().manual_seed(0))
    picture = decode_latents(tiled.model, latents)
    assert picture is not None
    vae.enable_tiling()
    try:
        wanted = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
        unscaled = vae.decode(latents).sample
    finally:
        vae.disable_tiling()
    assert torch.equal(picture, wanted)
    assert not torch.equal(picture, unscaled)  # a fault is seen


def test_tiles_are_of_the_sizes_of_the_vae(tiled: Worker) -> None:
    tiles = tiling(tiled.model.vae)
    assert (tiles.tile, tiles.stride, tiles.scale) == ((128, 128), (96, 96), 8)


def test_a_rank_without_the_vae_decodes_nothing(tiled: Worker) -> None:
    with patch.object(tiled.model, "patches", None):
        assert decode_latents(tiled.model, torch.zeros(1, 16, 4, 4)) is None


@pytest.mark.parametrize("size", [(64, 48), (272, 320)])  # one tile, and several that end unevenly
def test_an_encode_is_the_stock_tiled_one(size: tuple[int, int], tiled: Worker) -> None:
    vae = tiled.model.vae
    picture = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = encode_picture(tiled.model, picture, torch.Generator().manual_seed(1))
    vae.enable_tiling()
    try:
        wanted = vae.encode(picture).latent_dist.sample(torch.Generator().manual_seed(1))
    finally:
        vae.disable_tiling()
    assert torch.equal(latents, (wanted - vae.config.shift_factor) * vae.config.scaling_factor)
