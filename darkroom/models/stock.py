"""What diffusers' sources say about its classes, read as text.

Signatures, defaults and plans are declared there, so nothing needs to be run: the command line and the server know
them in milliseconds, and without torch.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any


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
        return "\n".join(self.text.split("\n")[method.lineno - 1 : method.end_lineno]) if method else ""

    def parameters(self, name: str) -> dict[str, Any]:
        """The names of a method's parameters with their defaults; None too where there is none."""
        method = self.method(name)
        if method is None:
            return {}
        args = [*method.args.posonlyargs, *method.args.args]
        plain = [None] * (len(args) - len(method.args.defaults)) + [literal(x) for x in method.args.defaults]
        named = [None if x is None else literal(x) for x in method.args.kw_defaults]
        return dict(zip([x.arg for x in (*args, *method.args.kwonlyargs)][1:], [*plain, *named][1:], strict=True))

    def is_optional(self, method: str, parameter: str) -> bool:
        """Whether None is among the types that a method takes for it."""
        found = self.method(method)
        args = [] if found is None else [*found.args.args, *found.args.kwonlyargs]
        types = (ast.unparse(x.annotation) for x in args if x.arg == parameter and x.annotation)
        return any("None" in x or x.startswith("Optional[") for x in types)

    def constant(self, name: str) -> Any:
        """What `__init__` assigns to `self.<name>`, where that is a literal."""
        for node in ast.walk(self.node):
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == f"self.{name}":
                return literal(node.value)
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
        text = file.read_text(encoding="utf-8")
        found = classes(text) if name in text and declared.search(text) else ()
        if source := next((x for x in found if x.node.name == name), None):
            return source
    return None


@cache
def classes(text: str) -> tuple[Source, ...]:
    """Those that a file declares."""
    return tuple(Source(node, text) for node in ast.parse(text).body if isinstance(node, ast.ClassDef))


def literal(node: ast.expr | None) -> Any:
    """None for what is no literal."""
    try:
        return None if node is None else ast.literal_eval(node)
    except ValueError:
        return None
