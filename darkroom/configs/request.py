"""What a picture is asked for with: `SamplingParams` as a caller writes it, `Request` with every default filled in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import msgspec

from .errors import RequestError

OutputFormat = Literal["png", "jpeg", "webp", "mp4"]
Task = Literal["text-to-image", "image-to-image", "inpaint", "edit", "layered", "text-to-video", "image-to-video"]
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
    """The same, for the other models; where a model has both, guidance as an input of its transformer."""
    negative_prompt: str | None = None
    max_sequence_length: int | None = None
    """Prompt tokens after which the text is cut off."""
    images: tuple[bytes, ...] = ()
    """PNG, JPEG or WebP files: what is edited, or begun from."""
    mask: bytes | None = None
    """A picture of the first image's size: what is transparent in it is drawn anew, or without alpha what is white."""
    strength: float | None = None
    """How far a picture is taken back to noise before it is drawn anew: above 0, to 1, which leaves nothing of it."""
    layers: int | None = None
    """How many layers a picture is taken apart into."""
    num_frames: int | None = None
    fps: int | None = None
    """Frames per second of a video's file."""
    guidance_scale_2: float | None = None
    """Strength of guidance in the low-noise steps, for models that have a second transformer for them."""
    seed: int | None = None
    """Picture i of n is drawn with `seed + i`. None draws a random seed."""
    n: int = 1
    """How many pictures."""
    quality: Literal["low", "medium", "high"] | None = None
    """Sets the number of steps where `num_inference_steps` does not."""


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One picture, resolved and checked: what the engine and its workers see."""

    task: Task = "text-to-image"
    prompt: str
    negative_prompt: str
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    """Strength of classifier-free guidance, which the model's `no_guidance` switches off."""
    max_sequence_length: int
    seed: int
    images: tuple[bytes, ...] = ()
    mask: bytes | None = None
    strength: float = 1.0
    layers: int = 0
    num_frames: int = 1
    fps: int = 0
    guidance_scale_2: float | None = None
    embedded_guidance: float | None = None
    """Strength of guidance that is an input of the transformer, for models that have it beside the other kind."""
    output_format: OutputFormat = "png"
    output_compression: int = 100
    """0 to 100, the quality of JPEG and WebP."""
    stills: bool = False
    """Whether a thumbnail and a spritesheet come with a video."""
    partial_images: int = 0
    """How many previews are decoded on the way."""

    @property
    def num_bytes(self) -> int:
        """Of the pictures that came with the request."""
        return sum(len(image) for image in self.images) + len(self.mask or b"")

    @property
    def first_step(self) -> int:
        """The step of the schedule at which the picture's noise fits `strength`, as diffusers' pipelines round it."""
        steps = self.num_inference_steps
        return int(max(steps - min(steps * self.strength, steps), 0))

    def as_file(self, output_format: OutputFormat, output_compression: int = 100) -> Request:
        """The request for a file of this format; a video in a picture's format is one file for each frame.

        Raises RequestError for what the format cannot hold.
        """
        if output_format == "mp4" and not self.fps:
            raise RequestError("The model makes pictures, not videos: use png, jpeg or webp.", param="output_format")
        if output_format == "jpeg" and self.task == "layered":
            raise RequestError(
                "Layers are transparent, which jpeg files are not: use png or webp.", param="output_format"
            )
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
