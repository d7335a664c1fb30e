"""What of stock pipelines cannot be derived."""

from __future__ import annotations

import pytest

from darkroom.configs import RequestError, SamplingParams
from tests.golden import picture_file
from tests.models.test_stock_sizes import capabilities, with_settings


def test_what_cannot_be_derived() -> None:
    newer = {"patch_size_t": 2, "sample_width": 300, "sample_height": 300, "sample_frames": 81}
    model = with_settings("CogVideoXImageToVideoPipeline", **newer)
    assert (model.default_size, model.num_frames, model.fps) == ((1360, 768), 81, 16)
    with pytest.raises(RequestError, match="num_frames"):
        capabilities("Kandinsky5I2VPipeline").resolve(
            "a cat", SamplingParams(images=(picture_file(64, 64),), num_frames=5)
        )
