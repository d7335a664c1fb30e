"""What the golden tests and the matrix need to know of every family: a family joins both by one entry here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import diffusers
import torch

from darkroom.configs import Request
from darkroom.models import Model
from darkroom.models.longcat_image import LongCatImage
from darkroom.models.ovis_image import OvisImage
from darkroom.models.qwen_image import QwenImage
from darkroom.models.z_image import ZImage
from tests import faults, tiny
from tests.golden import TOLERANCE, request, stock_pipeline
from tests.matrix import TEXT_TO_IMAGE, Kinds, Trial

Builder = Callable[[Path], Path]
"""Builds a tiny checkpoint in a folder, and returns it."""


class RunStock(Protocol):
    """Calls the stock pipeline: with the output type "latent" -> latents, with "pil" -> pictures or frames."""

    def __call__(self, pipe: Any, request: Request, output_type: str, /) -> Any: ...


EVERY = frozenset({"interleaved", "batched", "one branch"})
GUIDED = frozenset({"interleaved", "batched"})

TRIALS = (
    Trial(fault=faults.ring_skips_a_hop, cell={"ring": 2}, kinds=EVERY),
    Trial(fault=faults.heads_come_back_in_another_order, cell={"usp": 2}, kinds=EVERY),
    Trial(fault=faults.partial_sums_are_not_reduced, cell={"tp": 2}, kinds=EVERY),
    Trial(fault=faults.branches_are_swapped, cell={"cfg": 2}, kinds=GUIDED),
    Trial(fault=faults.halo_rows_are_zero, cell={"tp": 2, "vae-pp": 2}, kinds=EVERY),
    Trial(
        fault=faults.tiles_fade_with_another_rounding,
        cell={"usp": 2, "vae-pp": 2, "vae_use_tiling": True},
        kinds=frozenset({"tiles of large"}),
    ),
)
"""Faults that show in every family of text to image. On 2 ranks each."""
MASKS = Trial(fault=faults.ring_keeps_its_mask, cell={"ring": 2}, kinds=frozenset({"batched"}))
FUSED = Trial(fault=faults.parts_are_cut_as_one, cell={"tp": 2}, kinds=EVERY)
GROUP_NORMS = Trial(fault=faults.group_norms_are_of_one_rank, cell={"tp": 2, "vae-pp": 2}, kinds=EVERY)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One family under test."""

    family: type[Model]
    variants: Mapping[str, Builder]
    """Tiny checkpoints by name. One has a number of heads that no number of ranks divides."""
    eight: Builder | None = None
    """A checkpoint with heads for 8 ranks: for one family of each form of attention."""
    pipeline: Any
    """The stock pipeline's class."""
    stock_parts: Mapping[str, Any] = field(default_factory=dict)
    """What its `from_pretrained` is given."""
    run_stock: RunStock
    requests: Mapping[str, Request]
    """Compared with the stock pipeline, in the first variant."""
    batches_branches: bool = False
    """The stock pipeline runs both branches of guidance as one batch, which rounds otherwise than one by one."""
    kinds: Kinds = field(default_factory=lambda: TEXT_TO_IMAGE)
    """Compared between layouts."""
    trials: tuple[Trial, ...] = TRIALS
    """Faults that must show in the first variant."""

    @property
    def title(self) -> str:
        return self.family.capabilities.family

    def stock(self, folder: Path) -> Any:
        return stock_pipeline(self.pipeline, folder, **self.stock_parts)

    def allowed(self, request: Request) -> tuple[float, int]:
        """How far one process may be from the stock pipeline: in the latents, and in levels of 255."""
        return (TOLERANCE, 1) if self.batches_branches and request.guidance_scale > 1 else (0.0, 0)


def stock_options(request: Request, output_type: str) -> dict[str, Any]:
    """What all stock pipelines call the same."""
    return {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "width": request.width,
        "height": request.height,
        "num_inference_steps": request.num_inference_steps,
        "generator": torch.Generator("cpu").manual_seed(request.seed),
        "output_type": output_type,
    }


def run_qwen_image(pipe: Any, request: Request, output_type: str) -> Any:
    options = stock_options(request, output_type)
    length = request.max_sequence_length
    return pipe(**options, true_cfg_scale=request.guidance_scale, max_sequence_length=length).images


def run_guided(pipe: Any, request: Request, output_type: str) -> Any:
    """Of the pipelines that take `guidance_scale` and `max_sequence_length`."""
    options = stock_options(request, output_type)
    length = request.max_sequence_length
    return pipe(**options, guidance_scale=request.guidance_scale, max_sequence_length=length).images


def run_longcat_image(pipe: Any, request: Request, output_type: str) -> Any:
    pipe.tokenizer_max_length = request.max_sequence_length
    options = stock_options(request, output_type)
    return pipe(**options, guidance_scale=request.guidance_scale, enable_prompt_rewrite=False).images


QWEN_IMAGE = Subject(
    family=QwenImage,
    variants={
        "4_heads": tiny.qwen_image,
        "5_heads": lambda folder: tiny.qwen_image(folder, heads=5, encoder_heads=6, encoder_kv_heads=2),
    },
    eight=lambda folder: tiny.qwen_image(folder, heads=8),
    pipeline=diffusers.QwenImagePipeline,
    run_stock=run_qwen_image,
    requests={
        "square": request("a green star on a white background", width=128, height=128, seed=7),
        "uneven": request("two small blue cats", width=112, height=80, seed=2**64 - 1),
        "no guidance": request("a moon", guidance_scale=1.0),
        "negative prompt": request("a house", negative_prompt="red, blurry", guidance_scale=2.5, num_inference_steps=5),
        "short window": request("a very long prompt about a tree on the left", max_sequence_length=3),
    },
    trials=(*TRIALS, MASKS),
)

Z_IMAGE = Subject(
    family=ZImage,
    variants={"4_heads": tiny.z_image, "5_heads": lambda folder: tiny.z_image(folder, heads=5)},
    eight=lambda folder: tiny.z_image(folder, heads=8),
    pipeline=diffusers.ZImagePipeline,
    run_stock=run_guided,
    requests={
        "turbo": request("a green star on a white background", guidance_scale=0.0, width=128, height=128, seed=7),
        "one step": request("a cat", guidance_scale=0.0, num_inference_steps=1),
        "guidance": request("two small blue cats", negative_prompt="red", guidance_scale=4.0),
        "short window": request("a very long prompt about a tree", guidance_scale=0.0, max_sequence_length=9),
    },
    batches_branches=True,
    trials=(*TRIALS, GROUP_NORMS),
)

LONGCAT_IMAGE = Subject(
    family=LongCatImage,
    variants={"4_heads": tiny.longcat_image, "5_heads": lambda folder: tiny.longcat_image(folder, heads=5)},
    eight=lambda folder: tiny.longcat_image(folder, heads=8),
    pipeline=diffusers.LongCatImagePipeline,
    stock_parts={"text_processor": None},
    run_stock=run_longcat_image,
    requests={
        "square": request("a green star on a white background", width=128, height=128, seed=7),
        "full window": request("two orange squares", max_sequence_length=512),
        "one step": request("a cat", guidance_scale=1.0, num_inference_steps=1),
        "no negative prompt": request("two small blue cats", negative_prompt="", guidance_scale=4.5),
        "negative prompt": request("a house", negative_prompt="red, blurry", guidance_scale=2.5, num_inference_steps=5),
        "letters": request("a sign that says 'a cat'", negative_prompt='"red"'),  # quoted: one token a letter
        "short window": request("a very long prompt about a tree on the left", max_sequence_length=5),
    },
    trials=(*TRIALS, FUSED, GROUP_NORMS),
)

OVIS_IMAGE = Subject(
    family=OvisImage,
    variants={"4_heads": tiny.ovis_image, "5_heads": lambda folder: tiny.ovis_image(folder, heads=5)},
    pipeline=diffusers.OvisImagePipeline,
    run_stock=run_guided,
    requests={
        "square": request("a green star on a white background", width=128, height=128, seed=7),
        "full window": request("two orange squares", max_sequence_length=256),
        "one step": request("a cat", guidance_scale=1.0, num_inference_steps=1),
        "no negative prompt": request("two small blue cats", negative_prompt=""),
        "negative prompt": request("a house", negative_prompt="red, blurry", guidance_scale=2.5, num_inference_steps=5),
        "short window": request("a very long prompt about a tree on the left", max_sequence_length=5),
    },
    trials=(*TRIALS, FUSED, GROUP_NORMS),
)

SUBJECTS: dict[str, Subject] = {
    "qwen_image": QWEN_IMAGE,
    "z_image": Z_IMAGE,
    "longcat_image": LONGCAT_IMAGE,
    "ovis_image": OVIS_IMAGE,
}
"""By name; a variant's checkpoint is called `<subject>_<variant>`."""
