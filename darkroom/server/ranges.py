"""A file's content as an answer, whole or the part of it that the client asks for."""

from __future__ import annotations

import re
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from .errors import ApiError
from .job_files import JobFiles

_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})", re.ASCII)


@dataclass(frozen=True)
class Part:
    """Bytes `start` up to `end` of a file that never changes, and how an answer says so."""

    start: int
    end: int
    status: int
    headers: dict[str, str]

    @classmethod
    def asked_for(cls, http: Request, name: str, size: int) -> Part:
        """Raises `ApiError` 416 for a part that the file does not have."""
        headers = {"accept-ranges": "bytes", "etag": f'"{name}"', "cache-control": "private"}
        is_same = http.headers.get("if-range", headers["etag"]) == headers["etag"]
        part = parse_range(http.headers.get("range", ""), size) if is_same and http.method == "GET" else None
        start, end = part or (0, size)
        if part:
            headers["content-range"] = f"bytes {start}-{end - 1}/{size}"
        return cls(start, end, 206 if part else 200, {**headers, "content-length": str(end - start)})


async def file_response(http: Request, files: JobFiles, name: str, media_type: str) -> Response:
    """Raises `ApiError` 416 and FileNotFoundError."""
    part = Part.asked_for(http, name, await files.size(name))
    return StreamingResponse(files.pieces(name, part.start, part.end), part.status, part.headers, media_type)


def parse_range(header: str, size: int) -> tuple[int, int] | None:
    """(start, end) of one range of bytes; None for what is to be ignored, such as several. Raises `ApiError`."""
    match = _RANGE.fullmatch(header.strip())
    if not match or not (match[1] or match[2]):
        return None
    if not match[1]:
        start, end = max(size - int(match[2]), 0), size
    else:
        start, end = int(match[1]), min(int(match[2] or size) + 1, size)
        if match[2] and int(match[2]) < start:
            return None
    if start >= end:
        message = f"The file has {size} bytes; '{header[:80]}' is none of them."
        raise ApiError(416, message, headers={"Content-Range": f"bytes */{size}"})
    return start, end
