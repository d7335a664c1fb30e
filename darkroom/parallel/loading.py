"""Weights from safetensors, slice by slice: a rank reads only its part, straight to its device, in parallel streams.

No rank ever holds a whole component that is cut. The functions that only look at headers need no torch.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from darkroom.configs.errors import ConfigError

from .plan import Cut, Plan, cut_parameter, style_of

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .mesh import Axis

_SUFFIX = ".safetensors"
_INDEX = f"{_SUFFIX}.index.json"
_INDICES = f"*{_SUFFIX}.index*.json"
_SHARD = re.compile(r"-[0-9]+-of-[0-9]+(?=\.)")
_COMPUTED = ("inv_freq", "position_ids")
"""Last names of what older checkpoints hold although the classes compute it."""
_THREADS = 8
"""Streams that read one component; more do not help an NVMe disk or a PCIe link."""


@dataclass(frozen=True)
class Stored:
    """One tensor as a checkpoint holds it."""

    file: Path
    key: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Report:
    """What reading a component took: numbers of elements, for tests and logs."""

    elements_read: int
    elements_held: int


def find_weights(folder: Path) -> list[Path]:
    """The safetensors files of one component. Raises `ConfigError`."""
    files = [folder / name for name in choose_weights(folder, [file.name for file in folder.iterdir()])]
    if missing := [file.name for file in files if not file.is_file()]:
        raise ConfigError(f"'{folder.name}' lacks {missing[0]}, which its index names")
    return files


def find_variant(folder: Path) -> str | None:
    """The variant that `find_weights` takes, such as `fp16`; None for plain files."""
    return _variant_of(find_weights(folder)[0].name) or None


def choose_weights(folder: Path, names: Iterable[str]) -> list[str]:
    """Which of the files `names` hold a component: those of its index in `folder`, or the only one.

    Plain files before variants, such as model.fp16.safetensors; of several variants, the first by name.
    """
    files = sorted(name for name in names if name.endswith(_SUFFIX))
    indices = {_variant_of(index.name): index for index in sorted(folder.glob(_INDICES), reverse=True)}
    variants = {*indices, *map(_variant_of, files)}
    if not variants:
        raise ConfigError(f"'{folder.name}' holds no safetensors file: Darkroom reads no other format")
    variant = min(variants)
    if variant in indices:
        return _indexed(indices[variant])
    chosen = [name for name in files if _variant_of(name) == variant]
    if len(chosen) > 1:
        raise ConfigError(f"'{folder.name}' holds {len(chosen)} safetensors files, but no *{_INDEX} that joins them")
    return chosen


def _variant_of(name: str) -> str:
    """What stands between the dots: `fp16` of model.fp16-00001-of-00002.safetensors, of
    model-00001-of-00002.fp16.safetensors and of model.safetensors.index.fp16.json; nothing for plain files."""
    parts = _SHARD.sub("", name).split(".")[1:]
    return ".".join(part for part in parts if part not in ("safetensors", "index", "json"))


def _indexed(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ConfigError(f"{index.parent.name}/{index.name} is no index of weights: {type(e).__name__}: {e}") from None


def read_headers(files: Iterable[Path], rename: Callable[[str], str | None]) -> dict[str, Stored]:
    """Parameter name -> tensor. `rename` maps a checkpoint's key to a parameter's name, or to None to leave it out.

    Raises `ConfigError` naming a file that is corrupt or cut off.
    """
    tensors = {}
    for file in files:
        try:
            with safe_open(file, framework="np") as opened:
                for key in opened.keys():  # noqa: SIM118 - not a mapping
                    if name := rename(key):
                        tensors[name] = Stored(file, key, tuple(opened.get_slice(key).get_shape()))
        except (SafetensorError, OSError) as e:
            raise ConfigError(f"{file.parent.name}/{file.name} is not a whole safetensors file: {e}") from None
    return tensors


def elements_per_rank(
    tensors: Mapping[str, Stored], plan: Plan, config: Mapping[str, Any], size: int, rank: int
) -> int:
    """How many numbers `rank` of `size` will hold of a component."""
    total = 0
    for name, stored in tensors.items():
        cut = cut_stored(stored, name, plan, config, size, rank)
        total += math.prod(cut.shape(stored.shape) if cut else stored.shape)
    return total


def is_exact(name: str, exact: Collection[str]) -> bool:
    """Whether one of the names `exact` stands in a parameter's path: then it is kept in fp32."""
    return not frozenset(exact).isdisjoint(name.split("."))


def cut_stored(stored: Stored, name: str, plan: Plan, config: Mapping[str, Any], size: int, rank: int) -> Cut | None:
    path, _, leaf = name.rpartition(".")
    return cut_parameter(style_of(plan, path), leaf, stored.shape, config, size, rank)


def load(
    module: nn.Module,
    tensors: Mapping[str, Stored],
    plan: Plan,
    config: Mapping[str, Any],
    axis: Axis,
    device: torch.device,
    dtype: torch.dtype,
    exact: Collection[str] = (),
) -> Report:
    """Fill the parameters of `module`, which are on the meta device, with this rank's part of the checkpoint.

    All become `dtype`, but fp32 where one of the names `exact` stands in a parameter's path. Raises ConfigError for a
    parameter that the checkpoint does not hold, or holds in another shape, and for what the checkpoint holds and the
    module has no place for: config.json then describes another model.
    """
    import torch

    wanted = {**dict(module.named_parameters()), **_stored_buffers(module, tensors)}
    if missing := [name for name in wanted if name not in tensors]:
        raise ConfigError(f"the checkpoint has no '{missing[0]}' for {type(module).__name__} ({len(missing)} missing)")

    if unexpected := _unexpected(module, tensors):
        raise ConfigError(
            f"{type(module).__name__} has no '{unexpected[0]}', which the checkpoint holds ({len(unexpected)} such): "
            "config.json does not fit the weights"
        )

    def fill(name: str) -> int:
        stored = tensors[name]
        whole = getattr(wanted[name], "whole_shape", tuple(wanted[name].shape))
        if stored.shape != whole:
            raise ConfigError(
                f"'{name}' is {list(stored.shape)} in {stored.file.name}, but {type(module).__name__} "
                f"expects {list(whole)}: config.json does not fit the weights"
            )
        cut = cut_stored(stored, name, plan, config, axis.size, axis.rank)
        _assign(module, name, _read(stored, cut, device, torch.float32 if is_exact(name, exact) else dtype))
        return cut.stored(stored.shape) if cut else math.prod(stored.shape)

    with ThreadPoolExecutor(_THREADS if device.type == "cuda" else 1) as pool:
        read = sum(pool.map(_on_own_stream(fill, device), wanted))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    state = module.state_dict()
    return Report(read, sum(state[name].numel() for name in wanted))


def _stored_buffers(module: nn.Module, tensors: Mapping[str, Stored]) -> dict[str, torch.Tensor]:
    """The buffers to be read: those that the checkpoint holds, and those that the class has not computed."""
    kept = module.state_dict().keys() & tensors.keys()
    return {name: buffer for name, buffer in module.named_buffers() if name in kept or buffer.is_meta}


def _unexpected(module: nn.Module, tensors: Iterable[str]) -> list[str]:
    """A tied parameter has a place under each of its names, and so has a buffer that is computed."""
    places = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    places |= {name for name, _ in module.named_buffers(remove_duplicate=False)}
    return [name for name in tensors if name not in places and name.rpartition(".")[2] not in _COMPUTED]


def _read(stored: Stored, cut: Cut | None, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Only the wanted runs are touched; each goes to the device before they are joined there.

    safetensors maps the file into memory. What is kept is a copy, and the file is opened anew for every tensor (0.2 ms
    in a large one): a view would keep the map, and with it every page that holds a wanted number, which of a matrix
    that is cut along its rows are all.
    """
    import torch

    def to_device(x: torch.Tensor) -> torch.Tensor:
        return x.to(device=device, dtype=dtype if x.is_floating_point() else x.dtype, copy=True)

    with safe_open(stored.file, framework="pt") as opened:
        view = opened.get_slice(stored.key)
        if cut is None:
            return to_device(view[...])
        parts = []
        for run in cut.runs(stored.shape[cut.dim]):
            if isinstance(run, int):
                shape = list(stored.shape)
                shape[cut.dim] = run
                parts.append(torch.zeros(shape, device=device, dtype=dtype))
            else:
                rows = slice(*run)
                parts.append(to_device(view[rows] if cut.dim == 0 else view[:, rows]))
    return parts[0] if len(parts) == 1 else torch.cat(parts, cut.dim)


def _assign(module: nn.Module, name: str, value: torch.Tensor) -> None:
    from torch import nn

    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        owner._buffers[leaf] = value


def _on_own_stream(fill: Callable[[str], int], device: torch.device) -> Callable[[str], int]:
    """Let each thread copy on a CUDA stream of its own, so that the copies overlap."""
    import torch

    if device.type != "cuda":
        return fill
    streams = threading.local()

    def filled(name: str) -> int:
        if not hasattr(streams, "mine"):
            streams.mine = torch.cuda.Stream(device)
        with torch.cuda.stream(streams.mine):
            return fill(name)

    return filled
