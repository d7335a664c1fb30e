"""What a picture is asked for with: `SamplingParams` as a caller writes it, `Request` with every default filled in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import msgspec

from .errors import RequestError

OutputFormat = Literal["png", "jpeg", "webp"]
_MAX_EDGE: dict[OutputFormat, int] = {"jpeg": 65_535, "webp": 16_383}
"""What the file formats can hold."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to sample. None is the model card's default, declared in the model's `Capabilities`."""

    width: int | None = None
    """Pixels."""
    height: int | None = None
    """Pixels."""
    num_inference_steps: int | None = None
    true_cfg_scale: float | None = None
    """Strength of classifier-free guidance, for models that call it so; 1 or less switches it off: half the work."""
    guidance_scale: float | None = None
    """The same, for the other models."""
    negative_prompt: str | None = None
    max_sequence_length: int | None = None
    """Prompt tokens after which the text is cut off."""
    seed: int | None = None
    """Picture i of n is drawn with `seed + i`. None draws a random seed."""
    n: int = 1
    """How many pictures."""
    quality: Literal["low", "medium", "high"] | None = None
    """Sets the number of steps where `num_inference_steps` does not."""


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One picture, resolved and checked: what the engine and its workers see."""

    prompt: str
    negative_prompt: str
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    """Strength of classifier-free guidance; 1 or less: none."""
    max_sequence_length: int
    seed: int
    output_format: OutputFormat = "png"
    output_compression: int = 100
    """0 to 100, the quality of JPEG and WebP."""
    partial_images: int = 0
    """How many previews are decoded on the way."""

    def as_file(self, output_format: OutputFormat, output_compression: int = 100) -> Request:
        """The request for a file of this format. Raises RequestError for a picture that is too long for it."""
        edge, limit = max(self.width, self.height), _MAX_EDGE.get(output_format)
        if limit and edge > limit:
            raise RequestError(
                f"Invalid size {self.width}x{self.height}: {output_format} files hold at most {limit} pixels a side; "
                "use png.",
                param="size",
            )
        return msgspec.structs.replace(self, output_format=output_format, output_compression=output_compression)

    def picture(self, index: int) -> Request:
        """The request for picture `index` of n. Seeds wrap at 64 bits, as the generator's do."""
        return msgspec.structs.replace(self, seed=(self.seed + index) % 2**64)
