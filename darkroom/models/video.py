"""What families that draw videos share: noise of a video's size, a picture that it begins with, and its frames.

The latents are those of Wan's causal VAE, in fp32 whatever the model computes in.
"""

# B batch, F frames, H W rows and columns; C f h w the same of latents

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from darkroom.configs.pictures import load_picture
from darkroom.configs.request import Request

from .autoencoder_causal import AutoencoderCausalModel, decode_latents, vae
from .base import Sample, noise_generator

if TYPE_CHECKING:
    import torch
    from PIL import Image

VAE = vae("autoencoder_kl_wan", "AutoencoderKLWan")


@dataclass(kw_only=True)
class VideoSample(Sample):
    first_frame: torch.Tensor | None = None
    """The latents [1, C, 1, h, w] of a picture that the video begins with: no step changes them."""

    def __post_init__(self) -> None:
        self.latents = self.begin_with_picture(self.latents)

    def begin_with_picture(self, latents: torch.Tensor) -> torch.Tensor:
        """[1, C, f, h, w], of which the first frame is the picture, if there is one."""
        import torch

        return latents if self.first_frame is None else torch.cat([self.first_frame, latents[:, :, 1:]], 2)


class VideoModel(AutoencoderCausalModel):
    """A family whose videos come from that VAE."""

    def noise(self, request: Request) -> torch.Tensor:
        """[1, C, f, h, w]"""
        import torch

        config = self.vae.config
        frames = (request.num_frames - 1) // config.scale_factor_temporal + 1
        height, width = request.height // config.scale_factor_spatial, request.width // config.scale_factor_spatial
        shape = (1, config.z_dim, frames, height, width)
        return torch.randn(shape, generator=noise_generator(request), dtype=torch.float32).to(self.device)

    def picture(self, request: Request) -> torch.Tensor:
        """The request's own, of the size of the video. [1, 3, 1, H, W] in [-1, 1]"""
        picture = load_picture(request.images[0]).convert("RGB")
        pixels: torch.Tensor = self.pipe.video_processor.preprocess(picture, request.height, request.width)
        return pixels.to(self.device)[:, :, None]

    def encode_video(self, pixels: torch.Tensor) -> torch.Tensor:
        """[1, 3, F, H, W] -> the likeliest latents, normalised: [1, C, f, h, w] in fp32"""
        return self.normalised(self.encoder.encode(pixels).latent_dist.mode().float())

    def advance(self, sample: Sample, prediction: torch.Tensor) -> None:
        assert isinstance(sample, VideoSample)
        super().advance(sample, prediction)
        sample.latents = sample.begin_with_picture(sample.latents)
        if sample.estimate is not None:
            sample.estimate = sample.begin_with_picture(sample.estimate)

    def decode(self, samples: Sequence[Sample], latents: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """-> videos [B, 3, F, H, W]"""
        import torch

        z = torch.cat(list(latents))
        return decode_latents(self, z, lambda tiles: finish(self.vae, tiles), first_chunk=True)

    def pictures(self, decoded: torch.Tensor) -> list[Image.Image]:
        """The frames of one video [1, 3, F, H, W]."""
        [frames] = self.pipe.video_processor.postprocess_video(decoded, output_type="pil")
        return list(frames)


def finish(vae: Any, tiles: torch.Tensor) -> torch.Tensor:
    """What the decoder returns -> pixels in [-1, 1]"""
    from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

    pixels: torch.Tensor = unpatchify(tiles, vae.config.patch_size or 1)
    return pixels.clamp(-1.0, 1.0)
