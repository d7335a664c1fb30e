"""Videos that begin with a picture and others, in batches and as previews."""

from __future__ import annotations

from pathlib import Path

import torch

from darkroom.configs import ParallelConfig
from tests import tiny
from tests.golden import TOLERANCE, generate, worker
from tests.subjects import from_a_picture, video


def test_the_clean_estimate_ends_as_the_video(checkpoints: dict[str, Path]) -> None:
    with worker(checkpoints["wan_2_1_4_heads"], ParallelConfig()) as one:
        generate(one, [video(partial_images=1, num_inference_steps=8)])
        sample = one.samples["0"]
    assert sample.estimate is not None
    assert float((sample.estimate - sample.latents).abs().max()) <= TOLERANCE  # the last step goes to sigma zero


def test_previews_begin_with_the_picture_too(checkpoints: dict[str, Path]) -> None:
    with worker(checkpoints["wan_image_to_video_2_2_small"], ParallelConfig()) as one:
        generate(one, [from_a_picture(partial_images=1, num_inference_steps=2)])
        sample = one.samples["0"]
    assert sample.estimate is not None
    assert torch.equal(sample.estimate[:, :, 0], sample.latents[:, :, 0])


def test_requests_with_and_without_a_picture_share_a_batch(tmp_path: Path) -> None:
    both = [from_a_picture(), from_a_picture(images=(), task="text-to-video", seed=1)]
    with worker(tiny.wan(tmp_path / "small", small=True), ParallelConfig()) as one:
        alone, together = generate(one, both), generate(one, both, batched=True)
    for id, (latents, _) in alone.items():
        assert float((latents - together[id][0]).abs().max()) <= TOLERANCE
