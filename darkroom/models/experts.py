"""Two transformers of one form that share a request's steps: one for those with much noise, the other for the rest.

Timesteps from `boundary_ratio` (of model_index.json) times the longest on are the first one's. Without it there is no
second; a boundary at either end of the schedule leaves only one of them.

Source: expert denoisers, https://arxiv.org/abs/2211.01324.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from darkroom.configs.errors import ConfigError

from .base import Model, Sample

if TYPE_CHECKING:
    import torch


@dataclass(kw_only=True)
class ExpertsSample(Sample):
    high_noise_steps: int
    """How many of the steps, the first ones, are `transformer`'s; the others are `transformer_2`'s."""


class ExpertsModel(Model):
    """A family whose checkpoints have `transformer`, `transformer_2`, or both."""

    optional: ClassVar[tuple[str, ...]] = ("transformer", "transformer_2")

    @property
    def transformers(self) -> list[Any]:
        """Those that this checkpoint has."""
        return [part for part in (self.pipe.transformer, self.pipe.transformer_2) if part is not None]

    @property
    def dtype(self) -> torch.dtype:
        """What the transformers compute in."""
        dtype: torch.dtype = self.transformers[0].dtype
        return dtype

    def high_noise_steps(self, scheduler: Any) -> int:
        """Counted once for a request: to compare a timestep in a step would make Python wait for the GPU."""
        boundary = self.pipe.config.boundary_ratio
        if boundary is None:
            return len(scheduler.timesteps)
        return int((scheduler.timesteps >= boundary * scheduler.config.num_train_timesteps).sum())

    def expert(self, sample: Sample) -> Any:
        """The one that has this step of the sample."""
        return self.pipe.transformer if is_high_noise(sample) else self.pipe.transformer_2

    def guidance_scale(self, sample: Sample) -> float:
        low_noise = sample.request.guidance_scale_2
        return sample.request.guidance_scale if low_noise is None or is_high_noise(sample) else low_noise


def is_high_noise(sample: Sample) -> bool:
    assert isinstance(sample, ExpertsSample)
    return sample.step < sample.high_noise_steps


def transformer_config(index: Mapping[str, Any], configs: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    """A checkpoint's, by its model_index.json and configs. Raises ConfigError where it lacks one that it needs."""
    boundary = index.get("boundary_ratio")
    needed = {"transformer": boundary is None or boundary < 1, "transformer_2": bool(boundary)}
    if missing := [name for name, is_needed in needed.items() if is_needed and name not in configs]:
        raise ConfigError(f"model_index.json names no {missing[0]}, and its boundary_ratio of {boundary} needs one")
    return configs.get("transformer") or configs["transformer_2"]
