"""Image-to-image and inpainting: begin part of the way through the schedule, from a picture with noise on it.

Source: SDEdit, https://arxiv.org/abs/2108.01073. Numbers are drawn, and steps rounded, as diffusers' pipelines do it.
"""

# B batch, C latent channels, h w latent rows and columns

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from darkroom.configs.pictures import load_mask, load_picture
from darkroom.configs.request import Request

from .base import Kept, Sample, noise_generator

if TYPE_CHECKING:
    import torch


class DrawsOver(Protocol):
    """What a model needs for it."""

    pipe: Any
    device: torch.device

    def encode_picture(self, picture: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """[1, 3, H, W] in [-1, 1] -> latents as the transformer knows them, [1, C, h, w], sampled from the VAE."""

    def pack(self, latents: torch.Tensor) -> torch.Tensor:
        """[1, C, h, w] -> the shape in which this model's latents go through its steps."""

    def noise(self, request: Request, dtype: torch.dtype) -> torch.Tensor:
        """What a request without a picture begins with, in that shape. `dtype`: what the texts are in."""


def begin(
    model: DrawsOver,
    request: Request,
    scheduler: Any,
    branches: list[dict[str, Any]],
    dtype: torch.dtype,
    *,
    text_tokens: int,
    image_tokens: int,
) -> Sample:
    """The sample of a request: of noise, or of its picture part of the way through the schedule.

    `dtype`: what the texts are in, and then the picture.
    """
    latents, kept = (
        _from_picture(model, request, scheduler, dtype) if request.images else (model.noise(request, dtype), None)
    )
    return Sample(
        request=request,
        latents=latents,
        first_step=request.first_step if request.images else 0,
        kept=kept,
        scheduler=scheduler,
        branches=branches,
        text_tokens=text_tokens,
        image_tokens=image_tokens,
    )


def _from_picture(
    model: DrawsOver, request: Request, scheduler: Any, dtype: torch.dtype
) -> tuple[torch.Tensor, Kept | None]:
    """The picture's latents, as noisy as the schedule has them at `request.first_step`, where it then begins; and what
    stays of them."""
    import torch

    generator, first = noise_generator(request), request.first_step
    clean = model.encode_picture(_pixels(model, request).to(model.device, dtype), generator)
    noise = torch.randn(clean.shape, generator=generator, dtype=dtype).to(model.device)
    scheduler.set_begin_index(first)
    latents = scheduler.scale_noise(clean, scheduler.timesteps[first : first + 1], noise)
    kept = None
    if request.mask is not None:
        mask = _mask(model, request, clean)
        kept = Kept(latents=model.pack(clean), noise=model.pack(noise), mask=model.pack(mask))
    return model.pack(latents), kept


def _pixels(model: DrawsOver, request: Request) -> torch.Tensor:
    picture = load_picture(request.images[0]).convert("RGB")
    pixels: torch.Tensor = model.pipe.image_processor.preprocess(picture, height=request.height, width=request.width)
    return pixels


def _mask(model: DrawsOver, request: Request, like: torch.Tensor) -> torch.Tensor:
    """[1, C, h, w]: zeros and ones"""
    from diffusers.image_processor import VaeImageProcessor
    from torch.nn.functional import interpolate

    assert request.mask is not None
    processor = VaeImageProcessor(
        vae_scale_factor=model.pipe.image_processor.config.vae_scale_factor,
        do_normalize=False,
        do_binarize=True,
        do_convert_grayscale=True,
    )
    mask = processor.preprocess(load_mask(request.mask), height=request.height, width=request.width)
    resized: torch.Tensor = interpolate(mask, size=like.shape[-2:]).to(like)
    return resized.expand(like.shape)
