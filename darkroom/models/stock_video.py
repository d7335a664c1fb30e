"""Pipelines that make videos without a family file: which of them run, and for what."""

from __future__ import annotations

import ast
import re

from darkroom.configs.request import Task

from .stock import Source

LENGTHS, RATES = ("num_frames", "frames", "video_length"), ("frame_rate", "fps")
"""What calls name the number of frames, and how many of them a second has."""
_SOUND = re.compile(r"audio|sound")
_ROUNDED = re.compile(r"num_frames // (self\.\w+) \* \1 \+ 1|max\(num_frames, 1\)|num_frames or .*")
"""What a call may make of the number of frames that it is given: nothing that it has not asked for."""


def makes_videos(pipeline: Source) -> bool:
    code = pipeline.code("__call__")
    return bool({*LENGTHS, "video"} & set(pipeline.parameters("__call__"))) or ".frames" in code or "(frames=" in code


def length_parameter(pipeline: Source) -> str | None:
    """What the call names the number of frames."""
    return next((name for name in LENGTHS if name in pipeline.parameters("__call__")), None)


def does_without(pipeline: Source, parameter: str) -> bool:
    """Whether the call also works without it."""
    return pipeline.is_optional("__call__", parameter) or f" {parameter} is not None" in pipeline.code("__call__")


def refusal(pipeline: Source) -> str | None:
    """Why it cannot run: by what sets it apart from one that draws pictures."""
    parts, call, code = pipeline.parameters("__init__"), pipeline.parameters("__call__"), pipeline.code("__call__")
    if sound := next((name for name in (*parts, *call) if _SOUND.search(name)), None):
        return f"it makes sound with its videos ('{sound}'), which no answer has a place for"
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
