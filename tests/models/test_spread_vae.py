"""What a stock pipeline sees of its VAE on one rank: the VAE itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from darkroom.configs import ParallelConfig
from darkroom.models.spread_vae import SpreadVae
from darkroom.models.stepwise import EndOfCall
from tests import tiny
from tests.golden import worker


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.flux2_klein(tmp_path_factory.mktemp("spread") / "klein")


def test_one_rank_sees_the_vae(folder: Path) -> None:
    with worker(folder, ParallelConfig()) as one:
        spread, vae = one.model.pipe.vae, one.model.vae
        assert isinstance(spread, type(vae)) and isinstance(spread, SpreadVae)
        assert spread.bn is vae.bn and spread.config is vae.config and spread.dtype == vae.dtype
        z, picture = torch.randn(1, 32, 6, 8), torch.randn(1, 3, 48, 64)
        assert torch.equal(spread.decode(z).sample, vae.decode(z).sample)
        assert torch.equal(spread.decode(z, return_dict=False)[0], vae.decode(z).sample)
        assert torch.equal(spread.encode(picture).latent_dist.mode(), vae.encode(picture).latent_dist.mode())
        [encoded] = spread.encode(picture, return_dict=False)
        assert torch.equal(encoded.mode(), vae.encode(picture).latent_dist.mode())
        with pytest.raises(AttributeError):
            spread.nothing  # noqa: B018


def test_a_rank_that_does_not_decode_ends_its_call(folder: Path) -> None:
    with worker(folder, ParallelConfig()) as one:
        one.model.patches = None
        with pytest.raises(EndOfCall):
            one.model.pipe.vae.decode(torch.randn(1, 32, 6, 8))
