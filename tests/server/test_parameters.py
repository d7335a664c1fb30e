"""How requests are read, whichever they are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from darkroom.configs.errors import RequestError
from darkroom.server.fields import EditRequest, GenerationRequest, VariationRequest
from darkroom.server.parameters import _ALIASES, Parameters
from darkroom.server.video_request import VideoRequest

from .conftest import CAPABILITIES

DOCS = Path(__file__).parents[2] / "docs"
KINDS = [GenerationRequest, EditRequest, VariationRequest, VideoRequest]


@pytest.mark.parametrize("kind", KINDS)
def test_a_form_and_an_object_are_read_alike(kind: type[Parameters]) -> None:
    form = {"prompt": "5", "steps": "7", "cfg": "2.5", "extra_params": '{"seed": 3, "steps": 7}'}
    body = {"prompt": "5", "num_inference_steps": 7, "extra_args": {"guidance_scale": 2.5}, "model": None}
    body |= {"extra_body": {"seed": 3}, "extra_json": {}}
    asked = kind.read(form, is_form=True)
    assert asked == kind.read(body)
    assert (asked.prompt, asked.num_inference_steps, asked.guidance_scale, asked.seed) == ("5", 7, 2.5, 3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"steps": 4, "sample_steps": 5}, "num_inference_steps", "invalid_value"),
        ({"seed": 1, "extra_body": {"seed": 2}}, "seed", "invalid_value"),
        ({"extra_body": {"seed": 1}, "extra_params": {"seed": 2}}, "seed", "invalid_value"),
        ({"extra_body": 5}, "extra_body", "invalid_type"),
        ({"extra_params": "{}"}, "extra_params", "invalid_type"),
        ({"extra_body": {"extra_body": {}}}, "extra_body", "unknown_parameter"),
        ({"steps": "4"}, "num_inference_steps", "invalid_type"),
    ],
)
def test_what_is_not_read(kind: type[Parameters], fields: dict[str, object], param: str, code: str) -> None:
    with pytest.raises(RequestError) as caught:
        kind.read({"prompt": "x", **fields})
    assert (caught.value.param, caught.value.code) == (param, code)


@pytest.mark.parametrize(
    ("kind", "name"), [(VideoRequest, "denoising_strength"), (GenerationRequest, "video_frames"), (EditRequest, "fps")]
)
def test_a_spelling_of_what_a_request_does_not_have_is_named_as_it_was_sent(kind: type[Parameters], name: str) -> None:
    with pytest.raises(RequestError, match=f"Unknown parameter: '{name}'"):
        kind.read({"prompt": "x", name: 1})


@pytest.mark.parametrize("kind", KINDS)
def test_every_other_spelling_is_its_field(kind: type[Parameters]) -> None:
    read = {name: field for name, field in _ALIASES.items() if field in kind.model_fields}
    assert {"cfg_scale", "txt_cfg", "sample_steps"} < read.keys()
    for name, field in read.items():
        assert getattr(kind.read({"prompt": "x", name: 1}), field) == 1


@pytest.mark.parametrize("name", ["num_outputs_per_prompt", "num_images_per_prompt"])
def test_other_words_for_how_many(name: str) -> None:
    assert GenerationRequest.read({"prompt": "x", name: 3}).n == 3
    with pytest.raises(RequestError) as caught:
        VideoRequest.read({"prompt": "x", name: 2})
    assert caught.value.param == "n"


@pytest.mark.parametrize("kind", KINDS)
def test_two_sizes(kind: type[Parameters]) -> None:
    sampling = kind.read({"prompt": "x", "size": "64x128", "width": 64}).sampling(CAPABILITIES)
    assert (sampling.width, sampling.height) == (64, 128)
    with pytest.raises(RequestError, match="'height' 64 contradicts the size '64x128'"):
        kind.read({"prompt": "x", "size": "64x128", "height": 64}).sampling(CAPABILITIES)


def test_the_fields_of_other_servers_that_the_docs_name_are_refused() -> None:
    section = (DOCS / "api.md").read_text().split("## Fields of other servers")[1].split("\n## ")[0]
    names = re.findall(
        r"`(\w+)`", "".join(row.split(" | ")[0] for row in section.splitlines() if row.startswith("| `"))
    )
    assert len(names) > 60
    for name in names:
        for kind in KINDS:
            with pytest.raises(RequestError) as caught:
                kind.read({"prompt": "x", name: "y"})
            assert (caught.value.param, caught.value.code) == (name, "unknown_parameter")


def test_every_other_spelling_is_in_the_docs() -> None:
    page = (DOCS / "api.md").read_text() + (DOCS / "api-videos.md").read_text()
    assert [name for name in _ALIASES if f"`{name}`" not in page] == []
