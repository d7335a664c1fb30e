"""Golden equality of one process in all that layouts share: on any device, in bfloat16, in tiles, in batches.

With the trained demo. The tiny checkpoints in every layout are tests/test_matrix.py's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from diffusers import QwenImagePipeline
from PIL import Image

from darkroom.configs import ParallelConfig
from darkroom.engine.worker import Worker
from darkroom.models.checkpoint import DEMO
from darkroom.models.qwen_image import QwenImage
from tests.golden import TOLERANCE, difference, generate, request, worker
from tests.matrix import Cell, Kind, OneProcess, differences, run_cells, unequal
from tests.ranks import run_ranks
from tests.subjects import QWEN_IMAGE
from tests.subjects import run_qwen_image as run_stock


@pytest.fixture(
    scope="module",
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")],
        ),
    ],
)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both sides run on it, in full fp32: convolutions on CUDA would round to TF32."""
    convolutions: Any = torch.backends.cudnn.conv
    before = convolutions.fp32_precision
    convolutions.fp32_precision = "ieee"
    yield request.param
    convolutions.fp32_precision = before


@pytest.fixture(scope="module")
def stock(device: str) -> QwenImagePipeline:
    pipe = QwenImagePipeline.from_pretrained(DEMO, dtype=torch.float32).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def alone(device: str) -> Iterator[Worker]:
    with worker(DEMO, ParallelConfig(), device=device) as one:
        yield one


def assert_same(ours: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit for bit on a CPU. CUDA's libraries may choose another kernel for the same product from call to call."""
    if ours.device.type == "cpu":
        assert torch.equal(ours, expected)
    else:
        assert float((ours - expected).abs().max()) <= TOLERANCE


def assert_same_picture(ours: Image.Image, expected: Image.Image, levels: int) -> None:
    apart = np.asarray(ours).astype(int) - np.asarray(expected).astype(int)
    assert np.abs(apart).max() <= levels


REQUESTS = QWEN_IMAGE.requests


@pytest.mark.parametrize("case", REQUESTS)
def test_one_process_is_the_stock_pipeline(case: str, stock: QwenImagePipeline, alone: Worker) -> None:
    wanted = REQUESTS[case]
    [(latents, decoded)] = generate(alone, [wanted]).values()
    assert_same(latents, run_stock(stock, wanted, "latent"))
    assert decoded is not None
    [picture], [expected] = alone.model.pictures(decoded), run_stock(stock, wanted, "pil")
    assert_same_picture(picture, expected, levels=0 if decoded.device.type == "cpu" else 1)


def test_one_process_decodes_in_tiles_as_the_stock_vae_does(stock: QwenImagePipeline, device: str) -> None:
    wanted = request("a blue house", width=288, height=272, num_inference_steps=2)
    with worker(DEMO, ParallelConfig(vae_use_tiling=True), device=device) as one:
        [(_, decoded)] = generate(one, [wanted]).values()
        assert decoded is not None
        [picture] = one.model.pictures(decoded)
    [whole] = run_stock(stock, wanted, "pil")
    stock.vae.enable_tiling()
    [expected] = run_stock(stock, wanted, "pil")
    stock.vae.disable_tiling()
    levels = 0 if device == "cpu" else 1
    assert_same_picture(picture, expected, levels)
    with pytest.raises(AssertionError):  # tiles blend into each other: another picture
        assert_same_picture(picture, whole, levels)


def test_one_process_is_the_stock_pipeline_in_bfloat16(device: str) -> None:
    wanted = REQUESTS["square"]
    pipe = QwenImagePipeline.from_pretrained(DEMO, dtype=torch.bfloat16).to(device)
    pipe.set_progress_bar_config(disable=True)
    with worker(DEMO, ParallelConfig(), device=device, dtype="bfloat16") as one:
        [(latents, decoded)] = generate(one, [wanted]).values()
        numbers = one.model.pipe.image_processor.postprocess(decoded, output_type="pt")
    assert torch.equal(latents, run_stock(pipe, wanted, "latent"))
    assert torch.equal(numbers, run_stock(pipe, wanted, "pt"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_the_same_seed_gives_the_same_picture_on_any_device(stock: QwenImagePipeline, alone: Worker) -> None:
    wanted = REQUESTS["square"]
    with worker(DEMO, ParallelConfig()) as on_cpu:
        pictures = []
        for one in (alone, on_cpu):
            [(_, decoded)] = generate(one, [wanted]).values()
            assert decoded is not None
            pictures += one.model.pictures(decoded)
    assert_same_picture(*pictures, levels=1)


def test_interleaved_requests_do_not_touch_each_other(stock: QwenImagePipeline, alone: Worker) -> None:
    both = [REQUESTS["square"], REQUESTS["negative prompt"]]
    outputs = generate(alone, both)
    for (latents, _), wanted in zip(outputs.values(), both, strict=True):
        assert_same(latents, run_stock(stock, wanted, "latent"))


def test_pictures_of_n_have_the_seeds_that_follow(stock: QwenImagePipeline, alone: Worker) -> None:
    second = REQUESTS["square"].picture(1)
    [(latents, _)] = generate(alone, [second]).values()
    expected = run_stock(stock, request("a green star on a white background", width=128, height=128, seed=8), "latent")
    assert_same(latents, expected)


def test_a_batch_of_unequal_prompts_is_each_alone(checkpoints: dict[str, Path]) -> None:
    both = [request("a cat"), request("three tiny yellow stars and a very large orange house", seed=1)]
    with worker(checkpoints["qwen_image_4_heads"], ParallelConfig()) as one:
        expected = generate(one, both)
        assert difference(generate(one, both, batched=True), expected) <= TOLERANCE
        with patch("darkroom.models.qwen_image._pad", without_mask):  # a fault, which must be seen
            assert difference(generate(one, both, batched=True), expected) > 10 * TOLERANCE


def test_a_text_may_have_fewer_tokens_than_ranks(checkpoints: dict[str, Path]) -> None:
    """As the default negative prompt has, on 8 GPUs."""
    folders = {"4_heads": checkpoints["qwen_image_4_heads"]}
    kinds = {"short": Kind(requests=[request("a cat", max_sequence_length=2)])}
    cells: list[Cell] = [{"ring": 4}, {"usp": 4}]
    results = run_ranks(run_cells, 4, folders, cells, nullcontext, kinds)
    assert unequal(differences(results, OneProcess(folders, kinds))) == {}


def without_mask(embeds: list[torch.Tensor], _least: int) -> tuple[torch.Tensor, None]:
    return torch.nn.utils.rnn.pad_sequence([x[0] for x in embeds], batch_first=True), None


def test_guidance_without_its_norm_is_seen(stock: QwenImagePipeline, alone: Worker) -> None:
    def plain(_model: QwenImage, _sample: Any, predictions: list[torch.Tensor]) -> torch.Tensor:
        return predictions[1] + 4.0 * (predictions[0] - predictions[1])

    with patch.object(QwenImage, "guide", plain):
        [(latents, _)] = generate(alone, [REQUESTS["square"]]).values()
    assert float((latents - run_stock(stock, REQUESTS["square"], "latent")).abs().max()) > 10 * TOLERANCE


def test_the_clean_estimate_ends_as_the_picture(alone: Worker) -> None:
    """At the last step sigma is the scheduler's terminal value, so the estimate is nearly the result."""
    wanted = request("a star", partial_images=1, num_inference_steps=8, width=128, height=128)
    generate(alone, [wanted])
    sample = alone.samples["0"]
    assert sample.estimate is not None
    assert float((sample.estimate - sample.latents).abs().mean()) < 0.05
