from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from darkroom.configs import Capabilities, Request, RequestError, SamplingParams
from tests.golden import picture_file

CAPABILITIES = Capabilities(
    family="A family",
    tasks=("text-to-image",),
    size_multiple=16,
    min_edge=64,
    max_pixels=512 * 512,
    default_size=(256, 128),
    num_inference_steps=50,
    min_inference_steps=2,
    max_inference_steps=200,
    quality_steps={"low": 20, "medium": 35, "high": 50},
    guidance_parameter="true_cfg_scale",
    guidance_scale=4.0,
    max_guidance=100.0,
    negative_prompt=" ",
    max_sequence_length=512,
    text_window=1024,
    guidance_branches=2,
    axes=("tp",),
)


def resolve(prompt: str = "a cat", **params: Any) -> Request:
    return CAPABILITIES.resolve(prompt, SamplingParams(**params))


# ---- size ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "expected"),
    [(None, (None, None)), ("auto", (None, None)), ("64x512", (64, 512)), ("1x99999", (1, 99999))],
)
def test_a_size_is_read(size: str | None, expected: tuple[int | None, int | None]) -> None:
    assert CAPABILITIES.parse_size(size) == expected


@pytest.mark.parametrize("size", ["", "64", "64x", "x64", "64X64", "064x64", "0x64", "-64x64", "64x64x1", "64*64",
                                  " 64x64", "64x64\n", "٦٤x64", "100000x64", "1024x1024" * 99])  # fmt: skip
def test_a_size_that_is_none(size: str) -> None:
    with pytest.raises(RequestError, match="expected 'auto' or 'WIDTHxHEIGHT', such as '256x128'") as caught:
        CAPABILITIES.parse_size(size)
    assert caught.value.param == "size"
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("size", [(64, 64), (512, 512), (64, 4096), (80, 112)])
def test_sizes_that_are_fine(size: tuple[int, int]) -> None:
    width, height = size
    assert (resolve(width=width, height=height).width, resolve(width=width, height=height).height) == size


@pytest.mark.parametrize(
    ("width", "height", "message"),
    [
        (
            100,
            128,
            "100x128: A family makes pictures whose width and height are multiples of 16; the nearest is 96x128",
        ),
        (1, 1, "the nearest is 64x64"),
        (48, 128, "each edge must be at least 64 pixels"),
        (0, 0, "each edge must be at least 64 pixels"),
        (-64, -64, "each edge must be at least 64 pixels"),
        (512, 528, "270336 pixels, and this model makes at most 262144"),
        (2**40, 2**40, "at most 262144"),
    ],
)
def test_sizes_that_are_not(width: int, height: int, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        resolve(width=width, height=height)
    assert caught.value.param == "size"


def test_an_edge_may_have_a_limit_of_its_own() -> None:
    limited = CAPABILITIES.override({"max_edge": 1024})
    assert limited.resolve("a cat", SamplingParams(width=256, height=1024)).height == 1024
    for params in (SamplingParams(width=1040, height=64), SamplingParams(width=64, height=1040)):
        with pytest.raises(RequestError, match="each edge must be at most 1024 pixels") as caught:
            limited.resolve("a cat", params)
        assert caught.value.param == "size"


def test_one_edge_may_be_given_alone() -> None:
    assert (resolve(width=64).width, resolve(width=64).height) == (64, 128)


# ---- the rest ------------------------------------------------------------------------------------------------------


def test_defaults_are_the_models() -> None:
    request = resolve()
    assert request == Request(
        prompt="a cat",
        negative_prompt=" ",
        width=256,
        height=128,
        num_inference_steps=50,
        guidance_scale=4.0,
        max_sequence_length=512,
        seed=request.seed,
    )


def test_what_is_given_is_taken() -> None:
    params: dict[str, Any] = {
        "width": 64,
        "height": 80,
        "num_inference_steps": 2,
        "true_cfg_scale": 0.0,
        "negative_prompt": "",
        "max_sequence_length": 1024,
        "seed": 2**64 - 1,
    }
    request = resolve("  a cat\n", **params)
    assert request.prompt == "  a cat\n"
    assert request.guidance_scale == params.pop("true_cfg_scale")
    assert {name: getattr(request, name) for name in params} == params


@pytest.mark.parametrize("prompt", ["", " ", "\n\t", "\u2003"])
def test_a_blank_prompt(prompt: str) -> None:
    with pytest.raises(RequestError, match="blank") as caught:
        resolve(prompt)
    assert caught.value.param == "prompt"


@pytest.mark.parametrize(
    ("params", "steps"),
    [
        ({}, 50),
        ({"quality": "low"}, 20),
        ({"quality": "medium"}, 35),
        ({"quality": "low", "num_inference_steps": 7}, 7),
        ({"num_inference_steps": 2}, 2),
        ({"num_inference_steps": 200}, 200),
    ],
)
def test_quality_sets_the_steps_where_nothing_else_does(params: dict[str, Any], steps: int) -> None:
    assert resolve(**params).num_inference_steps == steps


BELOW, ABOVE = "integer_below_min_value", "integer_above_max_value"


@pytest.mark.parametrize(
    ("param", "value", "expected", "code"),
    [
        ("num_inference_steps", 1, "2 to 200", BELOW),
        ("num_inference_steps", 201, "2 to 200", ABOVE),
        ("max_sequence_length", 0, "1 to 1024", BELOW),
        ("max_sequence_length", 1025, "1 to 1024", ABOVE),
        ("seed", -1, r"0 to 2\^64 - 1", BELOW),
        ("seed", 2**64, r"0 to 2\^64 - 1", ABOVE),
        ("true_cfg_scale", -0.1, "from 0 to 100", "invalid_value"),
        ("true_cfg_scale", 100.5, "from 0 to 100", "invalid_value"),
        ("true_cfg_scale", float("nan"), "from 0 to 100", "invalid_value"),
        ("true_cfg_scale", float("inf"), "from 0 to 100", "invalid_value"),
        ("guidance_scale", 3.5, "takes 'true_cfg_scale'", "invalid_value"),
    ],
)
def test_what_the_model_cannot_take(param: str, value: float, expected: str, code: str) -> None:
    """The error names the thing, the value and the rule."""
    with pytest.raises(RequestError, match=expected) as caught:
        resolve(**{param: value})
    assert param in str(caught.value)
    assert (caught.value.param, caught.value.code) == (param, code)


def test_a_second_strength_is_for_models_with_a_second_transformer() -> None:
    two = CAPABILITIES.override({"guidance_parameter": "guidance_scale", "guidance_scale_2": 3.0})
    scales: list[tuple[float | None, float | None]] = [(None, None), (5.0, None), (None, 2.0), (5.0, 2.0)]
    resolved = [two.resolve("a cat", SamplingParams(guidance_scale=a, guidance_scale_2=b)) for a, b in scales]
    assert [(x.guidance_scale, x.guidance_scale_2) for x in resolved] == [
        (4.0, 3.0),
        (5.0, None),
        (4.0, 2.0),
        (5.0, 2.0),
    ]
    for capabilities, value, message in ((CAPABILITIES, 3.0, "a second transformer"), (two, -1.0, "from 0 to 100")):
        with pytest.raises(RequestError, match=message) as caught:
            capabilities.resolve("a cat", SamplingParams(guidance_scale_2=value))
        assert caught.value.param == "guidance_scale_2"
    assert resolve().guidance_scale_2 is None


def test_a_guidance_scale_without_effect_is_let_through() -> None:
    assert resolve(guidance_scale=1.0, seed=0) == resolve(seed=0)


def test_a_model_may_have_guidance_of_both_kinds() -> None:
    both = CAPABILITIES.override({"embedded_guidance": 3.5})
    assert resolve().embedded_guidance is None
    assert both.resolve("a cat", SamplingParams()).embedded_guidance == 3.5
    request = both.resolve("a cat", SamplingParams(guidance_scale=7.0, true_cfg_scale=2.0))
    assert (request.embedded_guidance, request.guidance_scale) == (7.0, 2.0)
    with pytest.raises(RequestError, match="Invalid guidance_scale 101"):
        both.resolve("a cat", SamplingParams(guidance_scale=101.0))


def test_a_negative_prompt_that_would_have_no_effect() -> None:
    without = CAPABILITIES.override({"takes_negative_prompt": False})
    with pytest.raises(RequestError, match="A family takes no negative prompt") as caught:
        without.resolve("a cat", SamplingParams(negative_prompt="red"))
    assert caught.value.param == "negative_prompt"
    assert without.resolve("a cat", SamplingParams(negative_prompt=" ")).prompt == "a cat"


def test_no_seed_is_a_random_one() -> None:
    assert len({resolve().seed for _ in range(10)}) > 1


# ---- override ------------------------------------------------------------------------------------------------------


def test_a_checkpoint_may_override_any_field() -> None:
    other = CAPABILITIES.override({"default_size": [64, 64], "family": "Another"})
    assert (other.default_size, other.family, other.min_edge) == ((64, 64), "Another", 64)


@pytest.mark.parametrize("values", [{"nope": 1}, {"default_size": [64]}, {"quality_steps": {"best": 1}}])
def test_an_override_is_checked(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        CAPABILITIES.override(values)


# ---- pictures that come with a request -----------------------------------------------------------------------------

WIDE, TALL, THIN = picture_file(160, 80), picture_file(70, 150), picture_file(10, 4000)
DRAWS_OVER = CAPABILITIES.override({"tasks": ("text-to-image", "image-to-image", "inpaint"), "max_images": 1})
EDITS = CAPABILITIES.override({"tasks": ("edit",), "max_images": 3, "image_area": 128 * 128})
LAYERS = CAPABILITIES.override(
    {"tasks": ("layered",), "max_images": 1, "image_area": 128 * 128, "layers": 4, "max_layers": 8}
)
FILMS = CAPABILITIES.override(
    {"tasks": ("text-to-video",), "num_frames": 81, "frame_multiple": 4, "max_frames": 121, "fps": 16}
)


def test_what_a_request_brings_says_what_is_done() -> None:
    def task(capabilities: Capabilities, **params: Any) -> str:
        return capabilities.resolve("a cat", SamplingParams(**params)).task

    assert task(DRAWS_OVER) == "text-to-image"
    assert task(DRAWS_OVER, images=(WIDE,)) == "image-to-image"
    assert task(DRAWS_OVER, images=(WIDE,), mask=WIDE) == "inpaint"
    assert task(EDITS, images=(WIDE, TALL)) == "edit"
    assert task(LAYERS, images=(WIDE,)) == "layered"
    assert task(FILMS) == "text-to-video"


@pytest.mark.parametrize(
    ("capabilities", "image", "size"),
    [
        (DRAWS_OVER, WIDE, (160, 80)),  # as it is
        (DRAWS_OVER, TALL, (64, 144)),  # to what the model can do
        (DRAWS_OVER.override({"image_area": 128 * 128}), picture_file(1024, 512), (192, 96)),  # too large as it is
        (EDITS, WIDE, (192, 96)),  # of the area, as the stock pipelines round it
        (EDITS, TALL, (96, 192)),
        (DRAWS_OVER.override({"max_edge": 170}), WIDE, (160, 80)),
        (DRAWS_OVER.override({"max_edge": 140, "image_area": 96 * 96}), WIDE, (128, 64)),  # too long as it is
        (DRAWS_OVER.override({"max_edge": 140, "image_area": 128 * 128}), WIDE, (128, 96)),
        (EDITS.override({"max_edge": 170}), TALL, (96, 160)),
    ],
)
def test_a_size_that_is_not_asked_for_comes_from_the_first_picture(
    capabilities: Capabilities, image: bytes, size: tuple[int, int]
) -> None:
    wanted = capabilities.resolve("a cat", SamplingParams(images=(image,)))
    assert (wanted.width, wanted.height) == size
    wanted = capabilities.resolve("a cat", SamplingParams(images=(image,), width=64, height=96))
    assert (wanted.width, wanted.height) == (64, 96)


@pytest.mark.parametrize(
    ("capabilities", "params", "param", "message"),
    [
        (CAPABILITIES, {"images": (WIDE,)}, "image", "1 pictures were sent; A family takes none"),
        (EDITS, {"images": (WIDE,) * 4}, "image", "4 pictures were sent; A family takes at most 3"),
        (EDITS, {}, "image", "A family needs a picture to begin with"),
        (EDITS, {"images": (WIDE,), "mask": WIDE}, "mask", "takes no mask"),
        (EDITS, {"images": (b"hello",)}, "image", "'image' is no PNG, JPEG or WebP file"),
        (
            EDITS,
            {"images": (WIDE, THIN)},
            "image",
            "'image' has 10x4000 pixels; one edge can be at most about 200 times",
        ),
        (EDITS.override({"min_image_edge": 75}), {"images": (WIDE, TALL)}, "image", "has 70x150 .* at least 75"),
        (DRAWS_OVER, {"mask": WIDE}, "mask", "'mask' needs an 'image'"),
        (DRAWS_OVER, {"images": (WIDE,), "mask": TALL}, "mask", "The mask has 70x150 pixels, and its picture 160x80"),
        (DRAWS_OVER, {"images": (WIDE,), "strength": 0.0}, "strength", "Invalid strength 0: expected more than 0"),
        (DRAWS_OVER, {"images": (WIDE,), "strength": 1.5}, "strength", "Invalid strength 1.5"),
        (DRAWS_OVER, {"images": (WIDE,), "strength": float("nan")}, "strength", "Invalid strength nan"),
        (DRAWS_OVER, {"strength": 0.5}, "strength", "for this request A family draws from noise"),
        (DRAWS_OVER, {"layers": 2}, "layers", "makes pictures without layers"),
        (LAYERS, {"images": (WIDE,), "layers": 9}, "layers", "Invalid layers 9: expected 1 to 8"),
        (LAYERS, {"images": (WIDE,), "layers": 0}, "layers", "Invalid layers 0: expected 1 to 8"),
        (CAPABILITIES, {"num_frames": 5}, "num_frames", "makes pictures, not videos"),
        (CAPABILITIES, {"fps": 5}, "fps", "makes pictures, not videos"),
        (FILMS, {"num_frames": 80}, "num_frames", "such as 77 or 81"),
        (FILMS, {"num_frames": 125}, "num_frames", "expected 1 to 121"),
        (FILMS, {"fps": 0}, "fps", "expected 1 to 60"),
    ],
)
def test_what_a_model_cannot_do_is_refused(
    capabilities: Capabilities, params: dict[str, Any], param: str, message: str
) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        capabilities.resolve("a cat", SamplingParams(**params))
    assert caught.value.param == param


def test_defaults_of_what_comes_with_a_request() -> None:
    over = DRAWS_OVER.resolve("a cat", SamplingParams(images=(WIDE,)))
    assert (over.strength, over.first_step) == (0.6, 20)
    masked = DRAWS_OVER.resolve("a cat", SamplingParams(images=(WIDE,), mask=WIDE))
    assert (masked.strength, masked.first_step) == (1.0, 0)
    assert LAYERS.resolve("a cat", SamplingParams(images=(WIDE,))).layers == 4
    film = FILMS.resolve("a cat", SamplingParams())
    assert (film.num_frames, film.fps) == (81, 16)
    assert FILMS.resolve("a cat", SamplingParams(num_frames=1, fps=60)).num_frames == 1


def test_a_strength_that_leaves_no_step_is_refused() -> None:
    params = SamplingParams(images=(WIDE,), num_inference_steps=2, strength=1e-17)
    with pytest.raises(RequestError, match="of 2 steps none would be left") as caught:
        DRAWS_OVER.resolve("a cat", params)
    assert caught.value.param == "strength"
