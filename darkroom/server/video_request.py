"""What a client may ask of a video, and what becomes of it: OpenAI's fields in, the engine's request out."""

from __future__ import annotations

import asyncio
import re
from base64 import b64decode
from dataclasses import dataclass
from typing import Any

import msgspec
from pydantic import BaseModel, ConfigDict, Field

from darkroom.configs.capabilities import Capabilities
from darkroom.configs.errors import RequestError
from darkroom.configs.pictures import load_picture
from darkroom.configs.request import Request, SamplingParams

from .body import validate
from .fields import Integer
from .form import from_text

DEFAULT_SECONDS = 4

_ALIASES = {
    "steps": "num_inference_steps", "infer_steps": "num_inference_steps", "sample_steps": "num_inference_steps",
    "cfg": "guidance_scale", "cfg_scale": "guidance_scale", "txt_cfg": "guidance_scale",
    "video_frames": "num_frames", "target_video_length": "num_frames", "num_outputs_per_prompt": "n",
}  # fmt: skip
_NESTED = ("extra_body", "extra_params", "video_params")
_SECONDS = re.compile(r"[1-9][0-9]{0,3}", re.ASCII)
_DATA_URL = re.compile(r"data:image/[a-z0-9.+-]+;base64,", re.ASCII | re.IGNORECASE)


class Reference(BaseModel):
    """The picture that a video begins with, in JSON."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    image_url: str | None = Field(None, description="a data: URL")
    file_id: None = Field(None, description="not supported")


class VideoRequest(BaseModel):
    """An explicit null is the default: `read` leaves it out."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    prompt: str = Field(max_length=32_000, description="what the video shows")
    model: str | None = Field(None, description="the served model, if not given")
    seconds: str | int | None = Field(None, description="length; 4, if neither it nor num_frames is given")
    size: str = Field("auto", description="'WIDTHxHEIGHT', or 'auto' for the model's own")
    input_reference: bytes | Reference | None = Field(None, description="the picture that the video begins with")
    negative_prompt: str | None = Field(None, max_length=32_000, description="what the video should not show")
    num_inference_steps: Integer | None = Field(None, description="denoising steps")
    guidance_scale: float | None = Field(None, description="strength of guidance")
    true_cfg_scale: float | None = Field(None, description="strength of guidance, for models that call it so")
    guidance_scale_2: float | None = Field(
        None, ge=0, le=100, description="the same for the second transformer of models with two"
    )
    num_frames: Integer | None = Field(None, description="length in frames")
    fps: Integer | None = Field(None, description="frames per second")
    width: Integer | None = Field(None, description="pixels; with height in place of size")
    height: Integer | None = Field(None, description="pixels; with width in place of size")
    max_sequence_length: Integer | None = Field(None, description="prompt tokens after which the text is cut off")
    seed: Integer | None = Field(None, description="64 bits; the same seed gives the same video; random, if not given")
    n: int = Field(1, ge=1, le=1, description="one video for each request")
    user: str | None = Field(None, description="without effect")
    safety_identifier: str | None = Field(None, description="without effect")

    @classmethod
    def read(cls, body: dict[str, Any], *, is_form: bool = False) -> VideoRequest:
        """The members of `body` and of the objects in it that hold extensions. Raises `RequestError`.

        In a form numbers are text, and objects may be JSON.
        """
        values: dict[str, Any] = {}
        top = {key: value for key, value in body.items() if key not in _NESTED}
        for source, members in {"": top, **{name: body.get(name) for name in _NESTED}}.items():
            members = _object(members) if is_form else members
            if not isinstance(members, dict | None):
                raise RequestError(f"'{source}' should be an object.", param=source, code="invalid_type")
            for key, value in (members or {}).items():
                name = _ALIASES.get(key, key)
                if value is None and name in cls.model_fields:
                    continue
                if name in values and (isinstance(value, list | dict) or value != values[name]):
                    raise RequestError(f"'{key[:80]}' contradicts another spelling of it.", param=name[:80])
                values[name] = value
        if is_form:
            values = {name: cls._typed(name, value) for name, value in values.items()}
        return validate(cls, values)

    @classmethod
    def _typed(cls, name: str, value: Any) -> Any:
        """A form's text as what the field is."""
        if name == "input_reference":
            return _object(value)
        if not isinstance(value, str) or name not in cls.model_fields or name == "seconds":  # which is text in JSON too
            return value
        return from_text(cls, name, value)

    async def resolve(self, capabilities: Capabilities) -> VideoJob:
        """Raises `RequestError`."""
        picture = await self._picture()
        _check_picture(capabilities, picture)
        width, height = self._size(capabilities)
        fps = capabilities.fps if self.fps is None else self.fps
        params = SamplingParams(
            width=width,
            height=height,
            images=() if picture is None else (picture,),
            num_frames=self._frames(capabilities, fps),
            fps=self.fps,
            negative_prompt=self.negative_prompt,
            num_inference_steps=self.num_inference_steps,
            true_cfg_scale=self.true_cfg_scale,
            guidance_scale=self.guidance_scale,
            guidance_scale_2=self.guidance_scale_2,
            max_sequence_length=self.max_sequence_length,
            seed=self.seed,
        )
        request = capabilities.resolve(self.prompt, params).as_file("mp4")
        return VideoJob(request, str(self.seconds or _rounded(request.num_frames / request.fps)))

    async def _picture(self) -> bytes | None:
        match self.input_reference:
            case Reference(image_url=url):
                picture = _from_data_url(url)
            case picture:
                pass
        if picture is not None:  # whole: a broken file is told now, and not in minutes when its turn has come
            await asyncio.to_thread(load_picture, picture, "input_reference")
        return picture

    def _size(self, capabilities: Capabilities) -> tuple[int | None, int | None]:
        width, height = capabilities.parse_size(self.size)
        for name, value, own in (("width", width, self.width), ("height", height, self.height)):
            if None not in (value, own) and value != own:
                raise RequestError(f"'{name}' {own} contradicts 'size' {self.size}.", param=name)
        return width or self.width, height or self.height

    def _frames(self, capabilities: Capabilities, fps: int) -> int | None:
        """The frames of `seconds`, on the model's grid. A model whose videos are all shorter makes its longest."""
        if self.seconds is None:
            if self.num_frames is not None:
                return self.num_frames
            return min(_on_grid(capabilities, DEFAULT_SECONDS * fps), _longest(capabilities))
        if not _SECONDS.fullmatch(str(self.seconds)):
            message = f"Invalid seconds '{str(self.seconds)[:40]}': expected a positive whole number, such as '4'."
            raise RequestError(message, param="seconds")
        frames = _on_grid(capabilities, int(self.seconds) * fps)
        if frames > capabilities.max_frames:
            raise RequestError(
                f"Invalid seconds '{self.seconds}': at {fps} frames per second these are {frames} frames, and "
                f"{capabilities.family} makes at most {capabilities.max_frames}.",
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
        _check_picture(capabilities, source.images[0] if source.images else None)
        guidance: dict[str, Any] = {capabilities.guidance_parameter: source.guidance_scale}
        params = SamplingParams(
            width=source.width,
            height=source.height,
            images=source.images,
            num_frames=source.num_frames,
            fps=source.fps,
            negative_prompt=source.negative_prompt,
            num_inference_steps=source.num_inference_steps,
            guidance_scale_2=source.guidance_scale_2,
            max_sequence_length=source.max_sequence_length,
            seed=source.seed,
            **guidance,
        )
        return capabilities.resolve(self.prompt, params).as_file("mp4")


def _object(value: Any) -> Any:
    """What a form has as JSON text."""
    try:
        return msgspec.json.decode(value) if isinstance(value, str) and value.startswith("{") else value
    except (msgspec.DecodeError, RecursionError):
        return value


def _check_picture(capabilities: Capabilities, picture: bytes | None) -> None:
    param = "input_reference"
    if picture is None and "text-to-video" not in capabilities.tasks:
        raise RequestError(f"{capabilities.family} needs a picture to begin with: '{param}'.", param=param)
    if picture is not None and "image-to-video" not in capabilities.tasks:
        raise RequestError(f"{capabilities.family} makes videos from text alone; it takes no '{param}'.", param=param)


def _from_data_url(url: str | None) -> bytes:
    param = "input_reference"
    if url is None:
        raise RequestError(f"'{param}' should have an 'image_url'.", param=param)
    if not (match := _DATA_URL.match(url)):
        message = f"'{param}' is taken as a data: URL such as 'data:image/png;base64,...', or as a file of a form."
        raise RequestError(message, param=param)
    try:
        return b64decode(url[match.end() :], validate=True)
    except ValueError:
        raise RequestError(f"'{param}' is not valid base64.", param=param) from None


def _on_grid(capabilities: Capabilities, frames: int) -> int:
    unit = capabilities.frame_multiple
    return 1 + unit * max(round((frames - 1) / unit), 0)


def _longest(capabilities: Capabilities) -> int:
    unit = capabilities.frame_multiple
    return 1 + unit * ((capabilities.max_frames - 1) // unit)


def _rounded(seconds: float) -> str:
    """Clients read it as a whole number, which a video has at least one of; `num_frames` and `fps` are exact."""
    return str(max(round(seconds), 1))
