"""What a client may ask of a video, and what becomes of it: OpenAI's fields in, the engine's request out."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import msgspec
from pydantic import BaseModel, ConfigDict, Field

from darkroom.configs.capabilities import Capabilities
from darkroom.configs.errors import RequestError
from darkroom.configs.request import Request, SamplingParams

from .parameters import Integer, Parameters
from .uploads import ReferenceObject

DEFAULT_SECONDS = 4

REFERENCE = "input_reference"
"""The field of the picture that a video begins with."""
_SECONDS = re.compile(r"[1-9][0-9]{0,3}", re.ASCII)


class VideoRequest(Parameters):
    """POST /v1/videos. In a form the picture is a file."""

    nested = (*Parameters.nested, "video_params")

    seconds: str | int | None = Field(
        None, description="length; if neither it nor num_frames is given 4, or as near as the model comes to it"
    )
    input_reference: ReferenceObject | None = Field(
        None, description='the picture to begin with; in JSON {"image_url": "data:image/png;base64,..."}'
    )
    num_frames: Integer | None = Field(None, description="length in frames")
    fps: Integer | None = Field(None, description="frames per second")
    n: int = Field(1, ge=1, le=1, description="one video for each request")

    def resolve(self, capabilities: Capabilities, picture: bytes | None = None) -> VideoJob:
        """Raises `RequestError`."""
        params = self.sampling(
            capabilities,
            images=() if picture is None else (picture,),
            num_frames=self._frames(capabilities, capabilities.fps if self.fps is None else self.fps),
            fps=self.fps,
        )
        request = _resolved(capabilities, self.prompt, params).as_file("mp4")
        return VideoJob(request, str(self.seconds or _rounded(request.num_frames / request.fps)))

    def _frames(self, capabilities: Capabilities, fps: int) -> int | None:
        """The frames of `seconds`, on the model's grid; by default as near as the model comes to it."""
        if self.seconds is None:
            if self.num_frames is not None:
                return self.num_frames
            frames = min(_on_grid(capabilities, DEFAULT_SECONDS * fps), _longest(capabilities))
            return max(frames, capabilities.min_frames)
        if not _SECONDS.fullmatch(str(self.seconds)):
            message = f"Invalid seconds '{str(self.seconds)[:40]}': expected a positive whole number, such as '4'."
            raise RequestError(message, param="seconds")
        frames = _on_grid(capabilities, int(self.seconds) * fps)
        least, most = capabilities.min_frames, capabilities.max_frames
        if not least <= frames <= most:
            raise RequestError(
                f"Invalid seconds '{self.seconds}': at {fps} frames per second these are {frames} frames, and "
                f"{capabilities.family} makes {f'at least {least}' if frames < least else f'at most {most}'}.",
                param="seconds",
            )
        if self.num_frames not in (None, frames):
            message = f"'num_frames' {self.num_frames} contradicts 'seconds' {self.seconds}: these are {frames} frames."
            raise RequestError(message, param="num_frames")
        return frames


@dataclass(frozen=True)
class VideoJob:
    """What is made, and its length in the client's words."""

    request: Request
    seconds: str


class Remix(BaseModel):
    """The same video with another prompt."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    prompt: str = Field(max_length=32_000, description="what the new video shows")

    def resolve(self, source: Request, capabilities: Capabilities) -> Request:
        """The request with all that the source was made with, its seed too, but for the prompt."""
        check_task(capabilities, has_picture=bool(source.images))
        _resolved(capabilities, self.prompt, _as_asked(source, capabilities))  # raises what the model can do no longer
        return msgspec.structs.replace(source, prompt=self.prompt)


def _resolved(capabilities: Capabilities, prompt: str, params: SamplingParams) -> Request:
    return capabilities.resolve(prompt, params, image_names=(REFERENCE,) * len(params.images))


def _as_asked(source: Request, capabilities: Capabilities) -> SamplingParams:
    """Parameters to check a request with that was resolved before."""
    guidance: dict[str, Any] = {"guidance_scale": source.embedded_guidance}
    guidance[capabilities.guidance_parameter] = source.guidance_scale
    cuts_prompts = capabilities.max_sequence_length is not None
    return SamplingParams(
        width=source.width,
        height=source.height,
        images=source.images,
        num_frames=source.num_frames,
        fps=source.fps,
        negative_prompt=source.negative_prompt,
        num_inference_steps=source.num_inference_steps,
        guidance_scale_2=source.guidance_scale_2,
        max_sequence_length=source.max_sequence_length if cuts_prompts else None,
        seed=source.seed,
        **guidance,
    )


def check_task(capabilities: Capabilities, *, has_picture: bool) -> None:
    """Whether the model makes videos of this kind, before the picture is looked at. Raises `RequestError`."""
    if not has_picture and "text-to-video" not in capabilities.tasks:
        raise RequestError(f"{capabilities.family} needs a picture to begin with: '{REFERENCE}'.", param=REFERENCE)
    if has_picture and "image-to-video" not in capabilities.tasks:
        raise RequestError(
            f"{capabilities.family} makes videos from text alone; it takes no '{REFERENCE}'.", param=REFERENCE
        )


def _on_grid(capabilities: Capabilities, frames: int) -> int:
    unit = capabilities.frame_multiple
    return 1 + unit * max(round((frames - 1) / unit), 0)


def _longest(capabilities: Capabilities) -> int:
    unit = capabilities.frame_multiple
    return 1 + unit * ((capabilities.max_frames - 1) // unit)


def _rounded(seconds: float) -> str:
    """Clients read it as a whole number, which a video has at least one of; `num_frames` and `fps` are exact."""
    return str(max(round(seconds), 1))
