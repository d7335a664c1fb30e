"""The family of a pipeline without a file of its own: derived from diffusers' sources and a checkpoint's configs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from darkroom.configs.errors import ConfigError
from darkroom.parallel.plan import Plan

from . import stock_sizes, stock_video
from .any_diffusers import AnyDiffusers
from .base import Component, Model
from .json_file import read_json
from .stock import Source, find_class
from .stock_capabilities import capabilities
from .stock_encoders import cut_encoder
from .stock_plans import sequence_plan, tensor_plan
from .stock_vaes import SPREADABLE

_NEEDED = ("prompt", "height", "width", "num_inference_steps", "generator", "output_type")
_CONTROLS = {
    *("control_image", "control_guidance_start", "controlnet_conditioning_scale"),
    *("control_video", "pose_video", "id_cond"),
}
_PICTURE = re.compile(r"image|mask|font|video")
_PROCESSOR = "Qwen2VLProcessor"
_TEXT_MASK = re.compile(r"(attention|embeds)_mask")
_PICTURES = {
    "image",
    "mask_image",
    *("num_images_per_prompt", "padding_mask_crop", "masked_image_latents", "image_reference"),
    *("ip_adapter_image", "ip_adapter_image_embeds", "negative_ip_adapter_image", "negative_ip_adapter_image_embeds"),
    *("input_images", "max_input_image_size", "use_input_image_size_as_output"),
    *("prior_token_image_ids", "source_image_grid_thw"),
    *("num_videos_per_prompt", "video_length", "video", "video_latents"),
    *("image_embeds", "last_image", "image_cond_noise_scale", "mask_feature"),
}
"""Parameters of pictures and videos: those that are filled, and those that a call does without."""
_OWN_SIZE = re.compile(
    r"\bwidth = (?:image|calculated)_width\n|\bwidth, height = (?:self\.resolutions\[|int\(width \* scale\b)"
    r"|\bheight, width = self\.vae_image_processor\.get_default_height_width\("
)
"""Where a call draws as large as a picture of the request is, or in one of a few sizes, or always as many pixels."""
_BINNING = "use_resolution_binning"


def family_of(name: str, index: Mapping[str, Any], folder: Path) -> type[Model]:
    """The family of a checkpoint whose model_index.json names the pipeline `name`. Raises ConfigError with why not."""
    pipeline = find_class(name, "pipelines")
    if pipeline is None:
        raise ConfigError("it is no pipeline of diffusers")
    if trouble := why_not(pipeline):
        raise ConfigError(trouble)
    configs = {part: _config(folder / part) for part in ("transformer", "vae")}
    configs["scheduler"] = _config(folder / "scheduler", "scheduler_config.json")
    components = _components(pipeline, index, folder)
    attributes = {
        "pipelines": (name,),
        "components": components,
        "capabilities": capabilities(name, pipeline, index, configs, components),
        "parameters": frozenset(pipeline.parameters("__call__")),
        "fixed": _fixed(pipeline),
        "processor_parts": tuple(part for part, x in index.items() if part.startswith("tokenizer") and _PROCESSOR in x),
        "frames_per_latent": stock_sizes.frames_per_latent(pipeline, configs),
    }
    return type(name.removesuffix("Pipeline"), (AnyDiffusers,), attributes)


def why_not(pipeline: Source) -> str | None:
    """What keeps a pipeline from running by its own call, as far as its source tells."""
    parts, call = pipeline.parameters("__init__"), pipeline.parameters("__call__")
    code = pipeline.code("__call__")
    if missing := [part for part in ("transformer", "vae", "scheduler") if part not in parts]:
        return f"it has no {' and no '.join(missing)}"
    if missing := [parameter for parameter in _NEEDED if parameter not in call]:
        return f"its call takes no {' and no '.join(missing)}"
    if "safety_checker" in parts and "requires_safety_checker" not in parts:  # which may be told that there is none
        return "it needs a 'safety_checker', which comes with no checkpoint"
    if missing := sorted(_CONTROLS & set(call)):
        return f"it draws by a '{missing[0]}', which no request brings"
    if trouble := (stock_video.refusal if stock_video.makes_videos(pipeline) else _other_than_pictures)(pipeline):
        return trouble
    strange = [name for name in call if _PICTURE.search(name) and not _TEXT_MASK.search(name)]
    if missing := sorted(set(strange) - _PICTURES):
        return f"its call takes '{missing[0]}', and it is not known what it does without"
    if not {"callback_on_step_end", "callback"} & set(call):
        return "its call takes no callback after a step"
    if "self.progress_bar(total=" not in code:
        return "its loop keeps no progress bar, which is how steps are told apart"
    return None


def _other_than_pictures(pipeline: Source) -> str | None:
    code = pipeline.code("__call__")
    if not re.search(r"return \w+\(\s*images?=", code):
        return "it does not return pictures"
    return "its pictures have sizes of their own, whatever is asked for" if _OWN_SIZE.search(code) else None


def _fixed(pipeline: Source) -> dict[str, bool]:
    """What every call is given: no shapes but the one that is asked for, where the call would draw in one of its own
    and leave it so; and for videos, as Sana-Video's fail its own checks."""
    scales_back = "resize_and_crop_tensor(" in pipeline.code("__call__") and not stock_video.makes_videos(pipeline)
    return {_BINNING: False} if _BINNING in pipeline.parameters("__call__") and not scales_back else {}


def _config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    return read_json(folder / name, "the checkpoint is incomplete")


def _components(pipeline: Source, index: Mapping[str, Any], folder: Path) -> dict[str, Component]:
    """All parts with weights: those whose folder says which class it is."""
    components = {}
    for part, (library, name) in ((part, x) for part, x in index.items() if isinstance(x, list) and all(x)):
        if library not in ("diffusers", "transformers"):
            raise ConfigError(f"model_index.json takes '{part}' from {library}: only diffusers' and transformers' run")
        if not (folder / part / "config.json").is_file():
            continue
        if cut := cut_encoder(part, name, pipeline, _config(folder / part)):
            components[part] = cut
            continue
        plan = _plan(pipeline, part, name, folder)
        components[part] = Component(
            module="diffusers.models" if library == "diffusers" else library,
            name=name,
            plan=plan,
            ranks="tp" if plan.tensor else "all",
        )
    return components


def _plan(pipeline: Source, part: str, name: str, folder: Path) -> Plan:
    if part == "vae":
        takes_turns = "decode_chunk_size" in pipeline.parameters("__call__")  # ranks leave the call after one decode
        return SPREADABLE[name].plan if name in SPREADABLE and not takes_turns else Plan()
    source = find_class(name, "models/transformers") if part == "transformer" else None
    if source is None:
        return Plan()
    return Plan(tensor=tensor_plan(source, _config(folder / part)), even_heads=True, sequence=sequence_plan(source))
