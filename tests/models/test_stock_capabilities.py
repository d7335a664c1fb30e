"""What is read of a pipeline's capabilities, from its source and a checkpoint's configs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from darkroom.configs import RequestError, SamplingParams
from darkroom.models.any_diffusers import AnyDiffusers
from darkroom.models.checkpoint import Checkpoint
from tests import tiny
from tests.golden import picture_file
from tests.matrix import refusal


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("stock")
    return {name: getattr(tiny, name)(root / name) for name in ("flux", "flux2_klein", "aura_flow")}


def test_capabilities_are_the_pipelines_own(folders: dict[str, Path], tmp_path: Path) -> None:
    klein = Checkpoint.open(str(folders["flux2_klein"])).capabilities
    assert klein.tasks == ("text-to-image", "edit") and klein.max_images == 1
    assert (klein.size_multiple, klein.default_size, klein.guidance_scale) == (16, (1024, 1024), 4.0)
    with pytest.raises(RequestError, match="takes no negative prompt"):
        klein.resolve("a cat", SamplingParams(negative_prompt="red"))
    aura = Checkpoint.open(str(folders["aura_flow"])).capabilities
    assert (aura.num_inference_steps, aura.guidance_scale, aura.text_window) == (50, 3.5, 256)
    assert (klein.max_edge, aura.max_edge) == (None, 32 * 16)  # AuraFlow's table has 1024 positions
    assert (klein.min_image_edge, klein.max_aspect_ratio) == (64, 8)
    own = tiny.renamed(folders["flux"], tmp_path / "own", "FluxPipeline")
    (own / "darkroom.json").write_text(json.dumps({"num_inference_steps": 4, "default_size": [64, 48]}))
    flux = Checkpoint.open(str(own)).capabilities
    assert (flux.num_inference_steps, flux.default_size, flux.guidance_scale) == (4, (64, 48), 1.0)
    assert issubclass(Checkpoint.open(str(own)).family, AnyDiffusers)


def test_steps_that_are_fixed_are_the_only_ones(folders: dict[str, Path], tmp_path: Path) -> None:
    sprint = Checkpoint.open(str(tiny.renamed(folders["flux"], tmp_path / "x", "SanaSprintPipeline"))).capabilities
    params = [SamplingParams(), SamplingParams(quality="low"), SamplingParams(num_inference_steps=2)]
    assert [sprint.resolve("a cat", each).num_inference_steps for each in params] == [2, 2, 2]
    for steps in (1, 3):
        with pytest.raises(RequestError, match="Invalid num_inference_steps"):
            sprint.resolve("a cat", SamplingParams(num_inference_steps=steps))


@pytest.mark.parametrize(("name", "places"), [("CogView3Plus", 6), ("CogView4", None)])
def test_an_edge_is_bounded_by_a_table_and_not_by_a_number_in_the_config(
    folders: dict[str, Path], tmp_path: Path, name: str, places: int | None
) -> None:
    folder = tiny.renamed(folders["flux"], tmp_path / name, f"{name}Pipeline")
    config = folder / "transformer" / "config.json"
    more = {"_class_name": f"{name}Transformer2DModel", "pos_embed_max_size": 6, "patch_size": 2}
    config.write_text(json.dumps({**json.loads(config.read_text()), **more}))
    found = Checkpoint.open(str(folder)).capabilities
    assert found.max_edge == (places and places * found.size_multiple)


def test_a_picture_alone_does_not_do_where_a_part_is_drawn_over(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tiny.renamed(folders["flux"], tmp_path / "x", "FluxInpaintPipeline")
    params = SamplingParams(images=(picture_file(64, 64),))
    with pytest.raises(RequestError, match="it needs a 'mask' too"):
        Checkpoint.open(str(folder)).capabilities.resolve("a cat", params)


def test_what_cannot_be_spread_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    distilled = tiny.flux2_klein(tmp_path / "distilled", is_distilled=True)
    assert (
        "one prediction a step" in (message := refusal({"cfg": 2}, distilled))
        and "use --usp or --ring or --tp" in message
    )
    assert "the transformer has 4 heads" in refusal({"tp": 3}, folders["flux"])
    assert "has no plan for ulysses parallelism; it has: cfg, vae" in refusal({"usp": 2}, folders["aura_flow"])
    assert "tp parallelism" in refusal({"tp": 2}, folders["aura_flow"])
