"""Two transformers that share the steps: which has which, where one is absent, and both on ranks."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

from diffusers import WanPipeline

from darkroom.configs import ParallelConfig
from darkroom.models.checkpoint import Checkpoint
from darkroom.models.wan import WanSample
from tests import tiny
from tests.golden import TOLERANCE, difference, from_stock, generate, stock_pipeline, worker
from tests.ranks import run_ranks
from tests.subjects import run_wan, video


def test_guidance_of_one_strength_is_seen(checkpoints: dict[str, Path]) -> None:
    stock = stock_pipeline(WanPipeline, checkpoints["wan_2_2"])
    wanted = video(guidance_scale_2=2.5)
    with worker(checkpoints["wan_2_2"], ParallelConfig()) as one, patch.object(WanSample, "is_high_noise", True):
        [(latents, _)] = generate(one, [wanted]).values()
    assert float((latents - run_wan(stock, wanted, "latent")).abs().max()) > 10 * TOLERANCE


def test_a_batch_over_both_transformers_is_each_alone(checkpoints: dict[str, Path]) -> None:
    """At the second of three steps one sample is below the boundary, at that of four the other is above it."""
    both = [video("a cat", num_inference_steps=3), video("a large orange house", seed=1, max_sequence_length=40)]
    with worker(checkpoints["wan_2_2"], ParallelConfig()) as one:
        assert difference(generate(one, both, batched=True), generate(one, both)) <= TOLERANCE
        assert [one.samples[id].high_noise_steps for id in ("0", "1")] == [1, 2]  # type: ignore[attr-defined]


def test_one_of_two_transformers_may_be_absent(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Of a boundary at the end of the schedule, all steps are the second's."""
    assert list(Checkpoint.open(str(checkpoints["wan_2_1_4_heads"])).absent) == ["transformer_2"]
    folder = tiny.wan(tmp_path / "second", boundary=1.0, first=False)
    assert from_stock(folder, video(), stock_pipeline(WanPipeline, folder), run_wan) == (0.0, 0)


def connected(rank: int, _size: int, folder: Path) -> list[int]:
    """How many attention modules of each transformer are spread."""
    with worker(folder, ParallelConfig.model_validate({"usp": 2}), rank) as one:
        both = (one.model.pipe.transformer, one.model.pipe.transformer_2)
        attending = [[part for part in x.modules() if hasattr(part, "processor")] for x in both]
        return [sum(part.processor._parallel_config is not None for part in parts) for parts in attending]


def test_both_transformers_are_spread(checkpoints: dict[str, Path]) -> None:
    """Alone on its rank, one of them would give the same video, and save nothing."""
    assert run_ranks(connected, 2, checkpoints["wan_2_2"]) == [[2, 2], [2, 2]]
