from __future__ import annotations

import pytest
import torch

from darkroom.configs import RequestError
from darkroom.configs.request import OutputFormat
from tests.golden import request


@pytest.mark.parametrize(
    ("seed", "index", "expected"),
    [(0, 0, 0), (7, 3, 10), (2**64 - 1, 0, 2**64 - 1), (2**64 - 1, 1, 0), (2**64 - 2, 5, 3)],
)
def test_picture_i_has_the_seed_that_follows_and_wraps_at_64_bits(seed: int, index: int, expected: int) -> None:
    picture = request(seed=seed).picture(index)
    assert picture.seed == expected
    torch.Generator("cpu").manual_seed(picture.seed)


def test_a_picture_differs_from_its_request_in_the_seed_alone() -> None:
    wanted = request(seed=5, output_format="webp", partial_images=2)
    assert wanted.picture(0) == wanted
    assert wanted.picture(2) == request(seed=7, output_format="webp", partial_images=2)


def test_a_file_of_another_format() -> None:
    assert request().as_file("jpeg", 80) == request(output_format="jpeg", output_compression=80)


@pytest.mark.parametrize(("output_format", "limit"), [("webp", 16_383), ("jpeg", 65_535)])
def test_a_picture_that_is_too_long_for_its_format(output_format: OutputFormat, limit: int) -> None:
    assert request(width=limit).as_file(output_format).width == limit
    with pytest.raises(RequestError, match=f"{output_format} files hold at most {limit} pixels a side") as caught:
        request(height=limit + 1).as_file(output_format)
    assert caught.value.param == "size"
    assert request(height=limit + 1).as_file("png").height == limit + 1
