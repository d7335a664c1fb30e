"""Two transformers of one form that share a request's steps: one for those with much noise, the other for the rest.

Timesteps from `boundary_ratio` (of model_index.json) times the longest on are the first one's. Without it there is no
second; a boundary at either end of the schedule leaves only one of them.

Source: expert denoisers, https://arxiv.org/abs/2211.01324.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from darkroom.configs.errors import ConfigError

TRANSFORMERS = ("transformer", "transformer_2")


def transformers(pipe: Any) -> list[Any]:
    """Those that a pipeline has."""
    return [part for name in TRANSFORMERS if (part := getattr(pipe, name)) is not None]


def high_noise_steps(pipe: Any, scheduler: Any) -> int:
    """How many of the steps, the first ones, are `transformer`'s; the others are `transformer_2`'s.

    Counted once for a request: to compare a timestep in a step would make Python wait for the GPU.
    """
    boundary = pipe.config.boundary_ratio
    if boundary is None:
        return len(scheduler.timesteps)
    return int((scheduler.timesteps >= boundary * scheduler.config.num_train_timesteps).sum())


def transformer_config(index: Mapping[str, Any], configs: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    """A checkpoint's, by its model_index.json and configs. Raises ConfigError where it lacks one that it needs."""
    boundary = index.get("boundary_ratio")
    needed = {"transformer": boundary is None or boundary < 1, "transformer_2": bool(boundary)}
    if missing := [name for name, is_needed in needed.items() if is_needed and name not in configs]:
        raise ConfigError(f"model_index.json names no {missing[0]}, and its boundary_ratio of {boundary} needs one")
    return configs.get("transformer") or configs["transformer_2"]
