"""AutoencoderKL, the VAE of several families: how its decode is spread over ranks, and the latents that it takes."""

# B batch, C latent channels, h w latent rows and columns

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from darkroom.parallel.plan import Plan

from .base import Component, Model

if TYPE_CHECKING:
    import torch

    from darkroom.parallel.spatial import Tiling

VAE = Component(
    module="diffusers.models.autoencoders.autoencoder_kl",
    name="AutoencoderKL",
    plan=Plan(spatial="decoder", whole_rows=("decoder.mid_block.attentions.*",)),
    ranks="vae",
)


def decode_latents(model: Model, latents: torch.Tensor) -> torch.Tensor | None:
    """[B, C, h, w] as the transformer made them -> pictures [B, 3, H, W] on the output rank, None elsewhere."""
    vae = model.vae

    def decode(z: torch.Tensor) -> torch.Tensor:
        picture: torch.Tensor = vae.decode(z, return_dict=False)[0]
        return picture

    z = latents.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
    return model.spread_decode(z, decode, decode)


def encode_picture(model: Model, picture: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """[1, 3, H, W] in [-1, 1] -> latents as the transformer knows them [1, C, h, w], sampled from the VAE."""
    config = model.vae.config
    latents: torch.Tensor = model.encoder.encode(picture).latent_dist.sample(generator)
    return (latents - config.shift_factor) * config.scaling_factor


def tiling(vae: Any) -> Tiling:
    """The stock tiled decode's tiles, which overlap by a share of their edge."""
    from darkroom.parallel.spatial import Tiling

    tile = vae.tile_sample_min_size
    stride = tile - int(tile * vae.tile_overlap_factor)
    return Tiling(tile=(tile, tile), stride=(stride, stride), scale=tile // vae.tile_latent_min_size)
