"""The fields of the three routes that make pictures: what each may be, and the request that comes of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

import msgspec
from pydantic import BaseModel, ConfigDict, Field

from darkroom.configs.capabilities import Capabilities
from darkroom.configs.errors import RequestError
from darkroom.configs.request import Request, SamplingParams, Task

from .body import validate
from .form import from_text, parse_object
from .uploads import Pictures

Quality = Literal["low", "medium", "high"]
Integer = Annotated[int, Field(ge=-(2**63), le=2**64)]
"""Further bounds are the model's; these keep a number of thousands of digits out of messages."""

_ALIASES = {
    "steps": "num_inference_steps", "infer_steps": "num_inference_steps", "sample_steps": "num_inference_steps",
    "cfg": "guidance_scale", "cfg_scale": "guidance_scale", "txt_cfg": "guidance_scale",
    "denoising_strength": "strength", "i2i_denoise_strength": "strength",
}  # fmt: skip
_NESTED = ("extra_body", "extra_params")
QUALITIES: dict[str, Quality | None] = {
    "auto": None, "low": "low", "medium": "medium", "standard": "medium",
    "high": "high", "hd": "high", "xhigh": "high", "max": "high",
}  # fmt: skip
EDITING: tuple[Task, ...] = ("edit", "layered", "image-to-image", "inpaint")


def _allow_null(schema: dict[str, Any]) -> None:
    for name, field in schema["properties"].items():
        if name not in schema.get("required", ()) and "anyOf" not in field:
            common = {key: field.pop(key) for key in ("title", "description", "default") if key in field}
            schema["properties"][name] = {"anyOf": [field, {"type": "null"}], **common}


class ImageRequest(BaseModel):
    """What the routes share. An explicit null is the default: `read` leaves it out."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, json_schema_extra=_allow_null)

    prompt: str = Field(max_length=32_000, description="what the picture shows")
    model: str | None = Field(None, description="the served model, if not given")
    n: int = Field(1, ge=1, le=10, description="how many pictures; picture i is drawn with seed + i")
    size: str = Field("auto", description="'WIDTHxHEIGHT', or 'auto' for the model's own, or the first picture's")
    width: Integer | None = Field(None, description="pixels; another spelling of size")
    height: Integer | None = Field(None, description="pixels; another spelling of size")
    quality: Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"] = Field(
        "auto", description="sets the number of steps where num_inference_steps does not"
    )
    background: Literal["auto", "opaque", "transparent"] = Field(
        "auto", description="transparent for models that make layers, opaque for all others"
    )
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: int = Field(100, ge=0, le=100, description="the quality of JPEG and WebP")
    response_format: Literal["b64_json", "url"] = Field("b64_json", description="'url' can be fetched for a while")
    user: str | None = Field(None, description="without effect")
    safety_identifier: str | None = Field(None, description="without effect")
    negative_prompt: str | None = Field(None, max_length=32_000, description="what the picture should not show")
    num_inference_steps: Integer | None = Field(None, description="denoising steps")
    true_cfg_scale: float | None = Field(None, description="strength of classifier-free guidance")
    guidance_scale: float | None = Field(None, description="the guidance input of guidance-distilled models")
    guidance_scale_2: float | None = Field(None, description="the same for the second transformer of models with two")
    strength: float | None = Field(None, description="how far a picture is taken back to noise, above 0 to 1")
    layers: Integer | None = Field(None, description="how many layers a picture is taken apart into")
    seed: Integer | None = Field(None, description="64 bits; the same seed gives the same picture; else random")
    max_sequence_length: Integer | None = Field(None, description="prompt tokens after which the text is cut off")

    @classmethod
    def read(cls, body: dict[str, Any], *, is_form: bool = False) -> Self:
        """The members of `body` and of a literal `extra_body` or `extra_params` in it. Raises `RequestError`."""
        values: dict[str, Any] = {}
        for source, members in _sources(body, is_form).items():
            if not isinstance(members, dict | None):
                raise RequestError(f"'{source}' should be an object.", param=source, code="invalid_type")
            given: dict[str, Any] = members or {}
            for key, value in given.items():
                name = _ALIASES.get(key, key)
                if name in cls.model_fields:
                    if value is None:
                        continue
                    if is_form and isinstance(value, str):
                        value = from_text(cls, name, value)
                if name in values and (isinstance(value, list | dict) or value != values[name]):
                    raise RequestError(f"'{key[:80]}' contradicts another spelling of it.", param=name[:80])
                values[name] = value
        return validate(cls, values)

    def resolve(self, capabilities: Capabilities, pictures: Pictures) -> Request:
        """The request for the first picture. Raises `RequestError`."""
        if self.output_compression < 100 and self.output_format == "png":
            message = "'output_compression' is for jpeg and webp: png loses nothing."
            raise RequestError(message, param="output_compression")
        width, height = self._size(capabilities)
        params = SamplingParams(
            width=width,
            height=height,
            images=pictures.images,
            mask=pictures.mask,
            quality=QUALITIES[self.quality],
            negative_prompt=self.negative_prompt,
            num_inference_steps=self.num_inference_steps,
            true_cfg_scale=self.true_cfg_scale,
            guidance_scale=self.guidance_scale,
            guidance_scale_2=self.guidance_scale_2,
            max_sequence_length=self.max_sequence_length,
            strength=self.strength,
            layers=self.layers,
            seed=self.seed,
        )
        request = capabilities.resolve(self.prompt, params)
        self._check_background(request, capabilities)
        return request.as_file(self.output_format, self.output_compression)

    def _size(self, capabilities: Capabilities) -> tuple[int | None, int | None]:
        width, height = capabilities.parse_size(self.size)
        for name, edge, other in (("width", width, self.width), ("height", height, self.height)):
            if edge is not None and other is not None and edge != other:
                raise RequestError(f"'{name}' {other} contradicts the size '{self.size}'.", param=name)
        return width or self.width, height or self.height

    def _check_background(self, request: Request, capabilities: Capabilities) -> None:
        made = background_of(request)
        if self.background not in ("auto", made):
            raise RequestError(
                f"For this request {capabilities.family} makes {made} pictures, not {self.background} ones.",
                param="background",
            )


class StreamedRequest(ImageRequest):
    """Of the routes that can answer with events."""

    moderation: Literal["auto", "low"] = Field("auto", description="without effect")
    stream: bool = Field(False, description="answer with server-sent events")
    partial_images: int = Field(0, ge=0, le=3, description="previews on the way, with stream")
    complexity: None = Field(None, description="not supported")
    frame_count: None = Field(None, description="not supported")
    frame_duration_ms: None = Field(None, description="not supported")
    svg: None = Field(None, description="not supported")

    def resolve(self, capabilities: Capabilities, pictures: Pictures) -> Request:
        if self.partial_images and not self.stream:
            raise RequestError("'partial_images' needs 'stream': true.", param="partial_images")
        if self.partial_images and not capabilities.previews:
            raise RequestError(f"{capabilities.family} shows no previews.", param="partial_images")
        if self.stream and self.response_format == "url":
            raise RequestError(
                "Events hold pictures as b64_json: leave out 'stream' or ask for 'b64_json'.", param="response_format"
            )
        request = super().resolve(capabilities, pictures)
        return msgspec.structs.replace(request, partial_images=self.partial_images)


class GenerationRequest(StreamedRequest):
    """POST /v1/images/generations"""

    style: None = Field(None, description="not supported")

    def resolve(self, capabilities: Capabilities, pictures: Pictures) -> Request:
        _check_tasks(capabilities, ("text-to-image",))
        return super().resolve(capabilities, pictures)


class EditRequest(StreamedRequest):
    """POST /v1/images/edits, the JSON form. In a form the pictures are files."""

    images: list[dict[str, Any]] | None = Field(
        None,
        min_length=1,
        max_length=16,
        description='JSON only: the pictures, each as {"image_url": "data:image/png;base64,..."}',
    )
    mask: dict[str, Any] | None = Field(None, description="JSON only: a reference like those of images")
    input_fidelity: Literal["high", "low"] | None = Field(None, description="without effect")
    markup: None = Field(None, description="not supported")

    def resolve(self, capabilities: Capabilities, pictures: Pictures) -> Request:
        _check_tasks(capabilities, EDITING)
        return super().resolve(capabilities, pictures)


class VariationRequest(ImageRequest):
    """POST /v1/images/variations: the picture drawn over, from `strength` of its noise."""

    prompt: str = Field("a picture", max_length=32_000, description="what the variation should show")

    def resolve(self, capabilities: Capabilities, pictures: Pictures) -> Request:
        _check_tasks(capabilities, ("image-to-image",))
        return super().resolve(capabilities, pictures)


def background_of(request: Request) -> Literal["opaque", "transparent"]:
    return "transparent" if request.task == "layered" else "opaque"


def _sources(body: dict[str, Any], is_form: bool) -> dict[str, Any]:
    nested = {name: body[name] for name in _NESTED if name in body}
    if is_form:
        nested = {name: parse_object(x, name) if isinstance(x, str) else x for name, x in nested.items()}
    return {"": {name: value for name, value in body.items() if name not in _NESTED}, **nested}


def _check_tasks(capabilities: Capabilities, needed: tuple[Task, ...]) -> None:
    """Raises `RequestError` that says what would work, where the model does none of the tasks."""
    if set(needed) & set(capabilities.tasks):
        return
    able = set(capabilities.tasks)
    if "text-to-image" in able:
        instead = "it makes pictures from text: POST /v1/images/generations"
    elif able & set(EDITING):
        instead = "it changes the pictures that it is sent: POST /v1/images/edits"
    else:
        instead = "it makes videos: POST /v1/videos"
    raise RequestError(f"{capabilities.family} has no {' or '.join(needed)}; {instead}.", param="model")
