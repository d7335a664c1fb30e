"""The VAEs of stock pipelines whose encode and decode can be spread over ranks: their plans, and their tiles."""

# B batch, C latent channels, f latent frames, h w latent rows and columns; F H W the same of a video

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from darkroom.parallel.plan import Plan

from . import autoencoder_causal, autoencoder_kl, video

if TYPE_CHECKING:
    import torch

    from darkroom.parallel.spatial import Tiling


@dataclass(frozen=True, kw_only=True)
class SpreadableVae:
    """What is known of one class. The functions are given the VAE."""

    plan: Plan
    tiling: Callable[[Any], Tiling]
    encode_tiling: Callable[[Any], Tiling]
    decode_tile: Callable[[Any, torch.Tensor], torch.Tensor] | None = None
    """One tile, where that is not the class's own `decode`: [B, C, f, h, w] -> [B, 3, F, H, W]"""
    finish: Callable[[Any, torch.Tensor], torch.Tensor] | None = None
    """What the class does to tiles once they are one."""


def _decode_wan_tile(vae: Any, z: torch.Tensor) -> torch.Tensor:
    return autoencoder_causal.decode_tile(vae, z, {"first_chunk": True})


_KL = SpreadableVae(plan=autoencoder_kl.VAE.plan, tiling=autoencoder_kl.tiling, encode_tiling=autoencoder_kl.tiling)
SPREADABLE = {
    "AutoencoderKL": _KL,
    "AutoencoderKLFlux2": _KL,
    "AutoencoderKLWan": SpreadableVae(
        plan=video.VAE.plan,
        tiling=autoencoder_causal.tiling,
        encode_tiling=autoencoder_causal.encode_tiling,
        decode_tile=_decode_wan_tile,
        finish=video.finish,
    ),
}
"""By the class's name. Of all others a rank decodes alone."""
