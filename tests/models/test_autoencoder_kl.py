"""Latents to pictures by AutoencoderKL, against the VAE's own decode."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from darkroom.configs import ParallelConfig
from darkroom.models.autoencoder_kl import AutoencoderKLModel, tiling
from tests.golden import worker


@pytest.fixture(scope="module")
def tiled(checkpoints: dict[str, Path]) -> Iterator[AutoencoderKLModel]:
    with worker(checkpoints["z_image_4_heads"], ParallelConfig(vae_use_tiling=True)) as one:
        assert isinstance(one.model, AutoencoderKLModel)
        yield one.model


@pytest.mark.parametrize("size", [(10, 14), (34, 40)])  # one tile, and several that end unevenly
def test_a_decode_is_the_stock_tiled_one(size: tuple[int, int], tiled: AutoencoderKLModel) -> None:
    vae = tiled.vae
    latents = torch.randn(1, 16, *size, generator=torch.Generator().manual_seed(0))
    picture = tiled.decode_latents(latents)
    assert picture is not None
    vae.enable_tiling()
    try:
        wanted = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
        unscaled = vae.decode(latents).sample
    finally:
        vae.disable_tiling()
    assert torch.equal(picture, wanted)
    assert not torch.equal(picture, unscaled)  # a fault is seen


def test_tiles_are_of_the_sizes_of_the_vae(tiled: AutoencoderKLModel) -> None:
    tiles = tiling(tiled.vae)
    assert (tiles.tile, tiles.stride, tiles.scale) == ((128, 128), (96, 96), 8)


def test_a_rank_without_the_vae_decodes_nothing(tiled: AutoencoderKLModel) -> None:
    with patch.object(tiled, "patches", None):
        assert tiled.decode_latents(torch.zeros(1, 16, 4, 4)) is None


@pytest.mark.parametrize("size", [(64, 48), (272, 320)])  # one tile, and several that end unevenly
def test_an_encode_is_the_stock_tiled_one(size: tuple[int, int], tiled: AutoencoderKLModel) -> None:
    vae = tiled.vae
    picture = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = tiled.encode_picture(picture, torch.Generator().manual_seed(1))
    vae.enable_tiling()
    try:
        wanted = vae.encode(picture).latent_dist.sample(torch.Generator().manual_seed(1))
    finally:
        vae.disable_tiling()
    assert torch.equal(latents, (wanted - vae.config.shift_factor) * vae.config.scaling_factor)
