"""The fields of the three routes that make pictures: what each may be, and the request that comes of them."""

from __future__ import annotations

from typing import ClassVar, Literal

import msgspec
from pydantic import Field

from darkroom.configs.capabilities import Capabilities
from darkroom.configs.errors import RequestError
from darkroom.configs.request import Request, Task

from .parameters import Integer, Parameters
from .uploads import MOST_IMAGES, Pictures, ReferenceObject, Sent

Quality = Literal["low", "medium", "high"]
QUALITIES: dict[str, Quality | None] = {
    "auto": None, "low": "low", "medium": "medium", "standard": "medium",
    "high": "high", "hd": "high", "xhigh": "high", "max": "high",
}  # fmt: skip
EDITING: tuple[Task, ...] = ("edit", "layered", "image-to-image", "inpaint")


class ImageRequest(Parameters):
    """What the routes share."""

    n: int = Field(1, ge=1, le=10, description="how many pictures; picture i is drawn with seed + i")
    quality: Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"] = Field(
        "auto", description="sets the number of steps where num_inference_steps does not"
    )
    background: Literal["auto", "opaque", "transparent"] = Field(
        "auto", description="transparent for models that make layers, opaque for all others"
    )
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: int = Field(100, ge=0, le=100, description="the quality of JPEG and WebP")
    response_format: Literal["b64_json", "url"] = Field("b64_json", description="'url' can be fetched for a while")
    strength: float | None = Field(None, description="how far a picture is taken back to noise, above 0 to 1")
    layers: Integer | None = Field(None, description="how many layers a picture is taken apart into")

    tasks: ClassVar[tuple[Task, ...]]
    """What the route is for: one of these the model must do."""

    def check(self, capabilities: Capabilities, sent: Sent) -> None:
        """Whether it is for this model at all, before any picture is looked at. Raises `RequestError`."""
        _check_tasks(capabilities, self.tasks)
        capabilities.task(sent.names, has_mask=sent.mask is not None)

    def resolve(self, capabilities: Capabilities, pictures: Pictures) -> Request:
        """The request for the first picture. Raises `RequestError`."""
        if self.output_compression < 100 and self.output_format == "png":
            message = "'output_compression' is for jpeg and webp: png loses nothing."
            raise RequestError(message, param="output_compression")
        params = self.sampling(
            capabilities,
            images=pictures.images,
            mask=pictures.mask,
            quality=QUALITIES[self.quality],
            strength=self.strength,
            layers=self.layers,
        )
        request = capabilities.resolve(self.prompt, params, image_names=pictures.names)
        self._check_background(request, capabilities)
        return request.as_file(self.output_format, self.output_compression)

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

    tasks = ("text-to-image",)

    style: None = Field(None, description="not supported")


class EditRequest(StreamedRequest):
    """POST /v1/images/edits, the JSON form. In a form the pictures are files."""

    tasks = EDITING

    images: list[ReferenceObject] | None = Field(
        None,
        min_length=1,
        max_length=MOST_IMAGES,
        description='JSON only: the pictures, each as {"image_url": "data:image/png;base64,..."}',
    )
    mask: ReferenceObject | None = Field(None, description="JSON only: a reference like those of images")
    input_fidelity: Literal["high", "low"] | None = Field(None, description="without effect")
    markup: None = Field(None, description="not supported")


class VariationRequest(ImageRequest):
    """POST /v1/images/variations: the picture drawn over, from `strength` of its noise."""

    tasks = ("image-to-image",)

    prompt: str = Field("a picture", max_length=32_000, description="what the variation should show")


def background_of(request: Request) -> Literal["opaque", "transparent"]:
    return "transparent" if request.task == "layered" else "opaque"


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
