"""A file's content as an answer, whole or the part of it that the client asks for."""

from __future__ import annotations

import re

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from .errors import ApiError
from .job_files import JobFiles

_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})", re.ASCII)


async def file_response(http: Request, files: JobFiles, name: str, media_type: str) -> Response:
    """Raises `ApiError` 416 for a part that the file does not have, and FileNotFoundError."""
    size = await files.size(name)
    headers = {"accept-ranges": "bytes", "etag": f'"{name}"', "cache-control": "private"}
    asked = http.headers.get("range", "") if http.headers.get("if-range", headers["etag"]) == headers["etag"] else ""
    part = parse_range(asked, size)
    start, end = part or (0, size)
    headers["content-length"] = str(end - start)
    if part:
        headers["content-range"] = f"bytes {start}-{end - 1}/{size}"
    return StreamingResponse(files.pieces(name, start, end), 206 if part else 200, headers, media_type)


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
