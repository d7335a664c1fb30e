"""AutoencoderKL, the VAE of several families: how its decode is spread over ranks, and the latents that it takes."""

# B batch, C latent channels, h w latent rows and columns

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from darkroom.parallel.plan import Plan

from .base import Component, Model, Sample

if TYPE_CHECKING:
    import torch

    from darkroom.parallel.spatial import Tiling

VAE = Component(
    module="diffusers.models.autoencoders.autoencoder_kl",
    name="AutoencoderKL",
    plan=Plan(spatial="decoder", whole_rows=("decoder.mid_block.attentions.*",)),
    ranks="vae",
)


class AutoencoderKLModel(Model):
    """A family whose pictures come from it."""

    def tiling(self) -> Tiling:
        return tiling(self.vae)

    def encode_picture(self, picture: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """[1, 3, H, W] in [-1, 1] -> latents as the transformer knows them [1, C, h, w], sampled from the VAE."""
        config = self.vae.config
        latents: torch.Tensor = self.encoder.encode(picture).latent_dist.sample(generator)
        return (latents - config.shift_factor) * config.scaling_factor

    def pack(self, latents: torch.Tensor) -> torch.Tensor:
        """[1, C, h, w], which is the shape in which they go through the steps."""
        return latents

    def decode(self, samples: Sequence[Sample], latents: Sequence[torch.Tensor]) -> torch.Tensor | None:
        import torch

        return self.decode_latents(torch.cat(list(latents)))

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor | None:
        """[B, C, h, w] as the transformer made them -> pictures [B, 3, H, W] on the output rank, None elsewhere."""
        vae = self.vae

        def decode(z: torch.Tensor) -> torch.Tensor:
            picture: torch.Tensor = vae.decode(z, return_dict=False)[0]
            return picture

        z = latents.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        return self.spread_decode(z, decode, decode)


def tiling(vae: Any) -> Tiling:
    """The stock tiled decode's tiles, which overlap by a share of their edge."""
    from darkroom.parallel.spatial import Tiling

    tile = vae.tile_sample_min_size
    stride = tile - int(tile * vae.tile_overlap_factor)
    return Tiling(tile=(tile, tile), stride=(stride, stride), scale=tile // vae.tile_latent_min_size)
