"""The causal VAE of Qwen-Image and of Wan: frames through convolutions that see those before them, in a cache.

Its two classes in diffusers differ in names and in what stands around the layers, and work alike.
"""

# B batch, C latent channels, f latent frames, h w latent rows and columns; F H W the same of a video

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from darkroom.parallel.plan import Plan

from .base import Component, Model

if TYPE_CHECKING:
    import torch

    from darkroom.parallel.spatial import Tiling

    from .base import Decode


def vae(module: str, name: str) -> Component:
    """The component of either class."""
    return Component(
        module=f"diffusers.models.autoencoders.{module}",
        name=name,
        plan=Plan(spatial="decoder", whole_rows=("decoder.mid_block.attentions.*",)),
        ranks="vae",
    )


class AutoencoderCausalModel(Model):
    """A family whose pictures or videos come from it."""

    def tiling(self) -> Tiling:
        return tiling(self.vae)

    def encode_tiling(self) -> Tiling:
        return encode_tiling(self.vae)

    def normalised(self, latents: torch.Tensor) -> torch.Tensor:
        """What the encoder gives -> what the transformer knows: [B, C, f, h, w]"""
        mean, std = statistics(self.vae, latents)
        return (latents - mean) * (1.0 / std)

    def encode_picture(self, picture: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """[1, 3, H, W] in [-1, 1] -> normalised latents [1, C, h, w], sampled from the VAE."""
        latents = self.encoder.encode(picture[:, :, None]).latent_dist.sample(generator)
        return self.normalised(latents)[:, :, 0]

    def decode_pictures(self, latents: torch.Tensor) -> torch.Tensor | None:
        """Normalised latents of single frames [B, C, 1, h, w] -> [B, 3, H, W] on the output rank, None elsewhere."""
        decoded = decode_latents(self, latents)
        return None if decoded is None else decoded[:, :, 0]


def decode_latents(
    model: Model, latents: torch.Tensor, finish: Decode | None = None, **first: Any
) -> torch.Tensor | None:
    """Normalised latents [B, C, f, h, w] -> [B, 3, F, H, W] on the output rank, None elsewhere.

    `finish`: what the class does to tiles once they are one. `first`: what it tells its decoder with the first frame.
    """
    z = latents.to(model.vae.dtype)
    mean, std = statistics(model.vae, z)
    z = z / (1.0 / std) + mean  # in bfloat16 every other order rounds to another picture than stock's
    return model.spread_decode(
        z, lambda x: model.vae.decode(x, return_dict=False)[0], lambda x: decode_tile(model.vae, x, first), finish
    )


def statistics(vae: Any, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the latents, by channel: [1, C, 1, 1, 1] each"""
    import torch

    config = vae.config
    mean, std = (torch.tensor(x).view(1, -1, 1, 1, 1).to(like) for x in (config.latents_mean, config.latents_std))
    return mean, std


def tiling(vae: Any) -> Tiling:
    """In pixels of what the decoder returns: where a class folds pixels, each is `patch` x `patch` of the picture's."""
    from darkroom.parallel.spatial import Tiling

    patch = _patch(vae)
    return Tiling(
        tile=(vae.tile_sample_min_height // patch, vae.tile_sample_min_width // patch),
        stride=(vae.tile_sample_stride_height // patch, vae.tile_sample_stride_width // patch),
        scale=vae.spatial_compression_ratio // patch,
    )


def encode_tiling(vae: Any) -> Tiling:
    """In pixels of the picture. Where a class folds pixels, its tile sizes count folded ones, and the size from which
    on it tiles at all counts the picture's."""
    from darkroom.parallel.spatial import Tiling

    patch, least = _patch(vae), (vae.tile_sample_min_height, vae.tile_sample_min_width)
    return Tiling(
        tile=(least[0] * patch, least[1] * patch),
        stride=(vae.tile_sample_stride_height * patch, vae.tile_sample_stride_width * patch),
        scale=vae.spatial_compression_ratio,
        above=least,
    )


def _patch(vae: Any) -> int:
    """How many pixels, along either edge, the class folds into the channels of one."""
    return vae.config.get("patch_size") or 1


def decode_tile(vae: Any, z: torch.Tensor, first: Mapping[str, Any]) -> torch.Tensor:
    """One tile, frame by frame as the stock tiled decode does it, not clamped: [B, C, f, h, w] -> [B, 3, F, H, W]"""
    import torch

    vae.clear_cache()
    frames = [
        vae.decoder(vae.post_quant_conv(frame), feat_cache=vae._feat_map, feat_idx=[0], **({} if number else first))
        for number, frame in enumerate(z.split(1, 2))
    ]
    return torch.cat(frames, 2)
