"""VAEs of stock pipelines that are spread: what the pipeline gets is what its own VAE would give it."""

from __future__ import annotations

from pathlib import Path

import torch

from darkroom.configs import ParallelConfig
from darkroom.models.checkpoint import Checkpoint
from tests import tiny_video
from tests.golden import worker


def test_tiles_of_a_video_are_the_stock_ones(checkpoints: dict[str, Path]) -> None:
    generator = torch.Generator().manual_seed(0)
    z, pixels = torch.randn(1, 16, 2, 8, 34, generator=generator), torch.rand(1, 3, 5, 64, 272, generator=generator)
    with worker(checkpoints["skyreels_v2_4_heads"], ParallelConfig(vae_use_tiling=True)) as one:
        spread, vae = one.model.pipe.vae, one.model.vae
        decoded, encoded = spread.decode(z).sample, spread.encode(pixels).latent_dist.mode()
        whole = vae.decode(z).sample
        vae.enable_tiling()
        assert torch.equal(decoded, vae.decode(z).sample) and not torch.equal(decoded, whole)
        assert torch.equal(encoded, vae.encode(pixels).latent_dist.mode())


def test_a_vae_that_decodes_a_video_in_turns_is_not_spread(tmp_path: Path) -> None:
    """Of pictures the same class is: here all ranks but one would leave after the first."""
    assert Checkpoint.open(str(tiny_video.latte(tmp_path / "latte"))).capabilities.axes == ("cfg",)
