"""The fields of edits and variations, by each way in; those of generations are in test_images.py."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from darkroom.configs.config import Limits
from darkroom.configs.errors import RequestError
from darkroom.server.fields import EditRequest, GenerationRequest, VariationRequest
from darkroom.server.uploads import Pictures
from tests.golden import picture_file

from .conftest import CAPABILITIES

EDITS, VARIATIONS = "/v1/images/edits", "/v1/images/variations"
PICTURE = picture_file(96, 80)
INVALID, TYPE, BELOW, ABOVE = "invalid_value", "invalid_type", "integer_below_min_value", "integer_above_max_value"
LONG, UNKNOWN, MISSING = "string_above_max_length", "unknown_parameter", "missing_required_parameter"

TAKEN = [
    {"n": 10},
    {"size": "auto"},
    {"size": "128x64"},
    {"size": "128x64", "width": 128, "height": 64},
    {"width": 128, "height": 64},
    {"quality": "low"},
    {"quality": "hd"},
    {"background": "auto"},
    {"background": "opaque"},
    {"output_format": "png", "output_compression": 100},
    {"output_format": "jpeg", "output_compression": 0},
    {"output_format": "webp", "output_compression": 80},
    {"response_format": "b64_json"},
    {"response_format": "url"},
    {"user": "x", "safety_identifier": "x"},
    {"negative_prompt": "x"},
    {"steps": 4},
    {"true_cfg_scale": 1.5},
    {"strength": 0.5},
    {"denoising_strength": 0.5, "strength": 0.5},
    {"strength": 1},
    {"seed": 0},
    {"max_sequence_length": 64},
]
OF_EDITS = [
    {"moderation": "low"},
    {"input_fidelity": "high"},
    {"input_fidelity": "low"},
    {"stream": True},
    {"stream": True, "partial_images": 3},
    {"stream": False, "partial_images": 0},
]
REFUSED = [
    ({"prompt": " "}, "prompt", INVALID),
    ({"prompt": "x" * 32_001}, "prompt", LONG),
    ({"n": 0}, "n", BELOW),
    ({"n": 11}, "n", ABOVE),
    ({"n": 10**300}, "n", ABOVE),
    ({"size": "1024"}, "size", INVALID),
    ({"size": "130x128"}, "size", INVALID),
    ({"size": "99984x99984"}, "size", INVALID),
    ({"size": "128x128", "width": 64}, "width", INVALID),
    ({"size": "128x128", "height": 64}, "height", INVALID),
    ({"width": 0}, "size", INVALID),
    ({"width": 10**300}, "width", ABOVE),
    ({"quality": "best"}, "quality", INVALID),
    ({"background": "transparent"}, "background", INVALID),
    ({"background": "blue"}, "background", INVALID),
    ({"output_format": "gif"}, "output_format", INVALID),
    ({"output_compression": 80}, "output_compression", INVALID),
    ({"output_compression": 101, "output_format": "jpeg"}, "output_compression", ABOVE),
    ({"output_compression": -1, "output_format": "jpeg"}, "output_compression", BELOW),
    ({"response_format": "file"}, "response_format", INVALID),
    ({"negative_prompt": "x" * 32_001}, "negative_prompt", LONG),
    ({"num_inference_steps": 0}, "num_inference_steps", BELOW),
    ({"num_inference_steps": 201}, "num_inference_steps", ABOVE),
    ({"num_inference_steps": 10**300}, "num_inference_steps", ABOVE),
    ({"steps": 4, "infer_steps": 5}, "num_inference_steps", INVALID),
    ({"true_cfg_scale": -1}, "true_cfg_scale", INVALID),
    ({"true_cfg_scale": 101}, "true_cfg_scale", INVALID),
    ({"guidance_scale": 3.5}, "guidance_scale", INVALID),
    ({"strength": 0}, "strength", INVALID),
    ({"strength": 1.5}, "strength", INVALID),
    ({"strength": -1}, "strength", INVALID),
    ({"layers": 3}, "layers", INVALID),
    ({"seed": -1}, "seed", BELOW),
    ({"seed": 2**64}, "seed", ABOVE),
    ({"max_sequence_length": 1025}, "max_sequence_length", ABOVE),
    ({"promt": "x"}, "promt", UNKNOWN),
    ({"output_path": "/etc/passwd"}, "output_path", UNKNOWN),
    ({"lora": "x"}, "lora", UNKNOWN),
    ({"flow_shift": 3.0}, "flow_shift", UNKNOWN),
    ({"guidance_scale_2": 3.0}, "guidance_scale_2", INVALID),
    ({"num_frames": 5}, "num_frames", UNKNOWN),
]
REFUSED_BY_EDITS = [
    ({"prompt": None}, "prompt", MISSING),
    ({"input_fidelity": "medium"}, "input_fidelity", INVALID),
    ({"moderation": "none"}, "moderation", INVALID),
    ({"partial_images": 1}, "partial_images", INVALID),
    ({"partial_images": 4, "stream": True}, "partial_images", ABOVE),
    ({"partial_images": -1, "stream": True}, "partial_images", BELOW),
    ({"stream": True, "response_format": "url"}, "response_format", INVALID),
    ({"complexity": "low"}, "complexity", INVALID),
    ({"frame_count": 9}, "frame_count", INVALID),
    ({"frame_duration_ms": 200}, "frame_duration_ms", INVALID),
    ({"style": "vivid"}, "style", UNKNOWN),
]
REFUSED_BY_VARIATIONS = [
    ({"stream": True}, "stream", UNKNOWN),
    ({"partial_images": 1}, "partial_images", UNKNOWN),
    ({"input_fidelity": "high"}, "input_fidelity", UNKNOWN),
]
OVER_JSON = [
    ({"n": "2"}, "n", TYPE),
    ({"n": True}, "n", TYPE),
    ({"seed": 1.5}, "seed", TYPE),
    ({"stream": "true"}, "stream", TYPE),
    ({"strength": "0.5"}, "strength", TYPE),
    ({"prompt": 5}, "prompt", TYPE),
    ({"svg": {"model": "x"}}, "svg", INVALID),
    ({"extra_params": "{}"}, "extra_params", TYPE),
]


def as_text(fields):
    """As the SDK writes a form: booleans in small letters, no nulls."""
    given = {name: value for name, value in fields.items() if value is not None}
    return {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in given.items()}


def as_form(http, path, fields):
    return http.post(path, data=as_text(fields), files={"image": PICTURE})


def as_json(http, path, fields):
    url = "data:image/png;base64," + base64.b64encode(PICTURE).decode()
    return http.post(path, json={"images": [{"image_url": url}], **fields})


@pytest.mark.parametrize("fields", TAKEN + OF_EDITS, ids=str)
@pytest.mark.parametrize("send", [as_form, as_json])
def test_edits_take(over, engine, send, fields):
    response = send(over, EDITS, {"prompt": "x", **fields})
    assert response.status_code == 200, response.text
    assert len(engine.requests) == fields.get("n", 1)


@pytest.mark.parametrize("fields", TAKEN, ids=str)
def test_variations_take(over, engine, fields):
    response = as_form(over, VARIATIONS, fields)
    assert response.status_code == 200, response.text
    assert {message.request.task for message in engine.requests} == {"image-to-image"}


def refused(response, engine, param, code):
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")
    assert len(error["message"]) < 1000
    assert engine.requests == []


@pytest.mark.parametrize(("fields", "param", "code"), REFUSED + REFUSED_BY_EDITS, ids=lambda x: str(x)[:40])
@pytest.mark.parametrize("send", [as_form, as_json])
def test_edits_refuse(over, engine, send, fields, param, code):
    refused(send(over, EDITS, {"prompt": "x", **fields}), engine, param, code)


@pytest.mark.parametrize(("fields", "param", "code"), OVER_JSON, ids=lambda x: str(x)[:40])
def test_edits_in_json_are_strict_in_types(over, engine, fields, param, code):
    refused(as_json(over, EDITS, {"prompt": "x", **fields}), engine, param, code)


@pytest.mark.parametrize(("fields", "param", "code"), REFUSED + REFUSED_BY_VARIATIONS, ids=lambda x: str(x)[:40])
def test_variations_refuse(over, engine, fields, param, code):
    refused(as_form(over, VARIATIONS, fields), engine, param, code)


@pytest.mark.parametrize("name", ["svg[model]", "svg[reasoning][effort]"])
def test_what_is_nested_and_not_supported_is_named(over, engine, name):
    refused(as_form(over, EDITS, {"prompt": "x", name: "y"}), engine, "svg", INVALID)


def test_an_edit_that_draws_anew_has_no_strength(edit, engine):
    refused(as_form(edit, EDITS, {"prompt": "x", "strength": 0.5}), engine, "strength", INVALID)


def test_sizes_of_a_generation(http, engine):
    response = http.post("/v1/images/generations", json={"prompt": "x", "width": 64, "height": 128})
    assert response.json()["size"] == "64x128"
    response = http.post("/v1/images/generations", json={"prompt": "x", "strength": 0.5})
    assert response.json()["error"]["param"] == "strength"


def test_a_model_without_previews_refuses_them():
    asked = GenerationRequest.read({"prompt": "x", "stream": True, "partial_images": 1})
    with pytest.raises(RequestError, match="shows no previews"):
        asked.resolve(CAPABILITIES.override({"previews": False}), Pictures())


@pytest.mark.parametrize("route", [GenerationRequest, EditRequest, VariationRequest])
def test_every_field_is_in_the_docs(route):
    page = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
    assert [name for name in route.model_fields if f"`{name}`" not in page] == []


def test_every_limit_is_in_the_docs():
    page = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
    for name, field in Limits.model_fields.items():
        assert f"`--{name.replace('_', '-')}`" in page
        assert name.startswith("url_") or f"| {field.default} |" in page
