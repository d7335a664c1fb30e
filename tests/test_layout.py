"""The rules of the design that a test can hold: by reading the sources, by importing them, by building real classes."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from darkroom.models import MODELS
from darkroom.models.base import Component, Model
from darkroom.models.build import use_processors
from darkroom.parallel.loading import Stored, elements_per_rank
from darkroom.parallel.mesh import Axis
from darkroom.parallel.sequence import SequenceParallel
from darkroom.parallel.spatial import PatchDecoder
from darkroom.parallel.tensor import shard

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "darkroom"
SOURCES = sorted(PACKAGE.rglob("*.py"))


def name_of(file: Path) -> str:
    """`engine.worker` for darkroom/engine/worker.py, `engine` for darkroom/engine/__init__.py"""
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")


TREES = {name_of(file): ast.parse(file.read_text()) for file in SOURCES}

Rule = Callable[[str, ast.Module], Iterator[str]]
"""(module's name, its tree) -> what is wrong with it"""


def broken(rule: Rule, trees: dict[str, ast.Module] = TREES) -> list[str]:
    return [f"{name or 'darkroom'}: {fault}" for name, tree in trees.items() for fault in rule(name, tree)]


def example(name: str, source: str) -> dict[str, ast.Module]:
    """A module that is not there, to show that a rule sees a fault."""
    return {name: ast.parse(source)}


# ---- imports go one way ----------------------------------------------------------------------------------------------

ALLOWED: dict[str, tuple[str, ...]] = {
    # an area may import itself, and what stands here; of two entries that fit a module, the longer one counts
    "configs": (),
    "parallel": ("configs",),
    "models": ("parallel", "configs"),
    "engine.messages": ("configs",),
    "engine.stills": (),
    "engine.media": ("engine.stills", "configs"),
    "engine.scheduler": ("engine.messages", "configs"),
    "engine.workers": ("engine.messages", "models", "configs"),  # models: which modules worker processes share
    "engine.engine": ("engine.scheduler", "engine.workers", "engine.messages", "configs"),
    "engine.__main__": ("engine.engine",),
    "engine.launch": ("engine.engine", "configs"),
    "engine.worker": ("engine.media", "engine.messages", "models", "parallel", "configs"),
    "engine": (),
    "server": ("engine.messages", "engine.launch", "configs"),
    "offline": ("engine.messages", "engine.launch", "models.checkpoint", "configs"),
    "cli": ("server.run", "server.keys", "offline", "models.checkpoint", "configs"),
    "__main__": ("cli",),
    "": ("offline", "configs"),
}


def within(name: str, area: str) -> bool:
    return name == area or name.startswith(f"{area}.")


def area_of(name: str) -> str:
    return max((area for area in ALLOWED if within(name, area)), key=len, default="")


def imported(name: str, tree: ast.Module) -> Iterator[str]:
    """Every name that the module imports anywhere in it, in full, with `darkroom.` for our own."""
    is_package = (PACKAGE / Path(*name.split("."))).is_dir()
    package = ["darkroom", *(name.split(".") if name else [])]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            up = len(package) + is_package - node.level
            base = [*(package[:up] if node.level else []), *([node.module] if node.module else [])]
            yield from (".".join([*base, alias.name]) for alias in node.names)


def imports_upwards(name: str, tree: ast.Module) -> Iterator[str]:
    mine = area_of(name)
    for target in imported(name, tree):
        if within(target, "darkroom"):
            other = target.removeprefix("darkroom").lstrip(".")
            if not any(within(other, area) for area in (mine, *ALLOWED[mine]) if area) and other:
                yield f"imports {target}"


def test_imports_go_one_way() -> None:
    assert broken(imports_upwards) == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("configs.config", "from darkroom.parallel.plan import Plan"),
        ("parallel.mesh", "def f():\n    from darkroom.models import MODELS"),
        ("parallel.plan", "from ..models import base"),
        ("engine.scheduler", "from . import worker"),
        ("engine.launch", "import darkroom.engine.worker"),
        ("server.app", "from darkroom.engine.engine import Engine"),
        ("server.models", "from darkroom.models.checkpoint import Checkpoint"),
        ("models.base", "from darkroom.engine import worker"),
    ],
)
def test_an_import_the_other_way_is_seen(name: str, source: str) -> None:
    assert len(broken(imports_upwards, example(name, source))) == 1


# ---- torch is where the devices are ----------------------------------------------------------------------------------

WITHOUT_TORCH = ("darkroom.server.app", "darkroom.cli", "darkroom.engine.engine", "darkroom.models.checkpoint")


def test_what_serves_does_not_import_torch() -> None:
    """Each in one process, one after another; and then a module that must import it, so that the test can fail."""
    code = f"""
import importlib, sys
for name in {(*WITHOUT_TORCH, "darkroom.parallel.mesh")}:
    importlib.import_module(name)
    print(name, sorted({{"torch", "diffusers", "transformers"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines() == [*(f"{name} []" for name in WITHOUT_TORCH), "darkroom.parallel.mesh ['torch']"]


def imports_torch(name: str, tree: ast.Module) -> Iterator[str]:
    if not any(within(name, area) for area in ("parallel", "models", "engine.worker")):
        for target in imported(name, tree):
            if target.split(".")[0] in ("torch", "diffusers", "transformers"):
                yield f"imports {target}"


def test_torch_is_imported_by_workers_alone() -> None:
    assert broken(imports_torch) == []
    assert broken(imports_torch, example("engine.workers", "def f():\n    import torch.cuda")) != []


# ---- no model is named outside models/ -------------------------------------------------------------------------------

FAMILIES = (
    "qwen", "wan", "z image", "zimage", "longcat", "long cat", "ovis", "sd 3", "sdxl", "stable diffusion", "flux",
    "hunyuan", "ltx", "hidream", "sana", "pixart", "cogview", "cogvideo", "chroma", "lumina", "mochi", "kandinsky",
)  # fmt: skip

_WORD = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|[0-9]+")


def named_families(text: str) -> list[str]:
    """Lines that name a family in an identifier, a string or a comment: `AutoencoderKLWan`, but not `want`."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        words = f" {' '.join(_WORD.findall(line)).lower()} "
        found += [f"{number}: {family}" for family in FAMILIES if f" {family} " in words]
    return found


def test_no_model_is_named_outside_models() -> None:
    found = {
        name_of(file): named_families(file.read_text()) for file in SOURCES if PACKAGE / "models" not in file.parents
    }
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_every_family_is_known_to_the_rule_above() -> None:
    for family in MODELS.values():
        assert named_families(family.__name__) and named_families(family.capabilities.family)


@pytest.mark.parametrize(
    ("line", "seen"),
    [
        ("class QwenImagePipeline:", True),
        ("vae = AutoencoderKLWan()", True),
        ("# as in Z-Image", True),
        ("z_image = 1", True),
        ('if name == "FLUX.1-dev":', True),
        ("StableDiffusion3Pipeline", True),
        ("transformer_sd3", True),
        ("wanted, provision, influx, a size of an image", False),
    ],
)
def test_names_are_told_from_words(line: str, seen: bool) -> None:
    assert bool(named_families(line)) is seen


# ---- what no module does ---------------------------------------------------------------------------------------------


def dotted(node: ast.AST) -> str:
    """`os.environ` for that expression; "" for what is not made of names and dots."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def reads_the_environment(name: str, tree: ast.Module) -> Iterator[str]:
    if not within(name, "configs") and not name.endswith("__main__"):
        used = {*imported(name, tree), *(dotted(node) for node in ast.walk(tree))}
        yield from used & {"os.environ", "os.environb", "os.getenv", "os.putenv"}


def unpickles(name: str, tree: ast.Module) -> Iterator[str]:
    """Weights are safetensors only, and messages msgpack: what can run code is not read."""
    used = {*imported(name, tree), *(dotted(node) for node in ast.walk(tree))}
    unsafe = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    yield from (
        x for x in used if x.split(".")[0] in unsafe or x in ("torch.load", "numpy.load", "np.load", "yaml.load")
    )


def prints(name: str, tree: ast.Module) -> Iterator[str]:
    if name not in ("cli", "server.run"):
        calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
        yield from (f"print in line {call.lineno}" for call in calls if dotted(call.func) == "print")


def warns(name: str, tree: ast.Module) -> Iterator[str]:
    """What does not fit is an error at the start: a warning scrolls by, and the picture is silently wrong."""
    if any(within(name, area) for area in ("configs", "parallel", "models")):
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in ("warn", "warning", "warning_once"):
                yield f"line {node.lineno}"


def has_no_docstring(_name: str, tree: ast.Module) -> Iterator[str]:
    if not ast.get_docstring(tree):
        yield "no docstring"


_MUTABLE = ("dict", "list", "set", "bytearray", "defaultdict", "deque", "Counter", "OrderedDict")
_MUTATING = (
    "append", "extend", "insert", "remove", "pop", "popitem", "popleft", "appendleft", "clear", "update", "add",
    "discard", "setdefault", "sort", "reverse",
)  # fmt: skip


def keeps_global_state(_name: str, tree: ast.Module) -> Iterator[str]:
    """Module-level containers that the module changes later, and `global`. A constant may well be a dictionary."""
    containers = set()
    for node in tree.body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        value = getattr(node, "value", None)
        is_call = isinstance(value, ast.Call) and dotted(value.func).split(".")[-1] in _MUTABLE
        literals = (ast.Dict, ast.List, ast.Set, ast.DictComp, ast.ListComp, ast.SetComp)
        if is_call or isinstance(value, literals):
            containers |= {dotted(target) for target in targets}
    for node in ast.walk(tree):
        changed = ""
        match node:
            case ast.Global(names=names):
                yield f"line {node.lineno}: global {', '.join(names)}"
            case ast.Subscript(value=value, ctx=ast.Store() | ast.Del()):
                changed = dotted(value)
            case ast.AugAssign(target=target):
                changed = dotted(target.value if isinstance(target, ast.Subscript) else target)
            case ast.Call(func=ast.Attribute(value=value, attr=attr)) if attr in _MUTATING:
                changed = dotted(value)
        if changed in containers:
            yield f"line {node.lineno}: changes {changed}"


RULES: dict[Rule, list[str]] = {
    reads_the_environment: ["import os\nos.environ['A']", "from os import getenv", "import os\nf(os.environ)"],
    unpickles: ["import pickle", "def f():\n    from pickle import loads", "import torch\ntorch.load('x')"],
    prints: ["print()"],
    warns: ["logger.warning('x')", "import warnings\nwarnings.warn('x')"],
    has_no_docstring: ["import os"],
    keeps_global_state: [
        "x = {}\ndef f():\n    x[1] = 2",
        "x: list[int] = []\ndef f():\n    x.append(1)",
        "x = set()\ndef f():\n    global y",
        "x = defaultdict(int)\nx[1] += 1",
    ],
}
"""With sources that break each."""


@pytest.mark.parametrize("rule", RULES)
def test_no_module_breaks_the_rule(rule: Rule) -> None:
    assert broken(rule) == []
    for source in RULES[rule]:
        assert broken(rule, example("parallel.example", source)), source


def test_constants_and_local_containers_are_no_state() -> None:
    source = "X = {1: 2}\nY = [*X]\ndef f():\n    x = []\n    x.append(X[1])\n    return x"
    assert broken(keeps_global_state, example("parallel.example", source)) == []


_TODO = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b(?!\(#\d+\))")


def test_what_is_left_to_do_has_an_issue() -> None:
    assert [str(file.relative_to(ROOT)) for file in SOURCES if _TODO.search(file.read_text())] == []
    assert _TODO.search("# TODO: later") and not _TODO.search("# TODO(#12): later")


def test_no_module_is_longer_than_800_lines() -> None:
    files = [*SOURCES, *(ROOT / "tests").rglob("*.py")]
    assert [str(file.relative_to(ROOT)) for file in files if len(file.read_text().splitlines()) > 800] == []


# ---- tests mirror sources --------------------------------------------------------------------------------------------

WITHOUT_TESTS = {
    "configs/errors.py": "two exceptions without code of their own",
    "server/migrations/env.py": "tests/server/test_jobs.py migrates with it",
    "server/migrations/versions/v0001_video_jobs.py": "tests/server/test_jobs.py compares its tables with the code's",
    "server/migrations/versions/v0002_idempotency.py": "the same",
    "server/migrations/versions/v0003_unread_pictures.py": "the same",
    "models/base.py": "a contract: each family's golden test runs all of it",
    "models/build.py": "every golden test builds its model with it, and tests/engine its errors",
}


def test_every_module_has_its_tests() -> None:
    missing = []
    for file in SOURCES:
        path = file.relative_to(PACKAGE)
        mirror = ROOT / "tests" / path.with_name(f"test_{path.name}")
        if not path.name.startswith("__") and str(path) not in WITHOUT_TESTS and not mirror.is_file():
            missing.append(str(mirror.relative_to(ROOT)))
    assert missing == []


def test_the_list_of_exceptions_is_true() -> None:
    for path in WITHOUT_TESTS:
        file = PACKAGE / path
        assert file.is_file() and not (ROOT / "tests" / file.parent.name / f"test_{file.name}").is_file()


# ---- what families declare -------------------------------------------------------------------------------------------

FAMILY_CLASSES = sorted(set(MODELS.values()), key=lambda family: family.__name__)


PUBLISHED: dict[str, dict[str, Any]] = {"T5Stack": {"feed_forward_proj": "gated-gelu"}}
"""What every published checkpoint has otherwise than the class by default."""


def built(component: Component) -> tuple[nn.Module, dict[str, Any]]:
    """The real class at its default, full size, without memory; and its configuration."""
    module, config = bare(component)
    use_processors(module, component)
    return module, config


def bare(component: Component) -> tuple[nn.Module, dict[str, Any]]:
    cls = getattr(importlib.import_module(component.module), component.name)
    with torch.device("meta"):
        if component.module.startswith("diffusers."):
            module = cls()
            return module, dict(module.config)
        config = cls.config_class(**component.settings, **PUBLISHED.get(component.name, {}))
        return cls(config), config.to_dict()


@pytest.mark.parametrize("family", FAMILY_CLASSES)
def test_axes_are_declared_where_there_is_a_plan(family: type[Model]) -> None:
    transformer, vae = family.components["transformer"], family.components["vae"]
    planned = {
        "cfg": family.capabilities.guidance_branches > 1,
        "ring": bool(transformer.plan.sequence),
        "ulysses": bool(transformer.plan.sequence),
        "tp": bool(transformer.plan.tensor),
        "vae": vae.plan.spatial is not None,
    }
    assert set(family.capabilities.axes) == {axis for axis, has_plan in planned.items() if has_plan}
    assert transformer.ranks == "tp" and vae.ranks == "vae"
    for name, component in family.components.items():
        assert component.ranks != "world" or component.plan.tensor, (
            f"{name} is to be cut over all ranks, without a plan"
        )


@pytest.mark.parametrize(
    ("family", "name"), [(family, name) for family in FAMILY_CLASSES for name in family.components]
)
def test_plans_fit_the_real_classes(family: type[Model], name: str) -> None:
    """Every pattern names modules of the borrowed class, with the inputs, weights and processors that it needs.

    This is the pin on diffusers' and transformers' names.
    """
    component = family.components[name]
    plan = component.plan
    module, config = built(component)
    parameters = {key: Stored(Path(), key, tuple(x.shape)) for key, x in module.named_parameters()}
    if plan.sequence:
        mesh: Any = SimpleNamespace(sequence=Axis("sequence", 2), ulysses=Axis("ulysses", 2), ring=Axis("ring"))
        SequenceParallel(module, plan, mesh)
    if plan.spatial:
        PatchDecoder(module, plan, Axis("vae", 2))
    if plan.tensor:
        shard(module, plan, config, Axis("tp", 2))
        whole = sum(elements_per_rank({key: x}, plan, config, 1, 0) for key, x in parameters.items())
        assert elements_per_rank(parameters, plan, config, 2, 0) <= 0.55 * whole


def test_a_plan_that_does_not_fit_is_seen() -> None:
    family = FAMILY_CLASSES[0]
    text_plan = family.components["text_encoder"].plan
    module, config = built(family.components["transformer"])
    with pytest.raises(ValueError, match="has no such module"):
        shard(module, text_plan, config, Axis("tp", 2))
