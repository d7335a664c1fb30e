"""Image-to-image and inpainting beyond what test_matrix compares: what a mask keeps, and who encodes what."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from darkroom.configs import ParallelConfig
from darkroom.engine.messages import Prepare
from darkroom.models.base import Model
from darkroom.parallel.spatial import SharedEncoder
from tests.golden import TOLERANCE, from_stock, generate, request, worker
from tests.ranks import run_ranks
from tests.subjects import DRAWING_OVER, MASK, SUBJECTS, Subject, over


@pytest.fixture(scope="module")
def folder(checkpoints: dict[str, Path]) -> Path:
    return checkpoints["qwen_image_4_heads"]


NAMES = [(name, cls.__name__) for name, subject in SUBJECTS.items() for cls in DRAWING_OVER.get(subject.pipeline, ())]
TASKS = {
    "text-to-image": request("a cat", num_inference_steps=2),
    "image-to-image": over(num_inference_steps=4),
    "inpaint": over(num_inference_steps=4, mask=MASK),
}


@pytest.mark.parametrize(("name", "pipeline"), NAMES)
def test_a_folder_that_names_another_pipeline_does_every_task(
    name: str, pipeline: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """model_index.json may hold the class for image-to-image or inpainting: its parts are the same."""
    subject: Subject = SUBJECTS[name]
    built = checkpoints[f"{name}_4_heads"]
    folder = Path(shutil.copytree(built, tmp_path / "model"))
    index = folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": pipeline}))
    pipe = subject.stock(built)
    for task in subject.capabilities.tasks:
        latents, levels = from_stock(folder, TASKS[task], pipe, subject.run_stock)
        allowed = subject.allowed(TASKS[task])
        assert latents <= allowed[0] and levels <= allowed[1], task


def test_what_the_mask_leaves_out_stays(folder: Path) -> None:
    """To within what the VAE loses; and all else is drawn anew."""
    with worker(folder, ParallelConfig()) as one:
        [(kept, _)] = generate(one, [over(mask=MASK, strength=1.0)]).values()
        clean = one.samples["0"].kept
        assert clean is not None
        same = (kept == clean.latents).flatten()
        assert torch.equal(same, clean.mask.flatten() == 0)


def test_previews_keep_what_the_mask_leaves_out(folder: Path) -> None:
    with worker(folder, ParallelConfig()) as one:
        one.execute(Prepare(ids=("a",), requests=(over(mask=MASK, strength=1.0, partial_images=2),)))
        sample = one.samples["a"]
        for _ in range(3):
            one.step([sample])
            assert sample.kept is not None and sample.estimate is not None
            same = (sample.estimate == sample.kept.latents).flatten()
            assert torch.equal(same, sample.kept.mask.flatten() == 0)


def test_a_mask_that_is_not_put_back_is_seen(folder: Path) -> None:
    wanted = over(mask=MASK)
    with worker(folder, ParallelConfig()) as one:
        [(right, _)] = generate(one, [wanted]).values()
        with patch.object(Model, "_keep", lambda _self, sample, _kept: sample.latents):
            [(wrong, _)] = generate(one, [wanted]).values()
    assert float((wrong - right).abs().max()) > 10 * TOLERANCE


def test_pictures_are_shared_out_among_the_ranks(folder: Path) -> None:
    """Three pictures over two ranks: each encodes some of them, and both get all, in order. And so the tiles of one."""
    with worker(folder, ParallelConfig()) as one:
        alone = dict(enumerate(encode_three(one.model.encoder)[0]))
    (first, counts_first, tiles_first), (second, counts_second, tiles_second) = run_ranks(encode_on_ranks, 2, folder)
    assert (counts_first, counts_second) == (2, 1)
    assert (tiles_first, tiles_second) == (1, 3)  # by their areas: one is larger than the others together
    for i, moments in alone.items():
        assert torch.equal(first[i], moments)
        assert torch.equal(second[i], moments)


def encode_on_ranks(rank: int, size: int, folder: Path) -> tuple[list[torch.Tensor], int, int]:
    """What came of three pictures, how many of them were encoded here, and how many tiles of a large one."""
    config = ParallelConfig.model_validate({"usp": 2, "vae-pp": 2, "vae_use_tiling": True})
    with worker(folder, config, rank) as one:
        moments, count = encode_three(one.model.encoder)
        with counted(one.model.encoder) as tiles:
            one.model.encoder.encode(torch.rand(1, 3, 1, 272, 272, generator=torch.Generator().manual_seed(0)))
        return moments, count, len(tiles)


def encode_three(encoder: SharedEncoder) -> tuple[list[torch.Tensor], int]:
    """What came of three pictures, and how many of them were encoded here."""
    generator = torch.Generator().manual_seed(0)
    pictures = [torch.rand(1, 3, 1, 64, width, generator=generator) for width in (64, 80, 96)]
    with counted(encoder) as here, encoder.ahead(pictures):
        moments = [encoder.encode(picture).latent_dist.parameters for picture in pictures]
    return moments, len(here)


@contextmanager
def counted(encoder: SharedEncoder) -> Iterator[list[torch.Size]]:
    """The sizes of what this rank encodes."""
    vae, sizes = encoder._vae[0], []
    inner = vae._encode
    with patch.object(vae, "_encode", lambda x: (sizes.append(x.shape), inner(x))[1]):
        yield sizes
