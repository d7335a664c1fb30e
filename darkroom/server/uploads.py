"""The pictures of a request, wherever they come from: checked by their headers, decoded by the workers alone."""

from __future__ import annotations

import asyncio
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from darkroom.configs.config import Limits
from darkroom.configs.errors import RequestError
from darkroom.configs.pictures import picture_size

from .body import Share, validate
from .errors import ApiError
from .fetch import PLACES_OF_ONE, Fetcher
from .form import Form

FILES = ("image", "url", "mask", "mask_image", "markup")
"""A form's fields that are pictures, or as large."""
MOST_IMAGES = 16
_MAX_URL = 20 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Pictures:
    images: tuple[bytes, ...] = ()
    names: tuple[str, ...] = ()
    """The field that each was sent in."""
    mask: bytes | None = None


@dataclass(frozen=True)
class Source:
    """A picture as it was sent: the file, or the URL where it is to be had."""

    param: str
    content: bytes | str


@dataclass(frozen=True)
class Sent:
    """What a request brought, of which nothing was fetched or decoded yet."""

    images: tuple[Source, ...] = ()
    mask: Source | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(image.param for image in self.images)

    @property
    def sources(self) -> tuple[Source, ...]:
        return self.images if self.mask is None else (*self.images, self.mask)


class Reference(BaseModel):
    """A picture in JSON."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, json_schema_extra={"required": ["image_url"]})

    image_url: str | None = Field(None, max_length=_MAX_URL, description="'data:image/png;base64,...', or https:")
    file_id: Annotated[str | None, WithJsonSchema({"type": "null", "description": "not supported"})] = None


ReferenceObject = Annotated[dict[str, Any], WithJsonSchema(Reference.model_json_schema())]
"""Is read by `referenced`, whose errors name the field that it stands in."""


def from_form(form: Form) -> Sent:
    """Raises `RequestError`."""
    if "markup" in form.files:
        raise RequestError("'markup' is not supported: use 'mask' to say where to draw.", param="markup")
    images = [Source("image", data) for data in form.files.get("image", ())]
    images += [Source("url", data.decode("ascii", "replace")) for data in form.files.get("url", ())]
    masks = {*form.files.get("mask", ()), *form.files.get("mask_image", ())}
    if not images:
        raise RequestError("Missing required parameter: 'image'.", param="image", code="missing_required_parameter")
    if len(images) > MOST_IMAGES:
        message = f"{len(images)} pictures were sent; a request has at most {MOST_IMAGES}."
        raise RequestError(message, param=images[MOST_IMAGES].param)
    if len(masks) > 1:
        raise RequestError("'mask' is sent more than once: it belongs to the first picture.", param="mask")
    return Sent(tuple(images), Source("mask", masks.pop()) if masks else None)


def from_json(images: Sequence[dict[str, Any]] | None, mask: dict[str, Any] | None) -> Sent:
    """Raises `RequestError`."""
    if not images:
        raise RequestError("Missing required parameter: 'images'.", param="images", code="missing_required_parameter")
    sources = tuple(referenced(reference, "images") for reference in images)
    return Sent(sources, None if mask is None else referenced(mask, "mask"))


def referenced(reference: dict[str, Any], param: str) -> Source:
    """What a `Reference` stands for. Raises `RequestError`."""
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
    return Source(param, found.image_url)


def is_data(url: str) -> bool:
    return url[:5].lower() == "data:"


async def take(sent: Sent, fetcher: Fetcher, limits: Limits, share: Share) -> Pictures:
    """The files that were sent, wherever they lie. Raises `RequestError` or `ApiError`."""
    fetched = await _fetch(fetcher, sent, limits.max_upload_mb << 20, share)
    return await asyncio.to_thread(_read, sent, fetched, limits)


async def _fetch(fetcher: Fetcher, sent: Sent, most: int, share: Share) -> dict[str, bytes]:
    """By their URLs what lies elsewhere, a few at a time; with the body at most `most` bytes.

    None, if the operator allows none.
    """
    if not fetcher.hosts:
        return {}
    urls = [(one.content, one.param) for one in sent.sources if isinstance(one.content, str)]
    remote = {url: param for url, param in urls if not is_data(url)}
    places = asyncio.Semaphore(PLACES_OF_ONE)

    async def fetch(url: str, param: str) -> bytes:
        async with places:
            data = await fetcher.fetch_picture(url, param=param)
        if share.held + len(data) > most:
            message = f"The body and its pictures from elsewhere are larger than {most} bytes."
            raise ApiError(413, message, param=param, code="request_too_large")
        share.add(len(data))
        return data

    try:
        async with asyncio.TaskGroup() as group:
            tasks = {url: group.create_task(fetch(url, param)) for url, param in remote.items()}
    except ExceptionGroup as e:
        raise e.exceptions[0] from None
    return {url: task.result() for url, task in tasks.items()}


def _read(sent: Sent, fetched: Mapping[str, bytes], limits: Limits) -> Pictures:
    images = tuple(_checked(source, fetched, limits) for source in sent.images)
    mask = _checked(sent.mask, fetched, limits) if sent.mask else None
    return Pictures(images=images, names=sent.names, mask=mask)


def _checked(source: Source, fetched: Mapping[str, bytes], limits: Limits) -> bytes:
    """The file, of which the header was read. Raises `RequestError` or `ApiError`."""
    data = _file(source, fetched)
    if len(data) > limits.max_image_mb << 20:
        message = f"'{source.param}' is larger than {limits.max_image_mb} MiB."
        raise ApiError(413, message, param=source.param, code="request_too_large")
    picture_size(data, source.param, limits.max_image_pixels)
    return data


def _file(source: Source, fetched: Mapping[str, bytes]) -> bytes:
    url, param = source.content, source.param
    if isinstance(url, bytes):
        return url
    if url in fetched:
        return fetched[url]
    if not is_data(url):
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
