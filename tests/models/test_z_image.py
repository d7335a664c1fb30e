"""What the golden tests of every family (tests/test_matrix.py) do not say of Z-Image."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from darkroom.configs import ParallelConfig, SamplingParams
from darkroom.models.checkpoint import Checkpoint
from tests.golden import TOLERANCE, difference, from_stock, generate, request, stock_pipeline, worker
from tests.subjects import Z_IMAGE


def test_a_batch_of_unequal_prompts_is_each_alone(checkpoints: dict[str, Path]) -> None:
    both = [request("a cat"), request("three tiny yellow stars and a very large orange house " * 4, seed=1)]
    with worker(checkpoints["z_image_4_heads"], ParallelConfig()) as one:
        assert difference(generate(one, both, batched=True), generate(one, both)) <= TOLERANCE


def test_the_base_model_is_guided_and_turbo_is_not(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """And with its shift and its strength of guidance, it is the stock pipeline too."""
    folder = Path(shutil.copytree(checkpoints["z_image_4_heads"], tmp_path / "base"))
    turbo = Checkpoint.open(str(folder)).capabilities
    assert (turbo.num_inference_steps, turbo.guidance_scale) == (9, 0.0)
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "shift": 6.0}))
    base = Checkpoint.open(str(folder)).capabilities
    assert (base.num_inference_steps, base.guidance_scale) == (50, 4.0)
    assert Checkpoint.open(str(folder)).notes(ParallelConfig(cfg_parallel_size=2)) == []
    params = SamplingParams(width=112, height=80, num_inference_steps=4, seed=3, negative_prompt="red")
    wanted = base.resolve("a cat", params)
    assert wanted.guidance_scale == 4.0
    latents, levels = from_stock(folder, wanted, stock_pipeline(Z_IMAGE.pipeline, folder), Z_IMAGE.run_stock)
    assert latents <= TOLERANCE and levels <= 1
