"""What of a request is given to a stock pipeline's call."""

from __future__ import annotations

from typing import Any

import pytest

from darkroom.configs import Request
from darkroom.models.stock_call import arguments
from tests.golden import picture_file, request
from tests.models.test_stock_sizes import capabilities
from tests.subjects import WIDE, opened


def given(wanted: Request, *names: str) -> dict[str, object]:
    return arguments(wanted, capabilities("LTXPipeline"), names)


@pytest.mark.parametrize("name", ["num_frames", "frames", "video_length"])
def test_frames_by_any_name(name: str) -> None:
    assert given(request(num_frames=17), name, "prompt") == {"prompt": "a red circle", name: 17}


def test_a_rate_by_either_name() -> None:
    assert given(request(fps=12), "fps") == {"fps": 12} and given(request(fps=12), "frame_rate") == {"frame_rate": 12}


def test_pictures_are_one_or_several() -> None:
    one: Any = given(request(images=(WIDE,)), "image")["image"]
    assert one.tobytes() == opened(WIDE).tobytes()
    two: Any = given(request(images=(WIDE, picture_file(64, 64))), "image")["image"]
    assert [each.size for each in two] == [one.size, (64, 64)]
    assert given(request(), "image", "mask_image") == {}
