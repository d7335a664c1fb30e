from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import time

import httpx
import msgspec
import openai
import pytest
from PIL import Image

from darkroom.configs.config import Limits
from darkroom.engine.media import encode_picture
from darkroom.engine.messages import Failed, Preview, Progress, Refusal
from darkroom.server.client import EngineError
from darkroom.server.fields import GenerationRequest
from tests.golden import picture_file

from .conftest import CAPABILITIES, NAME, OVER, serving
from .engine import failing, finished, slow, wait_until

PATH = "/v1/images/generations"


LARGE = picture_file(64, 64).ljust(400_000, b"x")


def images(response) -> list[bytes]:
    return [base64.b64decode(item["b64_json"], validate=True) for item in response["data"]]


def create(http, **fields):
    response = http.post(PATH, json={"prompt": "a red circle", **fields})
    assert response.status_code == 200, response.text
    return response.json()


def test_the_answer_is_the_contracts(http, engine):
    before = int(time.time())
    answer = create(http, seed=5, n=2, size="256x128", quality="low", output_format="webp", output_compression=80)
    assert before <= answer.pop("created") <= time.time()
    assert images(answer) == [b"picture 5", b"picture 6"]
    assert [item["seed"] for item in answer["data"]] == [5, 6]
    assert all(set(item) == {"b64_json", "seed"} for item in answer.pop("data"))
    assert answer == {
        "size": "256x128",
        "quality": "low",
        "background": "opaque",
        "output_format": "webp",
        "usage": {
            "input_tokens": 7,
            "input_tokens_details": {"text_tokens": 7, "image_tokens": 0},
            "output_tokens": 128,
            "output_tokens_details": {"text_tokens": 0, "image_tokens": 128},
            "total_tokens": 135,
        },
    }
    request = engine.requests[0].request
    assert (request.width, request.height, request.num_inference_steps) == (256, 128, 10)
    assert (request.output_format, request.output_compression) == ("webp", 80)


def test_the_sdk_reads_it(sdk):
    answer = sdk.images.generate(prompt="a red circle", model=NAME, extra_body={"seed": 5})
    assert base64.b64decode(answer.data[0].b64_json) == b"picture 5"
    assert (answer.size, answer.quality, answer.background, answer.output_format) == (
        "128x128",
        "high",
        "opaque",
        "png",
    )
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens == 71
    assert answer._request_id.startswith("req_")


def test_defaults_are_the_models_and_a_null_is_a_default(http, engine):
    nullable = [*(GenerationRequest.model_fields.keys() - {"prompt"}), "steps", "extra_body", "extra_params"]
    answer = create(http, **dict.fromkeys(nullable))
    assert (answer["size"], answer["quality"], answer["output_format"]) == ("128x128", "high", "png")
    request = engine.requests[0].request
    assert (request.num_inference_steps, request.guidance_scale, request.negative_prompt) == (50, 4.0, " ")
    assert (request.output_format, request.output_compression, request.partial_images) == ("png", 100, 0)
    assert request.seed == answer["data"][0]["seed"]


def test_without_a_seed_pictures_differ(http):
    assert images(create(http)) != images(create(http))


def test_extensions_reach_the_engine(http, engine):
    create(
        http,
        negative_prompt="blue",
        num_inference_steps=4,
        true_cfg_scale=2,
        guidance_scale=1,
        max_sequence_length=64,
        seed=2**64 - 1,
        quality="low",
        user="somebody",
        safety_identifier="somebody",
        moderation="low",
    )
    request = engine.requests[0].request
    assert (request.negative_prompt, request.num_inference_steps, request.guidance_scale) == ("blue", 4, 2.0)
    assert (request.max_sequence_length, request.seed) == (64, 2**64 - 1)


@pytest.mark.parametrize(
    ("quality", "steps", "word"),
    [
        ("auto", 50, "high"),
        ("low", 10, "low"),
        ("medium", 25, "medium"),
        ("standard", 25, "medium"),
        ("high", 50, "high"),
        ("hd", 50, "high"),
        ("xhigh", 50, "high"),
        ("max", 50, "high"),
    ],
)
def test_quality_sets_the_steps(http, engine, quality, steps, word):
    assert create(http, quality=quality)["quality"] == word
    assert engine.requests[0].request.num_inference_steps == steps


@pytest.mark.parametrize(
    "fields",
    [
        {"steps": 4},
        {"infer_steps": 4, "num_inference_steps": 4},
        {"extra_body": {"num_inference_steps": 4}},
        {"extra_params": {"steps": 4}, "num_inference_steps": None},
        {"sample_steps": 4},
    ],
)
def test_other_spellings(http, engine, fields):
    create(http, **fields)
    assert engine.requests[0].request.num_inference_steps == 4


def test_every_prompt_within_the_limit_is_taken(http, engine):
    for prompt in ("x" * 32_000, "\u0000\U0001f600\u202e", " a "):
        create(http, prompt=prompt)
        assert engine.requests[-1].request.prompt == prompt


NO_MODEL = "model_not_found"
INVALID, TYPE, BELOW, ABOVE = "invalid_value", "invalid_type", "integer_below_min_value", "integer_above_max_value"
DEEP = json.loads("[" * 400 + "]" * 400)
HOSTILE = [
    ({"prompt": None}, "prompt", "missing_required_parameter"),
    ({"prompt": ""}, "prompt", INVALID),
    ({"prompt": " \n\t"}, "prompt", INVALID),
    ({"prompt": 5}, "prompt", TYPE),
    ({"prompt": ["x"]}, "prompt", TYPE),
    ({"prompt": DEEP}, "prompt", TYPE),
    ({"prompt": "x" * 32_001}, "prompt", "string_above_max_length"),
    ({"model": 5}, "model", TYPE),
    ({"n": 0}, "n", BELOW),
    ({"n": -1}, "n", BELOW),
    ({"n": 11}, "n", ABOVE),
    ({"n": 10**4000}, "n", ABOVE),
    ({"n": "2"}, "n", TYPE),
    ({"n": 2.0}, "n", TYPE),
    ({"n": True}, "n", TYPE),
    ({"size": "0x0"}, "size", INVALID),
    ({"size": "1024"}, "size", INVALID),
    ({"size": "128X128"}, "size", INVALID),
    ({"size": "+128x128"}, "size", INVALID),
    ({"size": "1_28x128"}, "size", INVALID),
    ({"size": "128x128\n"}, "size", INVALID),
    ({"size": " 128x128"}, "size", INVALID),
    ({"size": "-128x128"}, "size", INVALID),
    ({"size": "\uff11\uff12\uff18x128"}, "size", INVALID),
    ({"size": "\u0661\u0662\u0668x128"}, "size", INVALID),
    ({"size": "130x128"}, "size", INVALID),
    ({"size": "32x32"}, "size", INVALID),
    ({"size": "99984x99984"}, "size", INVALID),
    ({"size": "9" * 100_000 + "x128"}, "size", INVALID),
    ({"size": [128, 128]}, "size", TYPE),
    ({"quality": "best"}, "quality", INVALID),
    ({"quality": 1}, "quality", TYPE),
    ({"quality": ["low"]}, "quality", TYPE),
    ({"background": "transparent"}, "background", INVALID),
    ({"background": "blue"}, "background", INVALID),
    ({"output_format": "gif"}, "output_format", INVALID),
    ({"output_format": "svg"}, "output_format", INVALID),
    ({"output_format": "PNG"}, "output_format", INVALID),
    ({"output_compression": 80}, "output_compression", INVALID),
    ({"output_compression": -1, "output_format": "jpeg"}, "output_compression", BELOW),
    ({"output_compression": 101, "output_format": "jpeg"}, "output_compression", ABOVE),
    ({"response_format": "file"}, "response_format", INVALID),
    ({"response_format": "url", "stream": True}, "response_format", INVALID),
    ({"moderation": "none"}, "moderation", INVALID),
    ({"style": "vivid"}, "style", INVALID),
    ({"complexity": "low"}, "complexity", INVALID),
    ({"frame_count": 9}, "frame_count", INVALID),
    ({"frame_duration_ms": 200}, "frame_duration_ms", INVALID),
    ({"svg": {"model": "x"}}, "svg", INVALID),
    ({"stream": "true"}, "stream", TYPE),
    ({"stream": 1}, "stream", TYPE),
    ({"partial_images": 1}, "partial_images", INVALID),
    ({"partial_images": -1, "stream": True}, "partial_images", BELOW),
    ({"partial_images": 4, "stream": True}, "partial_images", ABOVE),
    ({"user": 5}, "user", TYPE),
    ({"negative_prompt": 5}, "negative_prompt", TYPE),
    ({"negative_prompt": "x" * 32_001}, "negative_prompt", "string_above_max_length"),
    ({"num_inference_steps": 0}, "num_inference_steps", BELOW),
    ({"num_inference_steps": 201}, "num_inference_steps", ABOVE),
    ({"num_inference_steps": 4.5}, "num_inference_steps", TYPE),
    ({"steps": 0}, "num_inference_steps", BELOW),
    ({"steps": 4, "num_inference_steps": 5}, "num_inference_steps", INVALID),
    ({"seed": 1, "extra_body": {"seed": 2}}, "seed", INVALID),
    ({"seed": DEEP, "extra_body": {"seed": DEEP}}, "seed", INVALID),
    ({"extra_body": [1]}, "extra_body", TYPE),
    ({"extra_params": "{}"}, "extra_params", TYPE),
    ({"true_cfg_scale": -1}, "true_cfg_scale", INVALID),
    ({"true_cfg_scale": 101.0}, "true_cfg_scale", INVALID),
    ({"true_cfg_scale": 10**400}, "true_cfg_scale", TYPE),
    ({"true_cfg_scale": "4"}, "true_cfg_scale", TYPE),
    ({"true_cfg_scale": True}, "true_cfg_scale", TYPE),
    ({"guidance_scale": 3.5}, "guidance_scale", INVALID),
    ({"cfg": 3.5}, "guidance_scale", INVALID),
    ({"seed": -1}, "seed", BELOW),
    ({"seed": 2**64}, "seed", ABOVE),
    ({"seed": 1.5}, "seed", TYPE),
    ({"seed": "1"}, "seed", TYPE),
    ({"seed": [1, 2]}, "seed", TYPE),
    ({"max_sequence_length": 0}, "max_sequence_length", BELOW),
    ({"max_sequence_length": 1025}, "max_sequence_length", ABOVE),
    ({"promt": "x"}, "promt", "unknown_parameter"),
    ({"unknown": None}, "unknown", "unknown_parameter"),
    ({"output_path": "/etc/passwd"}, "output_path", "unknown_parameter"),
    ({"x" * 100_000: 1}, "x" * 80, "unknown_parameter"),
    ({"\u0000": DEEP}, "\u0000", "unknown_parameter"),
]


@pytest.mark.parametrize(("fields", "param", "code"), HOSTILE, ids=lambda value: str(value)[:40])
def test_bad_input_is_400_before_anything_is_queued(http, engine, fields, param, code):
    response = http.post(PATH, json={"prompt": "x", **fields})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")
    assert len(error["message"]) < 1000
    assert engine.requests == []


@pytest.mark.parametrize("model", ["gpt-image-1", "", NAME.upper(), "x" * 100_000])
def test_an_unknown_model_is_404(http, engine, model):
    response = http.post(PATH, json={"prompt": "x", "model": model})
    assert response.status_code == 404
    error = response.json()["error"]
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert len(response.text) < 1000
    assert engine.requests == []


def test_the_first_failure_of_n_cancels_the_others(http, engine):
    def script(message):
        if len(engine.requests) == 2:
            yield Failed(id=message.id, error="why", reason="busy")
        yield 3600.0

    engine.script = script
    assert http.post(PATH, json={"prompt": "x", "n": 3}).status_code == 429
    ids = [message.id for message in engine.requests]
    assert wait_until(lambda: sorted(engine.cancelled) == sorted([ids[0], *ids[2:]]))


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_cancels(http, engine, n, stream):
    engine.script = slow
    with (
        pytest.raises(httpx.ReadTimeout),
        http.stream("POST", PATH, json={"prompt": "x", "n": n, "stream": stream}, timeout=0.2) as response,
    ):
        response.read()
    assert len(engine.requests) == n
    assert wait_until(lambda: set(engine.cancelled) == {message.id for message in engine.requests})


def test_the_engines_death_ends_every_request(http, server):
    def die(message):
        yield Progress(id=message.id, step=1, num_steps=2, seconds=0.1, batch_size=1)
        error = EngineError("unavailable", "exit code 9")
        server.loop.call_soon_threadsafe(server.client.fail_all, error)
        yield 3600.0

    server.engine.script = die
    assert http.post(PATH, json={"prompt": "x", "n": 2}).status_code == 503
    server.engine.script = slow
    assert http.post(PATH, json={"prompt": "x"}).status_code == 503


def test_large_pictures_come_whole(http, engine):
    large = os.urandom(3_000_001)
    engine.script = lambda message: [finished(message, large)]
    assert images(create(http, n=2)) == [large, large]


def test_stream_is_the_contracts(http):
    before = int(time.time())
    with http.stream("POST", PATH, json={"prompt": "x", "seed": 5, "stream": True, "partial_images": 2}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].partition(";")[0] == "text/event-stream"
        text = response.read().decode()
    assert text.endswith("\n\n")
    events = [event.split("\n") for event in text[:-2].split("\n\n")]
    common = {"size": "128x128", "quality": "high", "background": "opaque", "output_format": "png", "image_index": 0}
    for i, (name, data) in enumerate(events):
        content = json.loads(data.removeprefix("data: "))
        assert name == "event: " + content["type"]
        assert before <= content.pop("created_at") <= time.time()
        image = base64.b64decode(content.pop("b64_json"))
        if i < 2:
            assert image == b"preview %d of 5" % i
            assert content == {"type": "image_generation.partial_image", "partial_image_index": i, **common}
        else:
            assert image == b"picture 5"
            usage = content.pop("usage")
            assert usage["input_tokens"] + usage["output_tokens"] == usage["total_tokens"] == 71
            assert content == {"type": "image_generation.completed", "seed": 5, **common}
    assert len(events) == 3


def test_the_sdk_reads_the_stream(sdk, engine):
    events = list(sdk.images.generate(prompt="x", stream=True, partial_images=2, extra_body={"seed": 5}))
    assert [event.type.rpartition(".")[2] for event in events] == ["partial_image", "partial_image", "completed"]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    assert base64.b64decode(events[2].b64_json) == b"picture 5"
    assert events[2].usage.total_tokens == 71
    assert engine.requests[0].request.partial_images == 2


def test_a_stream_without_previews_is_one_event(sdk):
    assert [event.type for event in sdk.images.generate(prompt="x", stream=True)] == ["image_generation.completed"]


def test_a_stream_of_n_has_n_completed_events_whose_usage_adds_up(sdk):
    events = list(sdk.images.generate(prompt="x", stream=True, n=3, partial_images=1, extra_body={"seed": 5}))
    completed = [event for event in events if event.type == "image_generation.completed"]
    assert len(events) == 6
    assert sorted((event.image_index, event.seed) for event in completed) == [(0, 5), (1, 6), (2, 7)]
    assert sum(event.usage.total_tokens for event in completed) == 7 + 3 * 64


def test_a_late_failure_is_an_error_event(sdk, engine):
    def script(message):
        yield Preview(id=message.id, index=0, image=b"preview")
        yield Failed(id=message.id, error="/secret")

    engine.script = script
    stream = iter(sdk.images.generate(prompt="x", stream=True, partial_images=1))
    assert next(stream).type == "image_generation.partial_image"
    with pytest.raises(openai.APIError, match="server failed") as caught:
        next(stream)
    assert caught.value.type == "server_error"


def test_previews_are_sent_as_they_come(http, engine):
    def script(message):
        yield Preview(id=message.id, index=0, image=b"preview")
        yield 3600.0

    engine.script = script
    with http.stream("POST", PATH, json={"prompt": "x", "stream": True, "partial_images": 1}) as response:
        assert next(response.iter_lines()) == "event: image_generation.partial_image"
    assert wait_until(lambda: len(engine.cancelled) == 1)


# ---- pictures in: edits, masks, variations ---------------------------------------------------------------------------

EDITS, VARIATIONS = "/v1/images/edits", "/v1/images/variations"
PICTURE, OTHER, MASK = picture_file(96, 80), picture_file(64, 128, seed=1), picture_file(96, 80, seed=2, mode="RGBA")


def test_the_sdk_edits(sdk_of, engine):
    answer = sdk_of("edit").images.edit(image=PICTURE, prompt="make it red", model=NAME, extra_body={"seed": 5})
    assert base64.b64decode(answer.data[0].b64_json) == b"picture 5"
    assert (answer.size, answer.background, answer.output_format) == ("288x224", "opaque", "png")
    assert answer.usage.input_tokens_details.image_tokens == 16
    assert answer.usage.input_tokens == 7 + 16
    assert answer.usage.total_tokens == 7 + 16 + 64
    request = engine.requests[0].request
    assert (request.task, request.prompt, request.images, request.mask) == ("edit", "make it red", (PICTURE,), None)


def test_the_sdk_sends_every_field(sdk_of, engine):
    answer = sdk_of("over").images.edit(
        image=("../../etc/passwd", PICTURE, "image/svg+xml"),
        mask=MASK,
        prompt="a cat",
        n=2,
        size="128x64",
        quality="low",
        background="opaque",
        output_format="webp",
        output_compression=80,
        input_fidelity="high",
        user="somebody",
        response_format="b64_json",
        extra_body={"seed": 2**64 - 1, "true_cfg_scale": 2.5, "negative_prompt": "dog", "denoising_strength": 0.5},
    )
    assert [item.seed for item in answer.data] == [2**64 - 1, 0]
    assert answer.usage.total_tokens == 7 + 16 + 2 * 64
    request = engine.requests[0].request
    assert (request.task, request.images, request.mask) == ("inpaint", (PICTURE,), MASK)
    assert (request.width, request.height, request.num_inference_steps) == (128, 64, 10)
    assert (request.output_format, request.output_compression) == ("webp", 80)
    assert (request.guidance_scale, request.negative_prompt, request.strength) == (2.5, "dog", 0.5)


def test_several_pictures_in_their_order(sdk_of, edit, engine):
    sdk_of("edit").images.edit(image=[PICTURE, OTHER, PICTURE], prompt="x")
    assert engine.requests[-1].request.images == (PICTURE, OTHER, PICTURE)
    repeated = [("image", PICTURE), ("image", OTHER)]
    assert edit.post(EDITS, data={"prompt": "x"}, files=repeated).status_code == 200
    assert engine.requests[-1].request.images == (PICTURE, OTHER)


def test_the_json_form(edit, engine):
    def reference(data):
        return {"image_url": "data:image/png;base64," + base64.b64encode(data).decode()}

    body = {"prompt": "x", "images": [reference(PICTURE), reference(OTHER)], "seed": 5, "n": 1, "mask": None}
    response = edit.post(EDITS, json=body)
    assert response.status_code == 200, response.text
    assert images(response.json()) == [b"picture 5"]
    assert engine.requests[0].request.images == (PICTURE, OTHER)


def test_the_json_form_with_a_mask(over, engine):
    url = "data:;base64," + base64.b64encode(PICTURE).decode()
    mask = "DATA:text/html;BASE64," + base64.b64encode(MASK).decode()
    body = {"prompt": "x", "images": [{"image_url": url, "file_id": None}], "mask": {"image_url": mask}}
    assert over.post(EDITS, json=body).status_code == 200
    assert (engine.requests[0].request.task, engine.requests[0].request.mask) == ("inpaint", MASK)


@pytest.mark.parametrize("field", ["mask", "mask_image"])
def test_a_mask_is_honoured_or_refused(over, edit, engine, field):
    files = {"image": PICTURE, field: MASK}
    assert over.post(EDITS, data={"prompt": "x"}, files=files).status_code == 200
    assert engine.requests.pop().request.mask == MASK
    refused(edit.post(EDITS, data={"prompt": "x"}, files=files), "mask", INVALID)
    refused(over.post(EDITS, data={"prompt": "x"}, files={"image": OTHER, field: MASK}), "mask", INVALID)
    assert engine.requests == []


def test_auto_is_the_first_pictures_size(over, edit):
    for fields in ({}, {"size": "auto"}):
        answer = over.post(EDITS, data={"prompt": "x", **fields}, files={"image": PICTURE}).json()
        assert answer["size"] == "96x80"
    answer = edit.post(EDITS, data={"prompt": "x"}, files=[("image", OTHER), ("image", PICTURE)]).json()
    assert answer["size"] == "192x352"


def test_a_stream_of_an_edit_is_the_contracts(edit):
    data = {"prompt": "x", "seed": "5", "stream": "true", "partial_images": "2"}
    with edit.stream("POST", EDITS, data=data, files={"image": PICTURE}) as response:
        assert response.headers["content-type"].partition(";")[0] == "text/event-stream"
        text = response.read().decode()
    events = [event.split("\n") for event in text[:-2].split("\n\n")]
    names = [name.removeprefix("event: ") for name, _ in events]
    assert names == ["image_edit.partial_image", "image_edit.partial_image", "image_edit.completed"]
    for name, (_, data) in zip(names, events, strict=True):
        content = json.loads(data.removeprefix("data: "))
        assert content["type"] == name
        assert {"b64_json", "created_at", "size", "quality", "background", "output_format"} <= set(content)
    assert content["usage"]["input_tokens_details"] == {"text_tokens": 7, "image_tokens": 16}
    assert base64.b64decode(content["b64_json"]) == b"picture 5"


def test_the_sdk_reads_the_stream_of_an_edit(sdk_of):
    stream = sdk_of("edit").images.edit(image=PICTURE, prompt="x", stream=True, partial_images=1, n=2)
    events = list(stream)
    assert sorted(event.type for event in events) == ["image_edit.completed"] * 2 + ["image_edit.partial_image"] * 2
    usages = [event.usage for event in events if event.type == "image_edit.completed"]
    assert sum(usage.total_tokens for usage in usages) == 7 + 16 + 2 * 64


def test_the_async_sdk(server, _others):
    async def use():
        url = f"{_others['over'].url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="any", max_retries=0, timeout=10) as sdk:
            edited = await sdk.images.edit(image=PICTURE, mask=MASK, prompt="x", extra_body={"seed": 5})
            with pytest.deprecated_call():
                varied = await sdk.images.create_variation(image=PICTURE, extra_body={"seed": 6})
            made = await sdk.images.generate(prompt="x", extra_body={"seed": 7})
            stream = await sdk.images.edit(image=PICTURE, prompt="x", stream=True, extra_body={"seed": 8})
            events = [event async for event in stream]
            return [edited.data[0], varied.data[0], made.data[0], *events]

    pictures = [base64.b64decode(item.b64_json) for item in asyncio.run(use())]
    assert pictures == [b"picture %d" % i for i in (5, 6, 7, 8)]


def test_the_sdk_makes_variations(sdk_of, engine):
    with pytest.deprecated_call():
        answer = sdk_of("over").images.create_variation(
            image=PICTURE, n=2, size="128x128", response_format="b64_json", user="somebody", model=NAME
        )
    assert len({item.seed for item in answer.data}) == 2
    assert (answer.size, answer.usage.input_tokens_details.image_tokens) == ("128x128", 16)
    request = engine.requests[0].request
    assert (request.task, request.images, request.strength) == ("image-to-image", (PICTURE,), CAPABILITIES.strength)
    assert request.prompt.strip()


def test_nested_extras_of_a_form(edit, engine):
    data = {"prompt": "x", "extra_params[steps]": "4", "extra_body": '{"seed": 5}'}
    assert edit.post(EDITS, data=data, files={"image": PICTURE}).status_code == 200
    request = engine.requests[0].request
    assert (request.num_inference_steps, request.seed) == (4, 5)


def test_layers_are_transparent(http_of, engine):
    http = http_of("layered")
    engine.script = lambda message: [
        msgspec.structs.replace(
            finished(message),
            files=tuple(
                encode_picture(Image.new("RGBA", (64, 64), (255, 0, 0, 60 * i)), message.request.output_format, 100)
                for i in range(3)
            ),
        )
    ]
    for kind in ("png", "webp"):
        fields = {"prompt": "x", "background": "transparent", "output_format": kind}
        answer = http.post(EDITS, data=fields, files={"image": PICTURE}).json()
        assert answer["background"] == "transparent"
        layers = [Image.open(io.BytesIO(file)) for file in images(answer)]
        assert [layer.mode for layer in layers] == ["RGBA"] * 3
        assert [layer.getchannel("A").getextrema() for layer in layers] == [(0, 0), (60, 60), (120, 120)]
    assert engine.requests[0].request.layers == 3
    for fields, param in (
        ({"background": "opaque"}, "background"),
        ({"output_format": "jpeg"}, "output_format"),
        ({"layers": "9"}, "layers"),
    ):
        response = http.post(EDITS, data={"prompt": "x", **fields}, files={"image": PICTURE})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == param
    with http.stream("POST", EDITS, data={"prompt": "x", "stream": "true"}, files={"image": PICTURE}) as response:
        text = response.read().decode()
    usages = [json.loads(line[6:])["usage"]["total_tokens"] for line in text.splitlines() if line.startswith("data:")]
    assert usages == [7 + 16 + 64, 0, 0]


@pytest.mark.parametrize(
    ("kind", "path", "words"),
    [
        ("edit", PATH, "no text-to-image; it changes the pictures that it is sent: POST /v1/images/edits"),
        ("layered", PATH, "POST /v1/images/edits"),
        ("video", PATH, "it makes videos: POST /v1/videos"),
        ("video", EDITS, "it makes videos: POST /v1/videos"),
        ("edit", VARIATIONS, "no image-to-image; it changes the pictures that it is sent: POST /v1/images/edits"),
        ("video", VARIATIONS, "it makes videos: POST /v1/videos"),
        ("text", EDITS, "it makes pictures from text: POST /v1/images/generations"),
        ("text", VARIATIONS, "it makes pictures from text: POST /v1/images/generations"),
    ],
)
def test_a_model_that_cannot_says_what_would_work(http, http_of, engine, kind, path, words):
    client = http if kind == "text" else http_of(kind)
    if path == PATH:
        response = client.post(path, json={"prompt": "x"})
    else:
        data = {"prompt": "x"} if path == EDITS else {}
        response = client.post(path, data=data, files={"image": PICTURE})
    assert words in refused(response, "model", INVALID)
    assert engine.requests == []


def refused(response, param, code, status=400):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], error["code"], error["type"]) == (param, code, "invalid_request_error")
    assert len(error["message"]) < 1000
    return error["message"]


def test_an_unknown_model_of_an_edit_is_404(edit, over):
    refused(edit.post(EDITS, data={"prompt": "x", "model": "y"}, files={"image": PICTURE}), "model", NO_MODEL, 404)
    refused(over.post(VARIATIONS, data={"model": "y"}, files={"image": PICTURE}), "model", NO_MODEL, 404)


@pytest.mark.parametrize("path", [EDITS, VARIATIONS])
@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_other_content_types_are_415(edit, path, kind):
    response = edit.post(path, content=b"prompt=x", headers={"content-type": kind})
    refused(response, None, "unsupported_content_type", 415)


def test_variations_take_no_json(over):
    refused(over.post(VARIATIONS, json={}), None, "unsupported_content_type", 415)


def test_what_the_workers_alone_can_see_is_400(over, engine):
    refusal = Refusal(message="'image' cannot be decoded: the file is broken.", param="image", code=INVALID)
    engine.script = failing("internal", refusal=refusal)
    response = over.post(EDITS, data={"prompt": "x"}, files={"image": PICTURE})
    assert "is broken" in refused(response, "image", INVALID)


def test_a_client_that_goes_away_cancels_its_edit(edit, engine):
    engine.script = slow
    with pytest.raises(httpx.ReadTimeout):
        edit.post(EDITS, data={"prompt": "x"}, files={"image": PICTURE}, timeout=0.3)
    assert wait_until(lambda: engine.cancelled == [message.id for message in engine.requests] != [])


@pytest.mark.parametrize("size", [0, 1, 2, 3, 384 * 1024, 384 * 1024 + 1, 3 * 384 * 1024 - 1])
def test_pictures_of_any_length_come_whole(http, engine, size):
    """They are encoded in pieces, and the answer's length is told before."""
    file = os.urandom(size)
    engine.script = lambda message: [finished(message, file)]
    response = http.post(PATH, json={"prompt": "x", "n": 2})
    assert int(response.headers["content-length"]) == len(response.content)
    assert images(response.json()) == [file, file]
    text = http.post(PATH, json={"prompt": "x", "stream": True}).text
    [data] = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert base64.b64decode(json.loads(data)["b64_json"], validate=True) == file


def test_more_pictures_than_can_ever_wait_are_not_told_to_come_again(engine):
    limits = Limits(max_queue=4, max_queue_mb=1)
    with (
        serving(engine, capabilities=CAPABILITIES.override(OVER), limits=limits) as server,
        httpx.Client(base_url=server.url, timeout=10) as http,
    ):
        assert len(http.post(PATH, json={"prompt": "x", "n": 4}).json()["data"]) == 4
        for response in (
            http.post(PATH, json={"prompt": "x", "n": 5}),
            http.post("/v1/images/edits", data={"prompt": "x", "n": "3"}, files={"image": LARGE}),
        ):
            error = response.json()["error"]
            assert (response.status_code, error["param"], error["code"]) == (400, "n", "integer_above_max_value")
        assert http.post("/v1/images/edits", data={"prompt": "x", "n": "2"}, files={"image": LARGE}).status_code == 200
