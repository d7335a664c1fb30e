from __future__ import annotations

import io

import pytest
from PIL import Image

from darkroom.engine.stills import thumbnail_and_spritesheet


def stills(size: tuple[int, int], count: int) -> list[Image.Image]:
    frames = [Image.new("RGB", size, (255 * i // max(count - 1, 1),) * 3) for i in range(count)]
    return [Image.open(io.BytesIO(data)) for data in thumbnail_and_spritesheet(frames)]


@pytest.mark.parametrize(
    ("size", "count", "thumbnail", "sheet"),
    [
        ((64, 48), 1, (64, 48), (64, 48)),
        ((64, 48), 2, (64, 48), (128, 48)),
        ((64, 48), 5, (64, 48), (256, 96)),
        ((64, 48), 49, (64, 48), (256, 192)),
        ((1280, 640), 3, (512, 256), (960, 160)),
    ],
)
def test_sizes(size, count, thumbnail, sheet):
    first, grid = stills(size, count)
    assert (first.format, first.size) == ("WEBP", thumbnail)
    assert (grid.format, grid.size) == ("JPEG", sheet)


def test_the_sheet_goes_from_the_first_frame_to_the_last():
    first, grid = stills((64, 48), 49)
    assert first.convert("L").getpixel((32, 24)) < 5
    greys = [grid.convert("L").getpixel((32 + 64 * (i % 4), 24 + 48 * (i // 4))) for i in range(16)]
    assert greys == sorted(greys) and greys[0] < 5 and greys[-1] > 250
