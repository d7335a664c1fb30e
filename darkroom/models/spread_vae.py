"""What a stock pipeline takes for its VAE: `decode` and `encode` are shared by the ranks, all else is the VAE's own."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.autoencoders.vae import DecoderOutput

from darkroom.parallel.spatial import SharedEncoder, Tiling

from .stepwise import EndOfCall

if TYPE_CHECKING:
    from .any_diffusers import AnyDiffusers


class SpreadVae(SharedEncoder):
    """For a VAE that every rank holds: pipelines read what they like of it, also where others decode."""

    def __init__(self, model: AnyDiffusers, tiling: Tiling | None) -> None:
        super().__init__(model.vae, model.mesh, model.device, model.vae.dtype, tiling)
        self._model = [model]  # in a list: neither a child nor a parameter
        self._is_planned = model.components["vae"].plan.spatial is not None

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """Some pipelines ask which VAE they have by `isinstance`."""
        return type(self.__dict__["_vae"][0])

    def __getattr__(self, name: str) -> Any:
        """`nn.Module` asks for what it does not hold itself."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_vae"][0], name)

    def to(self, *args: Any, **kwargs: Any) -> SpreadVae:
        """Some pipelines decode in float32, whatever they compute in."""
        self._vae[0].to(*args, **kwargs)
        self.dtype = self._vae[0].dtype
        return self

    def encode(self, x: torch.Tensor, return_dict: bool = True) -> Any:
        encoded = super().encode(x) if self._is_planned else self._vae[0].encode(x)
        return encoded if return_dict else (encoded.latent_dist,)

    def decode(self, z: torch.Tensor, *args: Any, return_dict: bool = True, **options: Any) -> Any:
        """The picture on the output rank; on the others the call has nothing more to do."""

        def whole(latents: torch.Tensor) -> torch.Tensor:
            picture: torch.Tensor = self._vae[0].decode(latents, *args, return_dict=False, **options)[0]
            return picture

        picture = self._spread(z, whole)
        if picture is None:
            raise EndOfCall
        return DecoderOutput(sample=picture) if return_dict else (picture,)

    def _spread(self, z: torch.Tensor, whole: Any) -> torch.Tensor | None:
        if not self._is_planned:
            return whole(z) if self.mesh.rank == 0 else None
        known, vae = self._model[0].known_vae, self._vae[0]
        tile = partial(known.decode_tile, vae) if known.decode_tile else whole
        return self._model[0].spread_decode(z, whole, tile, known.finish and partial(known.finish, vae))
