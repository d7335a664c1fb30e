"""What a model can do: the one record behind flag checks, request checks, `/v1/models` and the docs."""

from __future__ import annotations

import math
import re
import secrets
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from .errors import RequestError
from .request import Request, SamplingParams

_SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", re.ASCII)


class Capabilities(BaseModel):
    """Sizes are in pixels. A checkpoint may override any field in a `darkroom.json` beside its `model_index.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    family: str
    tasks: tuple[str, ...]
    size_multiple: int
    """Width and height must be multiples of this."""
    min_edge: int
    max_edge: int | None = None
    """The longest edge; None where only `max_pixels` limits it."""
    max_pixels: int
    default_size: tuple[int, int]
    """(width, height) of `size: "auto"`."""
    num_inference_steps: int
    """The model card's number of denoising steps."""
    min_inference_steps: int
    max_inference_steps: int
    quality_steps: dict[Literal["low", "medium", "high"], int]
    """Steps by the OpenAI `quality` field, for a request that names no number of its own."""
    guidance_parameter: Literal["true_cfg_scale", "guidance_scale"]
    """The field of a request that sets the strength of classifier-free guidance, by the stock pipeline's name."""
    guidance_scale: float
    """The model card's strength."""
    max_guidance: float
    negative_prompt: str
    """The negative prompt of a request that has none."""
    max_sequence_length: int
    """Prompt tokens that are used where a request does not say."""
    text_window: int
    """The largest `max_sequence_length`: the text encoder's window in tokens, the template not counted."""
    guidance_branches: int
    """How many predictions guidance combines: the largest useful degree of CFG parallelism."""
    axes: tuple[str, ...]
    """The kinds of parallelism that the model has a plan for."""

    def parse_size(self, size: str | None) -> tuple[int, int]:
        """`"WIDTHxHEIGHT"`, `"auto"` or None -> (width, height). Raises `RequestError`."""
        if size is None or size == "auto":
            return self.default_size
        if not (match := _SIZE.fullmatch(size)):
            raise RequestError(
                f"Invalid size '{size[:40]}': expected 'auto' or 'WIDTHxHEIGHT', such as "
                f"'{self.default_size[0]}x{self.default_size[1]}'.",
                param="size",
            )
        return int(match[1]), int(match[2])

    def resolve(self, prompt: str, params: SamplingParams) -> Request:
        """Fill in the model's defaults and check every value. Raises `RequestError`; nothing is ever clamped."""
        width = self.default_size[0] if params.width is None else params.width
        height = self.default_size[1] if params.height is None else params.height
        self._check_prompt(prompt)
        self._check_size(width, height)
        return Request(
            prompt=prompt,
            negative_prompt=self.negative_prompt if params.negative_prompt is None else params.negative_prompt,
            width=width,
            height=height,
            num_inference_steps=self._steps(params),
            guidance_scale=self._guidance(params),
            max_sequence_length=self._sequence_length(params.max_sequence_length),
            seed=secrets.randbelow(2**32) if params.seed is None else self._seed(params.seed),
        )

    def _check_prompt(self, prompt: str) -> None:
        if not prompt.strip():
            raise RequestError("'prompt' is blank: say what the picture should show.", param="prompt")

    def _check_size(self, width: int, height: int) -> None:
        size, unit = f"{width}x{height}", self.size_multiple
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
        if value not in (None, 1):  # one is no guidance, which is what not having it means
            raise RequestError(
                f"{self.family} takes '{self.guidance_parameter}'; '{other}' would have no effect.", param=other
            )
        if scale is None:
            return self.guidance_scale
        if not 0 <= scale <= self.max_guidance:
            raise RequestError(
                f"Invalid {self.guidance_parameter} {scale}: expected a number from 0 to {self.max_guidance:g}.",
                param=self.guidance_parameter,
            )
        return float(scale)

    def _steps(self, params: SamplingParams) -> int:
        steps = params.num_inference_steps
        if steps is None:
            return self.quality_steps[params.quality] if params.quality else self.num_inference_steps
        if not self.min_inference_steps <= steps <= self.max_inference_steps:
            low = steps < self.min_inference_steps
            raise RequestError(
                f"Invalid num_inference_steps {steps}: expected {self.min_inference_steps} to "
                f"{self.max_inference_steps}.",
                param="num_inference_steps",
                code="integer_below_min_value" if low else "integer_above_max_value",
            )
        return steps

    def _sequence_length(self, length: int | None) -> int:
        if length is None:
            return self.max_sequence_length
        if not 1 <= length <= self.text_window:
            raise RequestError(
                f"Invalid max_sequence_length {length}: expected 1 to {self.text_window}.",
                param="max_sequence_length",
                code="integer_below_min_value" if length < 1 else "integer_above_max_value",
            )
        return length

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
