"""MODEL as a folder: where it lies, which family runs it, whether it is whole, and what each rank would hold of it.

Reads JSON files and the headers of safetensors files only: no torch, no weights.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from darkroom.configs.capabilities import Capabilities
from darkroom.configs.config import EngineConfig
from darkroom.configs.errors import ConfigError
from darkroom.configs.parallel import ParallelConfig
from darkroom.parallel.loading import Stored, elements_per_rank, find_weights, is_exact, read_headers
from darkroom.parallel.plan import Plan, head_counts, lookup

from . import MODELS, hub
from .base import Component, Model
from .json_file import read_json
from .stock_family import family_of

DEMO = Path(__file__).parent / "demo"
"""The small pipeline that is shipped with Darkroom."""

_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class Checkpoint:
    """A folder in the diffusers layout whose pipeline a family runs."""

    folder: Path
    family: type[Model]
    capabilities: Capabilities
    absent: frozenset[str] = frozenset()
    """The family's optional parts that this checkpoint does without."""
    repository: str | None = None
    """The hub id, where the folder is the hub's snapshot: it may lack the weights until `pin`."""

    @classmethod
    def open(cls, model: str, revision: str | None = None) -> Checkpoint:
        """Raises ConfigError for what is no pipeline, or none that a family runs."""
        local = _local_folder(model)
        folder = local or hub.fetch(model, revision)
        index = read_json(folder / "model_index.json", f"'{model}' is no diffusers pipeline")
        name = str(index.get("_class_name"))
        family = MODELS.get(name) or _other_family(model, name, index, folder)
        named = [part for part, classes in index.items() if isinstance(classes, list) and any(classes)]
        absent = frozenset(family.optional).difference(named)
        for part in [*family.components, *named]:
            if part not in {*family.unused, *absent} and not (folder / part).is_dir():
                raise ConfigError(f"'{model}' is incomplete: the folder {part}/ is missing")
        for choices in family.files:
            if choices[0][0].partition("/")[0] in absent:
                continue
            if not any(all((folder / file).is_file() for file in files) for files in choices):
                raise ConfigError(f"'{model}' is incomplete: {' and '.join(choices[0])} is missing")
        checkpoint = cls(folder, family, family.capabilities, absent, None if local else model)
        return replace(checkpoint, capabilities=_capabilities(checkpoint, index))

    @cached_property
    def components(self) -> dict[str, Component]:
        """Those of the family's that this checkpoint has."""
        return {name: component for name, component in self.family.components.items() if name not in self.absent}

    @cached_property
    def configs(self) -> dict[str, Mapping[str, Any]]:
        """config.json by component: the section that describes its class."""
        return {name: self._config(name, component) for name, component in self.components.items()}

    def _config(self, name: str, component: Component) -> Mapping[str, Any]:
        config = read_json(self.folder / name / "config.json", f"'{self.folder.name}' is incomplete")
        section = component.described(config)
        if key := component.missing_number(section):
            raise ConfigError(f"{name}/config.json has no number '{key}'")
        return section

    def tensors(self, name: str) -> dict[str, Stored]:
        """A component's parameters as its safetensors files hold them, by the class's own names."""
        component, folder = self.family.components[name], self.folder / name
        try:
            files = find_weights(folder)
        except ConfigError:
            if self.repository is None:
                raise
            # the weights are not all fetched yet
            tensors = hub.remote_tensors(self.repository, self.folder.name, folder, component.rename)
        else:
            tensors = read_headers(files, component.rename)
        if component.unread is None:
            return tensors
        return _without_last(tensors, f"{component.unread}.", component.unread_layers)

    def pin(self, config: EngineConfig) -> EngineConfig:
        """The configuration for the engine, with the weights here.

        Its processes all read the folder that was checked: a snapshot is named by its commit, a branch may move.
        """
        if self.repository and (files := self._missing_weights(self.repository)):
            hub.fetch(self.repository, self.folder.name, files)
        return config.model_copy(update={"model": str(self.folder.absolute()), "revision": None})

    def _missing_weights(self, repository: str) -> list[str]:
        """The files of components that are not, or half, fetched yet."""
        files = []
        for name in self.components:
            try:
                find_weights(self.folder / name)
            except ConfigError:
                files += hub.weight_files(repository, self.folder.name, self.folder / name)
        return files

    def check(self, config: ParallelConfig) -> None:
        """Raises ConfigError for degrees that this model cannot be spread by, with what would work."""
        if config.cfg_parallel_size > 1 and self.capabilities.guidance_branches == 1:
            others = [flag for axis, flag in _OTHER_FLAGS.items() if axis in self.capabilities.axes]
            raise ConfigError(
                f"--cfg {config.cfg_parallel_size}: {self.capabilities.family} makes one prediction a step, without "
                f"guidance branches, which every rank would repeat; {_instead(others)}"
            )
        for axis, degree in {**config.axes, "vae": config.vae_patch_parallel_size}.items():
            if degree > 1 and axis not in self.capabilities.axes:
                raise ConfigError(
                    f"{self.capabilities.family} has no plan for {axis} parallelism; "
                    f"it has: {', '.join(self.capabilities.axes)}"
                )
        branches = self.capabilities.guidance_branches
        if config.cfg_parallel_size not in (1, branches):
            raise ConfigError(
                f"--cfg {config.cfg_parallel_size}: {self.capabilities.family} has {branches} guidance branches; "
                f"use --cfg 1 or --cfg {branches}"
            )
        plan = self.family.components["transformer"].plan
        degree = config.tensor_parallel_size
        if degree > 1 and plan.even_heads and (heads := self._heads("transformer", plan)) % degree:
            raise ConfigError(
                f"--tp {config.tensor_parallel_size}: the transformer has {heads:g} heads, and its class needs as many "
                "on every rank"
            )
        used = config.tensor_parallel_size * config.ulysses_degree
        for name, component in self.components.items():
            if component.plan.sequence and used > (heads := self._heads(name, component.plan)):
                raise ConfigError(
                    f"--tp {config.tensor_parallel_size} --usp {config.ulysses_degree}: {used} ranks share the heads, "
                    f"and the {name} has {heads:g}; use a product of at most {heads:g}, and --ring for more ranks"
                )

    def _heads(self, name: str, plan: Plan) -> float:
        """How many heads a component has; without a plan that cuts them, as many as one likes."""
        count = next(head_counts(plan), None)
        return lookup(self.configs[name], count) if count else math.inf

    def notes(self, config: ParallelConfig) -> list[str]:
        """What an operator would want to know of degrees that are no error."""
        model, degree = self.capabilities, config.cfg_parallel_size
        if degree == 1 or model.guidance_scale > model.no_guidance:
            return []
        return [
            f"--cfg {degree}: {model.family} draws without guidance unless a request sets "
            f"{model.guidance_parameter} above {model.no_guidance:g}; "
            f"until then the {degree} groups of ranks all do the same work. "
            f"--usp {degree * config.ulysses_degree} would share it"
        ]

    def footprint(self, config: ParallelConfig, dtype: str) -> list[dict[str, int]]:
        """Bytes of weights by rank and component."""
        tensors = {name: self.tensors(name) for name in self.components}
        ranks: list[dict[str, int]] = []
        for rank in range(config.world_size):
            held = {}
            for name, component in self.components.items():
                size, place = _share(component, config, rank)
                plan, section, exact = component.plan, self.configs[name], component.exact_in(dtype)
                held[name] = 0
                for width, part in _by_width(tensors[name], exact, _BYTES[dtype]) if size else ():
                    held[name] += width * elements_per_rank(part, plan, section, size, place)
            ranks.append(held)
        return ranks


def open_checkpoint(config: EngineConfig) -> Checkpoint:
    """The checked checkpoint of a command's configuration. Raises `ConfigError`."""
    checkpoint = Checkpoint.open(config.model, config.revision)
    checkpoint.check(config)
    if config.ring_degree > 1 and config.attention_backend != "auto":
        raise ConfigError(
            f"--attention-backend {config.attention_backend} with --ring {config.ring_degree}: ring attention needs "
            "a kernel's log-sum-exp and chooses the kernel itself; leave the backend at auto, or use --usp"
        )
    return checkpoint


_OTHER_FLAGS = {"ulysses": "--usp", "ring": "--ring", "tp": "--tp"}


def _instead(flags: list[str]) -> str:
    return f"use {' or '.join(flags)} for more ranks" if flags else "use one rank, and several servers for more"


def _without_last(tensors: Mapping[str, Stored], layers: str, count: int) -> dict[str, Stored]:
    """All but the parameters of the last `count` of the `layers`."""
    numbers = {int(name.removeprefix(layers).partition(".")[0]) for name in tensors if name.startswith(layers)}
    last = tuple(f"{layers}{number}." for number in sorted(numbers)[-count:])
    return {name: stored for name, stored in tensors.items() if not name.startswith(last)}


def _share(component: Component, config: ParallelConfig, rank: int) -> tuple[int, int]:
    """(ranks that the component is cut over, this one's place among them); (0, 0) where it holds nothing."""
    match component.ranks:
        case "tp":
            return config.tensor_parallel_size, rank % config.tensor_parallel_size
        case "world":
            return config.world_size, rank
        case "vae":
            return (1, 0) if rank < config.vae_size else (0, 0)
        case "all":
            return 1, 0


def _by_width(tensors: Mapping[str, Stored], exact: Collection[str], width: int) -> list[tuple[int, dict[str, Stored]]]:
    """(bytes of a number, the parameters of which each has so many): those that are kept in fp32, and the others."""
    kept = {name: stored for name, stored in tensors.items() if is_exact(name, exact)}
    return [(4, kept), (width, {name: stored for name, stored in tensors.items() if name not in kept})]


def _local_folder(model: str) -> Path | None:
    """None for a hub id."""
    if model == "demo":
        return DEMO
    if os.path.isdir(folder := os.path.expanduser(model)):
        return Path(folder)
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ConfigError(f"'{model}' is no folder, and no hub id such as Qwen/Qwen-Image; 'demo' always works")
    return None


def _other_family(model: str, name: str, index: Mapping[str, Any], folder: Path) -> type[Model]:
    try:
        return family_of(name, index, folder)
    except ConfigError as e:
        raise ConfigError(
            f"'{model}' is a {name}, which no model family runs, and it does not run as any other pipeline of "
            f"diffusers does: {e}; families: {', '.join(sorted(MODELS))}"
        ) from None


def _capabilities(checkpoint: Checkpoint, index: Mapping[str, Any]) -> Capabilities:
    family, file = checkpoint.family, checkpoint.folder / "darkroom.json"
    scheduler = read_json(checkpoint.folder / "scheduler" / "scheduler_config.json", "the checkpoint is incomplete")
    configs = {**checkpoint.configs, "scheduler": scheduler}
    described = family.capabilities.override(family.describe(index, configs))
    if not file.is_file():
        return described
    try:
        return described.override(read_json(file, ""))
    except ValidationError as e:
        first = e.errors()[0]
        raise ConfigError(f"{file.name}: '{first['loc'][0]}': {first['msg']}") from None
