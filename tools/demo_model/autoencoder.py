"""Trains the VAE on crops of pictures that are drawn as they are needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import log10
from pathlib import Path
from random import Random
from types import MethodType

import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from tools.demo_model.components import LATENT_CHANNELS
from tools.demo_model.examples import example
from tools.demo_model.loop import Loop
from tools.demo_model.recipe import Recipe

# B batch, C channels, H and W rows and columns; one frame between C and H, as the classes have it


@contextmanager
def flat(vae: AutoencoderKLQwenImage) -> Iterator[None]:
    """Within, every causal convolution over frames is one over the only frame there is: a third of the work.

    Before the first frame there are zeros, so only a kernel's last tap counts.
    """

    def forward(conv: torch.nn.Conv3d, x: Tensor) -> Tensor:
        padding = conv._padding[0]  # of columns, as of rows
        frame = x[:, :, 0].contiguous(memory_format=torch.channels_last)  # many times as fast
        return F.conv2d(frame, conv.weight[:, :, -1], conv.bias, padding=padding)[:, :, None]

    convs = [module for module in vae.modules() if isinstance(module, torch.nn.Conv3d)]
    for conv in convs:
        conv.forward = MethodType(forward, conv)
    try:
        yield
    finally:
        for conv in convs:
            del conv.forward


def pixels(picture: Image.Image) -> Tensor:
    """(3, 1, H, W), -1 to 1."""
    levels = torch.from_numpy(np.array(picture))
    return (levels.permute(2, 0, 1).float() / 127.5 - 1)[:, None]


def encode(vae: AutoencoderKLQwenImage, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and logarithm of the variance of the latents of single frames: (B, C, 1, H / 8, W / 8)."""
    mean, variance = vae.quant_conv(vae.encoder(x)).float().chunk(2, dim=1)
    return mean, variance.clamp(-12, 4)


def decode(vae: AutoencoderKLQwenImage, latents: Tensor) -> Tensor:
    return vae.decoder(vae.post_quant_conv(latents)).float()


@dataclass(frozen=True)
class Crops(Dataset[Tensor]):  # type: ignore[misc]
    """The data set at several scales, cut from anywhere in the pictures. Number i is of step i // `vae_batch`."""

    recipe: Recipe

    def __len__(self) -> int:
        return self.recipe.vae_steps * self.recipe.vae_batch

    def __getitem__(self, i: int) -> Tensor:
        """(3, 1, edge, edge)"""
        edge = self.recipe.vae_crop
        random = Random(f"{self.recipe.seed} vae {i}")
        width, height = (max(edge, random.choice([96, 128, 128, 160, 192, 256])) for _ in range(2))
        picture = example(random).draw(width, height, random)
        left, top = random.randint(0, width - edge), random.randint(0, height - edge)
        return pixels(picture.crop((left, top, left + edge, top + edge)))


def error(drawn: Tensor, x: Tensor) -> Tensor:
    """Of pixels, of their squares, and of edges."""
    apart = drawn - x
    across, down = apart.diff(dim=-1).abs().mean(), apart.diff(dim=-2).abs().mean()
    return apart.abs().mean() + 5 * apart.square().mean() + 0.5 * (across + down)


def whole_loss(vae: AutoencoderKLQwenImage, kl: float, x: Tensor, noise: Tensor) -> Tensor:
    mean, variance = encode(vae, x)
    drawn = decode(vae, mean + noise * torch.exp(0.5 * variance))
    divergence = 0.5 * (mean.square() + variance.exp() - 1 - variance).mean()
    return error(drawn, x) + kl * divergence


def decoder_loss(vae: AutoencoderKLQwenImage, x: Tensor, noise: Tensor) -> Tensor:
    with torch.no_grad():
        mean, _ = encode(vae, x)
    return error(decode(vae, mean + noise), x)


def train(vae: AutoencoderKLQwenImage, recipe: Recipe, folder: Path) -> None:
    """First all of it; then the decoder alone, on latents with a little noise, which is what the transformer makes."""
    first = round(recipe.vae_steps * (1 - recipe.vae_frozen))
    optimizer = torch.optim.AdamW(vae.parameters(), lr=recipe.vae_rate, betas=(0.9, 0.99), weight_decay=0)
    loop = Loop("vae", folder, recipe, vae, recipe.vae_steps, optimizer)
    whole, decoder = partial(whole_loss, vae, recipe.vae_kl), partial(decoder_loss, vae)
    if recipe.compiled:
        whole, decoder = torch.compile(whole), torch.compile(decoder)
    data, batch = Crops(recipe), recipe.vae_batch
    left = range(loop.step * batch, len(data))
    batches = DataLoader(data, batch, sampler=left, num_workers=recipe.workers, persistent_workers=recipe.workers > 0)
    with flat(vae):
        for step, drawn in zip(loop.steps(), batches, strict=True):
            x = drawn.to(recipe.device)
            generator = torch.Generator().manual_seed(step)
            noise = torch.randn(batch, LATENT_CHANNELS, 1, *(edge // 8 for edge in x.shape[3:]), generator=generator)
            with torch.autocast(x.device.type, torch.bfloat16):
                if step < first:
                    loss = whole(x, noise.to(x.device))
                else:
                    noise *= 0.1 * torch.rand(batch, 1, 1, 1, 1, generator=generator)
                    loss = decoder(x, noise.to(x.device))
            loop.learn(loss)
        loop.use_average()
        vae.register_to_config(**statistics(vae, recipe))


def statistics(vae: AutoencoderKLQwenImage, recipe: Recipe) -> dict[str, list[float]]:
    """Mean and deviation of every channel of the latents, with which pipelines make them normal."""
    with torch.no_grad():
        latents = torch.cat([encode(vae, x)[0] for x in samples(vae, recipe, "statistics")])
    deviation, mean = torch.std_mean(latents, dim=(0, 2, 3, 4))
    return {"latents_mean": mean.tolist(), "latents_std": deviation.tolist()}


def samples(
    vae: AutoencoderKLQwenImage, recipe: Recipe, name: str, batch: int = 16, edge: int = 128
) -> Iterator[Tensor]:
    """Pictures of the data set that are not trained on, in batches: (B, 3, 1, edge, edge)."""
    for start in range(0, recipe.measured, batch):
        randoms = [Random(f"{recipe.seed} {name} {i}") for i in range(start, min(recipe.measured, start + batch))]
        drawn = [pixels(example(random).draw(edge, edge, random)) for random in randoms]
        yield torch.stack(drawn).to(vae.device)


def signal_to_noise(vae: AutoencoderKLQwenImage, recipe: Recipe) -> float:
    """The peak signal-to-noise ratio in dB of pictures that went through latents and back, over all of them."""
    with flat(vae), torch.no_grad():
        errors = [
            (decode(vae, encode(vae, x)[0]).clamp(-1, 1) - x).square().flatten(1).mean(dim=1)
            for x in samples(vae, recipe, "reconstruction")
        ]
    return 10 * log10(4 / torch.cat(errors).mean().item())
