"""`scripts/matrix`: tries every family in every layout, and writes docs/models.md from what it measured.

    scripts/matrix                  all families
    scripts/matrix z_image          this one; the page keeps the others' sections as they are
    scripts/matrix --capabilities   what the models can do, anew; nothing is measured, and what was stays

A family in which a cell is further off than is allowed, a tile differs in a bit, or a fault does not show, gets no new
section, and the exit code is 1.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # as in tests/conftest.py: these two stand before what reads them
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import re
import sys
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from darkroom.configs import ParallelConfig
from darkroom.configs.capabilities import Capabilities
from tests.golden import TOLERANCE, from_stock
from tests.matrix import (
    CELLS,
    EIGHT,
    EVEN_HEADS,
    TILES,
    Cell,
    Differences,
    Expected,
    OneProcess,
    differences,
    lacks,
    refusal,
    run_cells,
    run_trials,
    unequal,
    unseen,
)
from tests.ranks import RankError, run_ranks
from tests.subjects import SUBJECTS, Subject

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
TIMEOUT = 600.0
"""Seconds for one group of ranks, which runs many cells."""

PREAMBLE = f"""# Models

`scripts/matrix` writes this page from what it measures: change nothing here by hand. For each model, what it can do, by
the names of `GET /v1/models` and `darkroom.json`; then every layout of ranks that was compared with one process.

A number is the largest difference of any latent or pixel on any rank, over requests that are interleaved, batched,
without guidance, and, where a layout decodes in tiles, larger than a tile: tiny random weights of the real classes, in
float32, by gloo on CPUs. More than {TOLERANCE:g} fails the run. *Tiles*: what ranks decode in tiles is what one process
does, bit for bit. A dash is what was not tried; a layout without a plan is refused at start. A family is tried with
four heads, and with a number of them that no number of ranks divides; columns are checkpoints.

The last sections are of pipelines that no family is written for: they run by their own call, and what they can do,
plans included, is derived from diffusers' source. *Refused* there: their classes need as many heads on every rank.
"""


# ---- the run ---------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Measured:
    """What a run found of one subject."""

    worst: dict[tuple[str, str], float] = field(default_factory=dict)
    """By (cell, variant): how far its ranks are from one process."""
    tiled: set[str] = field(default_factory=set)
    """The cells whose tiles were compared."""
    stock: list[tuple[float, int]] = field(default_factory=list)
    """How far one process is from the stock pipeline: latents, and levels of 255, by request."""
    refused: set[str] = field(default_factory=set)
    """The cells that its checkpoints do not start in, though there are plans for all axes."""
    faults: list[str] = field(default_factory=list)
    """Those that showed."""
    failures: list[str] = field(default_factory=list)

    def add(self, found: Differences) -> None:
        for (_, variant, cell, kind), value in found.items():
            self.worst[cell, variant] = max(self.worst.get((cell, variant), 0.0), value)
            if kind.startswith(TILES):
                self.tiled.add(cell)
        self.failures += [f"{place}: off by {value:.1e}" for place, value in unequal(found).items()]


def measure(subject: Subject, root: Path, cells: Mapping[int, list[Cell]], bar: Any) -> Measured:
    """Try one subject in everything. Its checkpoints are built in `root`."""
    measured = Measured()
    folders = {name: build(root / name) for name, build in subject.variants.items()}
    first = dict([next(iter(folders.items()))])
    _compare_with_stock(subject, first, measured, bar)
    expected = OneProcess(folders, subject.kinds)
    for size, some in subject.cells(cells).items():
        _compare_layouts(subject, folders, expected, size, some, measured, bar)
    if subject.eight:
        large = {"8_heads": subject.eight(root / "8_heads")}
        _compare_layouts(subject, large, OneProcess(large, subject.kinds), 8, EIGHT, measured, bar)
    _try_faults(subject, first, expected, measured, bar)
    return measured


def _compare_with_stock(subject: Subject, first: dict[str, Path], measured: Measured, bar: Any) -> None:
    [folder] = first.values()
    pipe = subject.stock(folder)
    for case, request in subject.requests.items():
        off, allowed = from_stock(folder, request, pipe, subject.run_stock), subject.allowed(request)
        measured.stock.append(off)
        if not (off[0] <= allowed[0] and off[1] <= allowed[1]):
            measured.failures.append(f"{case}: one process is off the stock pipeline by {off}")
        bar.update()


def _compare_layouts(
    subject: Subject,
    folders: dict[str, Path],
    expected: Expected,
    size: int,
    cells: list[Cell],
    measured: Measured,
    bar: Any,
) -> None:
    """All cells of one number of ranks, in one group of processes."""
    planned = [cell for cell in cells if not lacks(cell, subject.capabilities)]
    refused = {str(cell): why for cell in planned for folder in folders.values() if (why := refusal(cell, folder))}
    measured.refused |= refused.keys()
    measured.failures += [f"{cell}: {why}" for cell, why in refused.items() if EVEN_HEADS not in why]
    tried = [cell for cell in planned if str(cell) not in refused]
    if tried:
        try:
            results = run_ranks(run_cells, size, folders, tried, nullcontext, subject.kinds, timeout=TIMEOUT)
            measured.add(differences(results, expected))
        except RankError as e:
            measured.failures.append(f"{size} ranks: {e}")
    bar.update(len(planned) * len(folders))


def _try_faults(subject: Subject, first: dict[str, Path], expected: Expected, measured: Measured, bar: Any) -> None:
    trials = [trial for trial in subject.trials if not lacks(trial.cell, subject.capabilities)]
    try:
        results = run_ranks(run_trials, 2, first, trials, subject.kinds, timeout=TIMEOUT)
        hidden = unseen(trials, results, expected)
    except RankError as e:
        measured.failures.append(f"faults: {e}")
        return
    measured.failures += [f"the fault {name} shows in {sorted(kinds)}" for name, kinds in hidden.items()]
    measured.faults = [trial.fault.__name__ for trial in trials if trial.fault.__name__ not in hidden]
    bar.update(len(trials))


def comparisons(subject: Subject, cells: Mapping[int, list[Cell]]) -> int:
    """How many `measure` makes."""
    capabilities = subject.capabilities
    planned = sum(not lacks(cell, capabilities) for some in subject.cells(cells).values() for cell in some)
    eight = sum(not lacks(cell, capabilities) for cell in EIGHT) if subject.eight else 0
    trials = sum(not lacks(trial.cell, capabilities) for trial in subject.trials)
    return len(subject.requests) + len(subject.variants) * planned + eight + trials


# ---- the page --------------------------------------------------------------------------------------------------------


def describe(capabilities: Capabilities) -> str:
    """What a model can do, as a table of the record's fields."""
    values = {name: value for name, value in capabilities.model_dump().items() if name != "family"}
    rows = [f"| `{name}` | {_text(value)} |" for name, value in values.items()]
    return "\n".join([f"## {capabilities.family}", "", "| | |", "|---|---|", *rows, ""])


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(one)}" for key, one in value.items())
    if isinstance(value, tuple | list):
        return ", ".join(map(_text, value)) or "none"
    return f"`{value!r}`" if isinstance(value, str) and not value.strip() else f"{value}"


def section(subject: Subject, measured: Measured, cells: Mapping[int, list[Cell]]) -> str:
    variants = [*subject.variants, *(["8_heads"] if subject.eight else [])]
    every = [cell for some in subject.cells(cells).values() for cell in some] + (EIGHT if subject.eight else [])
    header = ["layout", "ranks", *(name.replace("_", " ") for name in variants), "tiles"]
    rows = [header, ["---"] * len(header), *(_row(cell, subject, variants, measured) for cell in every)]
    table = "\n".join(map(_line, rows))
    return f"{describe(subject.capabilities)}\n{table}\n\n{_facts(subject, measured)}\n"


def _line(row: Iterable[str]) -> str:
    return f"| {' | '.join(row)} |"


def _row(cell: Cell, subject: Subject, variants: Iterable[str], measured: Measured) -> list[str]:
    found = [measured.worst.get((str(cell), variant)) for variant in variants]
    numbers = ["-" if value is None else f"{value:.1e}" for value in found]
    if missing := lacks(cell, subject.capabilities):
        numbers = [f"no plan for {', '.join(missing)}"] * len(numbers)
    elif str(cell) in measured.refused:
        numbers = ["refused"] * len(numbers)
    tiles = "identical" if str(cell) in measured.tiled else ""
    return [f"`{flags(cell)}`", str(ParallelConfig.model_validate(cell).world_size), *numbers, tiles]


def flags(cell: Cell) -> str:
    """As on the command line."""
    return " ".join(
        f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}") for name, value in cell.items()
    )


def _facts(subject: Subject, measured: Measured) -> str:
    off, levels = (max(column) for column in zip(*measured.stock, strict=True))
    how = "bit for bit" if off == levels == 0 else f"to {off:.1e}, and {levels} levels of 255 in the picture"
    versions = ", ".join(f"{name} {version(name)}" for name in ("diffusers", "transformers"))
    faults = ", ".join(name.replace("_", " ") for name in measured.faults)
    return (
        f"One process is the stock `{subject.pipeline.__name__}`, {how}, in {len(measured.stock)} requests. "
        f"Deliberate faults that the comparison saw: {faults}. "
        f"Measured on {date.today()} with torch {torch.__version__}, {versions}."
    )


def write(page: Path, new: Mapping[str, str], titles: Iterable[str]) -> None:
    """Put sections in place of those of their titles. Sections without one of `titles` go."""
    old = page.read_text().split("\n## ")[1:] if page.is_file() else []
    sections = {text.partition("\n")[0]: f"## {text.rstrip()}\n" for text in old} | dict(new)
    text = "\n".join([PREAMBLE, *(sections[title] for title in titles if title in sections)])
    page.write_text(re.sub(r"\n{3,}", "\n\n", text))


def _described_anew(page: Path, subjects: Iterable[Subject], cells: Mapping[int, list[Cell]]) -> dict[str, str]:
    """The page's sections, with what was measured as it is. Layouts that are new were not tried."""
    old = {text.partition("\n")[0]: text for text in page.read_text().split("\n## ")[1:]}
    sections = {}
    for subject in (subject for subject in subjects if subject.title in old):
        head, *lines = f"| layout{old[subject.title].partition('| layout')[2].rstrip()}".split("\n")
        rule, measured = lines[0], {line.split("`")[1]: line for line in lines[1:] if line.startswith("| `")}
        variants = head.strip("| ").split(" | ")[2:-1]
        every = [cell for some in subject.cells(cells).values() for cell in some] + (EIGHT if subject.eight else [])
        rows = [measured.get(flags(cell)) or _line(_row(cell, subject, variants, Measured())) for cell in every]
        table = "\n".join([head, rule, *rows])
        sections[subject.title] = f"{describe(subject.capabilities)}\n{table}\n\n{lines[-1]}\n"
    return sections


def main(
    arguments: list[str],
    subjects: Mapping[str, Subject] = SUBJECTS,
    cells: Mapping[int, list[Cell]] = CELLS,
    page: Path = PAGE,
) -> int:
    parser = argparse.ArgumentParser(prog="scripts/matrix", description="Measure, and write docs/models.md.")
    parser.add_argument("subject", nargs="*", help=f"of {', '.join(subjects)}; by default all")
    parser.add_argument("--capabilities", action="store_true", help="measure nothing: only say what models can do")
    asked = parser.parse_args(arguments)
    names = asked.subject or list(subjects)
    if unknown := [name for name in names if name not in subjects]:
        parser.error(f"no subject '{unknown[0]}'; known: {', '.join(subjects)}")
    torch.set_num_threads(1)
    titles, failures = [subject.title for subject in subjects.values()], []
    if asked.capabilities:
        write(page, _described_anew(page, [subjects[name] for name in names], cells), titles)
        return 0
    with tqdm(total=sum(comparisons(subjects[name], cells) for name in names), unit="cell") as bar:
        for name in names:
            bar.set_description(name)
            subject = subjects[name]
            with tempfile.TemporaryDirectory() as root:
                measured = measure(subject, Path(root), cells, bar)
            failures += [f"{name}: {failure}" for failure in measured.failures]
            if not measured.failures:
                write(page, {subject.title: section(subject, measured, cells)}, titles)  # at once: it took minutes
    print("\n".join(failures) or f"{page.name}: all cells are equal", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
