"""A rank's part of a model: modules without weights, cut by their plans, then filled slice by slice."""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline
from torch import nn

from darkroom.configs.config import EngineConfig
from darkroom.parallel.loading import find_variant, load
from darkroom.parallel.mesh import Axis, Mesh
from darkroom.parallel.sequence import SequenceParallel, use_kernel
from darkroom.parallel.tensor import shard

from .base import Component, Model
from .checkpoint import Checkpoint

logger = logging.getLogger(__name__)


def build(checkpoint: Checkpoint, config: EngineConfig, mesh: Mesh, device: torch.device, dtype: torch.dtype) -> Model:
    """This rank's `Model`. Raises `ConfigError` for a checkpoint that does not fit, ValueError for a wrong plan."""
    family = checkpoint.family
    transformers.utils.logging.disable_progress_bar()
    parts: dict[str, Any] = {
        **dict.fromkeys([*family.unused, *checkpoint.absent]),
        **family.processors(checkpoint.folder),
    }
    for name, component in checkpoint.components.items():
        if component.ranks == "all":
            parts[name] = _whole(checkpoint, name, device, dtype)
        elif axis := _axis(component, mesh):
            parts[name] = _component(checkpoint, name, axis, device, dtype)
        else:
            parts[name] = _absent(checkpoint, name, dtype)
        if name.startswith("transformer") and config.attention_backend != "auto":
            use_kernel(parts[name], config.attention_backend)
        if component.plan.sequence and mesh.sequence.size > 1:
            SequenceParallel(parts[name], component.plan, mesh, config.attention_backend)
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()  # it warns of every component that is not of the class it expects
    pipe = _pipeline(checkpoint, parts)
    return family(pipe, parts["vae"], checkpoint.capabilities, mesh, device, use_tiling=config.vae_use_tiling)


def _pipeline(checkpoint: Checkpoint, parts: Mapping[str, Any]) -> DiffusionPipeline:
    """The family's stock pipeline of these parts; the others, such as tokenizers, are loaded.

    The first that the family names, whichever a folder does: those for image-to-image and inpainting have the same
    parts, and other helpers.

    `from_pretrained` does not do: what a pipeline's constructor has a default for, it loads though it is given.
    """
    folder = checkpoint.folder
    index = DiffusionPipeline.load_config(folder, local_files_only=True)
    cls: Any = getattr(diffusers, checkpoint.family.pipelines[0])
    given = {name: value for name, value in index.items() if name in inspect.signature(cls).parameters}
    for name, value in given.items():
        if isinstance(value, list) and name not in parts:
            library, kind = value
            loader = getattr(importlib.import_module(library), kind) if library else None
            given[name] = loader.from_pretrained(folder / name, local_files_only=True) if loader else None
    pipe: DiffusionPipeline = cls(**{**given, **parts})
    return pipe


def _axis(component: Component, mesh: Mesh) -> Axis | None:
    """The axis that cuts the component's weights; None where this rank holds nothing of it."""
    match component.ranks:
        case "tp":
            return mesh.tp
        case "world":
            return mesh.world
        case "vae":
            return Axis("whole") if mesh.vae else None
        case "all":
            raise AssertionError("what its own library loads is not cut")


def _component(checkpoint: Checkpoint, name: str, axis: Axis, device: torch.device, dtype: torch.dtype) -> nn.Module:
    component, config = checkpoint.family.components[name], checkpoint.configs[name]
    module = _empty(component, checkpoint.folder / name, config, dtype).eval().requires_grad_(False)
    shard(module, component.plan, config, axis)
    exact = component.exact_in(str(dtype).removeprefix("torch."))
    report = load(module, checkpoint.tensors(name), component.plan, config, axis, device, dtype, exact)
    module.to(device)  # buffers that are computed, not stored
    logger.debug("%s: read %d numbers, holds %d", name, report.elements_read, report.elements_held)
    return module


def _whole(checkpoint: Checkpoint, name: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A component that is not cut, as its library loads it, which may rename, tie or keep parameters in float32."""
    component = checkpoint.family.components[name]
    cls = getattr(importlib.import_module(component.module), component.name)
    folder = checkpoint.folder / name
    options = {"dtype": dtype, "variant": find_variant(folder), "local_files_only": True}
    module: nn.Module = cls.from_pretrained(folder, **options)
    module = module.eval().requires_grad_(False).to(device)
    for parameter in module.parameters():  # those mapped from a file keep it open, and may lie unaligned
        parameter.data = parameter.data.clone()
    return module


def _absent(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> nn.Module:
    """What a rank has of a component that other ranks hold: its config, and no memory."""
    component = checkpoint.family.components[name]
    return _empty(component, checkpoint.folder / name, checkpoint.configs[name], dtype).to("meta", dtype)


def _empty(component: Component, folder: Path, config: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    """The class with its parameters on the meta device; buffers that it computes are real.

    Some of transformers' are in the default `dtype`, as embeddings' scales: config.json's would be the trained one's.
    """
    cls = getattr(importlib.import_module(component.module), component.name)
    with init_empty_weights(include_buffers=False):
        if component.module.startswith("diffusers."):
            module: nn.Module = cls.from_config(config)
        else:
            hf_config: Any = transformers.AutoConfig.from_pretrained(
                folder, local_files_only=True, **component.settings
            )
            section = getattr(hf_config, component.section) if component.section else hf_config
            module = cls._from_config(section, dtype=dtype)
    use_processors(module, component)
    if component.around:
        vars(module)[component.around] = module  # not registered: its parameters have one name each
    if component.unread:
        for layer in module.get_submodule(component.unread)[-component.unread_layers :]:
            hand_on(layer)
    return module


def hand_on(layer: Any) -> None:
    """The layer stays where its hidden states are counted, and does nothing."""
    layer._modules.clear()
    layer._parameters.clear()
    layer.forward = lambda hidden_states, *_args, **_options: hidden_states


def use_processors(module: nn.Module, component: Component) -> None:
    """Let the module attend with the component's processors, if it has any of its own."""
    if component.processor:
        attending: Any = module
        attending.set_attn_processor({name: component.processor() for name in attending.attn_processors})
