"""Forms: multipart bodies, read as they come, with a limit on everything in them."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import msgspec
from multipart import MultipartError, MultipartSegment, ParserLimitReached, PushMultipartParser, parse_options_header
from pydantic import BaseModel
from starlette.requests import Request

from darkroom.configs.config import Limits
from darkroom.configs.errors import RequestError

from .body import receive
from .errors import ApiError

_NAME = re.compile(r"([^\[\]]+)((?:\[[^\[\]]*\]){0,4})")
"""`name`, `name[]`, `name[key][key]`"""
_INTEGER = re.compile(r"-?[0-9]{1,400}", re.ASCII)
_NUMBER = re.compile(r"-?[0-9]{1,400}(\.[0-9]{1,400})?([eE][+-]?[0-9]{1,4})?", re.ASCII)
_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


@dataclass(frozen=True)
class Form:
    values: dict[str, Any] = field(default_factory=dict)
    """Text; brackets in names have become objects and lists."""
    files: dict[str, list[bytes]] = field(default_factory=dict)
    """By name without brackets, in the order in which they came."""


async def read_form(request: Request, files: Collection[str], limits: Limits) -> Form:
    """The body of a `multipart/form-data` request, of which the fields named in `files` are bytes.

    What a field is, its name says: file names and types are the client's to choose, and are not looked at.
    Raises `ApiError`, `RequestError`.
    """
    boundary = parse_options_header(request.headers["content-type"])[1].get("boundary", "")
    reader = _Reader(boundary, files, limits)
    await receive(request, limits.max_upload_mb << 20, reader.feed)
    reader.close()
    return reader.form


class _Reader:
    def __init__(self, boundary: str, files: Collection[str], limits: Limits) -> None:
        self.form = Form()
        self._files = files
        self._limits = limits
        self._name = ""
        self._part = io.BytesIO()
        try:
            # names are compared and never used otherwise, so that any bytes will do
            self._parser = PushMultipartParser(
                boundary, max_segment_count=limits.max_form_fields, header_charset="latin1"
            )
        except (MultipartError, ValueError):
            raise ApiError(400, "The content type has no valid 'boundary', which a form needs.") from None

    def feed(self, chunk: bytes) -> None:
        try:
            for event in self._parser.parse(chunk):
                if isinstance(event, MultipartSegment):
                    self._begin(event)
                elif event is None:
                    self._end()
                else:
                    self._add(event)
        except ParserLimitReached:
            message = f"The form has more than {self._limits.max_form_fields} fields, or a field's header is too long."
            raise ApiError(400, message) from None
        except MultipartError:
            raise ApiError(400, "The body is not a valid form: 'multipart/form-data' is malformed.") from None

    def close(self) -> None:
        try:
            self._parser.close()
        except MultipartError:
            raise ApiError(400, "The form ends before its last boundary.") from None

    def _begin(self, segment: MultipartSegment) -> None:
        self._name, self._part = segment.name or "", io.BytesIO()
        if not _NAME.fullmatch(self._name):
            raise RequestError(f"'{self._name[:80]}' is no name of a field.", param=self._name[:80] or None)
        encoding = segment.header("Content-Transfer-Encoding", "binary").lower()
        if encoding not in ("binary", "8bit", "7bit"):
            message = f"'{self._name[:80]}' is sent in the transfer encoding '{encoding[:20]}': send bytes as they are."
            raise RequestError(message, param=self._name[:80])

    def _add(self, data: bytes) -> None:
        self._part.write(data)
        limit = self._limits.max_image_mb << 20 if self._is_file else self._limits.max_field_kb << 10
        if self._part.tell() > limit:
            message = f"'{self._name[:80]}' is larger than {limit} bytes."
            raise ApiError(413, message, param=self._name[:80], code="request_too_large")

    def _end(self) -> None:
        if self._is_file:
            self.form.files.setdefault(self._base, []).append(self._part.getvalue())  # which is no copy
            return
        try:
            text = self._part.getvalue().decode()
        except UnicodeDecodeError:
            raise RequestError(f"'{self._name[:80]}' is not text in UTF-8.", param=self._name[:80]) from None
        keys = re.findall(r"\[([^\[\]]*)\]", self._name)
        if not _put(self.form.values, [self._base, *keys], text):
            message = f"'{self._base[:80]}' is sent more than once, with different values."
            raise RequestError(message, param=self._base[:80])

    @property
    def _base(self) -> str:
        return self._name.partition("[")[0]

    @property
    def _is_file(self) -> bool:
        return self._name.removesuffix("[]") in self._files


def _put(values: dict[str, Any], keys: Sequence[str], text: str) -> bool:
    """`a`, `a[]` and `a[b]` as {"a": text}, {"a": [text]} and {"a": {"b": text}}. False for a name of two values."""
    key, *rest = keys
    kept = values.setdefault(key, [] if rest == [""] else {} if rest else text)
    if rest == [""] and isinstance(kept, list):
        kept.append(text)
        return True
    if rest and isinstance(kept, dict):
        return _put(kept, rest, text)
    return not rest and kept == text


def parse_object(text: str, name: str) -> dict[str, Any]:
    """An object that a form holds as JSON. Raises `RequestError`."""
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise RequestError(f"'{name}' should be a JSON object.", param=name, code="invalid_type")
    return value


def from_text(model: type[BaseModel], name: str, text: str) -> Any:
    """The value that a field of `model` has in a form as text. Raises `RequestError`."""
    annotation = model.model_fields[name].annotation
    kinds = {getattr(kind, "__origin__", kind) for kind in (annotation, *get_args(annotation))}
    value: Any = text
    if str in kinds:
        return text
    if bool in kinds:
        value, kind = _BOOLEANS.get(text.lower()), "'true' or 'false'"
    elif int in kinds:
        value, kind = int(text) if _INTEGER.fullmatch(text) else None, "an integer"
    elif float in kinds:
        value, kind = float(text) if _NUMBER.fullmatch(text) else None, "a number"
        value = value if value is not None and math.isfinite(value) else None
    if value is None:
        raise RequestError(f"'{name}' should be {kind}, not '{text[:40]}'.", param=name, code="invalid_type")
    return value
