"""What requests for pictures and for videos have in common, under every name that clients have for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field

from darkroom.configs.capabilities import Capabilities
from darkroom.configs.errors import RequestError
from darkroom.configs.request import SamplingParams

from .body import check_known, validate
from .form import from_text, parse_object

Integer = Annotated[int, Field(ge=-(2**63), le=2**64)]
"""Further bounds are the model's; these keep a number of thousands of digits out of messages."""

_ALIASES = {
    "steps": "num_inference_steps", "infer_steps": "num_inference_steps", "sample_steps": "num_inference_steps",
    "cfg": "guidance_scale", "cfg_scale": "guidance_scale", "txt_cfg": "guidance_scale",
    "denoising_strength": "strength", "i2i_denoise_strength": "strength",
    "video_frames": "num_frames", "target_video_length": "num_frames",
    "num_outputs_per_prompt": "n", "num_images_per_prompt": "n",
}  # fmt: skip


def _allow_null(schema: dict[str, Any]) -> None:
    for name, field in schema["properties"].items():
        if name not in schema.get("required", ()) and "anyOf" not in field:
            common = {key: field.pop(key) for key in ("title", "description", "default") if key in field}
            schema["properties"][name] = {"anyOf": [field, {"type": "null"}], **common}


class Parameters(BaseModel):
    """An explicit null is the default: `read` leaves it out."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, json_schema_extra=_allow_null)

    nested: ClassVar[tuple[str, ...]] = ("extra_body", "extra_params", "extra_json", "extra_args")
    """Members that are objects, whose members count as the request's own."""

    prompt: str = Field(max_length=32_000, description="what is to be seen")
    model: str | None = Field(None, description="the served model, if not given")
    size: str = Field("auto", description="'WIDTHxHEIGHT', or 'auto' for the model's own, or the first picture's")
    width: Integer | None = Field(None, description="pixels; another spelling of size")
    height: Integer | None = Field(None, description="pixels; another spelling of size")
    negative_prompt: str | None = Field(None, max_length=32_000, description="what is not to be seen")
    num_inference_steps: Integer | None = Field(None, description="denoising steps")
    true_cfg_scale: float | None = Field(None, description="strength of classifier-free guidance")
    guidance_scale: float | None = Field(None, description="the guidance input of guidance-distilled models")
    guidance_scale_2: float | None = Field(None, description="the same for the second transformer of models with two")
    max_sequence_length: Integer | None = Field(None, description="prompt tokens after which the text is cut off")
    seed: Integer | None = Field(None, description="64 bits; the same seed makes the same; else random")
    generator_device: str | None = Field(None, description="without effect: noise is the same on every device")
    user: str | None = Field(None, description="without effect")
    safety_identifier: str | None = Field(None, description="without effect")

    @classmethod
    def read(cls, body: dict[str, Any], *, is_form: bool = False) -> Self:
        """The members of `body` and of the `nested` objects in it, under their own names. Raises `RequestError`.

        In a form numbers are text, and objects may be JSON.
        """
        values: dict[str, Any] = {}
        for key, value in cls._members(body, is_form):
            name = cls._name(key)
            check_known(cls, name)
            if value is None:
                continue
            if is_form and isinstance(value, str):
                value = from_text(cls, name, value)
            if name in values and (isinstance(value, list | dict) or value != values[name]):
                raise RequestError(f"'{key[:80]}' contradicts another spelling of it.", param=name[:80])
            values[name] = value
        return validate(cls, values)

    @classmethod
    def _members(cls, body: dict[str, Any], is_form: bool) -> Iterator[tuple[str, Any]]:
        yield from ((key, value) for key, value in body.items() if key not in cls.nested)
        for source in cls.nested:
            members = body.get(source)
            if is_form and isinstance(members, str):
                members = parse_object(members, source)
            if not isinstance(members, dict | None):
                raise RequestError(f"'{source}' should be an object.", param=source, code="invalid_type")
            yield from (members or {}).items()

    @classmethod
    def _name(cls, key: str) -> str:
        """The field's own name, if the request has the field: else the client is told of what it has written."""
        name = _ALIASES.get(key, key)
        return name if name in cls.model_fields else key

    def sampling(self, capabilities: Capabilities, **more: Any) -> SamplingParams:
        """These parameters, and what else the request says. Raises `RequestError`."""
        width, height = self._size(capabilities)
        return SamplingParams(
            width=width,
            height=height,
            negative_prompt=self.negative_prompt,
            num_inference_steps=self.num_inference_steps,
            true_cfg_scale=self.true_cfg_scale,
            guidance_scale=self.guidance_scale,
            guidance_scale_2=self.guidance_scale_2,
            max_sequence_length=self.max_sequence_length,
            seed=self.seed,
            **more,
        )

    def _size(self, capabilities: Capabilities) -> tuple[int | None, int | None]:
        width, height = capabilities.parse_size(self.size)
        for name, edge, other in (("width", width, self.width), ("height", height, self.height)):
            if edge is not None and other is not None and edge != other:
                raise RequestError(f"'{name}' {other} contradicts the size '{self.size}'.", param=name)
        return width or self.width, height or self.height
