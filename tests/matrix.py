"""Every layout of ranks against one process, for any family: the cells, running them, and how far they are off."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from darkroom.configs import ConfigError, EngineConfig, ParallelConfig, Request
from darkroom.configs.capabilities import Capabilities
from darkroom.engine.worker import Worker
from darkroom.models.checkpoint import open_checkpoint
from tests.golden import TOLERANCE, Outputs, decode_noise, difference, generate, request, worker

Cell = dict[str, Any]
Fault = Callable[[], AbstractContextManager[None]]
"""Breaks something while it is entered. Travels to the ranks by its name, so it stands at a module's top level."""

CELLS: dict[int, list[Cell]] = {
    2: [
        {"usp": 2},
        {"ring": 2, "vae-pp": 2},
        {"tp": 2},
        {"cfg": 2, "vae-pp": 2},
        {"cfg": 2, "vae-pp": 2, "vae_use_tiling": True},
        {"tp": 2, "vae-pp": 2},
        {"usp": 2, "vae-pp": 2, "vae_use_tiling": True},
    ],
    3: [{"usp": 3, "vae-pp": 3}, {"ring": 3}, {"tp": 3}],
    4: [
        {"usp": 4, "vae-pp": 4},
        {"ring": 4, "vae-pp": 4},
        {"tp": 4, "vae-pp": 4},
        {"usp": 2, "ring": 2, "vae-pp": 4},
        {"usp": 2, "tp": 2, "vae-pp": 3},
        {"ring": 2, "tp": 2, "vae-pp": 2},
        {"cfg": 2, "usp": 2},
        {"cfg": 2, "ring": 2, "vae-pp": 2, "vae_use_tiling": True},
        {"cfg": 2, "tp": 2, "vae-pp": 4, "vae_use_tiling": True},
    ],
}
"""Layouts by world size: every axis, and every product of two, with the VAE on all, some and one of the ranks."""

EIGHT: list[Cell] = [{"usp": 8}, {"ring": 8}, {"usp": 2, "ring": 2, "tp": 2}, {"cfg": 2, "usp": 2, "tp": 2}]
"""On 8 ranks, for one family of each form of attention: the two that need as many heads or chunks, and all axes."""

PAIRWISE: dict[int, list[Cell]] = {
    2: [
        {"usp": 2, "vae-pp": 2, "vae_use_tiling": True},
        {"ring": 2, "vae-pp": 2},
        {"tp": 2, "vae-pp": 2},
        {"cfg": 2},
    ],
    4: [
        {"usp": 2, "ring": 2, "vae-pp": 4},
        {"usp": 2, "tp": 2, "vae-pp": 3},
        {"cfg": 2, "ring": 2},
    ],
}
"""What the first family is tried in, unless pytest is given `--matrix`: each in one of the checkpoints."""

_TILES: Cell = {"vae-pp": 2, "vae_use_tiling": True}
FEW: list[dict[int, list[Cell]]] = [
    {2: [{"tp": 2, "vae-pp": 2}, {"usp": 2, **_TILES}], 4: [{"cfg": 2, "ring": 2}]},
    {2: [{"cfg": 2, "vae-pp": 2}, {"usp": 2, **_TILES}], 4: [{"ring": 2, "tp": 2, "vae-pp": 2}]},
    {2: [{"tp": 2, "vae-pp": 2}, {"ring": 2, **_TILES}], 4: [{"cfg": 2, "usp": 2}]},
    {2: [{"ring": 2, "vae-pp": 2}, {"usp": 2, **_TILES}], 4: [{"cfg": 2, "tp": 2}]},
]
"""What another family is tried in, one of these: each has every axis and tiles, and all have every pair of axes."""

PAIR = [
    request("a cat on the left", seed=3),  # uneven: 35 image tokens, and text lengths that no degree divides
    request("three tiny yellow stars and a very large orange house", seed=4),
]
ONE_BRANCH = [request("a red heart", guidance_scale=0.0, seed=5)]
LARGE = [request("a blue moon", width=320, height=272, num_inference_steps=2, seed=6)]
"""More than one tile."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Requests that are made together, and how."""

    requests: Sequence[Request]
    batched: bool = False
    """Steps share forward passes; else they take turns."""
    tiled: bool = False
    """Too large for one tile: made where the decode is tiled, and nowhere else."""


Kinds = Mapping[str, Kind]
"""What every layout is asked for, by name."""

TEXT_TO_IMAGE: Kinds = {
    "interleaved": Kind(requests=PAIR),
    "batched": Kind(requests=PAIR, batched=True),
    "one branch": Kind(requests=ONE_BRANCH),
    "large": Kind(requests=LARGE, tiled=True),
}

TILES = "tiles of "
"""Before the name of a tiled kind: its noise decoded as it is. The same latents everywhere, so that ranks must agree
with one process bit for bit."""


def every_kind(worker: Worker, tiled: bool, kinds: Kinds = TEXT_TO_IMAGE) -> dict[str, Outputs]:
    """What a worker gives for each kind of requests."""
    outputs = {}
    for name, kind in kinds.items():
        if tiled or not kind.tiled:
            outputs[name] = generate(worker, kind.requests, batched=kind.batched)
        if kind.tiled and tiled:
            outputs[TILES + name] = decode_noise(worker, kind.requests)
    return outputs


Expected = Mapping[tuple[str, bool], dict[str, Outputs]]
"""What one process gives, by checkpoint and whether its decode is tiled."""


class OneProcess(dict[tuple[str, bool], dict[str, Outputs]]):
    """What it gives is made when it is first asked for: a subset of the layouts needs less than half of it."""

    def __init__(self, folders: dict[str, Path], kinds: Kinds = TEXT_TO_IMAGE) -> None:
        super().__init__()
        self._folders, self._kinds = folders, kinds

    def __missing__(self, place: tuple[str, bool]) -> dict[str, Outputs]:
        name, tiled = place
        with worker(self._folders[name], ParallelConfig(vae_use_tiling=tiled)) as one:
            self[place] = every_kind(one, tiled, self._kinds)
        return self[place]


Results = list[tuple[str, Cell, dict[str, Outputs]]]
"""What one rank gives: (checkpoint, cell, outputs by kind)."""


def run_cells(
    rank: int,
    size: int,
    folders: dict[str, Path],
    cells: list[Cell],
    fault: Fault = nullcontext,
    kinds: Kinds = TEXT_TO_IMAGE,
) -> Results:
    """What this rank gives in every cell, for every checkpoint. For `run_ranks`."""
    results = []
    with fault():
        for name, folder in folders.items():
            for cell in cells:
                config = ParallelConfig.model_validate(cell)
                with worker(folder, config, rank) as one:
                    results.append((name, cell, every_kind(one, config.vae_use_tiling, kinds)))
    return results


Differences = dict[tuple[int, str, str, str], float]
"""The largest difference by rank, checkpoint, cell and kind."""


def differences(results: list[Results], expected: Expected) -> Differences:
    """Of all ranks. Pictures are compared on the output rank."""
    worst = {}
    for rank, cells in enumerate(results):
        for name, cell, kinds in cells:
            for kind, outputs in kinds.items():
                wanted = expected[name, cell.get("vae_use_tiling", False)][kind]
                if rank > 0:
                    assert all(picture is None for _, picture in outputs.values())
                    outputs = {id: (latents, wanted[id][1]) for id, (latents, _) in outputs.items()}
                worst[rank, name, str(cell), kind] = difference(outputs, wanted)
    return worst


def allowed(kind: str) -> float:
    """How far ranks may be from one process."""
    return 0.0 if kind.startswith(TILES) else TOLERANCE


def unequal(worst: Differences) -> Differences:
    """What is further off than is allowed."""
    return {place: value for place, value in worst.items() if not value <= allowed(place[3])}


def axes(cell: Cell) -> list[str]:
    """Those that a cell spreads a model over."""
    config = ParallelConfig.model_validate(cell)
    degrees = {**config.axes, "vae": config.vae_patch_parallel_size}
    return [axis for axis, degree in degrees.items() if degree > 1]


def lacks(cell: Cell, capabilities: Capabilities) -> list[str]:
    """The axes of a cell that a model has no plan for. Where there are some, the model must refuse the layout."""
    return [axis for axis in axes(cell) if axis not in capabilities.axes]


def refusal(cell: Cell, folder: Path) -> str | None:
    """Why a checkpoint does not start in a layout."""
    try:
        open_checkpoint(EngineConfig.model_validate({"model": str(folder), "device": "cpu", **cell}))
    except ConfigError as e:
        return str(e)
    return None


EVEN_HEADS = "its class needs as many on every rank"
"""In the one refusal that is no failure: of a model that no family is written for."""


def startable(cells: Iterable[Cell], folder: Path, capabilities: Capabilities) -> list[Cell]:
    """The cells that a checkpoint starts in. The others it must refuse, for want of a plan or of even heads."""
    found = []
    for cell in cells:
        why, missing = refusal(cell, folder), lacks(cell, capabilities)
        if why is None and not missing:
            found.append(cell)
            continue
        expected = f"has no plan for {missing[0]} parallelism" if missing else EVEN_HEADS
        assert why and expected in why, f"{cell}: {why or 'it starts'}, and not: {expected}"
    return found


# ---- deliberate faults -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A fault, and where it must show: in which layout, and in which kinds of requests at least."""

    fault: Fault
    cell: Cell
    kinds: frozenset[str]

    def needed(self, kinds: Kinds) -> Kinds:
        """What must be made for it to show."""
        return {name: kind for name, kind in kinds.items() if {name, TILES + name} & self.kinds}


def run_trials(rank: int, size: int, folders: dict[str, Path], trials: list[Trial], kinds: Kinds) -> list[Results]:
    """What this rank gives under each fault. For `run_ranks`."""
    return [run_cells(rank, size, folders, [trial.cell], trial.fault, trial.needed(kinds)) for trial in trials]


def seen(worst: Differences) -> frozenset[str]:
    """The kinds in which a fault shows: ten times further off than is allowed."""
    return frozenset(kind for (*_, kind), value in worst.items() if not value <= 10 * allowed(kind))


def unseen(trials: Iterable[Trial], results: list[list[Results]], expected: Expected) -> dict[str, frozenset[str]]:
    """The faults that do not show where they should, and where they show instead."""
    shown = {
        trial.fault.__name__: (seen(differences(list(ranks), expected)), trial.kinds)
        for trial, *ranks in zip(trials, *results, strict=True)
    }
    return {name: kinds for name, (kinds, wanted) in shown.items() if not wanted <= kinds}
