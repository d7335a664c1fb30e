"""The pictures of a request, wherever they come from: checked by their headers, decoded by the workers alone."""

from __future__ import annotations

import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from darkroom.configs.config import Limits
from darkroom.configs.errors import RequestError
from darkroom.configs.pictures import picture_size

from .body import validate
from .errors import ApiError
from .fetch import Fetcher
from .form import Form

FILES = ("image", "url", "mask", "mask_image", "markup")
"""A form's fields that are pictures, or as large."""
_MAX_URL = 20 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Pictures:
    images: tuple[bytes, ...] = ()
    mask: bytes | None = None

    def check(self, limits: Limits) -> None:
        """Raises `RequestError` or `ApiError` for what no model is to see."""
        for data in self.images:
            check_picture(data, "image", limits)
        if self.mask is not None:
            check_picture(self.mask, "mask", limits)


class Reference(BaseModel):
    """A picture in JSON."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, json_schema_extra={"required": ["image_url"]})

    image_url: str | None = Field(None, max_length=_MAX_URL, description="'data:image/png;base64,...', or https:")
    file_id: Annotated[str | None, WithJsonSchema({"type": "null", "description": "not supported"})] = None


ReferenceObject = Annotated[dict[str, Any], WithJsonSchema(Reference.model_json_schema())]
"""Is read by `referenced`, whose errors name the field that it stands in."""

Fetched = Mapping[str, bytes]
"""Pictures from other hosts, by their URLs."""


async def fetch_form(fetcher: Fetcher, form: Form) -> Fetched:
    """What the form's `url` fields stand for, where the operator allows it. Raises `RequestError`."""
    return await _fetch(fetcher, [data.decode("ascii", "replace") for data in form.files.get("url", ())], "url")


async def fetch_json(fetcher: Fetcher, references: Sequence[object], param: str) -> Fetched:
    """What the references' `image_url` stand for, where the operator allows it. Raises `RequestError`."""
    return await _fetch(fetcher, [r.get("image_url") for r in references if isinstance(r, dict)], param)


async def _fetch(fetcher: Fetcher, urls: Sequence[object], param: str) -> Fetched:
    if not fetcher.hosts:
        return {}
    remote = {url for url in urls if isinstance(url, str) and url[:5].lower() != "data:"}
    return {url: await fetcher.fetch_picture(url, param=param) for url in remote}


def from_form(form: Form, fetched: Fetched) -> Pictures:
    """Raises `RequestError`."""
    if "markup" in form.files:
        raise RequestError("'markup' is not supported: use 'mask' to say where to draw.", param="markup")
    urls = [data.decode("ascii", "replace") for data in form.files.get("url", ())]
    images = [*form.files.get("image", ()), *(picture_at(url, "url", fetched) for url in urls)]
    masks = {*form.files.get("mask", ()), *form.files.get("mask_image", ())}
    if not images:
        raise RequestError("Missing required parameter: 'image'.", param="image", code="missing_required_parameter")
    if len(masks) > 1:
        raise RequestError("'mask' is sent more than once: it belongs to the first picture.", param="mask")
    return Pictures(images=tuple(images), mask=masks.pop() if masks else None)


def from_json(images: Sequence[dict[str, Any]] | None, mask: dict[str, Any] | None, fetched: Fetched) -> Pictures:
    """Raises `RequestError`."""
    if not images:
        raise RequestError("Missing required parameter: 'images'.", param="images", code="missing_required_parameter")
    return Pictures(
        images=tuple(referenced(reference, "images", fetched) for reference in images),
        mask=None if mask is None else referenced(mask, "mask", fetched),
    )


def picture_at(url: str, param: str, fetched: Fetched) -> bytes:
    """The file that a URL stands for. Raises `RequestError`."""
    if url in fetched:
        return fetched[url]
    if url[:5].lower() != "data:":
        raise RequestError(
            f"'{param}' names '{url[:80]}', and this server fetches nothing from elsewhere: send the picture itself, "
            "as a form's file or as 'data:image/png;base64,...'.",
            param=param,
        )
    head, comma, data = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise RequestError(f"'{param}' is no data URL in base64: 'data:image/png;base64,...'.", param=param)
    try:
        return binascii.a2b_base64(data, strict_mode=True)
    except ValueError:
        raise RequestError(f"'{param}' has a data URL whose base64 is broken.", param=param) from None


def referenced(reference: dict[str, Any], param: str, fetched: Fetched) -> bytes:
    """The file that a `Reference` stands for. Raises `RequestError`."""
    try:
        found = validate(Reference, reference)
    except RequestError as e:
        raise RequestError(f"In '{param}': {e}", param=param, code=e.code) from None
    if found.file_id is not None:
        raise RequestError(
            f"'{param}' has a 'file_id', and this server has no Files API: send an 'image_url' with a data URL.",
            param=param,
        )
    if found.image_url is None:
        raise RequestError(f"In '{param}': expected an 'image_url'.", param=param, code="missing_required_parameter")
    return picture_at(found.image_url, param, fetched)


def check_picture(data: bytes, param: str, limits: Limits) -> None:
    """By its header. Raises `RequestError` or `ApiError`."""
    if len(data) > limits.max_image_mb << 20:
        message = f"'{param}' is larger than {limits.max_image_mb} MiB."
        raise ApiError(413, message, param=param, code="request_too_large")
    picture_size(data, param, limits.max_image_pixels)
