"""What the golden tests and the matrix need to know of every family: a family joins both by one entry here."""

from __future__ import annotations

import inspect
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol
from unittest.mock import patch

import diffusers
import torch
from diffusers.pipelines.longcat_image import pipeline_longcat_image_edit
from diffusers.pipelines.qwenimage import (
    pipeline_qwenimage_edit,
    pipeline_qwenimage_edit_plus,
    pipeline_qwenimage_layered,
)
from PIL import Image

from darkroom.configs import Request
from darkroom.configs.capabilities import Capabilities
from darkroom.models import Model
from darkroom.models.any_diffusers import AnyDiffusers
from darkroom.models.checkpoint import Checkpoint
from darkroom.models.longcat_image import LongCatImage, LongCatImageEdit, mend_quotations
from darkroom.models.ovis_image import OvisImage
from darkroom.models.qwen_image import QwenImage
from darkroom.models.qwen_image_edit import QwenImageEdit, QwenImageEditPlus, QwenImageLayered
from darkroom.models.sd3 import StableDiffusion3
from darkroom.models.vision_language import load_processor, mark_pictures
from darkroom.models.wan import Wan
from darkroom.models.wan_image_to_video import WanImageToVideo
from darkroom.models.z_image import ZImage
from tests import faults, tiny, tiny_video
from tests.golden import TOLERANCE, picture_file, request, stock_pipeline
from tests.matrix import CELLS, FEW, PAIRWISE, TEXT_TO_IMAGE, Cell, Kind, Kinds, Trial

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
ONE_PICTURE = Trial(fault=faults.pictures_stay_where_they_were_encoded, cell={"usp": 2}, kinds=EVERY)
OVER_ONE = Trial(fault=faults.pictures_stay_where_they_were_encoded, cell={"usp": 2}, kinds=frozenset({"drawn over"}))
GROUP_NORMS = Trial(fault=faults.group_norms_are_of_one_rank, cell={"tp": 2, "vae-pp": 2}, kinds=EVERY)


WIDE, OTHER, TALL = picture_file(160, 100), picture_file(160, 100, seed=1), picture_file(90, 130, seed=2)
MASK = picture_file(160, 100, mode="L")


def over(**values: Any) -> Request:
    """A request to draw over a picture."""
    task = "inpaint" if "mask" in values else "image-to-image"
    return request(**{"task": task, "images": (WIDE,), "num_inference_steps": 5, "strength": 0.6, **values})


OVER: dict[str, Request] = {
    "image to image": over(),
    "half a step": over(strength=0.5),  # 2.5 steps of 5: rounded as the pipelines do
    "all of it": over(strength=1.0),
    "another size": over(width=64, height=96),
    "inpaint": over(mask=MASK, strength=0.8),
    "inpaint all of it": over(mask=MASK, strength=1.0),
    "inpaint, no guidance": over(mask=MASK, guidance_scale=0.0),
}
"""Compared with the stock pipelines, of the families that draw over pictures."""
DRAWN_OVER: dict[str, Kind] = {
    "drawn over": Kind(requests=[over(seed=1), over(mask=MASK, images=(OTHER,), seed=2)]),
    "large, drawn over": Kind(
        requests=[over(images=(picture_file(320, 272),), width=320, height=272, num_inference_steps=3)], tiled=True
    ),
}


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One family under test."""

    family: type[Model]
    """`AnyDiffusers` for pipelines that no family is written for."""
    variants: Mapping[str, Builder]
    """Tiny checkpoints by name. One has a number of heads that no number of ranks divides."""
    eight: Builder | None = None
    """A checkpoint with heads for 8 ranks: for one family of each form of attention."""
    pipeline: Any
    """The stock pipeline's class."""
    open_stock: Callable[[Any, Path], Any] = stock_pipeline
    """Loads it from a checkpoint."""
    run_stock: RunStock
    requests: Mapping[str, Request]
    """Compared with the stock pipeline, in the first variant."""
    batches_branches: bool = False
    """The stock pipeline runs both branches of guidance as one batch, which rounds otherwise than one by one."""
    kinds: Kinds = field(default_factory=lambda: TEXT_TO_IMAGE)
    """Compared between layouts."""
    trials: tuple[Trial, ...] = TRIALS
    """Faults that must show in the first variant."""
    subset: Mapping[int, list[Cell]] = field(default_factory=lambda: FEW[0])
    """The layouts that are tried unless the whole matrix is asked for."""

    more: Mapping[int, list[Cell]] = field(default_factory=dict)
    """Layouts beside those that every family is tried in."""

    @property
    def title(self) -> str:
        return self.pipeline.__name__ if self.family is AnyDiffusers else self.family.capabilities.family

    @cached_property
    def capabilities(self) -> Capabilities:
        """The family's; where no family declares them, those that are derived from the first checkpoint."""
        if self.family is not AnyDiffusers:
            return self.family.capabilities
        with TemporaryDirectory() as root:
            return Checkpoint.open(str(next(iter(self.variants.values()))(Path(root) / "checkpoint"))).capabilities

    def cells(self, every: Mapping[int, list[Cell]]) -> dict[int, list[Cell]]:
        """All layouts, of which these are every family's."""
        return {size: [*some, *self.more.get(size, [])] for size, some in every.items()}

    def layouts(self, size: int, whole: bool) -> dict[str, list[Cell]]:
        """What is tried on so many ranks, by variant. Of a subset each layout in one variant, in turn."""
        if whole:
            return dict.fromkeys(self.variants, self.cells(CELLS)[size])
        cells, number = self.subset.get(size, []), len(self.variants)
        return {name: mine for i, name in enumerate(self.variants) if (mine := cells[i::number])}

    def faults(self, whole: bool) -> list[Trial]:
        """Those that are tried: of the families in few layouts, what the first has not."""
        return [
            trial
            for trial in self.trials
            if whole or self.subset is PAIRWISE or trial.fault not in {one.fault for one in TRIALS}
        ]

    def stock(self, folder: Path) -> Any:
        return self.open_stock(self.pipeline, folder)

    def allowed(self, request: Request) -> tuple[float, int]:
        """How far one process may be from the stock pipeline: in the latents, and in levels of 255."""
        guided = request.guidance_scale > self.capabilities.no_guidance
        return (TOLERANCE, 1) if self.batches_branches and guided else (0.0, 0)


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


DRAWING_OVER: dict[Any, tuple[Any, Any]] = {
    diffusers.QwenImagePipeline: (diffusers.QwenImageImg2ImgPipeline, diffusers.QwenImageInpaintPipeline),
    diffusers.StableDiffusion3Pipeline: (
        diffusers.StableDiffusion3Img2ImgPipeline,
        diffusers.StableDiffusion3InpaintPipeline,
    ),
    diffusers.ZImagePipeline: (diffusers.ZImageImg2ImgPipeline, diffusers.ZImageInpaintPipeline),
}
"""The pipelines of the same components for image-to-image and for inpainting."""


def drawing_over(pipe: Any, request: Request) -> tuple[Any, dict[str, Any]]:
    """The pipeline for what the request brings, and its options for that."""
    if not request.images:
        return pipe, {}
    to_image, inpaint = DRAWING_OVER[type(pipe)]
    other = (inpaint if request.mask else to_image)(**pipe.components)
    other.set_progress_bar_config(disable=True)
    size = (request.width, request.height)  # not every pipeline scales the picture itself
    picture = opened(request.images[0]).resize(size, Image.Resampling.LANCZOS)
    mask = {"mask_image": opened(request.mask)} if request.mask else {}
    return other, {"image": picture, "strength": request.strength, **mask}


def opened(file: bytes) -> Image.Image:
    return Image.open(io.BytesIO(file))


def run_qwen_image(pipe: Any, request: Request, output_type: str) -> Any:
    pipe, options = drawing_over(pipe, request)
    options |= stock_options(request, output_type)
    length = request.max_sequence_length
    return pipe(**options, true_cfg_scale=request.guidance_scale, max_sequence_length=length).images


def run_guided(pipe: Any, request: Request, output_type: str) -> Any:
    """Of the pipelines that take `guidance_scale` and `max_sequence_length`."""
    pipe, options = drawing_over(pipe, request)
    options |= stock_options(request, output_type)
    length = request.max_sequence_length
    return pipe(**options, guidance_scale=request.guidance_scale, max_sequence_length=length).images


def open_with_processor(cls: Any, folder: Path) -> Any:
    """A pipeline that reads pictures, told which tokens these are: the input that diffusers 0.42 leaves out."""
    name = "text_processor" if (folder / "text_processor").is_dir() else "processor"
    pipe = stock_pipeline(cls, folder, **{name: load_processor(folder / name, folder / "tokenizer")})
    mark_pictures(pipe.text_encoder.model)
    return pipe


def open_longcat(cls: Any, folder: Path) -> Any:
    pipe = stock_pipeline(cls, folder, text_processor=None)
    mend_quotations(pipe)
    return pipe


def open_longcat_edit(cls: Any, folder: Path) -> Any:
    pipe = open_with_processor(cls, folder)
    mend_quotations(pipe)
    return pipe


def run_qwen_edit(pipe: Any, request: Request, output_type: str) -> Any:
    """With the tiny checkpoints' areas instead of those that the pipelines have built in."""
    options = stock_options(request, output_type)
    pictures = [opened(image) for image in request.images]
    fit = pipeline_qwenimage_edit.calculate_dimensions
    with (
        patch.object(pipeline_qwenimage_edit, "calculate_dimensions", lambda _, ratio: fit(tiny.IMAGE_AREA, ratio)),
        patch.object(pipeline_qwenimage_edit_plus, "VAE_IMAGE_SIZE", tiny.IMAGE_AREA),
        patch.object(pipeline_qwenimage_edit_plus, "CONDITION_IMAGE_SIZE", tiny.CONDITION_AREA),
    ):
        image = pictures if len(pictures) > 1 else pictures[0]
        return pipe(**options, image=image, true_cfg_scale=request.guidance_scale).images


def run_qwen_layered(pipe: Any, request: Request, output_type: str) -> Any:
    """The pipeline fails where it is asked for latents: they are taken from its last step."""
    latents: list[Any] = []
    options = stock_options(request, "pil")
    options |= {"layers": request.layers, "max_sequence_length": request.max_sequence_length}
    size = options.pop("width"), options.pop("height")
    with patch.object(pipeline_qwenimage_layered, "calculate_dimensions", lambda *_: size):
        [layers] = pipe(
            **options,
            image=opened(request.images[0]).convert("RGBA"),
            true_cfg_scale=request.guidance_scale,
            callback_on_step_end=lambda _pipe, _step, _time, values: (latents.append(values["latents"]), values)[1],
        ).images
    return latents[-1] if output_type == "latent" else layers


def run_longcat_edit(pipe: Any, request: Request, output_type: str) -> Any:
    pipe.tokenizer_max_length = request.max_sequence_length
    options = stock_options(request, output_type)
    size = options.pop("width"), options.pop("height")
    with patch.object(pipeline_longcat_image_edit, "calculate_dimensions", lambda *_: size):
        image = opened(request.images[0])
        return pipe(**options, image=image, guidance_scale=request.guidance_scale).images


def run_sd3(pipe: Any, request: Request, output_type: str) -> Any:
    """diffusers 0.42's inpainting forgets the VAE's shift where it decodes: the reference does not."""
    if request.mask is None or output_type == "latent":
        return run_guided(pipe, request, output_type)
    config = pipe.vae.config
    latents = run_guided(pipe, request, "latent") / config.scaling_factor + config.shift_factor
    with torch.no_grad():
        decoded = pipe.vae.decode(latents, return_dict=False)[0]
    return pipe.image_processor.postprocess(decoded, output_type=output_type)


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
        **OVER,
    },
    kinds={**TEXT_TO_IMAGE, **DRAWN_OVER},
    trials=(*TRIALS, MASKS, OVER_ONE),
    subset=PAIRWISE,
)


def edits(**values: Any) -> dict[str, Kind]:
    """What layouts are asked for of a model that edits: as of the others, with a picture each."""

    def edit(prompt: str, image: bytes, **more: Any) -> Request:
        return request(prompt, **{"task": "edit", "images": (image,), **values, **more})

    pair = [edit("make it red", WIDE, seed=3), edit("two small blue cats beside a very large house", OTHER, seed=4)]
    return {
        "interleaved": Kind(requests=pair),
        "batched": Kind(requests=pair, batched=True),
        "one branch": Kind(requests=[edit("a red heart", TALL, guidance_scale=0.0, seed=5)]),
        "large": Kind(requests=[edit("a moon", TALL, width=320, height=272, num_inference_steps=2)], tiled=True),
    }


def edit_requests(**values: Any) -> dict[str, Request]:
    """Compared with the stock pipelines."""
    edit = {"task": "edit", "images": (WIDE,), **values}
    return {
        "square": request("make it red", **{**edit, "width": 128, "height": 128}, seed=7),
        "tall picture": request("two small blue cats", **{**edit, "images": (TALL,)}),
        "no guidance": request("a moon", **edit, guidance_scale=0.0),
        "negative prompt": request("a house", **edit, negative_prompt="red, blurry", guidance_scale=2.5),
    }


QWEN_IMAGE_EDIT = Subject(
    family=QwenImageEdit,
    variants={
        "4_heads": tiny.qwen_image_edit,
        "5_heads": lambda folder: tiny.qwen_image_edit(folder, heads=5),
    },
    pipeline=diffusers.QwenImageEditPipeline,
    open_stock=open_with_processor,
    run_stock=run_qwen_edit,
    requests=edit_requests(),
    kinds=edits(),
    trials=(*TRIALS, MASKS, ONE_PICTURE),
)

QWEN_IMAGE_EDIT_PLUS = Subject(
    family=QwenImageEditPlus,
    variants={
        "2511": lambda folder: tiny.qwen_image_edit(folder, several=True, zero_cond_t=True),
        "5_heads": lambda folder: tiny.qwen_image_edit(folder, heads=5, several=True),
    },
    pipeline=diffusers.QwenImageEditPlusPipeline,
    open_stock=open_with_processor,
    run_stock=run_qwen_edit,
    requests={**edit_requests(), "three": request("a cat and a house", task="edit", images=(WIDE, TALL, OTHER))},
    kinds={**edits(), "two": Kind(requests=[request("a cat", task="edit", images=(TALL, WIDE))])},
    trials=(
        *(replace(trial, kinds=trial.kinds | {"two"}) if trial.kinds >= GUIDED else trial for trial in TRIALS),
        MASKS,
        replace(ONE_PICTURE, kinds=EVERY | {"two"}),
    ),
    subset=FEW[1],
)

QWEN_IMAGE_LAYERED = Subject(
    family=QwenImageLayered,
    variants={
        "4_heads": tiny.qwen_image_layered,
        "5_heads": lambda folder: tiny.qwen_image_layered(folder, heads=5),
    },
    pipeline=diffusers.QwenImageLayeredPipeline,
    open_stock=lambda cls, folder: stock_pipeline(cls, folder, processor=None),
    run_stock=run_qwen_layered,
    requests={
        **edit_requests(task="layered", layers=2),
        "four layers": request("a cat", task="layered", images=(OTHER,), layers=4),
    },
    kinds=edits(task="layered", layers=2),
    trials=(*TRIALS, MASKS, ONE_PICTURE),
    subset=FEW[2],
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
        "weak guidance": request(
            "a cat", negative_prompt="red", guidance_scale=0.5
        ),  # half a difference, on top of one
        "guidance": request("two small blue cats", negative_prompt="red", guidance_scale=4.0),
        "short window": request("a very long prompt about a tree", guidance_scale=0.0, max_sequence_length=9),
        **OVER,
    },
    kinds={**TEXT_TO_IMAGE, **DRAWN_OVER},
    batches_branches=True,
    trials=(*TRIALS, GROUP_NORMS),
    subset=FEW[3],
)

APOSTROPHES = "a cat that doesn't look, it's blue and won't move; 'it's a cat'"
LONGCAT_IMAGE = Subject(
    family=LongCatImage,
    variants={"4_heads": tiny.longcat_image, "5_heads": lambda folder: tiny.longcat_image(folder, heads=5)},
    eight=lambda folder: tiny.longcat_image(folder, heads=8),
    pipeline=diffusers.LongCatImagePipeline,
    open_stock=open_longcat,
    run_stock=run_longcat_image,
    requests={
        "square": request("a green star on a white background", width=128, height=128, seed=7),
        "full window": request("two orange squares", max_sequence_length=512),
        "one step": request("a cat", guidance_scale=1.0, num_inference_steps=1),
        "no negative prompt": request("two small blue cats", negative_prompt="", guidance_scale=4.5),
        "negative prompt": request("a house", negative_prompt="red, blurry", guidance_scale=2.5, num_inference_steps=5),
        "letters": request("a sign that says 'a cat'", negative_prompt='"red"'),  # quoted: one token a letter
        "apostrophes": request(APOSTROPHES, negative_prompt="isn't, doesn't"),
        "short window": request("a very long prompt about a tree on the left", max_sequence_length=5),
    },
    trials=(*TRIALS, FUSED, GROUP_NORMS),
)

LONGCAT_IMAGE_EDIT = Subject(
    family=LongCatImageEdit,
    variants={
        "4_heads": tiny.longcat_image_edit,
        "5_heads": lambda folder: tiny.longcat_image_edit(folder, heads=5),
    },
    pipeline=diffusers.LongCatImageEditPipeline,
    open_stock=open_longcat_edit,
    run_stock=run_longcat_edit,
    requests={
        **edit_requests(),
        "letters": request("write 'a cat'", task="edit", images=(WIDE,)),
        "apostrophes": request(APOSTROPHES, task="edit", images=(WIDE,)),
    },
    kinds=edits(),
    trials=(*TRIALS, FUSED, GROUP_NORMS, ONE_PICTURE),
    subset=FEW[1],
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
    subset=FEW[2],
)

LONG = "three tiny yellow stars and a very large orange house " * 4  # longer than CLIP's 77 tokens
SD3 = Subject(
    family=StableDiffusion3,
    variants={
        "4_heads": tiny.sd3,
        "5_heads": lambda folder: tiny.sd3(folder, heads=5),
        "4_heads_large": lambda folder: tiny.sd3(folder, dual=False),
        "5_heads_large": lambda folder: tiny.sd3(folder, heads=5, dual=False),
    },
    eight=lambda folder: tiny.sd3(folder, heads=8),
    pipeline=diffusers.StableDiffusion3Pipeline,
    run_stock=run_sd3,
    requests={
        "square": request("a green star on a white background", guidance_scale=1.0, width=128, height=128, seed=7),
        "uneven": request("a red cat", guidance_scale=0.0, max_sequence_length=256),
        "one step": request("a cat", guidance_scale=1.0, num_inference_steps=1, max_sequence_length=512),
        "long prompt": request(LONG, guidance_scale=1.0),
        "long prompt, short window": request(LONG, guidance_scale=1.0, max_sequence_length=9),
        "guidance": request("two small blue cats", negative_prompt="red, blurry", num_inference_steps=5),
        "no negative prompt": request("a house", negative_prompt="", guidance_scale=2.5),
        **OVER,
    },
    batches_branches=True,
    kinds={**TEXT_TO_IMAGE, **DRAWN_OVER},
    trials=(
        *TRIALS,
        GROUP_NORMS,
        OVER_ONE,
        Trial(fault=faults.attention_of_one_stream_stays_local, cell={"usp": 2}, kinds=EVERY),
        Trial(fault=faults.attention_of_one_stream_stays_local, cell={"ring": 2}, kinds=EVERY),
        Trial(fault=faults.biases_are_those_of_the_first_heads, cell={"tp": 2}, kinds=EVERY),
    ),
    subset=FEW[3],
)


def video(prompt: str = "a red circle", **values: Any) -> Request:
    small = {"width": 96, "height": 64, "num_frames": 5, "num_inference_steps": 4}
    return request(prompt, **{**small, "guidance_scale": 2.0, **values})  # a VAE of random weights adds to differences


def run_wan(pipe: Any, request: Request, output_type: str) -> Any:
    picture = {"image": opened(request.images[0])} if request.images else {}
    frames = pipe(
        **stock_options(request, output_type),
        **picture,
        num_frames=request.num_frames,
        guidance_scale=request.guidance_scale,
        guidance_scale_2=request.guidance_scale_2,
        max_sequence_length=request.max_sequence_length,
    ).frames
    return frames[0] if output_type == "pil" else frames


def videos(rows: int = 288, **values: Any) -> dict[str, Kind]:
    """What layouts are asked for of a model of videos, in sizes that all its checkpoints can make. The second of the
    pair takes one step more: with two transformers, a batch is of both. `rows`: of what is more than one tile."""
    size = {"width": 160, "height": 96, **values}
    pair = [
        video("a cat on the left", **size, num_inference_steps=3, guidance_scale_2=1.5, seed=3),
        video("three tiny yellow stars", **size, seed=4),
    ]
    one = [video("a red heart", **{**size, "height": 160}, num_frames=1, guidance_scale=1.0, seed=5)]
    large = [video("a blue moon", **{**size, "width": 320, "height": rows}, num_inference_steps=1, seed=6)]
    return {
        "interleaved": Kind(requests=pair),
        "batched": Kind(requests=pair, batched=True),
        "one branch": Kind(requests=one),
        "large": Kind(requests=large, tiled=True),
    }


WAN = Subject(
    family=Wan,
    variants={
        "2_2": lambda folder: tiny.wan(folder, boundary=0.875),
        "2_2_small": lambda folder: tiny.wan(folder, heads=5, small=True),
        "2_1_4_heads": tiny.wan,
        "2_1_5_heads": lambda folder: tiny.wan(folder, heads=5),
    },
    eight=lambda folder: tiny.wan(folder, heads=8),
    pipeline=diffusers.WanPipeline,
    run_stock=run_wan,
    requests={
        "5 frames": video("a green star on a white background", seed=7),
        "1 frame": video("two orange squares", num_frames=1),
        "9 frames": video("a  cat &amp; a dog", num_frames=9, max_sequence_length=512),  # cleaned before it is read
        "odd": video(width=112, height=80),  # an odd number of tokens in a frame
        "odd, tall": video(width=48, height=64),
        "one step": video("a cat", guidance_scale=1.0, num_inference_steps=1),
        "negative prompt": video("a house", negative_prompt="red, blurry", guidance_scale=2.5, width=64),
        "short window": video("a very long prompt about a tree on the left", max_sequence_length=5),
        "no guidance in the second": video(guidance_scale_2=1.0),
        "more guidance in the second": video(guidance_scale_2=2.5),
    },
    kinds=videos(),
    trials=(*TRIALS, Trial(fault=faults.norms_are_of_a_rank_alone, cell={"tp": 2}, kinds=EVERY)),
    subset=FEW[2],
)


def from_a_picture(prompt: str = "a red circle", **values: Any) -> Request:
    """The window is what 2.1 always takes."""
    given = {"task": "image-to-video", "images": (WIDE,), "max_sequence_length": 512}
    return video(prompt, **{**given, **values})


WAN_IMAGE_TO_VIDEO = Subject(
    family=WanImageToVideo,
    variants={
        "2_1": lambda folder: tiny.wan_image_to_video(folder, heads=5),
        "2_2_small": lambda folder: tiny.wan_image_to_video(folder, small=True),
        "2_2": lambda folder: tiny.wan_image_to_video(folder, boundary=0.875),
    },
    pipeline=diffusers.WanImageToVideoPipeline,
    run_stock=run_wan,
    requests={
        "5 frames": from_a_picture("a green star on a white background", seed=7),
        "1 frame": from_a_picture("two orange squares", num_frames=1),
        "9 frames, tall picture": from_a_picture("a cat", images=(TALL,), num_frames=9, width=64, height=96),
        "one step": from_a_picture("a cat", guidance_scale=1.0, num_inference_steps=1),
    },
    kinds=videos(rows=64, task="image-to-video", images=(WIDE,)),  # a wide one: to encode 5 frames takes seconds
    trials=(
        *TRIALS,
        Trial(fault=faults.norms_are_of_a_rank_alone, cell={"tp": 2}, kinds=EVERY),
        ONE_PICTURE,
    ),
    subset=FEW[1],
)


# ---- pipelines that no family is written for -------------------------------------------------------------------------


def run_other(pipe: Any, request: Request, output_type: str) -> Any:
    """The latents are those of the last step: some pipelines return them in another form. Of videos, "pt" -> [B, F, 3,
    H, W], "pil" -> frames."""
    options, takes = stock_options(request, output_type), inspect.signature(pipe.__call__).parameters
    lengths = ("num_frames", "frames", "video_length")
    options |= {**dict.fromkeys(lengths, request.num_frames), "frame_rate": request.fps}
    if takes.keys() & lengths:
        options["use_resolution_binning"] = False
    latents: list[Any] = []
    if output_type == "latent":
        options["output_type"] = "pt"
        if "callback_on_step_end" in takes:
            options["callback_on_step_end"] = lambda _pipe, _step, _time, x: (latents.append(x["latents"]), x)[1]
        else:
            options["callback"] = lambda _step, _time, x: latents.append(x)
    options["max_sequence_length"] = request.max_sequence_length
    options["true_cfg_scale" if "true_cfg_scale" in takes else "guidance_scale"] = request.guidance_scale
    if request.embedded_guidance is not None:
        options["guidance_scale"] = request.embedded_guidance
    if request.images:
        pictures = [opened(image) for image in request.images]
        options["image"] = pictures[0] if request.task == "image-to-video" else pictures
    made = pipe(**{name: value for name, value in options.items() if name in takes}, return_dict=False)[0]
    if output_type == "latent":
        return latents[-1]
    return made[0] if output_type == "pil" and takes.keys() & lengths else made


OTHER_REQUESTS = {
    "square": request("a green star", width=128, height=128, seed=7),
    "negative prompt": request("a house", negative_prompt="red, blurry", guidance_scale=2.5, num_inference_steps=4),
    "no guidance": request("a cat", guidance_scale=1.0, num_inference_steps=1, max_sequence_length=32),
}
CALLS = Trial(fault=faults.answers_of_both_calls_are_swapped, cell={"cfg": 2}, kinds=GUIDED)
SPREAD = (*TRIALS[:3], *TRIALS[4:], CALLS, FUSED, GROUP_NORMS)
"""Faults that show wherever diffusers' own plans are used, by pipelines that evaluate one branch after another."""
ROWS = (
    Trial(fault=faults.rows_of_both_branches_are_swapped, cell={"cfg": 2}, kinds=GUIDED),
    *(replace(trial, cell={"cfg": 2, "vae-pp": 2}) for trial in (TRIALS[4], GROUP_NORMS)),
    replace(TRIALS[5], cell={"cfg": 2, "vae-pp": 2, "vae_use_tiling": True}),
)
"""Those of pipelines that evaluate both branches as one batch, and are spread by no other axis."""


def other(pipeline: Any, build: Builder, *trials: Trial, **values: Any) -> Subject:
    return Subject(
        family=AnyDiffusers,
        variants={"4_heads": build},
        pipeline=pipeline,
        run_stock=run_other,
        **{"requests": OTHER_REQUESTS, "trials": trials, **values},
    )


FLUX = other(diffusers.FluxPipeline, tiny.flux, *SPREAD, subset={2: [{"usp": 2, "vae-pp": 2, "vae_use_tiling": True}]})
FLUX_2_KLEIN = other(
    diffusers.Flux2KleinPipeline,
    tiny.flux2_klein,
    *SPREAD,
    requests={**OTHER_REQUESTS, "edit": request("a cat in blue", task="edit", images=(WIDE,), num_inference_steps=2)},
    kinds={**TEXT_TO_IMAGE, "edit": Kind(requests=[request("a cat in blue", task="edit", images=(WIDE,))])},
    subset={2: [{"tp": 2}]},
)
AURA_FLOW = other(diffusers.AuraFlowPipeline, tiny.aura_flow, *ROWS, subset={2: [{"cfg": 2}, {"cfg": 2, "vae-pp": 2}]})
PIXART_SIGMA = other(diffusers.PixArtSigmaPipeline, tiny.pixart_sigma, *ROWS, subset={})


def short(prompt: str = "a red circle", **values: Any) -> Request:
    """A video of a size and length that every pipeline makes."""
    return video(prompt, **{"width": 64, "height": 64, "num_frames": 9, "num_inference_steps": 2, "fps": 8, **values})


OTHER_VIDEO_REQUESTS = {
    "17 frames": short("a green star", num_frames=17, fps=25, seed=7),
    "negative prompt": short("a house", negative_prompt="red, blurry", guidance_scale=2.5, width=96),
    "no guidance": short("a cat", guidance_scale=1.0, num_inference_steps=1, num_frames=1),
}
OTHER_VIDEOS = {
    "interleaved": Kind(requests=[short("a cat on the left", seed=3), short("two stars", seed=4)]),
    "batched": Kind(requests=[short("a cat", seed=5), short("two yellow stars", seed=6)], batched=True),
    "one branch": Kind(requests=[short("a red heart", guidance_scale=1.0, num_frames=1, seed=5)]),
}
LTX = other(
    diffusers.LTXPipeline,
    tiny_video.ltx,
    ROWS[0],
    requests=OTHER_VIDEO_REQUESTS,
    kinds=OTHER_VIDEOS,
    subset={2: [{"cfg": 2}]},
    more={2: [{"cfg": 2}]},  # the VAE has no plan, and in every other layout it would need one
)
WIDE_VIDEO = short("a blue moon", width=320, num_frames=5, num_inference_steps=1, guidance_scale=1.0, seed=6)
SKYREELS_V2 = other(
    diffusers.SkyReelsV2Pipeline,
    tiny_video.skyreels_v2,
    CALLS,
    replace(TRIALS[4], cell={"cfg": 2, "vae-pp": 2}),
    replace(TRIALS[5], cell={"cfg": 2, "vae-pp": 2, "vae_use_tiling": True}),
    requests=OTHER_VIDEO_REQUESTS,
    kinds={**OTHER_VIDEOS, "large": Kind(requests=[WIDE_VIDEO], tiled=True)},
    subset={2: [{"cfg": 2, "vae-pp": 2, "vae_use_tiling": True}]},
)

SUBJECTS: dict[str, Subject] = {
    "qwen_image": QWEN_IMAGE,
    "qwen_image_edit": QWEN_IMAGE_EDIT,
    "qwen_image_edit_plus": QWEN_IMAGE_EDIT_PLUS,
    "qwen_image_layered": QWEN_IMAGE_LAYERED,
    "z_image": Z_IMAGE,
    "longcat_image": LONGCAT_IMAGE,
    "longcat_image_edit": LONGCAT_IMAGE_EDIT,
    "ovis_image": OVIS_IMAGE,
    "sd3": SD3,
    "wan": WAN,
    "wan_image_to_video": WAN_IMAGE_TO_VIDEO,
    "flux": FLUX,
    "flux2_klein": FLUX_2_KLEIN,
    "aura_flow": AURA_FLOW,
    "pixart_sigma": PIXART_SIGMA,
    "ltx": LTX,
    "skyreels_v2": SKYREELS_V2,
}
"""By name; a variant's checkpoint is called `<subject>_<variant>`."""
