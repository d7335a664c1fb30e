"""Every number that the making of the demo model depends on."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Size:
    """Pictures of one size, and how much of the training they are."""

    width: int
    height: int
    share: float

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens, each of 16 x 16 pixels."""
        return self.height // 16, self.width // 16

    @property
    def tokens(self) -> int:
        rows, columns = self.grid
        return rows * columns


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is trained, for how long. Two runs of one recipe on one machine give the same weights."""

    seed: int = 0
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    workers: int = 0
    """processes that draw beside the one that trains; on a CPU it draws itself"""

    vae_steps: int = 16_000
    vae_batch: int = 8
    vae_crop: int = 96
    """pixels along each edge"""

    vae_frozen: float = 0.4
    """the share of the steps, at the end, in which the encoder stays as it is and latents are disturbed, as the
    transformer's are"""

    vae_rate: float = 1e-3
    vae_kl: float = 2e-4
    """the weight of the Kullback-Leibler divergence from a normal distribution, in nats per latent number"""

    measured: int = 256
    """pictures from which the mean and deviation of the latents are taken"""

    sizes: tuple[Size, ...] = (
        Size(128, 128, 0.23),
        Size(96, 96, 0.15),
        Size(96, 128, 0.13),
        Size(128, 96, 0.13),
        Size(192, 192, 0.14),
        Size(144, 192, 0.08),
        Size(192, 144, 0.08),
        Size(256, 256, 0.06),
    )
    pictures: int = 100_000
    """drawn and encoded once, over all sizes"""

    steps: int = 20_000
    tokens: int = 4096
    """of pictures in each step: 64 pictures of 128 x 128"""

    rate: float = 2e-3
    warm_up: int = 100
    decay: float = 0.5
    """the share of the steps, at the end, in which the rate falls to nothing"""

    averaging: float = 0.999
    """how much of the average of the weights is kept in each step"""

    dropout: float = 0.1
    """prompts that are left out, so that guidance has something to differ from"""

    prompt_tokens: int = 26
    """longer prompts are not trained on; with what the template adds behind them"""

    save_every: int = 250
    """steps"""

    compiled: bool = True
    """by torch.compile, after minutes: several times as fast for the VAE, by a sixth for the transformer on a CPU"""


SMOKE = Recipe(
    vae_steps=4,
    vae_batch=2,
    vae_crop=32,
    measured=4,
    sizes=(Size(64, 64, 0.5), Size(48, 64, 0.5)),
    pictures=16,
    steps=4,
    tokens=64,
    warm_up=1,
    save_every=2,
    compiled=False,
)
"""Every stage, for seconds: what it makes draws nothing."""
