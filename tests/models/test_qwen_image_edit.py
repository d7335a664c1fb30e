"""Qwen-Image's edits and layers beyond what test_matrix compares."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from darkroom.configs import ConfigError, ParallelConfig, RequestError, SamplingParams
from darkroom.engine.worker import Worker
from darkroom.models.checkpoint import Checkpoint
from darkroom.models.qwen_image_edit import QwenImageEditPlus
from tests import tiny
from tests.golden import TOLERANCE, difference, from_stock, generate, request, worker
from tests.subjects import OTHER, QWEN_IMAGE_EDIT_PLUS, SUBJECTS, TALL, WIDE, opened


@pytest.fixture(scope="module")
def stock_2509(checkpoints: dict[str, Path]) -> Any:
    return QWEN_IMAGE_EDIT_PLUS.stock(checkpoints["qwen_image_edit_plus_5_heads"])


@pytest.mark.parametrize("case", ["tall picture", "no guidance", "three"])
def test_the_first_release_is_the_stock_pipeline(case: str, stock_2509: Any, checkpoints: dict[str, Path]) -> None:
    """2509, whose transformer modulates all tokens alike; test_matrix compares 2511."""
    folder, wanted = checkpoints["qwen_image_edit_plus_5_heads"], QWEN_IMAGE_EDIT_PLUS.requests[case]
    assert not stock_2509.transformer.config.zero_cond_t
    assert from_stock(folder, wanted, stock_2509, QWEN_IMAGE_EDIT_PLUS.run_stock) == (0.0, 0)


@pytest.mark.parametrize(
    ("name", "picture", "rounding"),
    [
        ("qwen_image_layered", WIDE, 0),
        ("qwen_image_layered", TALL, 0),
        ("longcat_image_edit", TALL, 16),  # the stock pipeline's edges are the next larger multiples of 16
    ],
)
@pytest.mark.parametrize("area", [tiny.IMAGE_AREA, 160 * 160])
def test_a_picture_is_as_large_as_the_area_says(
    area: int, name: str, picture: bytes, rounding: int, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """Where a request names no size: of the picture's shape, as the stock pipeline draws it."""
    subject = SUBJECTS[name]
    folder = Path(shutil.copytree(checkpoints[f"{name}_4_heads"], tmp_path / "model"))
    (folder / "darkroom.json").write_text(json.dumps({"image_area": area}))
    params = SamplingParams(images=(picture,), num_inference_steps=2, max_sequence_length=61, seed=1)
    wanted = Checkpoint.open(str(folder)).capabilities.resolve("a cat", params)
    stock = sys.modules[subject.pipeline.__module__]
    width, height = opened(picture).size
    size = stock.calculate_dimensions(area, width / height)[:2]
    assert all(0 <= theirs - ours <= rounding for ours, theirs in zip((wanted.width, wanted.height), size, strict=True))
    if area == tiny.IMAGE_AREA:
        assert from_stock(folder, wanted, subject.stock(folder), subject.run_stock) == (0.0, 0)


def test_a_batch_of_unequal_pictures_is_each_alone(checkpoints: dict[str, Path]) -> None:
    both = [
        request("a cat", task="edit", images=(WIDE, OTHER)),
        request("a very large orange house", task="edit", images=(TALL,), seed=1),
    ]
    with worker(checkpoints["qwen_image_edit_plus_2511"], ParallelConfig()) as one:
        assert difference(generate(one, both, batched=True), generate(one, both)) <= TOLERANCE


def test_the_order_of_pictures_matters(checkpoints: dict[str, Path]) -> None:
    with worker(checkpoints["qwen_image_edit_plus_2511"], ParallelConfig()) as one:
        there = generate(one, [request(task="edit", images=(WIDE, OTHER))])
        back = generate(one, [request(task="edit", images=(OTHER, WIDE))])
    assert difference(there, back) > 10 * TOLERANCE


def test_every_layer_is_a_transparent_picture(checkpoints: dict[str, Path]) -> None:
    with worker(checkpoints["qwen_image_layered_4_heads"], ParallelConfig()) as one:
        [(_, decoded)] = generate(one, [request(task="layered", images=(WIDE,), layers=3)]).values()
        assert decoded is not None and decoded.shape == (1, 3, 4, 80, 112)
        layers = one.model.pictures(decoded)
    assert [(layer.mode, layer.size) for layer in layers] == [("RGBA", (112, 80))] * 3


def test_areas_are_options_of_the_checkpoint(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Pictures are as large as the stock pipelines make them, unless darkroom.json says otherwise."""
    stock = QwenImageEditPlus.capabilities
    assert (stock.image_area, stock.condition_area) == (1024 * 1024, 384 * 384)
    folder = Path(shutil.copytree(checkpoints["qwen_image_edit_plus_2511"], tmp_path / "model"))
    (folder / "darkroom.json").write_text(json.dumps({"image_area": 64 * 64, "condition_area": 64 * 64}))
    with worker(folder, ParallelConfig()) as one:
        sample = one.model.prepare(request(task="edit", images=(WIDE, TALL)))
    assert sample.branches[0]["img_shapes"] == [(1, 5, 7), (1, 4, 6), (1, 4, 4)]
    assert sample.context is not None and sample.context.shape[1] == 4 * 6 + 4 * 4
    wanted = Checkpoint.open(str(folder)).capabilities.resolve("a cat", SamplingParams(images=(WIDE,)))
    assert (wanted.width, wanted.height) == (96, 64)


@pytest.mark.parametrize(
    ("values", "param", "message"),
    [
        (
            {"prompt": "make <|image_pad|> red"},
            "prompt",
            r"'prompt' holds '<\|image_pad\|>', which stands for a picture",
        ),
        ({"negative_prompt": "<|video_pad|>"}, "negative_prompt", "'negative_prompt' holds"),
    ],
)
def test_what_cannot_be_read_beside_pictures(
    values: dict[str, Any], param: str, message: str, checkpoints: dict[str, Path]
) -> None:
    """The client's fault, found before the text encoder runs."""
    wanted = request(task="edit", images=(WIDE,), width=96, height=64, **{"prompt": "a cat", **values})
    with (
        worker(checkpoints["qwen_image_edit_4_heads"], ParallelConfig()) as one,
        pytest.raises(RequestError, match=message) as caught,
    ):
        one.model.prepare(wanted)
    assert caught.value.param == param


@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
@pytest.mark.parametrize("name", ["qwen_image_edit_4_heads", "qwen_image_edit_plus_2511"])
def test_of_a_prompt_that_is_too_long_the_beginning_is_read(
    name: str, field: str, checkpoints: dict[str, Path]
) -> None:
    """As much as there are positions for beside the pictures: what comes behind changes nothing."""
    long = [f"猫 cat {i} " for i in range(3_000)]

    def read(one: Worker, *more: str) -> torch.Tensor:
        texts = {"prompt": "a cat", field: "".join([*long, *more])}
        wanted = request(task="edit", images=(WIDE,), width=96, height=64, guidance_scale=2.0, **texts)
        branch = one.model.prepare(wanted).branches[field == "negative_prompt"]
        embeds: torch.Tensor = branch["encoder_hidden_states"]
        return embeds

    with worker(checkpoints[name], ParallelConfig()) as one:
        room = one.model._room([one.model.grid(96, 64)])
        first = read(one)
        assert room - 8 <= first.shape[1] <= room
        assert torch.equal(first, read(one, "and a dog"))


def test_what_reads_pictures_must_be_there(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoints["qwen_image_edit_4_heads"], tmp_path / "model"))
    (folder / "processor" / "preprocessor_config.json").unlink()
    with pytest.raises(ConfigError, match=r"incomplete: processor/preprocessor_config\.json is missing"):
        Checkpoint.open(str(folder))


def test_the_vision_tower_is_cut_over_all_ranks(checkpoints: dict[str, Path]) -> None:
    checkpoint = Checkpoint.open(str(checkpoints["qwen_image_edit_4_heads"]))
    whole = checkpoint.footprint(ParallelConfig(), "float32")[0]["text_encoder"]
    halves = checkpoint.footprint(ParallelConfig.model_validate({"usp": 2}), "float32")
    assert all(rank["text_encoder"] < 0.65 * whole for rank in halves)
