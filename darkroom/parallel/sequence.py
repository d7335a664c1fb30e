"""Sequence parallelism: split and gather tensors at module boundaries as the plan says, attend across ranks between.

The token counts of every rank follow from the whole length (`chunk_sizes`), so uneven lengths need neither padding
nor an exchange of sizes.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    _check_attention_backend_requirements,
    _maybe_download_kernel_for_backend,
    dispatch_attention_fn,
)
from torch import nn

from darkroom.configs.errors import ConfigError

from .attention import LocalAttention, attend, sdpa
from .mesh import Axis, Mesh
from .plan import (
    Plan,
    SequenceParallelInput,
    SequenceParallelOutput,
    SequenceRule,
    chunk_sizes,
    matches,
    may_lack,
)


def sp_shard(x: torch.Tensor, dim: int, axis: Axis) -> torch.Tensor:
    """This rank's part of `x` along `dim`."""
    return x.split(chunk_sizes(x.shape[dim], axis.size), dim)[axis.rank]


def sp_gather(x: torch.Tensor, dim: int, axis: Axis, length: int) -> torch.Tensor:
    """The whole tensor of `length` along `dim`, of which `x` is this rank's part."""
    return axis.all_gather(x, dim, chunk_sizes(length, axis.size))


class SequenceParallel:
    """One module under sequence parallelism: its hooks, and the stream lengths of the forward pass under way."""

    def __init__(self, module: nn.Module, plan: Plan, mesh: Mesh, backend: str = "auto") -> None:
        self.mesh = mesh
        self.local = sdpa if backend == "auto" else _local_attention(backend)
        self.axis = mesh.sequence
        self.lengths: dict[str, int] = {}
        """Whole token count of each stream that was split so far."""
        self._apply(module, plan)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float | None,
        streams: Sequence[str] = (),
    ) -> torch.Tensor:
        """Joint attention over the streams of all ranks, or over some of them. [B, s, H, D]; `mask` [B, s] is over
        this rank's keys."""
        lengths = {name: length for name, length in self.lengths.items() if not streams or name in streams}
        parts = [chunk_sizes(length, self.axis.size) for length in lengths.values()]
        sizes = [sum(stream) for stream in zip(*parts, strict=True)]
        mine = sizes[self.axis.rank] if sizes else 0
        if query.shape[1] != mine or key.shape[1] != mine:
            raise RuntimeError(
                f"attention of {query.shape[1]} tokens over {key.shape[1]}, but the streams {lengths} give this "
                f"rank {mine}: the plan lacks a stream, or covers a module that it should not"
            )
        return attend(query, key, value, mask, scale, sizes, self.mesh.ulysses, self.mesh.ring, self.local)

    def _apply(self, module: nn.Module, plan: Plan) -> None:
        name = type(module).__name__
        if not plan.sequence:
            raise ValueError(f"{name} has no sequence-parallel plan, but {self.axis.size} ranks were asked for")
        streams = [stream for pattern, rule in plan.sequence.items() for stream in _streams(pattern, rule)]
        if not streams:
            raise ValueError(f"the sequence plan of {name} marks no input as a stream")
        module.register_forward_pre_hook(lambda _module, _args: self.lengths.clear())
        for pattern, rule in plan.sequence.items():
            for child in _named(module, pattern).values():
                if isinstance(rule, SequenceParallelOutput):
                    self._gather_output(child, pattern, rule, streams)
                else:
                    self._split(child, pattern, rule)
        _connect_attention(module, self, plan, streams)

    def _split(self, module: nn.Module, pattern: str, rule: Mapping[str | int, SequenceParallelInput]) -> None:
        inputs = {key: entry for key, entry in rule.items() if isinstance(key, str) and not entry.split_output}
        outputs = {key: entry for key, entry in rule.items() if isinstance(key, int) and entry.split_output}
        if len(inputs) + len(outputs) != len(rule):
            raise ValueError(f"the plan of '{pattern}': names are inputs, numbers are outputs (split_output=True)")
        signature = inspect.signature(type(module).forward)
        if unknown := [key for key in inputs if key not in signature.parameters]:
            raise ValueError(f"the plan splits '{unknown[0]}' of '{pattern}', but its forward has no such input")

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            bound = signature.bind(_module, *args, **kwargs)
            for key, entry in inputs.items():
                if bound.arguments.get(key) is not None:
                    bound.arguments[key] = self._shard(bound.arguments[key], _stream(pattern, key), entry)
            return bound.args[1:], bound.kwargs

        def after(_module: nn.Module, _args: Any, out: Any) -> Any:
            parts = [out] if isinstance(out, torch.Tensor) else list(out)
            for key, entry in outputs.items():
                if parts[key] is not None:
                    parts[key] = self._shard(parts[key], _stream(pattern, key), entry)
            return parts[0] if isinstance(out, torch.Tensor) else type(out)(parts)

        if inputs:
            module.register_forward_pre_hook(before, with_kwargs=True)
        if outputs:
            module.register_forward_hook(after)

    def _shard(self, x: torch.Tensor, name: str, entry: SequenceParallelInput) -> torch.Tensor:
        if entry.expected_dims is not None and x.ndim != entry.expected_dims:
            return x
        length = x.shape[entry.split_dim]
        if not entry.auto_pad and length % self.axis.size:
            raise ValueError(f"'{name}' has {length} tokens, not divisible by {self.axis.size} ranks, and no auto_pad")
        if entry.stream and length != self.lengths.setdefault(name, length):
            raise RuntimeError(
                f"the stream '{name}' of {self.lengths[name]} tokens is split again: it has {length} now"
            )
        return sp_shard(x, entry.split_dim, self.axis)

    def _gather_output(self, module: nn.Module, pattern: str, rule: SequenceParallelOutput, streams: list[str]) -> None:
        stream = streams[0] if rule.stream is None else rule.stream
        if stream not in streams:
            raise ValueError(f"the plan gathers '{pattern}' as the stream '{stream}'; known: {', '.join(streams)}")

        def after(_module: nn.Module, _args: Any, out: torch.Tensor) -> torch.Tensor:
            if rule.expected_dims is not None and out.ndim != rule.expected_dims:
                return out
            if stream not in self.lengths:
                raise RuntimeError(f"'{pattern}' is to be gathered, but its stream '{stream}' was not split before it")
            return sp_gather(out, rule.gather_dim, self.axis, self.lengths.pop(stream))  # it may be split anew

        module.register_forward_hook(after)


def _named(module: nn.Module, pattern: str) -> dict[str, nn.Module]:
    """The modules that a plan's key names, by path. `blocks.-1` is the last element of a ModuleList."""
    before, last, after = pattern.partition(".-1")
    if last:
        pattern = f"{before}.{len(list(module.get_submodule(before).children())) - 1}{after}"
    found = {path: child for path, child in module.named_modules() if matches(pattern, path)}
    if not found:
        raise ValueError(f"the plan names '{pattern}', but {type(module).__name__} has no such module")
    return found


def _stream(pattern: str, key: str | int) -> str:
    """The name of what an entry splits: an input's own, or `pos_embed.0` for an element of an output."""
    return key if isinstance(key, str) else f"{pattern}.{key}"


def _streams(pattern: str, rule: SequenceRule) -> list[str]:
    if isinstance(rule, SequenceParallelOutput):
        return []
    return [_stream(pattern, key) for key, entry in rule.items() if entry.stream]


# ---- diffusers' attention dispatcher -----------------------------------------------------------------------------
# A processor hands its `_parallel_config` on to the function registered for its `_attention_backend`. So a backend of
# our own, registered once beside diffusers' own, gets the `SequenceParallel` of the very module that attends.

_BACKEND = "darkroom_sequence_parallel"


def use_kernel(module: nn.Module, name: str) -> None:
    """Let every processor attend with one of diffusers' kernels. Raises ConfigError where none takes it.

    The class's own `set_attention_backend` passes over what does not, and sets it for the whole process besides.
    """
    backend = _kernel(name)
    processors = [child.processor for child in module.modules() if hasattr(child, "processor")]
    taking = [processor for processor in processors if hasattr(processor, "_attention_backend")]
    if not taking:
        raise ConfigError(
            f"--attention-backend {name}: {type(module).__name__} attends with a kernel of its own; leave it at auto"
        )
    for processor in taking:
        processor._attention_backend = backend


def _local_attention(name: str) -> LocalAttention:
    return partial(dispatch_attention_fn, backend=_kernel(name))


def _kernel(name: str) -> AttentionBackendName:
    """Checked and fetched now, and not at the first request."""
    backend = AttentionBackendName(name)
    _check_attention_backend_requirements(backend)
    _maybe_download_kernel_for_backend(backend)
    return backend


@dataclass(frozen=True)
class _SomeStreams:
    """The parallel object of an attention module that joins some of the streams only."""

    parallel: SequenceParallel
    names: Sequence[str]

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float | None,
    ) -> torch.Tensor:
        return self.parallel.attend(query, key, value, mask, scale, self.names)


def _connect_attention(module: nn.Module, parallel: SequenceParallel, plan: Plan, known: Sequence[str]) -> None:
    """Give the parallel object to the attention modules that the plan names; to all of them where it names none."""
    attending = {path: child for path, child in module.named_modules() if hasattr(child, "processor")}
    if plan.attention:
        attending = {path: child for pattern in plan.attention for path, child in _named(module, pattern).items()}
    processors = {path: child.processor for path, child in attending.items()}
    if not processors:
        raise ValueError(f"{type(module).__name__} has no attention processor to give the parallel object to")
    backend, streams = _registered_backend(), _streams_of(module, plan, known)
    if strange := [path for path in streams if path not in processors]:
        raise ValueError(
            f"the plan names the streams of '{strange[0]}', which does not attend over other ranks' tokens"
        )
    for path, processor in processors.items():
        if not hasattr(processor, "_parallel_config"):  # it would attend over this rank's tokens only: silently wrong
            raise ValueError(f"'{path}' attends with {type(processor).__name__}, which takes no parallel object")
        names = streams.get(path)
        processor._parallel_config = _SomeStreams(parallel, names) if names else parallel
        processor._attention_backend = backend


def _streams_of(module: nn.Module, plan: Plan, known: Sequence[str]) -> dict[str, Sequence[str]]:
    """The streams that are joined by each attention module which does not join all of them, by its path."""
    streams: dict[str, Sequence[str]] = {}
    paths = [path for path, _ in module.named_modules()]
    for pattern, names in plan.streams.items():
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"the plan lets '{pattern}' attend over '{unknown[0]}'; known: {', '.join(known)}")
        if not may_lack(plan, pattern, paths):
            streams |= dict.fromkeys(_named(module, pattern), names)
    return streams


def _registered_backend() -> AttentionBackendName:
    members = AttentionBackendName._value2member_map_
    if _BACKEND not in members:
        member = str.__new__(AttentionBackendName, _BACKEND)
        member._name_, member._value_ = _BACKEND.upper(), _BACKEND
        members[_BACKEND] = member
        _AttentionBackendRegistry.register(member)(_dispatched)
    return members[_BACKEND]


def _dispatched(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    _parallel_config: SequenceParallel | None = None,
) -> torch.Tensor:
    """The dispatcher drops what is not in this signature, so what cannot be done is in it, to be refused."""
    if _parallel_config is None:
        raise RuntimeError("attention was dispatched to sequence parallelism without its parallel object")
    if dropout_p or is_causal or query.shape[2] != key.shape[2]:
        raise NotImplementedError("causal attention, grouped heads and dropout cannot be spread over a sequence")
    if attn_mask is not None and attn_mask.ndim == 4 and attn_mask.shape[1:3] == (1, 1):
        attn_mask = attn_mask[:, 0, 0]
    if attn_mask is not None and (attn_mask.ndim != 2 or attn_mask.dtype != torch.bool):
        shape = f"{attn_mask.dtype} {list(attn_mask.shape)}"
        raise NotImplementedError(f"a mask of {shape}: only boolean masks of keys can be spread")
    return _parallel_config.attend(query, key, value, attn_mask, scale)
