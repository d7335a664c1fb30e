"""Qwen-Image-Edit, its successors for several pictures, and Qwen-Image-Layered, over Qwen-Image's own transformer.

The latents of the pictures that come with a request stand behind those that are drawn, as clean tokens
(https://arxiv.org/abs/2508.02324, section 5.2; layers: https://arxiv.org/abs/2512.15603).
"""

# L layers, C latent channels, h w latent rows and columns, H W rows and columns of a picture

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from darkroom.configs.capabilities import fit_area
from darkroom.configs.errors import RequestError
from darkroom.configs.pictures import load_picture
from darkroom.configs.request import Request

from .base import PROMPTS, Model, Sample, noise_generator
from .language_models import QWEN2_5_VL_WITH_VISION
from .qwen_image import QwenImage
from .text_encoders import processor_files

if TYPE_CHECKING:
    import torch
    from PIL import Image


class QwenImageEdit(QwenImage):
    pipelines = ("QwenImageEditPipeline",)
    capabilities = QwenImage.capabilities.override(
        {"family": "Qwen-Image-Edit", "tasks": ("edit",), "max_sequence_length": None}
    )
    components: ClassVar = {**QwenImage.components, "text_encoder": QWEN2_5_VL_WITH_VISION}
    files = (*Model.files, processor_files("processor"))

    def __init__(self, *args: Any, **options: Any) -> None:
        from .vision_language import mark_pictures

        super().__init__(*args, **options)
        mark_pictures(self.pipe.text_encoder)

    @classmethod
    def processors(cls, folder: Path) -> dict[str, Any]:
        from .vision_language import load_processor

        return {"processor": load_processor(folder / "processor")}

    def prepare(self, request: Request) -> Sample:
        pictures = [load_picture(image).convert("RGB") for image in request.images]
        sizes = [fit_area(picture.size, self.options.image_area) for picture in pictures]
        grids = [self.grid(request.width, request.height), *(self.grid(*size) for size in sizes)]
        seen = self.seen(pictures)
        room = self._room(grids)
        branches = [
            {**self._read(param, prompt, seen, room), "img_shapes": grids}
            for param, prompt in zip(PROMPTS, self.prompts(request), strict=False)
        ]
        pixels = [self._pixels(picture, size) for picture, size in zip(pictures, sizes, strict=True)]
        with self.encoder.ahead(pixels):
            return _with_pictures(self, request, branches, self.arranged(pixels))

    def seen(self, pictures: Sequence[Image.Image]) -> Any:
        """What the text encoder sees of them."""
        return self.resized(pictures[0], self.options.image_area)

    def arranged(self, pixels: list[torch.Tensor]) -> Any:
        """The pictures as the pipeline's `prepare_latents` takes them."""
        return pixels[0]

    def resized(self, picture: Image.Image, area: int) -> Image.Image:
        width, height = fit_area(picture.size, area)
        resized: Image.Image = self.pipe.image_processor.resize(picture, height, width)
        return resized

    def _room(self, grids: Sequence[tuple[int, int, int]]) -> int:
        """How many tokens of text there are positions for: behind half of the longest edge's."""
        positions = len(self.pipe.transformer.pos_embed.pos_freqs)
        return positions - max(max(rows, columns) // 2 for _, rows, columns in grids)

    def _read(self, param: str, prompt: str, seen: Any, room: int) -> dict[str, Any]:
        """The prompt of the field `param` with the pictures: as much of its beginning as there is room for."""
        self.pipe.processor.check(prompt, param)
        prompt = self.pipe.processor.beginning(prompt, room)
        while (over := (embeds := self._embed(prompt, seen)).shape[1] - room) > 0:  # with the pictures' own tokens
            if not (prompt := self.pipe.processor.without_end(prompt, over)):
                raise RequestError("The pictures take all the positions that there are for text.", param="image")
        return {"encoder_hidden_states": embeds}

    def _embed(self, prompt: str, seen: Any) -> torch.Tensor:
        embeds: torch.Tensor = self.pipe.encode_prompt(image=seen, prompt=prompt, device=self.device)[0]
        return embeds

    def _pixels(self, picture: Image.Image, size: tuple[int, int]) -> torch.Tensor:
        """[1, 3, 1, H, W] in [-1, 1]"""
        width, height = size
        pixels: torch.Tensor = self.pipe.image_processor.preprocess(picture, height, width)
        return pixels.unsqueeze(2)


class QwenImageEditPlus(QwenImageEdit):
    """2509 and later: several pictures, of which the text encoder sees small copies."""

    pipelines = ("QwenImageEditPlusPipeline",)
    capabilities = QwenImageEdit.capabilities.override(
        {"family": "Qwen-Image-Edit-Plus", "max_images": 4, "num_inference_steps": 40}
    )

    def seen(self, pictures: Sequence[Image.Image]) -> Any:
        return [self.resized(picture, self.options.condition_area) for picture in pictures]

    def arranged(self, pixels: list[torch.Tensor]) -> Any:
        return pixels


class QwenImageLayered(QwenImage):
    """Takes a picture apart into transparent layers, which it draws all at once, and the picture itself with them."""

    pipelines = ("QwenImageLayeredPipeline",)
    capabilities = QwenImage.capabilities.override(
        {
            "family": "Qwen-Image-Layered",
            "tasks": ("layered",),
            "default_size": (640, 640),
            "image_area": 640 * 640,
            "layers": 4,
            "max_layers": 16,
        }
    )
    unused = ("processor",)  # it writes captions for requests without a prompt, which there are none of
    guide = Model.guide  # the stock pipeline keeps no norm here

    def prepare(self, request: Request) -> Sample:
        grid = self.grid(request.width, request.height)
        grids = [grid] * (request.layers + 2)  # all layers together, each layer, and the picture
        branches = [{**self._encode(request, prompt), "img_shapes": grids} for prompt in self.prompts(request)]
        picture = load_picture(request.images[0]).convert("RGBA")
        picture = self.pipe.image_processor.resize(picture, request.height, request.width)
        pixels = self.pipe.image_processor.preprocess(picture, request.height, request.width).unsqueeze(2)
        return _with_pictures(self, request, branches, pixels, request.layers)

    def schedule(self, request: Request) -> Any:
        """Shifted by the picture's edge, beside one of 256 pixels."""
        import numpy as np

        image_tokens = math.prod(self.grid(request.width, request.height))
        sigmas = np.linspace(1.0, 0, request.num_inference_steps + 1)[:-1]
        return self.timed_scheduler(None, sigmas=sigmas, mu=(image_tokens / 256) ** 0.5)

    def transformer_options(self, batch_size: int) -> dict[str, Any]:
        import torch

        return {"additional_t_cond": torch.zeros(batch_size, dtype=torch.long, device=self.device)}

    def decode(self, samples: Sequence[Sample], latents: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """[B, L, 4, H, W]: the layers, without what they make together."""
        import torch

        request, pipe = samples[0].request, self.pipe
        packed = torch.cat(list(latents))
        z = pipe._unpack_latents(packed, request.height, request.width, request.layers, pipe.vae_scale_factor)
        layers = z[:, :, 1:].transpose(1, 2).flatten(0, 1).unsqueeze(2)  # [B L, C, 1, h, w]
        decoded = self.decode_pictures(layers)
        return None if decoded is None else decoded.unflatten(0, (len(samples), request.layers))

    def pictures(self, decoded: torch.Tensor) -> list[Image.Image]:
        return super().pictures(decoded[0])


def _with_pictures(
    model: QwenImage, request: Request, branches: list[dict[str, Any]], pictures: Any, *layers: int
) -> Sample:
    """The sample of a request whose pictures stand behind what is drawn, as the pipelines' `prepare_latents` encodes
    them."""
    texts = branches[0]["encoder_hidden_states"]
    latents, context = model.pipe.prepare_latents(
        pictures,
        1,
        model.channels,
        request.height,
        request.width,
        *layers,
        texts.dtype,
        model.device,
        noise_generator(request),
    )
    return Sample(
        request=request,
        latents=latents,
        context=context,
        scheduler=model.schedule(request),
        branches=branches,
        text_tokens=texts.shape[1],
        image_tokens=latents.shape[1],
    )
