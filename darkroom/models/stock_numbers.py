"""Numbers that diffusers' classes work out from their configs, by their own expressions, read as text.

How many pixels and frames a latent stands for is written otherwise in every class. A pipeline says `2 ** (len(
self.vae.config.block_out_channels) - 1)`, or asks its VAE, which says `patch_size * 2 ** sum(spatio_temporal_scaling)`,
unless its config holds the number. So the expressions are evaluated.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .stock import Source

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: operator.pow,
}
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {"len": len, "sum": sum, "int": int, "max": max, "min": min}


class Unknown(LookupError):
    """What an expression says is not known from configs."""


@dataclass(frozen=True)
class Instance:
    """An object of a class of diffusers, of which its configuration is known, and no more."""

    source: Source
    config: Mapping[str, Any] = field(default_factory=dict)
    """config.json. What it does not hold has `__init__`'s default."""
    parts: Mapping[str, Instance] = field(default_factory=dict)
    """Its attributes that are such objects too."""

    def settings(self) -> dict[str, Any]:
        return {**self.source.parameters("__init__"), **self.config}

    def attribute(self, name: str) -> Any:
        """What `__init__` leaves in `self.<name>`. Raises Unknown; also for None."""
        init, value = self.source.method("__init__"), None
        for node in self._assignments(init.body if init else [], f"self.{name}"):
            value = node
        found = None if value is None else self.value(value)
        if found is None:
            raise Unknown(name)
        return found

    def default(self, name: str) -> Any:
        """What the call takes for a parameter that it is not given: the signature's, or else `name = name or ...` at
        the call's beginning; None where it has neither. Raises Unknown."""
        call = self.source.method("__call__")
        if call is None or (value := self.source.parameters("__call__").get(name)) is not None:
            return value if call else None
        for node in self._assignments(call.body, name):
            if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.Or) and ast.unparse(node.values[0]) == name:
                return self.value(node.values[1])
        return None

    def _assignments(self, statements: Sequence[ast.stmt], target: str) -> Iterator[ast.expr]:
        """The values that are assigned on the way that these configs take."""
        for statement in statements:
            if isinstance(statement, ast.If) and any(self._assignments_anywhere(statement, target)):
                taken = statement.body if self.value(statement.test) else statement.orelse
                yield from self._assignments(taken, target)
            elif isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == target:
                yield statement.value

    @staticmethod
    def _assignments_anywhere(statement: ast.stmt, target: str) -> Iterator[bool]:
        return (isinstance(x, ast.Assign) and ast.unparse(x.targets[0]) == target for x in ast.walk(statement))

    def value(self, node: ast.expr) -> Any:
        """What an expression in one of the class's methods comes to. Raises Unknown."""
        match node:
            case ast.Constant(value=value):
                return value
            case ast.Name(id="self"):
                return self
            case ast.Name(id=name):
                return _item(self.settings(), name)
            case ast.Attribute(value=owner, attr=name):
                return _attribute(self.value(owner), name)
            case ast.Subscript(value=owner, slice=index):
                return _item(self.value(owner), self._index(index))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
                return _BINARY[type(op)](_number(self.value(left)), _number(self.value(right)))
            case ast.BoolOp(op=op, values=values):
                return self._first(values, until=isinstance(op, ast.Or))
            case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _COMPARE:
                return _COMPARE[type(op)](self.value(left), self.value(right))
            case ast.IfExp(test=test, body=body, orelse=orelse):
                return self.value(body if self.value(test) else orelse)
            case ast.Call(func=ast.Name(id=name), args=args):
                return self._call(name, args)
        raise Unknown(ast.unparse(node))

    def _first(self, values: Sequence[ast.expr], *, until: bool) -> Any:
        """As `or` and `and` evaluate: the first that is true, or that is false; else the last."""
        for node in values[:-1]:
            if bool(value := self.value(node)) is until:
                return value
        return self.value(values[-1])

    def _index(self, node: ast.expr) -> Any:
        if not isinstance(node, ast.Slice):
            return ast.literal_eval(node)
        return slice(*(x and ast.literal_eval(x) for x in (node.lower, node.upper, node.step)))

    def _call(self, name: str, args: Sequence[ast.expr]) -> Any:
        if name in ("getattr", "hasattr"):
            has = ast.literal_eval(args[1]) in self.parts
            return has if name == "hasattr" else self.parts.get(ast.literal_eval(args[1]))
        if name == "isinstance":
            owner, classes = self.value(args[0]), args[1]
            names = classes.elts if isinstance(classes, ast.Tuple) else [classes]
            return isinstance(owner, Instance) and owner.source.node.name in [ast.unparse(x) for x in names]
        if name not in _FUNCTIONS:
            raise Unknown(name)
        return _FUNCTIONS[name](*(self.value(x) for x in args))


def _attribute(owner: Any, name: str) -> Any:
    if isinstance(owner, Instance):
        return owner.settings() if name == "config" else owner.parts.get(name) or owner.attribute(name)
    return _item(owner, name)


def _item(owner: Any, key: Any) -> Any:
    try:
        return owner[key]
    except (LookupError, TypeError):
        raise Unknown(str(key)) from None


def _number(value: Any) -> Any:
    if not isinstance(value, int | float):
        raise Unknown(str(value))
    return value
