"""Pictures of a video: what is shown of it before it is played."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

from PIL import Image

_THUMBNAIL_EDGE = 512
_TILE_EDGE = 320
_COLUMNS = 4
_TILES = 16


def thumbnail_and_spritesheet(frames: Sequence[Image.Image]) -> tuple[bytes, bytes]:
    """The first frame as WebP, and up to 16 frames from first to last, row by row, as JPEG."""
    shown = [frames[i] for i in _spread(len(frames))]
    return _encoded(_shrunk(frames[0], _THUMBNAIL_EDGE), "WEBP"), _encoded(_grid(shown), "JPEG")


def _spread(count: int) -> list[int]:
    """Which frames of so many, evenly."""
    tiles = min(count, _TILES)
    return [round(i * (count - 1) / max(tiles - 1, 1)) for i in range(tiles)]


def _grid(frames: list[Image.Image]) -> Image.Image:
    tiles = [_shrunk(frame, _TILE_EDGE) for frame in frames]
    width, height = tiles[0].size
    columns = min(_COLUMNS, len(tiles))
    sheet = Image.new("RGB", (columns * width, math.ceil(len(tiles) / columns) * height))
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (i % columns * width, i // columns * height))
    return sheet


def _shrunk(frame: Image.Image, edge: int) -> Image.Image:
    small = frame.copy()
    small.thumbnail((edge, edge))
    return small


def _encoded(picture: Image.Image, file_format: str) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, file_format, quality=85)
    return buffer.getvalue()
