"""Pipelines that no family is written for: one process is the stock call, and every layout of ranks is one process."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from diffusers import AuraFlowPipeline, Flux2KleinPipeline, FluxPipeline, PixArtSigmaPipeline, SanaPipeline

from darkroom.configs import ConfigError, EngineConfig, ParallelConfig, Request, RequestError, SamplingParams
from darkroom.configs.pictures import load_picture
from darkroom.engine.messages import Decode, Drop, Prepare, Step
from darkroom.models.any_diffusers import AnyDiffusers
from darkroom.models.checkpoint import Checkpoint, open_checkpoint
from darkroom.offline import Darkroom
from darkroom.parallel import guidance
from darkroom.server.fields import GenerationRequest
from darkroom.server.uploads import Pictures
from tests import faults, tiny
from tests.golden import TOLERANCE, difference, generate, picture_file, request, stock_pipeline, worker
from tests.matrix import TEXT_TO_IMAGE, Cell, Expected, Fault, differences, one_process, run_cells
from tests.ranks import RankError, run_ranks

STOCK = {
    "flux": FluxPipeline,
    "flux2_klein": Flux2KleinPipeline,
    "aura_flow": AuraFlowPipeline,
    "pixart_sigma": PixArtSigmaPipeline,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("any")
    return {name: getattr(tiny, name)(root / name) for name in STOCK}


def run_stock(pipe: Any, request: Request, output_type: str) -> Any:
    values: dict[str, Any] = {"guidance_scale": request.guidance_scale, "negative_prompt": request.negative_prompt}
    if isinstance(pipe, FluxPipeline):
        values["true_cfg_scale"] = values.pop("guidance_scale")
        if request.embedded_guidance is not None:
            values["guidance_scale"] = request.embedded_guidance
    if isinstance(pipe, Flux2KleinPipeline):
        del values["negative_prompt"]
        values["image"] = [load_picture(image).convert("RGB") for image in request.images] or None
    return pipe(
        prompt=request.prompt,
        width=request.width,
        height=request.height,
        num_inference_steps=request.num_inference_steps,
        max_sequence_length=request.max_sequence_length,
        generator=torch.Generator("cpu").manual_seed(request.seed),
        output_type=output_type,
        **values,
    ).images


REQUESTS = {
    "square": request("a green star", width=128, height=128, seed=7),
    "negative prompt": request("a house", negative_prompt="red, blurry", guidance_scale=2.5, num_inference_steps=4),
    "no guidance": request("a cat", guidance_scale=1.0, num_inference_steps=1, max_sequence_length=32),
}


@pytest.mark.parametrize("name", STOCK)
def test_one_process_is_the_stock_pipeline(name: str, folders: dict[str, Path]) -> None:
    stock = stock_pipeline(STOCK[name], folders[name])
    with worker(folders[name], ParallelConfig()) as one:
        for wanted in REQUESTS.values():
            [(_, decoded)] = generate(one, [wanted]).values()
            assert decoded is not None
            [picture] = one.model.pictures(decoded)
            assert torch.equal(decoded, run_stock(stock, wanted, "pt"))
            assert np.array_equal(np.asarray(picture), np.asarray(run_stock(stock, wanted, "pil")[0]))
        assert calls_in_flight() == []


def test_guidance_as_an_input_is_told_from_the_other_kind(folders: dict[str, Path]) -> None:
    params = SamplingParams(width=64, height=64, num_inference_steps=2, seed=0, max_sequence_length=32)
    stock = stock_pipeline(FluxPipeline, folders["flux"])
    pictures = []
    with worker(folders["flux"], ParallelConfig()) as one:
        for values in ({}, {"guidance_scale": 9.0}, {"guidance_scale": 9.0, "true_cfg_scale": 2.0}):
            wanted = one.model.capabilities.resolve("a cat", replace(params, **values))
            pictures.append(generate(one, [wanted])["0"][1])
            assert torch.equal(pictures[-1], run_stock(stock, wanted, "pt"))
    assert not any(torch.equal(a, b) for a, b in combinations(pictures, 2))


EDIT = request("a cat in blue", task="edit", images=(picture_file(80, 96),), num_inference_steps=2)
"""Its condition is encoded by the VAE, and attended to behind the picture's own tokens."""


def test_a_picture_is_edited(folders: dict[str, Path]) -> None:
    with worker(folders["flux2_klein"], ParallelConfig()) as one:
        edited = generate(one, [EDIT])["0"][1]
    stock = stock_pipeline(Flux2KleinPipeline, folders["flux2_klein"])
    assert edited is not None and torch.equal(edited, run_stock(stock, EDIT, "pt"))


@pytest.mark.matrix
def test_a_picture_is_edited_on_ranks(folders: dict[str, Path]) -> None:
    with worker(folders["flux2_klein"], ParallelConfig()) as one:
        wanted = generate(one, [EDIT])
    for cell in ({"cfg": 2, "vae-pp": 2}, {"usp": 2}):
        outputs = run_ranks(one_request, 2, folders["flux2_klein"], cell, EDIT)
        assert difference(outputs[0], wanted) <= TOLERANCE
        assert outputs[1]["0"][1] is None
        assert float((outputs[1]["0"][0] - wanted["0"][0]).abs().max()) <= TOLERANCE


def one_request(rank: int, size: int, folder: Path, cell: Cell, wanted: Request) -> Any:
    with worker(folder, ParallelConfig.model_validate(cell), rank) as one:
        return generate(one, [wanted])


def calls_in_flight() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "call"]


@pytest.mark.parametrize("name", STOCK)
def test_interleaved_is_one_by_one(name: str, folders: dict[str, Path]) -> None:
    requests = [request("a cat", guidance_scale=4.0), request("a dog", seed=1, guidance_scale=1.0, width=64)]
    requests += [request("two blue stars", seed=2, guidance_scale=2.0, num_inference_steps=5)]
    with worker(folders[name], ParallelConfig()) as one:
        together = generate(one, requests)
        alone = {str(i): generate(one, [each])["0"] for i, each in enumerate(requests)}
    assert difference(together, alone) == 0


def test_a_dropped_call_leaves_nothing(folders: dict[str, Path]) -> None:
    with worker(folders["flux"], ParallelConfig()) as one:
        one.execute(Prepare(ids=("a", "b"), requests=(request(), request("a dog", seed=3))))
        one.execute(Step(ids=("a",)))
        one.execute(Step(ids=("b",)))
        assert len(calls_in_flight()) == 2
        one.execute(Drop(ids=("a",)))
        assert len(calls_in_flight()) == 1 and list(one.samples) == ["b"]
        one.execute(Step(ids=("b",)))
        one.execute(Step(ids=("b",)))
        rest = one.decode(Decode(ids=("b",)))
        one.execute(Drop(ids=("b",)))
        assert calls_in_flight() == [] and one.samples == {}
        assert rest is not None and torch.equal(rest, generate(one, [request("a dog", seed=3)])["0"][1])


def test_errors_inside_the_call_are_the_commands(folders: dict[str, Path]) -> None:
    with worker(folders["flux"], ParallelConfig()) as one:
        with pytest.raises(ValueError, match="max_sequence_length"):
            one.execute(Prepare(ids=("a",), requests=(request(max_sequence_length=5000),)))
        one.execute(Prepare(ids=("b", "c"), requests=(request(), request(seed=1))))
        with (
            patch.object(one.model.pipe.transformer, "forward", side_effect=MemoryError("no room")),
            pytest.raises(MemoryError, match="no room"),
        ):
            one.execute(Step(ids=("b",)))
        one.execute(Drop(ids=("b",)))
        one.execute(Step(ids=("c",)))  # the other goes on
        one.execute(Drop(ids=("c",)))
    assert calls_in_flight() == []


KINDS = {**TEXT_TO_IMAGE, "large": replace(TEXT_TO_IMAGE["large"], decodes_noise=False)}
"""A stock pipeline decodes at the end of its call only."""

# ---- layouts ---------------------------------------------------------------------------------------------------------

LAYOUTS: dict[str, dict[int, list[Cell]]] = {
    "flux": {
        2: [{"cfg": 2}, {"usp": 2, "vae-pp": 2, "vae_use_tiling": True}, {"ring": 2}, {"tp": 2, "vae-pp": 2}],
        4: [{"cfg": 2, "usp": 2, "vae-pp": 3}, {"usp": 2, "ring": 2}, {"cfg": 2, "tp": 2}],
    },
    "flux2_klein": {
        2: [{"cfg": 2, "vae-pp": 2}, {"usp": 2}, {"ring": 2, "vae-pp": 2, "vae_use_tiling": True}, {"tp": 2}],
        4: [{"cfg": 2, "ring": 2, "vae-pp": 4}, {"usp": 2, "tp": 2}, {"tp": 4}],
    },
    "aura_flow": {2: [{"cfg": 2, "vae-pp": 2}]},
    "pixart_sigma": {2: [{"cfg": 2, "vae-pp": 2}]},
}


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> Expected:
    return one_process(folders, KINDS)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        pytest.param(name, size, marks=() if name == "aura_flow" else pytest.mark.matrix)
        for name, sizes in LAYOUTS.items()
        for size in sizes
    ],
)
def test_every_layout_is_one_process(name: str, size: int, folders: dict[str, Path], expected: Expected) -> None:
    cells = LAYOUTS[name][size]
    worst = differences(run_ranks(run_cells, size, {name: folders[name]}, cells, nullcontext, KINDS), expected)
    assert len(worst) >= size * len(cells) * 3
    assert {cell: value for cell, value in worst.items() if value > TOLERANCE} == {}


@pytest.mark.matrix
def test_calls_are_all_finished_on_every_rank(folders: dict[str, Path]) -> None:
    assert run_ranks(count_calls, 3, folders["flux2_klein"]) == [0, 0, 0]


def count_calls(rank: int, size: int, folder: Path) -> int:
    with worker(folder, ParallelConfig.model_validate({"usp": 3, "vae-pp": 2}), rank) as one:
        one.execute(Prepare(ids=("a", "b"), requests=(request(), request(seed=1, num_inference_steps=1))))
        one.execute(Step(ids=("b",)))
        one.decode(Decode(ids=("b",)))
        one.execute(Drop(ids=("a", "b")))
        return len(calls_in_flight())


# ---- faults ----------------------------------------------------------------------------------------------------------


@contextmanager
def branches_are_not_exchanged() -> Iterator[None]:
    def forget(self: guidance.BranchCalls) -> None:
        self._calls.clear()

    with patch.object(guidance.BranchCalls, "_exchange", forget):
        yield


@contextmanager
def rows_are_swapped() -> Iterator[None]:
    inner = guidance.BranchCalls._both

    def swapped(self: guidance.BranchCalls, latents: Any, args: Any, kwargs: Any) -> Any:
        return guidance._map(inner(self, latents, args, kwargs), lambda x: x.flip(0))

    with patch.object(guidance.BranchCalls, "_both", swapped):
        yield


GUIDED = {"interleaved", "batched"}
EVERY = {*GUIDED, "one branch"}


@pytest.mark.parametrize(
    ("name", "fault", "cell", "kinds"),
    [
        ("aura_flow", rows_are_swapped, {"cfg": 2}, GUIDED),
        ("flux", faults.ring_skips_a_hop, {"ring": 2}, EVERY),
        *(
            pytest.param(name, fault, cell, EVERY, marks=pytest.mark.matrix)
            for name, fault, cell in (
                ("flux", faults.parts_are_cut_as_one, {"tp": 2}),
                ("flux2_klein", faults.parts_are_cut_as_one, {"tp": 2}),
                ("flux2_klein", faults.partial_sums_are_not_reduced, {"tp": 2}),
                ("flux2_klein", faults.heads_come_back_in_another_order, {"usp": 2}),
            )
        ),
    ],
)
def test_a_fault_is_seen(
    name: str, fault: Fault, cell: Cell, kinds: set[str], folders: dict[str, Path], expected: Expected
) -> None:
    worst = differences(run_ranks(run_cells, 2, {name: folders[name]}, [cell], fault, KINDS), expected)
    assert {kind for (*_, kind), value in worst.items() if value > 10 * TOLERANCE} == kinds


@pytest.mark.parametrize("name", ["flux", "flux2_klein"])
def test_a_placeholder_that_is_not_filled_is_told(name: str, folders: dict[str, Path]) -> None:
    with pytest.raises(RankError, match="used a guidance branch before it asked for the other"):
        run_ranks(run_cells, 2, {name: folders[name]}, [{"cfg": 2}], branches_are_not_exchanged, KINDS)


# ---- at the start ----------------------------------------------------------------------------------------------------


def refusal(folder: Path, **values: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        open_checkpoint(EngineConfig.model_validate({"model": str(folder), "device": "cpu", **values}))
    return str(caught.value)


def test_what_cannot_be_spread_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    distilled = tiny.flux2_klein(tmp_path / "distilled", is_distilled=True)
    assert (
        "one prediction a step" in (message := refusal(distilled, cfg=2)) and "use --usp or --ring or --tp" in message
    )
    assert "the transformer has 4 heads" in refusal(folders["flux"], tp=3)
    assert "has no plan for ulysses parallelism; it has: cfg, vae" in refusal(folders["aura_flow"], usp=2)
    assert "tp parallelism" in refusal(folders["aura_flow"], tp=2)


def test_a_vae_without_a_plan_decodes_on_one_rank(tmp_path: Path) -> None:
    folder = tiny.sana(tmp_path / "sana")
    assert "has no plan for vae parallelism; it has: cfg" in refusal(folder, cfg=2, **{"vae-pp": 2})
    with (
        pytest.raises(ConfigError, match="the tiles of AutoencoderDC are not known"),
        worker(folder, ParallelConfig(vae_use_tiling=True)),
    ):
        pass
    wanted = request("a cat", width=128, height=96, num_inference_steps=2)
    with worker(folder, ParallelConfig()) as one:
        whole = generate(one, [wanted])
    picture = whole["0"][1]
    assert picture is not None and torch.equal(picture, run_stock(stock_pipeline(SanaPipeline, folder), wanted, "pt"))
    outputs = run_ranks(one_request, 2, folder, {"cfg": 2}, wanted)
    assert difference(outputs[0], whole) <= TOLERANCE and outputs[1]["0"][1] is None


def renamed(folder: Path, to: Path, name: str, **values: Any) -> Path:
    shutil.copytree(folder, to)
    index = json.loads((to / "model_index.json").read_text())
    (to / "model_index.json").write_text(json.dumps({**index, "_class_name": name, **values}))
    return to


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("NoPipeline", "is no pipeline of diffusers"),
        ("StableDiffusionPipeline", "it has no transformer"),
        ("DiTPipeline", "its call takes no prompt and no height and no width"),
        ("LTXPipeline", "it makes videos"),
    ],
)
def test_what_cannot_run_is_refused(name: str, reason: str, folders: dict[str, Path], tmp_path: Path) -> None:
    assert reason in refusal(renamed(folders["flux"], tmp_path / "x", name))


def test_foreign_code_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = renamed(folders["flux"], tmp_path / "x", "FluxPipeline", vae=["pipeline_mine", "MyVae"])
    assert "takes 'vae' from pipeline_mine" in refusal(folder)


def test_capabilities_are_the_pipelines_own(folders: dict[str, Path], tmp_path: Path) -> None:
    klein = Checkpoint.open(str(folders["flux2_klein"])).capabilities
    assert klein.tasks == ("text-to-image", "edit") and klein.max_images == 1
    assert (klein.size_multiple, klein.default_size, klein.guidance_scale) == (16, (1024, 1024), 4.0)
    with pytest.raises(RequestError, match="takes no negative prompt"):
        klein.resolve("a cat", SamplingParams(negative_prompt="red"))
    aura = Checkpoint.open(str(folders["aura_flow"])).capabilities
    assert (aura.num_inference_steps, aura.guidance_scale, aura.text_window) == (50, 3.5, 256)
    own = renamed(folders["flux"], tmp_path / "own", "FluxPipeline")
    (own / "darkroom.json").write_text(json.dumps({"num_inference_steps": 4, "default_size": [64, 48]}))
    flux = Checkpoint.open(str(own)).capabilities
    assert (flux.num_inference_steps, flux.default_size, flux.guidance_scale) == (4, (64, 48), 1.0)
    assert issubclass(Checkpoint.open(str(own)).family, AnyDiffusers)


def test_what_shows_no_previews_is_not_asked_for_them(folders: dict[str, Path]) -> None:
    capabilities = Checkpoint.open(str(folders["aura_flow"])).capabilities
    with pytest.raises(RequestError, match="AuraFlowPipeline shows no previews"):
        GenerationRequest.read({"prompt": "a cat", "stream": True, "partial_images": 1}).resolve(
            capabilities, Pictures()
        )
    with worker(folders["aura_flow"], ParallelConfig()) as one:
        one.execute(Prepare(ids=("a",), requests=(request(),)))
        with pytest.raises(RuntimeError, match="there are no previews"):
            one.decode(Decode(ids=("a",), preview=0))
        one.execute(Drop(ids=("a",)))


def test_what_is_derived_needs_no_torch(folders: dict[str, Path]) -> None:
    code = (
        "import sys; from darkroom.models.checkpoint import Checkpoint; "
        f"Checkpoint.open({str(folders['flux'])!r}); print(sorted({{'torch', 'diffusers'}} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_whole_engine_runs_one(folders: dict[str, Path]) -> None:
    params = SamplingParams(width=64, height=48, num_inference_steps=2, seed=3, guidance_scale=2.0)
    with Darkroom(str(folders["flux2_klein"]), device="cpu", dtype="float32") as darkroom:
        [picture] = darkroom.generate("a cat", params)
    wanted = request("a cat", width=64, height=48, num_inference_steps=2, seed=3, guidance_scale=2.0)
    wanted = Request(**{**{f: getattr(wanted, f) for f in wanted.__struct_fields__}, "max_sequence_length": 512})
    stock = stock_pipeline(Flux2KleinPipeline, folders["flux2_klein"])
    assert np.array_equal(np.asarray(picture), np.asarray(run_stock(stock, wanted, "pil")[0]))
