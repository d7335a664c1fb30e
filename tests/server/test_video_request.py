from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from darkroom.configs.errors import RequestError
from darkroom.server.video_request import Remix, VideoRequest
from tests.golden import picture_file

from .conftest import VIDEO_CAPABILITIES


def resolved(capabilities=VIDEO_CAPABILITIES, **fields):
    return VideoRequest.read({"prompt": "x", **fields}).resolve(capabilities)


@pytest.mark.parametrize(
    ("grid", "fields", "frames", "seconds"),
    [
        ({"frame_multiple": 1}, {"seconds": "5"}, 80, "5"),
        ({"frame_multiple": 4}, {"seconds": "5"}, 81, "5"),
        ({"frame_multiple": 8}, {"seconds": "5"}, 81, "5"),
        ({"frame_multiple": 4, "fps": 24}, {"seconds": "5"}, 121, "5"),
        ({"frame_multiple": 4, "max_frames": 50}, {}, 49, "3"),
        ({"frame_multiple": 4, "max_frames": 49}, {"fps": 8}, 33, "4"),
        ({"frame_multiple": 4, "max_frames": 3}, {}, 1, "1"),
    ],
)
def test_seconds_on_the_models_grid(grid, fields, frames, seconds):
    made = resolved(VIDEO_CAPABILITIES.override(grid), **fields)
    assert (made.request.num_frames, made.seconds) == (frames, seconds)


def test_seconds_that_are_too_many_say_what_would_be():
    with pytest.raises(RequestError, match=r"at 16 frames per second these are 177 frames.* at most 161") as caught:
        resolved(seconds="11")
    assert caught.value.param == "seconds"


def test_without_a_seed_videos_differ():
    assert resolved().request.seed != resolved().request.seed


def test_a_remix_has_all_of_its_source_but_the_prompt():
    source = resolved(
        seed=3, fps=8, num_frames=9, size="64x80", steps=3, guidance_scale=2.5, guidance_scale_2=1.5,
        negative_prompt="n", max_sequence_length=9,
    ).request  # fmt: skip
    remix = Remix(prompt="y").resolve(source, VIDEO_CAPABILITIES)
    changed = {name for name in source.__struct_fields__ if getattr(source, name) != getattr(remix, name)}
    assert changed == {"prompt"} and remix.prompt == "y"


def test_a_remix_keeps_what_parameters_cannot_say():
    """A model that cuts no prompt off takes no `max_sequence_length`, and one with both strengths names them both."""
    capabilities = VIDEO_CAPABILITIES.override(
        {"max_sequence_length": None, "guidance_parameter": "true_cfg_scale", "embedded_guidance": 3.5}
    )
    source = resolved(capabilities, true_cfg_scale=2.0, guidance_scale=6.0, num_frames=9).request
    source = msgspec.structs.replace(source, partial_images=2)
    assert source.embedded_guidance == 6.0
    assert Remix(prompt="y").resolve(source, capabilities) == msgspec.structs.replace(source, prompt="y")


def test_a_remix_for_a_model_that_can_do_less():
    source = resolved(num_frames=161).request
    with pytest.raises(RequestError) as caught:
        Remix(prompt="y").resolve(source, VIDEO_CAPABILITIES.override({"max_frames": 81}))
    assert caught.value.param == "num_frames"


def test_a_picture_of_a_bad_shape_is_named_as_it_was_sent():
    with pytest.raises(RequestError, match=r"^'input_reference' has 3x900 pixels; one edge") as caught:
        VideoRequest(prompt="x").resolve(VIDEO_CAPABILITIES, picture_file(3, 900))
    assert caught.value.param == "input_reference"
    source = VideoRequest(prompt="x").resolve(VIDEO_CAPABILITIES, picture_file(64, 128)).request
    with pytest.raises(RequestError, match=r"^'input_reference' has 64x128 pixels; each edge") as caught:
        Remix(prompt="y").resolve(source, VIDEO_CAPABILITIES.override({"min_image_edge": 80}))
    assert caught.value.param == "input_reference"


def test_every_field_is_in_the_docs():
    page = (Path(__file__).parents[2] / "docs" / "api-videos.md").read_text()
    assert [name for name in VideoRequest.model_fields if f"`{name}`" not in page] == []
