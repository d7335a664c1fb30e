"""Pipelines that make videos without a family file: which of them run; how large, long and fast their videos are."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Mapping
from typing import Any

from darkroom.configs.errors import ConfigError
from darkroom.configs.request import Task

from .stock import Source, classes, find_class
from .stock_numbers import Instance, Unknown

_LENGTHS = ("num_frames", "frames", "video_length")
_RATES = ("frame_rate", "fps")
_SOUND = re.compile(r"audio|sound")
_FRAME_RATES = {"MochiPipeline": 30}
"""By their model cards, of pipelines whose source names none."""
_MOST_FRAMES = 241
"""Ten seconds at 24 frames a second: how long the videos may be, unless those by default are longer."""
_LATENT_FRAMES = re.compile(r"frames - 1\) // self\.(\w+) \+ 1")
_LATENT_ROWS = re.compile(r"\bheight\)? // self\.(\w+)")
_ROUNDED = re.compile(r"num_frames // (self\.\w+) \* \1 \+ 1|max\(num_frames, 1\)|num_frames or .*")
"""What a call may make of the number of frames that it is given: nothing that it has not asked for."""


def makes_videos(pipeline: Source) -> bool:
    code = pipeline.code("__call__")
    return bool({*_LENGTHS, "video"} & set(pipeline.parameters("__call__"))) or ".frames" in code or "(frames=" in code


def length_parameter(pipeline: Source) -> str | None:
    """What the call names the number of frames."""
    return next((name for name in _LENGTHS if name in pipeline.parameters("__call__")), None)


def does_without(pipeline: Source, parameter: str) -> bool:
    """Whether the call also works without it."""
    return pipeline.is_optional("__call__", parameter) or f" {parameter} is not None" in pipeline.code("__call__")


def refusal(pipeline: Source) -> str | None:
    """Why it cannot run: by what sets it apart from one that draws pictures."""
    parts, call, code = pipeline.parameters("__init__"), pipeline.parameters("__call__"), pipeline.code("__call__")
    if sound := next((name for name in (*parts, *call) if _SOUND.search(name)), None):
        return f"it makes sound with its videos ('{sound}'), which no answer has a place for"
    if "safety_checker" in parts:
        return "it needs a 'safety_checker', which comes with no checkpoint"
    if "video" in call and not does_without(pipeline, "video"):
        return "it redraws a 'video', which no request brings"
    if (length := length_parameter(pipeline)) is None:
        return "its call takes no number of frames"
    if not re.search(r"return \w+\(\s*frames=\w+\)", code):
        return "it does not return frames alone"
    if _loops_over_bars(pipeline):
        return "it makes a video piece by piece, each with steps of its own"
    if changed := _changes(pipeline, length):
        return f"its call does not keep to '{length}': {changed}"
    return None


def _loops_over_bars(pipeline: Source) -> bool:
    """Whether the progress bar stands in a loop."""
    call = pipeline.method("__call__")
    loops = (node for node in ast.walk(call) if isinstance(node, ast.For)) if call else ()
    return any("self.progress_bar(" in ast.unparse(loop) for loop in loops)


def _changes(pipeline: Source, length: str) -> str | None:
    """How the call makes another number of frames than it is asked for."""
    call = pipeline.method("__call__")
    for node in ast.walk(call) if call else ():
        if isinstance(node, ast.Assign):
            made = ast.unparse(node.value)
            if ast.unparse(node.targets[0]) == length and not _ROUNDED.fullmatch(made):
                return f"{length} = {made}"
            if re.match(r"video\[:, :, \d+:", made):
                return f"video = {made}"
    return None


def tasks(pipeline: Source) -> tuple[Task, ...]:
    if "image" not in pipeline.parameters("__call__"):
        return ("text-to-video",)
    return ("text-to-video", "image-to-video") if does_without(pipeline, "image") else ("image-to-video",)


def sizes(name: str, source: Source, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The capabilities that say how large, long and fast its videos are. Raises ConfigError for what is not known."""
    pipeline = _instance(source, configs)
    try:
        token, unit = _token(pipeline), _unit(pipeline)
        width, height = pipeline.default("width"), pipeline.default("height")
        multiple = _frame_multiple(pipeline)
        frames = _default_frames(pipeline)
    except Unknown as e:
        raise ConfigError(f"how many pixels and frames it makes is not known: the configs have no {e}") from None
    places = _places(pipeline.parts["transformer"])
    longest = max(frames, (_MOST_FRAMES - 1) // multiple * multiple + 1) if _any_length(pipeline) else frames
    return {
        "size_multiple": unit,
        "min_edge": unit,
        "max_edge": min(places[1:]) * token // unit * unit if places else None,
        "max_pixels": 4 * width * height,
        "default_size": (width, height),
        "image_area": width * height,
        "num_frames": (frames - 1) // multiple * multiple + 1,
        "frame_multiple": multiple,
        "max_frames": min(longest, (places[0] - 1) * multiple + 1) if places else longest,
        "fps": _frame_rate(name, pipeline.source),
    }


def frames_per_latent(pipeline: Source, configs: Mapping[str, Mapping[str, Any]]) -> int:
    """How many frames of a video are one of its latents', the first frame aside. One of pictures."""
    found = _LATENT_FRAMES.search(pipeline.text) if makes_videos(pipeline) else None
    return int(_instance(pipeline, configs).attribute(found[1])) if found else 1


def _instance(pipeline: Source, configs: Mapping[str, Mapping[str, Any]]) -> Instance:
    """The pipeline with the parts whose configs these are. Raises ConfigError."""
    parts = {}
    for part, config in configs.items():
        name = str(config.get("_class_name"))
        if (source := find_class(name, "models")) is None:
            raise ConfigError(f"its {part} is a {name}, which is no class of diffusers")
        parts[part] = Instance(source, config)
    return Instance(pipeline, parts=parts)


def _token(pipeline: Instance) -> int:
    """Pixels along an edge of a token."""
    found = _LATENT_ROWS.search(pipeline.source.text)
    if found is None:
        raise Unknown("scale of its VAE")
    return int(pipeline.attribute(found[1])) * _patch(pipeline, -1)


def _unit(pipeline: Instance) -> int:
    """What edges are multiples of: a token's, and what the inputs are checked for."""
    checked = map(int, re.findall(r"(?:height|width) % (\d+)", pipeline.source.code("check_inputs")))
    return math.lcm(_token(pipeline), *checked)


def _places(transformer: Instance) -> tuple[int, ...] | None:
    """How many frames, rows and columns of tokens its table of positions has; None where it has no table."""
    if length := transformer.settings().get("rope_max_seq_len"):
        return (length,) * 3
    tables = (source.parameters("__init__").get("max_pos") for source in classes(transformer.source.text))
    return next((table for table in tables if isinstance(table, tuple)), None)


def _patch(pipeline: Instance, axis: int) -> int:
    """Latents along an edge of a token (`axis` -1), or frames of latents (0)."""
    transformer = pipeline.parts["transformer"].settings()
    patch = transformer.get("patch_size") or 1
    if isinstance(patch, list | tuple):
        return int(patch[axis])
    return int(patch if axis else transformer.get("patch_size_t") or 1)


def _frame_multiple(pipeline: Instance) -> int:
    """A video has one frame and a multiple of this more. Raises ConfigError."""
    code, vae = pipeline.source.code("__call__"), pipeline.parts["vae"].source
    if "without tiling has not been implemented" in vae.code("_decode"):
        raise ConfigError(f"its VAE, {vae.node.name}, decodes in nothing but tiles")
    if (patch := _patch(pipeline, 0)) > 1 and "patch_size_t" not in code:
        raise ConfigError(f"its transformer makes {patch} frames of latents a token")
    if found := _LATENT_FRAMES.search(pipeline.source.text):
        batch = vae.constant("num_latent_frames_batch_size") if "% frame_batch_size" in vae.code("_decode") else 1
        return int(pipeline.attribute(found[1]) * batch)  # of an even number of latents it makes more frames
    if _any_length(pipeline):
        raise ConfigError("it is not known how many frames it makes of those that it is asked for")
    return max(_default_frames(pipeline) - 1, 1)


def _any_length(pipeline: Instance) -> bool:
    """Whether it makes videos of other lengths than one: not if its transformer has a place for every frame."""
    return not pipeline.parts["transformer"].config.get("video_length")


def _default_frames(pipeline: Instance) -> int:
    name = length_parameter(pipeline.source)
    frames = pipeline.parts["transformer"].config.get("video_length") or pipeline.default(name or "")
    if not isinstance(frames, int):
        raise Unknown("number of frames")
    return frames


def _frame_rate(name: str, pipeline: Source) -> int:
    """What the call takes for it, or what the example in its documentation plays its video at."""
    call = pipeline.parameters("__call__")
    if rate := next((call[parameter] for parameter in _RATES if call.get(parameter)), None):
        return int(rate)
    said = re.search(r"export_to_video\([^\n]*\bfps=(\d+)|at (\d+) frames per second", pipeline.text)
    if said or name in _FRAME_RATES:
        return int(said[1] or said[2]) if said else _FRAME_RATES[name]
    raise ConfigError("its source does not say how many frames a second has")
