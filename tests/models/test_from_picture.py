"""Image-to-image and inpainting against the stock pipelines, in one process and on ranks."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from diffusers import (
    QwenImageImg2ImgPipeline,
    QwenImageInpaintPipeline,
    ZImageImg2ImgPipeline,
    ZImageInpaintPipeline,
)
from PIL import Image

from darkroom.configs import ParallelConfig, Request
from darkroom.models.base import Model
from darkroom.models.checkpoint import DEMO
from darkroom.parallel.spatial import SharedEncoder
from tests.golden import TOLERANCE, Outputs, difference, generate, picture_file, request, stock_pipeline, worker
from tests.matrix import Cell
from tests.ranks import run_ranks

SIZE = (112, 80)
FILE, MASK = picture_file(*SIZE), picture_file(*SIZE, mode="L")


def over(mask: bytes | None = None, **values: Any) -> Request:
    """A request to draw over the picture."""
    task: Any = "inpaint" if mask else "image-to-image"
    return request(task=task, images=(FILE,), mask=mask, **{"num_inference_steps": 5, "strength": 0.6, **values})


REQUESTS = {
    "image to image": over(),
    "half a step": over(strength=0.5),  # 2.5 steps of 5: rounded as the pipelines do
    "all of it": over(strength=1.0),
    "another size": over(width=64, height=96),
    "inpaint": over(MASK, strength=0.8),
    "inpaint all of it": over(MASK, strength=1.0),
    "inpaint, no guidance": over(MASK, guidance_scale=0.0),
}
STOCK = {
    "qwen_image": (QwenImageImg2ImgPipeline, QwenImageInpaintPipeline, "true_cfg_scale"),
    "z_image": (ZImageImg2ImgPipeline, ZImageInpaintPipeline, "guidance_scale"),
}


def run_stock(name: str, folder: Path, request: Request, output_type: str) -> Any:
    to_image, inpaint, guidance = STOCK[name]
    pipe = stock_pipeline(inpaint if request.mask else to_image, folder)
    mask = {"mask_image": Image.open(io.BytesIO(request.mask))} if request.mask else {}
    return pipe(
        request.prompt,
        image=Image.open(io.BytesIO(request.images[0])).resize((request.width, request.height), Image.LANCZOS),
        negative_prompt=request.negative_prompt,
        strength=request.strength,
        width=request.width,
        height=request.height,
        num_inference_steps=request.num_inference_steps,
        max_sequence_length=request.max_sequence_length,
        generator=torch.Generator("cpu").manual_seed(request.seed),
        output_type=output_type,
        **{guidance: request.guidance_scale},
        **mask,
    ).images


@pytest.fixture(scope="module")
def folders(checkpoints: dict[str, Path]) -> dict[str, Path]:
    return {
        "qwen_image": DEMO,
        "z_image": checkpoints["z_image_4_heads"],
        "tiny": checkpoints["qwen_image_4_heads"],
    }


@pytest.mark.parametrize("case", REQUESTS)
@pytest.mark.parametrize("name", STOCK)
def test_one_process_is_the_stock_pipeline(name: str, case: str, folders: dict[str, Path]) -> None:
    """Bit for bit, where the stock pipeline does not batch the two branches, as Z-Image's does."""
    wanted, folder = REQUESTS[case], folders[name]
    with worker(folder, ParallelConfig()) as one:
        [(latents, decoded)] = generate(one, [wanted]).values()
        assert decoded is not None
        [picture] = one.model.pictures(decoded)
    off = float((latents - run_stock(name, folder, wanted, "latent")).abs().max())
    batched = name == "z_image" and wanted.guidance_scale > 0
    assert off <= (TOLERANCE if batched else 0.0)
    levels = np.abs(np.asarray(picture).astype(int) - np.asarray(run_stock(name, folder, wanted, "pil")[0]).astype(int))
    assert levels.max() <= (1 if batched else 0)


def test_what_the_mask_leaves_out_stays(folders: dict[str, Path]) -> None:
    """To within what the VAE loses; and all else is drawn anew."""
    with worker(folders["qwen_image"], ParallelConfig()) as one:
        [(kept, _)] = generate(one, [over(MASK, strength=1.0)]).values()
        clean = one.samples["0"].kept
        assert clean is not None
        same = (kept == clean.latents).flatten()
        assert torch.equal(same, clean.mask.flatten() == 0)


def test_a_mask_that_is_not_put_back_is_seen(folders: dict[str, Path]) -> None:
    wanted = REQUESTS["inpaint"]
    with (
        worker(folders["qwen_image"], ParallelConfig()) as one,
        patch.object(Model, "_keep", lambda _, s, k: s.latents),
    ):
        [(latents, _)] = generate(one, [wanted]).values()
    off = latents - run_stock("qwen_image", folders["qwen_image"], wanted, "latent")
    assert float(off.abs().max()) > 10 * TOLERANCE


# ---- every rank begins with the same latents -----------------------------------------------------------------------

LARGE = picture_file(320, 272)
CELLS: list[Cell] = [{"usp": 2}, {"tp": 2, "vae-pp": 2}, {"cfg": 2, "vae-pp": 2, "vae_use_tiling": True}]
ON_RANKS = [
    over(MASK, seed=2),
    request(task="image-to-image", images=(LARGE,), width=320, height=272, num_inference_steps=3, strength=0.7),
]


def run_cells(rank: int, size: int, folder: Path, broken: bool) -> list[Outputs]:
    outputs = []
    for cell in CELLS:
        with worker(folder, ParallelConfig.model_validate(cell), rank) as one:
            if broken:  # every rank has its own idea of the picture
                one.model.encoder._give = lambda moments, owner: (
                    torch.zeros(1, 32, 1, 10, 14) if moments is None else moments
                )
            outputs.append(generate(one, ON_RANKS[:1] if broken else ON_RANKS))
    return outputs


def test_ranks_are_one_process(folders: dict[str, Path]) -> None:
    folder = folders["tiny"]
    ranks = run_ranks(run_cells, 2, folder, False)
    for i, cell in enumerate(CELLS):
        with worker(folder, ParallelConfig(vae_use_tiling=cell.get("vae_use_tiling", False))) as one:
            expected = generate(one, ON_RANKS)
        assert difference(ranks[0][i], expected) <= TOLERANCE
        latents = {id: (x, expected[id][1]) for id, (x, _) in ranks[1][i].items()}
        assert difference(latents, expected) <= TOLERANCE


def test_ranks_that_begin_with_other_latents_are_seen(folders: dict[str, Path]) -> None:
    ranks = run_ranks(run_cells, 2, folders["tiny"], True)
    with worker(folders["tiny"], ParallelConfig()) as one:
        expected = generate(one, ON_RANKS[:1])
    assert difference(ranks[0][0], expected) > 10 * TOLERANCE


def test_pictures_are_shared_out_among_the_ranks(folders: dict[str, Path]) -> None:
    """Three pictures over two ranks: each encodes some of them, and both get all, in order."""
    with worker(folders["tiny"], ParallelConfig()) as one:
        alone = dict(enumerate(encode_three(one.model.encoder)[0]))
    (first, counts_first), (second, counts_second) = run_ranks(encode_on_ranks, 2, folders["tiny"])
    assert (counts_first, counts_second) == (2, 1)
    for i, moments in alone.items():
        assert torch.equal(first[i], moments)
        assert torch.equal(second[i], moments)


def encode_on_ranks(rank: int, size: int, folder: Path) -> tuple[list[torch.Tensor], int]:
    with worker(folder, ParallelConfig.model_validate({"usp": 2, "vae-pp": 2}), rank) as one:
        return encode_three(one.model.encoder)


def encode_three(encoder: SharedEncoder) -> tuple[list[torch.Tensor], int]:
    """What came of three pictures, and how many of them were encoded here."""
    generator = torch.Generator().manual_seed(0)
    pictures = [torch.rand(1, 3, 1, 64, width, generator=generator) for width in (64, 80, 96)]
    vae, counted = encoder._vae[0], []
    inner = vae._encode
    vae._encode = lambda x: (counted.append(x), inner(x))[1]
    with encoder.ahead(pictures):
        moments = [encoder.encode(picture).latent_dist.parameters for picture in pictures]
    return moments, len(counted)
