"""What a stock pipeline's call is given for a request, by the names that it has for it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from darkroom.configs.capabilities import Capabilities
from darkroom.configs.pictures import load_mask, load_picture
from darkroom.configs.request import Request

from .base import PROMPTS, noise_generator
from .stock_video import LENGTHS, RATES

if TYPE_CHECKING:
    from .vision_language import PictureProcessor


def check_texts(request: Request, processors: Sequence[PictureProcessor]) -> None:
    """Raises RequestError for texts that `processors` would look for a picture for.

    The pipelines clean them first, which makes tokens whole that were escaped.
    """
    if not processors:
        return
    from diffusers.pipelines.kandinsky5.pipeline_kandinsky import prompt_clean

    for processor in processors:
        for param in PROMPTS:
            processor.check(prompt_clean(getattr(request, param)), param)


def arguments(request: Request, capabilities: Capabilities, parameters: Collection[str]) -> dict[str, Any]:
    """`parameters`: those that the call takes."""
    values = {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "height": request.height,
        "width": request.width,
        "max_area": request.width * request.height,  # some scale the size that is asked for to this many pixels
        **dict.fromkeys(LENGTHS, request.num_frames),
        **dict.fromkeys(RATES, request.fps),
        "num_inference_steps": request.num_inference_steps,
        **_guidance(request, capabilities),
        "max_sequence_length": request.max_sequence_length,
        "generator": noise_generator(request),
        "output_type": "pt",
        **_pictures(request),
    }
    return {name: value for name, value in values.items() if name in parameters}


def _guidance(request: Request, capabilities: Capabilities) -> dict[str, float]:
    values: dict[str, float] = {capabilities.guidance_parameter: request.guidance_scale}
    if request.embedded_guidance is not None:
        values["guidance_scale"] = request.embedded_guidance
    return values


def _pictures(request: Request) -> dict[str, Any]:
    if not request.images:
        return {}
    pictures = [load_picture(image).convert("RGB") for image in request.images]
    values = {"image": pictures if len(pictures) > 1 else pictures[0], "strength": request.strength}
    return values if request.mask is None else {**values, "mask_image": load_mask(request.mask)}
