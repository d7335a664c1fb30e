"""What a model can do: the one record behind flag checks, request checks, `/v1/models` and the docs."""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from .errors import RequestError
from .pictures import picture_size
from .request import Request, SamplingParams, Task

_SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", re.ASCII)


class Capabilities(BaseModel):
    """Sizes are in pixels. A checkpoint may override any field in a `darkroom.json` beside its `model_index.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    family: str
    tasks: tuple[Task, ...]
    size_multiple: int
    """Width and height must be multiples of this."""
    min_edge: int
    max_edge: int | None = None
    """The longest edge; None where only `max_pixels` limits it."""
    max_pixels: int
    default_size: tuple[int, int]
    """(width, height) of `size: "auto"`."""
    one_size: bool = False
    """Whether that is the only one."""
    num_inference_steps: int
    """The model card's number of denoising steps."""
    min_inference_steps: int = 1
    max_inference_steps: int = 200
    quality_steps: dict[Literal["low", "medium", "high"], int]
    """Steps by the OpenAI `quality` field, for a request that names no number of its own."""
    guidance_parameter: Literal["true_cfg_scale", "guidance_scale"]
    """The field of a request that sets the strength of classifier-free guidance, by the stock pipeline's name."""
    guidance_scale: float
    """The model card's strength."""
    guidance_scale_2: float | None = None
    """The model card's strength in the low-noise steps; None for models that have no second transformer for them."""
    no_guidance: float = 1.0
    """At this strength or less there is no guidance, and half the work."""
    max_guidance: float = 100.0
    embedded_guidance: float | None = None
    """The default of `guidance_scale`, where that is an input of the transformer, beside `true_cfg_scale`."""
    negative_prompt: str = ""
    """The negative prompt of a request that has none."""
    takes_negative_prompt: bool = True
    max_sequence_length: int | None
    """Prompt tokens that are used where a request does not say; None where prompts are never cut off."""
    text_window: int
    """The largest `max_sequence_length`: the text encoder's window in tokens, the template not counted."""
    guidance_branches: int
    """How many predictions guidance combines: the largest useful degree of CFG parallelism."""
    max_images: int = 0
    """How many pictures a request may bring."""
    min_image_edge: int = 1
    """Pixels that either edge of these pictures must have."""
    max_aspect_ratio: float = 200.0
    """How many times as long as the other one edge of these pictures may be, as they come and as they are scaled: what
    text encoders that see read, and little enough that none grows to gigabytes on its way to a fixed size."""
    strength: float = 0.6
    """The default `strength` of image-to-image requests."""
    inpaint_strength: float = 1.0
    """The default `strength` of requests with a mask."""
    image_area: int = 1024 * 1024
    """Pixels that a picture is scaled to before it is edited, and of an edited picture whose size is not asked for."""
    condition_area: int = 384 * 384
    """Pixels that a picture is scaled to for the text encoder, where that sees a copy of its own."""
    layers: int = 0
    """How many layers a picture is taken apart into by default."""
    max_layers: int = 0
    num_frames: int = 1
    """Frames of a video whose length is not asked for."""
    frame_multiple: int = 1
    """A video has one frame and a multiple of this more."""
    min_frames: int = 1
    max_frames: int = 1
    fps: int = 0
    """Frames per second by default; 0 for models that make no videos."""
    max_fps: int = 60
    previews: bool = True
    """Whether the picture can be shown before it is finished."""
    axes: tuple[str, ...]
    """The kinds of parallelism that the model has a plan for."""

    def parse_size(self, size: str | None) -> tuple[int, int] | tuple[None, None]:
        """`"WIDTHxHEIGHT"` -> (width, height); `"auto"` and None leave it to `resolve`. Raises `RequestError`."""
        if size is None or size == "auto":
            return None, None
        if not (match := _SIZE.fullmatch(size)):
            raise RequestError(
                f"Invalid size '{size[:40]}': expected 'auto' or 'WIDTHxHEIGHT', such as "
                f"'{self.default_size[0]}x{self.default_size[1]}'.",
                param="size",
            )
        return int(match[1]), int(match[2])

    def resolve(self, prompt: str, params: SamplingParams, *, image_names: Sequence[str] | None = None) -> Request:
        """Fill in the model's defaults and check every value. Raises `RequestError`; nothing is ever clamped.

        `image_names` are the fields that the pictures were sent in, where these are not called `image`.
        """
        names = ["image"] * len(params.images) if image_names is None else image_names
        task = self.task(names, has_mask=params.mask is not None)
        sizes = [picture_size(image, name) for image, name in zip(params.images, names, strict=True)]
        if params.mask is not None:
            _check_mask(picture_size(params.mask, "mask"), sizes[0])
        width, height = self._size(task, params, sizes)
        self._check_prompt(prompt)
        self._check_negative_prompt(params.negative_prompt)
        self._check_shapes(sizes, names)
        self._check_size(width, height)
        request = Request(
            task=task,
            prompt=prompt,
            negative_prompt=self.negative_prompt if params.negative_prompt is None else params.negative_prompt,
            width=width,
            height=height,
            num_inference_steps=self._steps(params),
            guidance_scale=self._guidance(params),
            guidance_scale_2=self._guidance_2(params),
            embedded_guidance=self._embedded_guidance(params.guidance_scale),
            max_sequence_length=self._sequence_length(params.max_sequence_length),
            seed=secrets.randbelow(2**32) if params.seed is None else self._seed(params.seed),
            images=params.images,
            mask=params.mask,
            strength=self._strength(task, params.strength),
            layers=self._layers(task, params.layers),
            num_frames=self._frames(params.num_frames),
            fps=self._fps(params.fps),
        )
        if request.first_step >= request.num_inference_steps:
            raise RequestError(
                f"Invalid strength {request.strength:g}: of {request.num_inference_steps} steps none would be left.",
                param="strength",
            )
        return request

    def task(self, images: Sequence[str], *, has_mask: bool) -> Task:
        """What pictures in these fields ask for, with a mask or without. Raises `RequestError` if the model cannot."""
        if len(images) > self.max_images:
            takes = f"at most {self.max_images}" if self.max_images else "none"
            message = f"{len(images)} pictures were sent; {self.family} takes {takes}."
            raise RequestError(message, param=images[self.max_images])
        if not images:
            if has_mask:
                raise RequestError("'mask' needs an 'image' that it is laid over.", param="mask")
            if found := self._first_of(("text-to-image", "text-to-video")):
                return found
            raise RequestError(f"{self.family} needs a picture to begin with: 'image'.", param="image")
        if not has_mask:
            if found := self._first_of(("edit", "layered", "image-to-video", "image-to-image")):
                return found
            raise RequestError(f"{self.family} draws over a part of a picture: it needs a 'mask' too.", param="mask")
        if "inpaint" not in self.tasks:
            raise RequestError(f"{self.family} takes no mask: it redraws the whole picture.", param="mask")
        return "inpaint"

    def _first_of(self, tasks: tuple[Task, ...]) -> Task | None:
        return next((task for task in tasks if task in self.tasks), None)

    def _size(self, task: Task, params: SamplingParams, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
        """(width, height), of which what the request does not say comes from its first picture or is the default."""
        width, height = self.default_size
        if sizes and not self.one_size and (params.width is None or params.height is None):
            width, height = self.scaled(sizes[0], task)
        return width if params.width is None else params.width, height if params.height is None else params.height

    def scaled(self, size: tuple[int, int], task: Task) -> tuple[int, int]:
        """What the model makes of a picture of `size`: as large where it is drawn over, else only of its shape."""
        unit = self.size_multiple
        own = self._rounded(size, unit)
        if task in ("inpaint", "image-to-image") and own == self._bounded(own) and own[0] * own[1] <= self.max_pixels:
            return own
        return self._bounded(self._rounded(fit_area(size, self.image_area), unit))

    def _bounded(self, size: tuple[int, int]) -> tuple[int, int]:
        """With no edge longer than the model draws."""
        if self.max_edge is None:
            return size
        longest = self.max_edge // self.size_multiple * self.size_multiple
        return min(size[0], longest), min(size[1], longest)

    def _rounded(self, size: tuple[int, int], unit: int) -> tuple[int, int]:
        width, height = (max(round(edge / unit), math.ceil(self.min_edge / unit)) * unit for edge in size)
        return width, height

    def _strength(self, task: Task, strength: float | None) -> float:
        if task not in ("image-to-image", "inpaint"):
            if strength not in (None, 1):
                raise RequestError(
                    f"'strength' is for pictures that are drawn over; for this request {self.family} draws from noise.",
                    param="strength",
                )
            return 1.0
        if strength is None:
            return self.inpaint_strength if task == "inpaint" else self.strength
        if not 0 < strength <= 1:
            raise RequestError(f"Invalid strength {strength:g}: expected more than 0 and at most 1.", param="strength")
        return float(strength)

    def _layers(self, task: Task, layers: int | None) -> int:
        if task != "layered":
            if layers is not None:
                raise RequestError(f"{self.family} makes pictures without layers.", param="layers")
            return 0
        return self.layers if layers is None else _between(layers, 1, self.max_layers, "layers")

    def _frames(self, frames: int | None) -> int:
        if frames is None:
            return self.num_frames
        if not self.fps and frames != 1:
            raise RequestError(f"{self.family} makes pictures, not videos.", param="num_frames")
        frames = _between(frames, self.min_frames, self.max_frames, "num_frames")
        if (frames - 1) % self.frame_multiple:
            below = (frames - 1) // self.frame_multiple * self.frame_multiple + 1
            raise RequestError(
                f"Invalid num_frames {frames}: {self.family} makes one frame and a multiple of {self.frame_multiple} "
                f"more, such as {below} or {below + self.frame_multiple}.",
                param="num_frames",
            )
        return frames

    def _fps(self, fps: int | None) -> int:
        if fps is None:
            return self.fps
        if not self.fps:
            raise RequestError(f"{self.family} makes pictures, not videos.", param="fps")
        return _between(fps, 1, self.max_fps, "fps")

    def _check_prompt(self, prompt: str) -> None:
        if not prompt.strip():
            raise RequestError("'prompt' is blank: say what the picture should show.", param="prompt")

    def _check_negative_prompt(self, prompt: str | None) -> None:
        if prompt and prompt.strip() and not self.takes_negative_prompt:
            raise RequestError(f"{self.family} takes no negative prompt.", param="negative_prompt")

    def _check_shapes(self, sizes: Sequence[tuple[int, int]], names: Sequence[str]) -> None:
        for size, name in zip(sizes, names, strict=True):
            if min(size) < self.min_image_edge:
                raise RequestError(
                    f"'{name}' has {size[0]}x{size[1]} pixels; each edge must be at least {self.min_image_edge}.",
                    param=name,
                )
            shapes = [size, *(fit_area(size, area) for area in (self.image_area, self.condition_area))]
            if any(max(shape) > self.max_aspect_ratio * min(shape) for shape in shapes):
                raise RequestError(
                    f"'{name}' has {size[0]}x{size[1]} pixels; one edge can be at most about {self.max_aspect_ratio:g} "
                    "times as long as the other.",
                    param=name,
                )

    def _check_size(self, width: int, height: int) -> None:
        size, unit = f"{width}x{height}", self.size_multiple
        if self.one_size and (width, height) != self.default_size:
            only = "x".join(map(str, self.default_size))
            raise RequestError(f"Invalid size {size}: {self.family} makes {only} and no other.", param="size")
        if width % unit or height % unit:
            nearest = "x".join(
                str(max(math.ceil(self.min_edge / unit), round(edge / unit)) * unit) for edge in (width, height)
            )
            raise RequestError(
                f"Invalid size {size}: {self.family} makes pictures whose width and height are multiples of {unit}; "
                f"the nearest is {nearest}.",
                param="size",
            )
        if min(width, height) < self.min_edge:
            raise RequestError(f"Invalid size {size}: each edge must be at least {self.min_edge} pixels.", param="size")
        if self.max_edge and max(width, height) > self.max_edge:
            raise RequestError(f"Invalid size {size}: each edge must be at most {self.max_edge} pixels.", param="size")
        if width * height > self.max_pixels:
            raise RequestError(
                f"Invalid size {size}: {width * height} pixels, and this model makes at most {self.max_pixels}.",
                param="size",
            )

    def _guidance(self, params: SamplingParams) -> float:
        scales = {"true_cfg_scale": params.true_cfg_scale, "guidance_scale": params.guidance_scale}
        scale = scales.pop(self.guidance_parameter)
        [(other, value)] = scales.items()
        if value not in (None, 1) and self.embedded_guidance is None:  # at one there is none
            raise RequestError(
                f"{self.family} takes '{self.guidance_parameter}'; '{other}' would have no effect.", param=other
            )
        return self.guidance_scale if scale is None else self._strength_of_guidance(scale, self.guidance_parameter)

    def _guidance_2(self, params: SamplingParams) -> float | None:
        """Of a request that names neither strength the model card's; of one that names the first, the same: None."""
        scale = params.guidance_scale_2
        if scale is None:
            return self.guidance_scale_2 if params.guidance_scale is None else None
        if self.guidance_scale_2 is None:
            raise RequestError(
                f"'guidance_scale_2' is for models with a second transformer, which {self.family} is not.",
                param="guidance_scale_2",
            )
        return self._strength_of_guidance(scale, "guidance_scale_2")

    def _embedded_guidance(self, scale: float | None) -> float | None:
        if scale is None or self.embedded_guidance is None:
            return self.embedded_guidance
        return self._strength_of_guidance(scale, "guidance_scale")

    def _strength_of_guidance(self, scale: float, param: str) -> float:
        if not 0 <= scale <= self.max_guidance:
            raise RequestError(
                f"Invalid {param} {scale}: expected a number from 0 to {self.max_guidance:g}.", param=param
            )
        return float(scale)

    def _steps(self, params: SamplingParams) -> int:
        steps = params.num_inference_steps
        if steps is None:
            return self.quality_steps[params.quality] if params.quality else self.num_inference_steps
        return _between(steps, self.min_inference_steps, self.max_inference_steps, "num_inference_steps")

    def _sequence_length(self, length: int | None) -> int:
        if self.max_sequence_length is None:
            if length is not None:
                raise RequestError(f"{self.family} cuts no prompt off.", param="max_sequence_length")
            return self.text_window
        if length is None:
            return self.max_sequence_length
        return _between(length, 1, self.text_window, "max_sequence_length")

    def _seed(self, seed: int) -> int:
        if not 0 <= seed < 2**64:
            raise RequestError(
                f"Invalid seed {seed}: expected 0 to 2^64 - 1.",
                param="seed",
                code="integer_below_min_value" if seed < 0 else "integer_above_max_value",
            )
        return seed

    def override(self, values: dict[str, Any]) -> Capabilities:
        return Capabilities.model_validate({**self.model_dump(), **values})


def _check_mask(size: tuple[int, int], picture: tuple[int, int]) -> None:
    """Raises `RequestError` where it is not laid over the whole picture."""
    if size != picture:
        raise RequestError(
            f"The mask has {size[0]}x{size[1]} pixels, and its picture {picture[0]}x{picture[1]}.", param="mask"
        )


def _between(value: int, low: int, high: int, param: str) -> int:
    """The value, if it lies in the range. Raises `RequestError`."""
    if not low <= value <= high:
        raise RequestError(
            f"Invalid {param} {value}: expected {low} to {high}.",
            param=param,
            code="integer_below_min_value" if value < low else "integer_above_max_value",
        )
    return value


def fit_area(size: tuple[int, int], area: int) -> tuple[int, int]:
    """(width, height) of a size's shape and about this many pixels, in multiples of 32 as stock pipelines have it."""
    ratio = size[0] / size[1]
    width = math.sqrt(area * ratio)
    return max(round(width / 32), 1) * 32, max(round(width / ratio / 32), 1) * 32
