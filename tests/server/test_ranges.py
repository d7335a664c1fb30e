from __future__ import annotations

import pytest

from darkroom.server.errors import ApiError
from darkroom.server.ranges import parse_range


@pytest.mark.parametrize(
    ("header", "part"),
    [
        ("bytes=0-0", (0, 1)),
        ("bytes=0-99", (0, 100)),
        ("bytes=0-1000", (0, 100)),
        ("bytes=40-", (40, 100)),
        ("bytes=-10", (90, 100)),
        ("bytes=-1000", (0, 100)),
        ("", None),
        ("bytes=-", None),
        ("bytes=5-4", None),
        ("bytes=0-1,4-5", None),
        ("items=0-1", None),
        ("bytes=a-b", None),
        ("bytes=\u0660-\u0669", None),
        ("bytes=0-" + "9" * 5000, None),
    ],
)
def test_ranges(header, part):
    assert parse_range(header, 100) == part


@pytest.mark.parametrize("header", ["bytes=100-", "bytes=100-200", "bytes=-0"])
def test_ranges_that_the_file_does_not_have(header):
    with pytest.raises(ApiError) as caught:
        parse_range(header, 100)
    assert caught.value.status == 416 and caught.value.headers == {"Content-Range": "bytes */100"}
