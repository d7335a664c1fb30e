"""How large, long and fast the videos of a pipeline without a family file are: by source, configs and model card."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from darkroom.configs.errors import ConfigError

from .stock import Source, classes, find_class
from .stock_cards import card
from .stock_numbers import Instance, Unknown
from .stock_video import RATES, length_parameter, makes_videos

_MOST_FRAMES = 241
"""Ten seconds at 24 frames a second: how long the videos may be, unless those by default are longer."""
_LATENT_FRAMES = re.compile(r"frames - 1\) // self\.(\w+) \+ 1")
_LATENT_ROWS = re.compile(r"\bheight\)? // self\.(\w+)")


def sizes(name: str, source: Source, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The capabilities that say how large, long and fast its videos are. Raises ConfigError for what is not known."""
    pipeline = _instance(source, configs)
    transformer = pipeline.parts["transformer"].settings()
    said = card(name, transformer)
    if transformer.get("attention_type") == "nabla":
        raise ConfigError("its transformer attends to some blocks of tokens alone ('attention_type': 'nabla')")
    try:
        width, height = said.get("default_size") or (pipeline.default("width"), pipeline.default("height"))
        frames = said.get("num_frames") or _default_frames(pipeline)
        return {
            "default_size": (width, height),
            "image_area": width * height,
            "fps": said.get("fps") or _frame_rate(source),
            **_edges(pipeline, width * height),
            **_lengths(pipeline, frames, said.get("min_frames", 1)),
        }
    except Unknown as e:
        raise ConfigError(f"how many pixels and frames it makes is not known: the configs have no {e}") from None


def _edges(pipeline: Instance, area: int) -> dict[str, Any]:
    """`area`: the pixels of the default size."""
    transformer, token = pipeline.parts["transformer"], _token(pipeline)
    unit, (_, places) = edge_unit(pipeline.source, token), _places(pipeline)
    return {
        "size_multiple": unit,
        "min_edge": unit,
        "max_edge": places * token // unit * unit if places else None,
        "max_pixels": 4 * area,
        "one_size": has_own_places(transformer.settings()),
    }


def edge_unit(pipeline: Source, token: int) -> int:
    """What edges are multiples of: a token's pixels, and what the inputs are checked for."""
    checked = re.findall(r"(?:height|width) % (\d+)", pipeline.code("check_inputs"))
    return math.lcm(token, *map(int, checked))


def _lengths(pipeline: Instance, frames: int, fewest: int) -> dict[str, int]:
    """Of videos, in frames; `frames` is the default."""
    multiple, (places, _) = _frame_multiple(pipeline), _places(pipeline)
    frames = (frames - 1) // multiple * multiple + 1
    if has_own_places(pipeline.parts["transformer"].settings()):
        fewest = most = frames
    else:
        most = max(frames, (_MOST_FRAMES - 1) // multiple * multiple + 1) if _any_length(pipeline) else frames
        most = min(most, (places - 1) * multiple + 1) if places else most
    return {"num_frames": frames, "frame_multiple": multiple, "min_frames": fewest, "max_frames": most}


def has_own_places(transformer: Mapping[str, Any]) -> bool:
    """Whether a position was learned for every token: such a transformer makes videos of one size and length."""
    return bool(transformer.get("use_learned_positional_embeddings"))


def frames_per_latent(pipeline: Source, configs: Mapping[str, Mapping[str, Any]]) -> int:
    """How many frames of a video are one of its latents', the first frame aside. One of pictures."""
    return (_frames_per_latent(_instance(pipeline, configs)) or 1) if makes_videos(pipeline) else 1


def _frames_per_latent(pipeline: Instance) -> int | None:
    """None where its source does not say."""
    found = _LATENT_FRAMES.search(pipeline.source.text)
    return int(pipeline.attribute(found[1])) if found else None


def _instance(pipeline: Source, configs: Mapping[str, Mapping[str, Any]]) -> Instance:
    """The pipeline with the parts whose configs these are. Raises ConfigError."""
    parts = {}
    for part in ("transformer", "vae"):
        config = configs[part]
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


def _places(pipeline: Instance) -> tuple[int | None, int | None]:
    """How many frames, and how many tokens along an edge, have a place in the transformer's table of positions; None
    where as many have as there are."""
    transformer = pipeline.parts["transformer"]
    settings = transformer.settings()
    if length := settings.get("rope_max_seq_len"):
        return length, length
    if settings.get("patch_size_t") and 'grid_type="slice"' in pipeline.source.text:  # CogVideoX 1.5: a corner of it
        return None, min(settings["sample_height"], settings["sample_width"]) // _patch(pipeline, -1)
    tables = (source.parameters("__init__").get("max_pos") for source in classes(transformer.source.text))
    frames, *edges = next((table for table in tables if isinstance(table, tuple)), (None, None))
    return frames, min(edges)


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
    if frames := _frames_per_latent(pipeline):
        batch = vae.constant("num_latent_frames_batch_size") if "% frame_batch_size" in vae.code("_decode") else 1
        return frames * int(batch)  # of an even number of latents it makes more frames
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


def _frame_rate(pipeline: Source) -> int:
    """What the call takes for it, or what the example in its documentation plays its video at."""
    call = pipeline.parameters("__call__")
    if rate := next((call[parameter] for parameter in RATES if call.get(parameter)), None):
        return int(rate)
    if said := re.search(r"export_to_video\([^\n]*\bfps=(\d+)|at (\d+) frames per second", pipeline.text):
        return int(said[1] or said[2])
    raise ConfigError("its source does not say how many frames a second has")
