"""The plans that diffusers ships with its transformers, `_cp_plan` and `_tp_plan`: read as text, in our terms."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

from darkroom.parallel.plan import (
    Colwise,
    Heads,
    Part,
    Rowwise,
    SequenceParallelInput,
    SequenceParallelOutput,
    SequenceRule,
    TensorStyle,
)

from .stock import Source, classes, literal

_HEADS = Heads("num_attention_heads")
_TOKENS, _POSITIONS = ("hidden_states", "encoder_hidden_states"), ("img_ids", "txt_ids")


def sequence_plan(transformer: Source) -> dict[str, SequenceRule]:
    """diffusers' `_cp_plan` in our terms; empty where the class ships none, or one that does not say what it attends.

    Only a plan that splits text and image tokens at the model's boundary, and the positions of both with them, shows
    that attention is over both together: then both are streams.
    """
    plan = transformer.attribute("_cp_plan")
    if not isinstance(plan, ast.Dict):
        return {}
    rules: dict[str, SequenceRule] = {}
    for key, value in zip(plan.keys, plan.values, strict=True):
        path = literal(key)
        if isinstance(value, ast.Call):
            rules[path] = SequenceParallelOutput(**_keywords(value))
        elif isinstance(value, ast.Dict) and path == "":
            entries = {literal(name): entry for name, entry in zip(value.keys, value.values, strict=True)}
            if set(entries) != {*_TOKENS, *_POSITIONS}:
                return {}
            rules[path] = {
                name: SequenceParallelInput(**_keywords(entry), stream=name in _TOKENS)
                for name, entry in entries.items()
            }
        else:
            return {}
    return rules if isinstance(rules.get(""), Mapping) else {}


def tensor_plan(transformer: Source, config: Mapping[str, Any]) -> dict[str, TensorStyle]:
    """diffusers' `_tp_plan` in our terms; empty where the class ships none, or one with styles that are not known here.

    The classes that ship one take the number of heads from the tensors, so no attribute needs another value.
    """
    plan = transformer.attribute("_tp_plan")
    if not isinstance(plan, ast.Dict) or not isinstance(config.get(_HEADS.count), int):
        return {}
    styles = {}
    for key, value in zip(plan.keys, plan.values, strict=True):
        path = literal(key)
        if (style := _style(transformer, path, value, config)) is None:
            return {}
        styles[path] = style
    return styles


def _style(transformer: Source, path: str, value: ast.expr, config: Mapping[str, Any]) -> TensorStyle | None:
    attends = _HEADS if ".attn." in path else None
    if isinstance(value, ast.Call):
        name, given = ast.unparse(value.func), [literal(x) for x in value.args]
        packed: dict[str, tuple[str, type[Colwise | Rowwise]]]
        packed = {"PackedColwiseParallel": ("col", Colwise), "PackedRowwiseParallel": ("row", Rowwise)}
        if name not in packed:
            return None
        axis, style = packed[name]
        widths = given[0] if given else None
        leaf = path.rpartition(".")[2]
        if widths is None:
            parts = _parts(transformer, f"{leaf}._tp_packed_{axis}", config)
        else:
            parts = tuple(Part(width=x) for x in widths)
        return style(parts=parts) if parts else None
    plain: dict[str, TensorStyle] = {"colwise": Colwise(attends), "rowwise": Rowwise(attends)}
    return plain.get(literal(value))


def _parts(transformer: Source, name: str, config: Mapping[str, Any]) -> tuple[Part, ...]:
    """What a fused layer is made of, by the list of widths that its class's `__init__` keeps on it for this purpose:
    the widths of an MLP are named so, and every other one is that of all heads."""
    for source in classes(transformer.text):
        for found in ast.walk(source.node):
            if isinstance(found, ast.Assign) and ast.unparse(found.targets[0]) == f"self.{name}_blocks":
                defaults = source.parameters("__init__")
                known = {**defaults, **transformer.parameters("__init__"), **config}
                ratio = known.get("mlp_ratio") or 0
                widths = _items(found.value, defaults) if ratio == int(ratio) > 0 else []
                return tuple(Part(width=int(ratio)) if "mlp" in x else Part(heads=_HEADS) for x in widths)
    return ()


def _items(node: ast.expr, numbers: Mapping[str, Any]) -> list[str]:
    """The elements' sources of a list that is written with `+` and `*`."""
    match node:
        case ast.List(elts=elements):
            return [ast.unparse(x) for x in elements]
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _items(left, numbers) + _items(right, numbers)
        case ast.BinOp(left=left, op=ast.Mult(), right=times):
            count = literal(times) or numbers.get(ast.unparse(times).removeprefix("self."))
            return _items(left, numbers) * count if isinstance(count, int) else []
    return []


def _keywords(call: ast.expr) -> dict[str, Any]:
    assert isinstance(call, ast.Call) and not call.args
    return {keyword.arg: literal(keyword.value) for keyword in call.keywords if keyword.arg}
