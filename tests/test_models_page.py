"""scripts/matrix, on one small family; and that docs/models.md says what the code does."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from darkroom.configs import ConfigError
from darkroom.configs.config import CheckConfig
from darkroom.models.any_diffusers import AnyDiffusers
from darkroom.models.checkpoint import open_checkpoint
from tests import faults
from tests.golden import TOLERANCE
from tests.matrix import CELLS, EIGHT, Cell, Trial, axes, lacks, refusal
from tests.models_page import PAGE, Measured, describe, flags, main
from tests.subjects import SUBJECTS, Z_IMAGE, Subject

# ---- writing it ------------------------------------------------------------------------------------------------------

CELL: dict[int, list[Cell]] = {2: [{"ring": 2}]}
SMALL = replace(
    Z_IMAGE,
    variants={"4_heads": Z_IMAGE.variants["4_heads"]},
    eight=None,
    requests={"one step": Z_IMAGE.requests["one step"]},
    trials=(Z_IMAGE.trials[0],),
)


def test_a_page_is_written_from_a_run(tmp_path: Path) -> None:
    page = tmp_path / "models.md"
    page.write_text("# Models\n\n## Z-Image\n\nold\n\n## Gone\n\nold\n")
    assert main([], {"small": SMALL}, CELL, page) == 0
    text = page.read_text()
    assert describe(SMALL.capabilities) in text and "old" not in text
    [row] = re.findall(r"\| `--ring 2` \| 2 \| (.+) \|  \|", text)
    assert 0 < float(row) <= TOLERANCE
    assert "`ZImagePipeline`, bit for bit, in 1 requests" in text and "saw: ring skips a hop." in text


def test_a_page_is_described_anew(tmp_path: Path) -> None:
    """What was measured stays, and a layout that is new has a dash."""
    page = tmp_path / "models.md"
    row = "| `--ring 2` | 2 | 1.9e-06 |  |"
    table = f"| layout | ranks | 4 heads | tiles |\n| --- | --- | --- | --- |\n{row}\n| `--tp 9` | 9 | 1.0e-06 |  |"
    page.write_text(f"# Models\n\n## Z-Image\n\nold\n\n{table}\n\nOne process is the stock pipeline.\n")
    assert main(["--capabilities"], {"small": SMALL}, {2: [{"ring": 2}, {"usp": 2}]}, page) == 0
    text = page.read_text()
    assert describe(SMALL.capabilities) in text and "old" not in text and "--tp 9" not in text
    assert text.endswith(f"{row}\n| `--usp 2` | 2 | - |  |\n\nOne process is the stock pipeline.\n")


def run_another(_pipe: Any, *arguments: Any) -> Any:
    return Z_IMAGE.run_stock(*arguments)


FALSE = Trial(fault=faults.branches_are_swapped, cell={"tp": 2}, kinds=frozenset({"one branch"}))


@pytest.mark.parametrize(
    ("subject", "told"),
    [
        (replace(SMALL, trials=(FALSE,)), "small: the fault branches_are_swapped shows in ["),
        (replace(SMALL, trials=(), requests={"guidance": Z_IMAGE.requests["guidance"]}), "off the stock pipeline by"),
    ],
)
def test_what_fails_is_not_written(subject: Subject, told: str, tmp_path: Path, capfd: Any) -> None:
    """The second is held to the bit, which guidance in one batch is not."""
    page = tmp_path / "models.md"
    assert main([], {"small": replace(subject, batches_branches=False)}, {}, page) == 1
    assert told in capfd.readouterr().err
    assert not page.exists()


@pytest.mark.parametrize(
    ("kind", "value", "fails"), [("batched", 1e-6, 0), ("batched", 2e-5, 1), ("tiles of x", 1e-9, 1)]
)
def test_a_cell_is_held_to_what_is_allowed(kind: str, value: float, fails: int) -> None:
    measured = Measured()
    measured.add({(0, "4_heads", "cell", kind): value, (1, "4_heads", "cell", "one branch"): 0.0})
    assert measured.worst == {("cell", "4_heads"): value}
    assert len(measured.failures) == fails


def test_an_unknown_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main(["nothing"], page=tmp_path / "models.md")


# ---- what it says ----------------------------------------------------------------------------------------------------


def section(subject: Subject) -> str:
    """Of the page that is checked in."""
    [text] = [text for text in PAGE.read_text().split("\n## ")[1:] if text.startswith(f"{subject.title}\n")]
    return f"## {text}"


@pytest.mark.parametrize("name", SUBJECTS)
def test_the_page_has_what_models_can_do(name: str) -> None:
    """If this fails, run `scripts/matrix NAME`."""
    assert describe(SUBJECTS[name].capabilities) in section(SUBJECTS[name])


def test_models_have_one_section_each() -> None:
    titles = [subject.title for subject in SUBJECTS.values()]
    assert re.findall("^## (.+)$", PAGE.read_text(), re.MULTILINE) == titles


def rows(subject: Subject) -> Iterator[tuple[str, dict[str, str]]]:
    """(flags, result by variant)"""
    names = [*subject.variants, *(["8_heads"] if subject.eight else [])]
    for layout, found in re.findall(r"^\| `(--[^`]+)` \| \d+ \| (.+) \|[^|]*\|$", section(subject), re.MULTILINE):
        yield layout, dict(zip(names, found.split(" | "), strict=True))


@pytest.mark.parametrize("name", SUBJECTS)
def test_check_agrees_with_the_page(name: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    subject = SUBJECTS[name]
    folders = {variant: checkpoints[f"{name}_{variant}"] for variant in subject.variants}
    folders |= {"8_heads": subject.eight(tmp_path / "8_heads")} if subject.eight else {}
    table = dict(rows(subject))
    every = [cell for cells in subject.cells(CELLS).values() for cell in cells] + (EIGHT if subject.eight else [])
    assert list(table) == [flags(cell) for cell in every]
    for layout, found in table.items():
        for variant, result in found.items():
            config = CheckConfig.parse([str(folders[variant]), *layout.split()])
            if result.startswith("no plan"):
                with pytest.raises(ConfigError, match="it has: "):
                    open_checkpoint(config)
            elif result == "refused":
                assert subject.family is AnyDiffusers
                with pytest.raises(ConfigError, match="as many on every rank"):
                    open_checkpoint(config)
            elif result != "-":
                assert float(result) <= TOLERANCE
                open_checkpoint(config)


@pytest.mark.parametrize("axis", ["cfg", "ring", "ulysses", "tp", "vae"])
@pytest.mark.parametrize("name", SUBJECTS)
def test_an_axis_without_a_plan_is_refused(name: str, axis: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    built = checkpoints[f"{name}_{next(iter(SUBJECTS[name].variants))}"]
    folder = Path(shutil.copytree(built, tmp_path / "x"))
    left = [one for one in SUBJECTS[name].capabilities.axes if one != axis]
    (folder / "darkroom.json").write_text(json.dumps({"axes": left}))
    every = [cell for cells in CELLS.values() for cell in cells]
    smallest = {frozenset(axes(cell)): cell for cell in reversed(every)}  # of those with the same axes
    for cell in smallest.values():
        config = CheckConfig.parse([str(folder), *flags(cell).split()])
        if refusal(cell, built):
            continue
        if axis in lacks(cell, SUBJECTS[name].capabilities.override({"axes": left})):
            with pytest.raises(ConfigError, match=f"has no plan for {axis} parallelism; it has: {', '.join(left)}"):
                open_checkpoint(config)
        else:
            open_checkpoint(config)
