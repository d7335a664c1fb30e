"""Reading multipart/form-data: every part by its name, text as text and files as their bytes."""

from __future__ import annotations

import re
from typing import Any

import msgspec
from pydantic import BaseModel
from python_multipart import FormParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import Field, File, parse_options_header
from starlette.requests import Request

from .body import media_type, receive
from .errors import ApiError

FORM_LIMIT = 64 * 1024 * 1024
"""Bytes of a form, pictures included."""
_TEXT_LIMIT = 1024 * 1024
_MAX_PARTS = 100
_MEMBER = re.compile(r"([^\[\]]+)\[([^\[\]]+)\]")


async def read_form(request: Request, limit: int = FORM_LIMIT) -> dict[str, Any]:
    """The form; parts `a[b]` and `a[c]` are the object `a`, as OpenAI's SDK writes it. Raises `ApiError`."""
    if media_type(request) != "multipart/form-data":
        message = f"Unsupported content type '{media_type(request)[:80]}': expected 'multipart/form-data'."
        raise ApiError(415, message, code="unsupported_content_type")
    form = _Form()
    try:
        parser = form.parser(request.headers["content-type"])
        await receive(request, limit, parser.write)
    except (FormParserError, UnicodeDecodeError) as e:
        raise ApiError(400, f"The body is not valid multipart/form-data: {str(e)[:200]}.") from None
    if not form.is_whole:
        raise ApiError(400, "The body is not valid multipart/form-data: its last boundary is missing.")
    return form.values


class _Form:
    """What a parser has found so far."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.is_whole = False
        self._parts = 0

    def parser(self, content_type: str) -> FormParser:
        """Raises FormParserError for a content type without a boundary that can be."""
        _, options = parse_options_header(content_type)
        limits: Any = {
            "MAX_FIELDS": _MAX_PARTS,
            "MAX_FIELD_SIZE": _TEXT_LIMIT,
            "MAX_MEMORY_FILE_SIZE": FORM_LIMIT,  # nothing is written to the disk
        }
        boundary = options.get(b"boundary")
        return FormParser("multipart/form-data", self._on_field, self._on_file, self._on_end, boundary, config=limits)

    def _on_field(self, field: Field) -> None:
        self._add(field.field_name, (field.value or b"").decode())

    def _on_file(self, file: File) -> None:
        file.file_object.seek(0)
        self._add(file.field_name, file.file_object.read())
        file.close()

    def _on_end(self) -> None:
        self.is_whole = True

    def _add(self, name: bytes | None, value: str | bytes) -> None:
        self._parts += 1
        if self._parts > _MAX_PARTS:
            raise ApiError(400, f"The form has more than {_MAX_PARTS} parts.")
        key, target = (name or b"").decode(), self.values
        if match := _MEMBER.fullmatch(key):
            target, key = self.values.setdefault(match[1], {}), match[2]
        if not isinstance(target, dict) or key in target:
            raise ApiError(400, f"The form has the part '{key[:80]}' more than once.", param=key[:80])
        target[key] = value


def numbers_in(values: dict[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """A form's values, in which what the model has as a number is one, if it is written as JSON writes numbers."""
    numeric = {name for name, field in model.model_fields.items() if _is_numeric(field.annotation)}
    return {key: _number(value) if key in numeric else value for key, value in values.items()}


def _is_numeric(annotation: object) -> bool:
    return annotation in (int, float, int | None, float | None)


def _number(value: Any) -> Any:
    if isinstance(value, str) and len(value) <= 40:
        try:
            return msgspec.json.decode(value, type=int | float)
        except msgspec.DecodeError:
            return value
    return value
