"""What a pipeline without a family file can do: read from its source, its model_index.json and its configs."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Mapping
from typing import Any

from darkroom.configs.capabilities import Capabilities
from darkroom.configs.request import Task

from . import stock_sizes, stock_video
from .base import Component
from .stock import Source, find_class

_AURA_FLOW = "AuraFlowTransformer2DModel"
_GUIDED = "do_classifier_free_guidance"


def capabilities(
    name: str,
    pipeline: Source,
    index: Mapping[str, Any],
    configs: Mapping[str, Mapping[str, Any]],
    components: Mapping[str, Component],
) -> Capabilities:
    call = pipeline.parameters("__call__")
    guidance = "true_cfg_scale" if "true_cfg_scale" in call else "guidance_scale"
    least, steps, most = _steps(pipeline, configs.get("scheduler", {}))
    window = _window(pipeline, configs["transformer"])
    is_video = stock_video.makes_videos(pipeline)
    branches = 2 if _is_guided(pipeline, index) else 1
    spreads = {
        "cfg": branches > 1,
        "ring": bool(components["transformer"].plan.sequence),
        "ulysses": bool(components["transformer"].plan.sequence),
        "tp": bool(components["transformer"].plan.tensor),
        "vae": components["vae"].plan.spatial is not None,
    }
    return Capabilities(
        family=name,
        tasks=stock_video.tasks(pipeline) if is_video else _tasks(pipeline),
        max_images=int("image" in call),
        **_picture_limits(pipeline),
        **(stock_sizes.sizes(name, pipeline, configs) if is_video else _sizes(pipeline, configs)),
        num_inference_steps=steps,
        min_inference_steps=least,
        max_inference_steps=most,
        quality_steps={
            name: max(least, math.ceil(steps * share)) for name, share in (("low", 0.4), ("medium", 0.7), ("high", 1.0))
        },
        guidance_parameter=guidance,
        guidance_scale=call.get(guidance) or 1.0,
        max_guidance=100.0 if guidance in call else 1.0,
        embedded_guidance=call.get("guidance_scale") if guidance == "true_cfg_scale" else None,
        negative_prompt=call.get("negative_prompt") or _negative_prompt(pipeline),
        takes_negative_prompt="negative_prompt" in call,
        max_sequence_length=None if _is_padded(configs["transformer"]) else call.get("max_sequence_length") or window,
        text_window=window,
        guidance_branches=branches,
        previews=False,
        axes=tuple(axis for axis, has_plan in spreads.items() if has_plan),
    )


def _tasks(pipeline: Source) -> tuple[Task, ...]:
    call = pipeline.parameters("__call__")
    if "image" not in call:
        return ("text-to-image",)
    if "mask_image" in call:
        return ("inpaint",)
    if "strength" in call:
        return ("image-to-image",)
    return ("text-to-image", "edit") if pipeline.is_optional("__call__", "image") else ("edit",)


def _steps(pipeline: Source, scheduler: Mapping[str, Any]) -> tuple[int, int, int]:
    """The fewest, those by default and the most. Where inputs are checked for one number it is all three: Sana-Sprint's
    two. Schedules that are stretched to an end, or linear at first, have no single step."""
    if fixed := re.search(r"num_inference_steps != (\d+)", pipeline.code("check_inputs")):
        return (int(fixed[1]),) * 3
    steps = pipeline.parameters("__call__")["num_inference_steps"] or 50
    is_linear = "linear_quadratic_schedule(" in pipeline.text and "num_steps < 2" not in pipeline.text
    two_at_least = scheduler.get("shift_terminal") or is_linear
    return 2 if two_at_least else 1, steps, max(200, steps)


def _window(pipeline: Source, transformer: Mapping[str, Any]) -> int:
    """The most tokens of text: for so many the transformer has places, or inputs are checked, or are the default."""
    if places := transformer.get("max_text_seq_length"):
        return int(places)
    bound = re.search(r"max_sequence_length > (\d+)", pipeline.code("check_inputs"))
    window = int(bound[1]) if bound else pipeline.parameters("__call__").get("max_sequence_length") or 512
    axes = transformer.get("axes_lens")  # Lumina 2's: places for texts, of which the picture takes one, rows, columns
    return min(window, int(axes[0]) - 1) if axes else window


def _is_padded(transformer: Mapping[str, Any]) -> bool:
    """Whether texts always fill the window: CogVideoX, where it adds a table of positions to texts and pictures."""
    adds = not transformer.get("use_rotary_positional_embeddings") or stock_sizes.has_own_places(transformer)
    return "max_text_seq_length" in transformer and adds


def _negative_prompt(pipeline: Source) -> str:
    """What the call takes where it is given none."""
    said = re.search(r"if negative_prompt is None:\s+negative_prompt = (\".*\")\n", pipeline.code("__call__"))
    return ast.literal_eval(said[1]) if said else ""


def _sizes(pipeline: Source, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Of pictures: what edges are multiples of and are limited by, and the default (width, height)."""
    transformer, vae, call = configs["transformer"], configs["vae"], pipeline.parameters("__call__")
    stages = vae.get("block_out_channels") or vae.get("encoder_block_out_channels") or [0] * 4
    scale = 2 ** (len(stages) - 1)
    patch = transformer.get("patch_size", 1)
    patch = max(patch[-1] if isinstance(patch, list) else patch, 2 if "// 2" in _packing(pipeline) else 1)
    edge = (pipeline.constant("default_sample_size") or transformer.get("sample_size") or 128) * scale
    unit, default_size = stock_sizes.edge_unit(pipeline, scale * patch), (call["width"] or edge, call["height"] or edge)
    return {
        "size_multiple": unit,
        "min_edge": unit,
        "max_edge": _max_edge(transformer, unit),
        "max_pixels": 4 * math.prod(default_size),
        "default_size": default_size,
    }


def _picture_limits(pipeline: Source) -> dict[str, Any]:
    """What FLUX.2's pipelines ask of pictures. The others scale what they get."""
    processor = find_class("Flux2ImageProcessor", "pipelines")
    if processor is None or "Flux2ImageProcessor(" not in pipeline.code("__init__"):
        return {}
    limits = processor.parameters("check_image_input")
    return {"min_image_edge": limits["min_side_length"], "max_aspect_ratio": limits["max_aspect_ratio"]}


def _max_edge(transformer: Mapping[str, Any], unit: int) -> int | None:
    """As far as its table of positions reaches. AuraFlow's says how many there are in all, the others' on an edge.
    CogView4 has the number in its config and no table."""
    if axes := transformer.get("axes_lens"):
        return unit * int(min(axes[1:]))
    tokens, name = transformer.get("pos_embed_max_size"), transformer.get("_class_name", "")
    source = find_class(name, "models/transformers")
    if tokens is None or source is None or "pos_embed_max_size=" not in source.code("__init__"):
        return None
    return unit * (math.isqrt(tokens) if name == _AURA_FLOW else tokens)


def _packing(pipeline: Source) -> str:
    """The method that puts two by two latents together to a token; "" where the pipeline has none."""
    return pipeline.code("_pack_latents") + pipeline.code("_patchify_latents")


def _is_guided(pipeline: Source, index: Mapping[str, Any]) -> bool:
    """Whether each step has two guidance branches: one call of the transformer after another, or one doubled batch."""
    code, call = pipeline.code("__call__"), pipeline.parameters("__call__")
    if any(index.get(flag) for flag in re.findall(r"not self\.config\.(\w+)", pipeline.code(_GUIDED))):
        return False  # a checkpoint that is distilled to do without, says so
    has_both = code.count("self.transformer(") == 2 or re.search(r"\[latents\] \* 2|\[latents, latents\]", code)
    return bool(has_both) and bool({"guidance_scale", "true_cfg_scale"} & set(call))
