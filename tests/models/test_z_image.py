"""What the golden tests of every family (tests/test_matrix.py) do not say of Z-Image."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from darkroom.configs import ParallelConfig, SamplingParams
from darkroom.engine.worker import Worker
from darkroom.models.checkpoint import Checkpoint
from tests.golden import TOLERANCE, Outputs, difference, from_stock, generate, request, stock_pipeline, worker
from tests.ranks import run_ranks
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


def test_no_edge_is_longer_than_its_table_of_positions(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoints["z_image_4_heads"], tmp_path / "short"))
    assert Checkpoint.open(str(folder)).capabilities.max_edge == 512 * 16
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "axes_lens": [1024, 64, 48]}))
    assert Checkpoint.open(str(folder)).capabilities.max_edge == 48 * 16


def test_a_kernel_is_used_on_ranks_too(checkpoints: dict[str, Path]) -> None:
    """Where attention is spread, and in the blocks of the text, where it is not."""
    folder = checkpoints["z_image_4_heads"]
    with worker(folder, ParallelConfig(), attention_backend="_native_math") as one:
        alone = generate(one, [request()])
        assert set(kernels(one).values()) == {"_native_math"}
    for outputs, used in run_ranks(with_kernel, 2, folder):
        assert float((outputs["0"][0] - alone["0"][0]).abs().max()) <= TOLERANCE
        assert {kernel for path, kernel in used.items() if "context_refiner" in path} == {"_native_math"}
        assert {kernel for path, kernel in used.items() if "context_refiner" not in path} == {
            "darkroom_sequence_parallel"
        }


def with_kernel(rank: int, size: int, folder: Path) -> tuple[Outputs, dict[str, str]]:
    config = ParallelConfig.model_validate({"usp": 2})
    with worker(folder, config, rank, attention_backend="_native_math") as one:
        return generate(one, [request()]), kernels(one)


def kernels(one: Worker) -> dict[str, str]:
    """By the path of the module that attends."""
    modules = one.model.pipe.transformer.named_modules()
    return {path: str(x.processor._attention_backend.value) for path, x in modules if hasattr(x, "processor")}
