"""Wan 2.1 and 2.2, image to video: the picture's latents stand beside the video's, as further channels.

2.1 also reads the picture with CLIP, and its video attends to what comes of that. 2.2's small model begins the video
with the picture, as under its other name (`wan.Wan`).
"""

# F frames; C f h w latent channels, frames, rows and columns; T text tokens

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from darkroom.configs.errors import ConfigError
from darkroom.configs.pictures import load_picture
from darkroom.configs.request import Request

from .experts import transformers
from .text_encoders import CLIP_VISION, processor_files
from .wan import Wan, WanSample

if TYPE_CHECKING:
    import torch

_TEXT_TOKENS = 512
"""What the transformer takes for text of its context, whatever else it is given; before them stands the picture."""


class WanImageToVideo(Wan):
    pipelines = ("WanImageToVideoPipeline",)
    capabilities = Wan.capabilities.override(
        {
            "family": "Wan-Image-to-Video",
            "tasks": ("image-to-video",),
            "max_images": 1,
            "image_area": 832 * 480,
        }
    )
    components: ClassVar = {**Wan.components, "image_encoder": CLIP_VISION}
    files = (*Wan.files, processor_files("image_processor"))
    optional = (*Wan.optional, "image_encoder", "image_processor")  # 2.2 has none

    @classmethod
    def processors(cls, folder: Path) -> dict[str, Any]:
        """Pictures are scaled by Pillow on every machine, so that they are the same with and without torchvision."""
        from transformers import CLIPImageProcessorPil

        place = folder / "image_processor"
        if not place.is_dir():
            return {}
        return {"image_processor": CLIPImageProcessorPil.from_pretrained(place, local_files_only=True)}

    @classmethod
    def describe(cls, index: Mapping[str, Any], configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        described = super().describe(index, configs)
        if configs.get("transformer", {}).get("image_dim") and "image_encoder" not in configs:
            raise ConfigError("model_index.json names no image_encoder, and the transformer needs one")
        if index.get("boundary_ratio") is not None:
            described |= {"guidance_scale": 3.5, "guidance_scale_2": 3.5}
        return {**described, "tasks": cls.capabilities.tasks}

    def prepare(self, request: Request) -> WanSample:
        sample = super().prepare(request)
        if self._reads_pictures:
            seen = self._see(request)
            sample.branches = [{**texts, "encoder_hidden_states_image": seen} for texts in sample.branches]
        if not self.pipe.config.expand_timesteps:
            sample.beside = self._beside(request)
        return sample

    def encode(self, prompt: str, max_sequence_length: int) -> dict[str, Any]:
        """Padded further, as far as a transformer needs it that also attends to a picture."""
        from torch.nn.functional import pad

        texts = super().encode(prompt, max_sequence_length)
        embeds = texts["encoder_hidden_states"]
        if not self._reads_pictures:
            return texts
        return {"encoder_hidden_states": pad(embeds, (0, 0, 0, _TEXT_TOKENS - embeds.shape[1]))}

    @property
    def _reads_pictures(self) -> bool:
        return transformers(self.pipe)[0].config.image_dim is not None

    def _see(self, request: Request) -> torch.Tensor:
        """What CLIP makes of the picture, whatever the video's size. [1, T, width]"""
        picture = load_picture(request.images[0]).convert("RGB")
        embeds: torch.Tensor = self.pipe.encode_image(picture, self.device)
        return embeds.to(transformers(self.pipe)[0].dtype)

    def _beside(self, request: Request) -> torch.Tensor:
        """A mask of the picture's frame, and the latents of a video of it and grey [1, 4 + C, f, h, w].

        The mask has a channel for each of the frames that one of the latents stands for.
        """
        import torch

        picture = self.picture(request)
        empty = torch.zeros_like(picture).expand(-1, -1, request.num_frames - 1, -1, -1)
        latents = self.encode_video(torch.cat([picture, empty], 2))
        mask = latents.new_zeros(1, self.vae.config.scale_factor_temporal, *latents.shape[2:])
        mask[:, :, 0] = 1
        return torch.cat([mask, latents], 1)
