"""The plans read from diffusers' sources are those of its imported classes."""

from __future__ import annotations

import ast
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput

from darkroom.models.stock import Source, find_class
from darkroom.models.stock_plans import sequence_plan, tensor_plan
from darkroom.parallel.plan import SequenceParallelInput, SequenceParallelOutput


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "Flux2Transformer2DModel"])
def test_the_plan_is_the_imported_class_own(name: str) -> None:
    source = find_class(name, "models/transformers")
    assert source is not None
    plan, theirs = sequence_plan(source), getattr(diffusers, name)._cp_plan
    assert plan.keys() == theirs.keys()
    for path, rule in theirs.items():
        ours: Any = plan[path]
        if isinstance(rule, ContextParallelOutput):
            assert isinstance(ours, SequenceParallelOutput)
            assert (ours.gather_dim, ours.expected_dims) == (rule.gather_dim, rule.expected_dims)
            continue
        assert ours.keys() == rule.keys()
        for key, entry in rule.items():
            assert isinstance(entry, ContextParallelInput) and isinstance(ours[key], SequenceParallelInput)
            assert (ours[key].split_dim, ours[key].expected_dims) == (entry.split_dim, entry.expected_dims)
        assert [key for key, entry in ours.items() if entry.stream] == ["hidden_states", "encoder_hidden_states"]


def same(style: Any, theirs: Any, module: Any) -> bool:
    if isinstance(theirs, str):
        return type(style).__name__.lower() == theirs and not style.parts
    kind = "col" if "Col" in type(theirs).__name__ else "row"
    blocks = theirs.blocks or getattr(module, f"_tp_packed_{kind}_blocks")
    return [part.width * blocks[0] for part in style.parts] == blocks


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "Flux2Transformer2DModel", "QwenImage21Transformer2DModel"])
def test_the_tensor_plan_is_the_imported_class_own(name: str) -> None:
    source, cls = find_class(name, "models/transformers"), getattr(diffusers, name)
    with torch.device("meta"):
        modules = dict(cls().named_modules())
    assert source is not None
    plan = tensor_plan(source, dict(modules[""].config))
    assert plan.keys() == cls._tp_plan.keys()
    for path, theirs in cls._tp_plan.items():
        assert same(plan[path], theirs, modules[path.replace("*", "0")]), path
    without_heads = tensor_plan(source, {})
    assert without_heads == {}


@pytest.mark.parametrize(
    "name",
    [
        "LTXVideoTransformer3DModel",  # splits texts that are attended to, but not with the picture: one is no stream
        "WanTransformer3DModel",
        "AuraFlowTransformer2DModel",  # ships none
    ],
)
def test_a_plan_whose_streams_are_not_certain_is_not_taken(name: str) -> None:
    source = find_class(name, "models/transformers")
    assert source is not None and sequence_plan(source) == {}


def test_a_plan_that_is_no_literal_is_not_taken() -> None:
    text = "class A:\n    _cp_plan = make()\n"
    node = ast.parse(text).body[0]
    assert isinstance(node, ast.ClassDef) and sequence_plan(Source(node, text)) == {}
