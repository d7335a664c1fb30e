"""Golden equality, for every family: one process is the stock pipeline, and every layout of ranks is one process.

In a subset of layouts, few for the families after the first, unless pytest is given `--matrix`. `scripts/matrix`
runs all, on up to 8 ranks, and writes what it finds to docs/models.md.
"""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from darkroom.configs import ParallelConfig
from darkroom.models import FAMILIES
from darkroom.models.any_diffusers import AnyDiffusers
from tests import faults, tiny
from tests.golden import difference, from_stock, generate, request, worker
from tests.matrix import (
    CELLS,
    Cell,
    Expected,
    Kind,
    OneProcess,
    Trial,
    axes,
    differences,
    run_cells,
    run_trials,
    startable,
    unequal,
    unseen,
)
from tests.ranks import run_ranks
from tests.subjects import QWEN_IMAGE, SUBJECTS, Builder, Subject


@pytest.fixture(scope="module")
def subject(request: pytest.FixtureRequest) -> Subject:
    return SUBJECTS[request.param]


@pytest.fixture(scope="module")
def folders(subject: Subject, checkpoints: dict[str, Path]) -> dict[str, Path]:
    [name] = [name for name, one in SUBJECTS.items() if one is subject]
    return {variant: checkpoints[f"{name}_{variant}"] for variant in subject.variants}


@pytest.fixture(scope="module")
def stock(subject: Subject, folders: dict[str, Path]) -> Any:
    return subject.stock(next(iter(folders.values())))


@pytest.fixture(scope="module")
def known() -> dict[str, Expected]:
    """What one process gave, by subject: pytest would have it made anew for every size."""
    return {}


@pytest.fixture
def expected(subject: Subject, folders: dict[str, Path], known: dict[str, Expected]) -> Expected:
    if subject.title not in known:
        known[subject.title] = OneProcess(folders, subject.kinds)
    return known[subject.title]


@pytest.mark.parametrize(
    ("subject", "case"),
    [(name, case) for name, subject in SUBJECTS.items() for case in subject.requests],
    indirect=["subject"],
)
def test_one_process_is_the_stock_pipeline(case: str, subject: Subject, stock: Any, folders: dict[str, Path]) -> None:
    wanted = subject.requests[case]
    latents, levels = from_stock(next(iter(folders.values())), wanted, stock, subject.run_stock)
    allowed = subject.allowed(wanted)
    assert latents <= allowed[0] and levels <= allowed[1]


@pytest.mark.parametrize("subject", SUBJECTS, indirect=True)
def test_samples_that_take_turns_are_each_alone(subject: Subject, folders: dict[str, Path], expected: Expected) -> None:
    """Bit for bit: what one process gives where requests take turns is what layouts are compared with."""
    name, folder = next(iter(folders.items()))
    with worker(folder, ParallelConfig()) as one:
        requests = subject.kinds["interleaved"].requests
        alone = {str(i): generate(one, [each])["0"] for i, each in enumerate(requests)}
    assert difference(expected[name, False]["interleaved"], alone) == 0


@pytest.mark.parametrize(
    ("subject", "size"), [(name, size) for name in SUBJECTS for size in CELLS], indirect=["subject"]
)
def test_every_layout_is_one_process(
    size: int, subject: Subject, folders: dict[str, Path], expected: Expected, whole_matrix: bool
) -> None:
    layouts = subject.layouts(size, whole_matrix)
    if not layouts:
        pytest.skip("in the whole matrix only: --matrix")
    for name, asked in layouts.items():
        cells = startable(asked, folders[name], subject.capabilities)
        assert cells == asked or subject.family is AnyDiffusers  # families refuse nothing
        if not cells:
            continue
        results = run_ranks(run_cells, size, {name: folders[name]}, cells, nullcontext, subject.kinds)
        worst = differences(results, expected)
        assert len(worst) >= size * len(cells) * 3
        assert unequal(worst) == {}


@pytest.mark.parametrize(
    ("subject", "build", "cells"),
    [
        ("z_image", lambda folder: tiny.z_image(folder, heads=30), [{"tp": 4}]),
        ("sd3", lambda folder: tiny.sd3(folder, heads=38, dual=False), [{"tp": 4}]),
        ("sd3", lambda folder: tiny.sd3(folder, dual=False, qk_norm=None), [{"tp": 2}, {"usp": 2}]),
    ],
    ids=["z_image", "sd3.5-large", "sd3"],
    indirect=["subject"],
)
def test_heads_and_norms_as_published(subject: Subject, build: Builder, cells: list[Cell], tmp_path: Path) -> None:
    """Z-Image's 30 heads, and SD3.5-large's 38: neither divides by four. And SD3, which has no norms in attention."""
    folders, kinds = {"published": build(tmp_path / "published")}, {"batched": subject.kinds["batched"]}
    size = ParallelConfig.model_validate(cells[0]).world_size
    worst = differences(run_ranks(run_cells, size, folders, cells, nullcontext, kinds), OneProcess(folders, kinds))
    assert len(worst) == size * len(cells) and unequal(worst) == {}


def test_few_rows_and_many_columns_are_shared(checkpoints: dict[str, Path]) -> None:
    """Once for every form of attention: the smallest square, and two latent rows for three ranks."""
    forms = [name for name, subject in SUBJECTS.items() if subject.eight]
    folders = {name: checkpoints[f"{name}_{next(iter(SUBJECTS[name].variants))}"] for name in forms}
    one = {"num_frames": 1, "num_inference_steps": 2}
    kinds = {
        "smallest": Kind(requests=[request("a cat", width=64, height=64, **one)]),
        "wide": Kind(requests=[request("a cat", width=384, height=16, **one)]),
    }
    cells: list[Cell] = [{"usp": 3, "vae-pp": 3}]
    worst = differences(run_ranks(run_cells, 3, folders, cells, nullcontext, kinds), OneProcess(folders, kinds))
    assert len(worst) == 3 * len(forms) * len(kinds) and unequal(worst) == {}


@pytest.mark.parametrize("subject", SUBJECTS, indirect=True)
def test_every_fault_is_seen(
    subject: Subject, folders: dict[str, Path], expected: Expected, whole_matrix: bool
) -> None:
    name, folder = next(iter(folders.items()))
    trials = subject.faults(whole_matrix)
    assert unseen(trials, run_ranks(run_trials, 2, {name: folder}, trials, subject.kinds), expected) == {}


def test_a_fault_that_does_not_show_is_named() -> None:
    trial = Trial(fault=faults.ring_skips_a_hop, cell={"ring": 2}, kinds=frozenset({"batched"}))
    wanted = {"0": (torch.zeros(1), torch.zeros(1))}
    results = [[[("a", trial.cell, {"batched": wanted})]]]
    assert unseen([trial], results, {("a", False): {"batched": wanted}}) == {"ring_skips_a_hop": frozenset()}


def test_few_layouts_have_every_pair_of_axes() -> None:
    """Those that are tried without `--matrix`: every family in every axis and in tiles, all families in every pair."""
    every, pairs = set(QWEN_IMAGE.capabilities.axes), set()
    for subject in (subject for subject in SUBJECTS.values() if subject.family is not AnyDiffusers):
        cells = [cell for some in subject.subset.values() for cell in some]
        assert {axis for cell in cells for axis in axes(cell)} == every
        assert any("vae_use_tiling" in cell for cell in cells)
        pairs |= {pair for cell in cells for pair in combinations(sorted(axes(cell)), 2)}
    assert pairs == set(combinations(sorted(every), 2))
    whole = [cell for cells in CELLS.values() for cell in cells]
    assert pairs == {pair for cell in whole for pair in combinations(sorted(axes(cell)), 2)}


def test_every_family_is_a_subject_and_every_fault_is_tried() -> None:
    assert {subject.family for subject in SUBJECTS.values()} == {*FAMILIES, AnyDiffusers}
    kinds = {
        fault for name, fault in inspect.getmembers(faults, inspect.isfunction) if fault.__module__ == "tests.faults"
    }
    assert {trial.fault for subject in SUBJECTS.values() for trial in subject.trials} == kinds
