"""What diffusers' sources say about its classes, read as text.

Signatures, defaults and plans are declared there, so nothing needs to be run: the command line and the server know
them in milliseconds, and without torch.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
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

_HEADS = Heads("num_attention_heads")
_TOKENS, _POSITIONS = ("hidden_states", "encoder_hidden_states"), ("img_ids", "txt_ids")


@dataclass(frozen=True)
class Source:
    """One class of diffusers."""

    node: ast.ClassDef
    text: str
    """The file that it stands in."""

    def method(self, name: str) -> ast.FunctionDef | None:
        return next((x for x in self.node.body if isinstance(x, ast.FunctionDef) and x.name == name), None)

    def code(self, name: str) -> str:
        """A method's source; "" where the class has none of its own."""
        method = self.method(name)
        return ast.get_source_segment(self.text, method) or "" if method else ""

    def parameters(self, name: str) -> dict[str, Any]:
        """The names of a method's parameters with their defaults; None too where there is none."""
        method = self.method(name)
        if method is None:
            return {}
        args = [*method.args.posonlyargs, *method.args.args]
        plain = [None] * (len(args) - len(method.args.defaults)) + [_literal(x) for x in method.args.defaults]
        named = [None if x is None else _literal(x) for x in method.args.kw_defaults]
        return dict(zip([x.arg for x in (*args, *method.args.kwonlyargs)][1:], [*plain, *named][1:], strict=True))

    def is_optional(self, method: str, parameter: str) -> bool:
        """Whether None is among the types that a method takes for it."""
        found = self.method(method)
        args = [] if found is None else [*found.args.args, *found.args.kwonlyargs]
        return any(x.arg == parameter and x.annotation and "None" in ast.unparse(x.annotation) for x in args)

    def only_calls(self, part: str) -> bool:
        """Whether the pipeline's file does no more with a part than call it and ask for its dtype and device.

        It then cannot tell a language model from its body, if the hidden states are all that it takes.
        """
        named = rf"\b{re.escape(part)}\."
        used = set(re.findall(rf"{named}(\w+)", self.text))
        return used <= {"dtype", "device"} and not re.search(r"\.(logits|generate)\b", self.text)

    def constant(self, name: str) -> Any:
        """What `__init__` assigns to `self.<name>`, where that is a literal."""
        for node in ast.walk(self.node):
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == f"self.{name}":
                return _literal(node.value)
        return None

    def attribute(self, name: str) -> ast.expr | None:
        """A class attribute's expression."""
        for node in self.node.body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
                return node.value
        return None


@cache
def find_class(name: str, part: str) -> Source | None:
    """A class in diffusers/<part>; None where there is none of the name."""
    spec = importlib.util.find_spec("diffusers")  # does not import it
    assert spec is not None and spec.submodule_search_locations
    declared = re.compile(rf"^class {re.escape(name)}\b", re.MULTILINE)
    for file in sorted(Path(spec.submodule_search_locations[0], part).rglob("*.py")):
        if declared.search(text := file.read_text(encoding="utf-8")):
            nodes = (x for x in ast.parse(text).body if isinstance(x, ast.ClassDef) and x.name == name)
            if node := next(nodes, None):
                return Source(node, text)
    return None


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
        path = _literal(key)
        if isinstance(value, ast.Call):
            rules[path] = SequenceParallelOutput(**_keywords(value))
        elif isinstance(value, ast.Dict) and path == "":
            entries = {_literal(name): entry for name, entry in zip(value.keys, value.values, strict=True)}
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
        path = _literal(key)
        if (style := _style(transformer, path, value, config)) is None:
            return {}
        styles[path] = style
    return styles


def _style(transformer: Source, path: str, value: ast.expr, config: Mapping[str, Any]) -> TensorStyle | None:
    attends = _HEADS if ".attn." in path else None
    if isinstance(value, ast.Call):
        name, given = ast.unparse(value.func), [_literal(x) for x in value.args]
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
    return plain.get(_literal(value))


def _parts(transformer: Source, name: str, config: Mapping[str, Any]) -> tuple[Part, ...]:
    """What a fused layer is made of, by the list of widths that its class's `__init__` keeps on it for this purpose:
    the widths of an MLP are named so, and every other one is that of all heads."""
    for node in (x for x in ast.parse(transformer.text).body if isinstance(x, ast.ClassDef)):
        source = Source(node, transformer.text)
        for found in ast.walk(node):
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
            count = _literal(times) or numbers.get(ast.unparse(times).removeprefix("self."))
            return _items(left, numbers) * count if isinstance(count, int) else []
    return []


def _keywords(call: ast.expr) -> dict[str, Any]:
    assert isinstance(call, ast.Call) and not call.args
    return {keyword.arg: _literal(keyword.value) for keyword in call.keywords if keyword.arg}


def _literal(node: ast.expr | None) -> Any:
    """None for what is no literal."""
    try:
        return None if node is None else ast.literal_eval(node)
    except ValueError:
        return None
