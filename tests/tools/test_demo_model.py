"""The making of the demo model: its data, its judge, that training computes what the pipeline does, and all of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from diffusers import QwenImagePipeline
from PIL import Image, ImageFilter
from torch import nn
from transformers import Qwen2Tokenizer

from darkroom.models.checkpoint import DEMO, Checkpoint
from tools.demo_model import making, scores
from tools.demo_model.__main__ import main
from tools.demo_model.autoencoder import decode, encode, flat, pixels
from tools.demo_model.components import TEXT_LAYERS, begin_with, make_text_encoder, make_vae, template
from tools.demo_model.denoiser import Denoiser
from tools.demo_model.examples import COLOURS, HELD_OUT, NUMBERS, Example, Kind, Thing, example
from tools.demo_model.judge import judge, pieces, rates
from tools.demo_model.latents import Prompts
from tools.demo_model.loop import Loop
from tools.demo_model.recipe import SMOKE
from tools.demo_model.shapes import SHAPES, Canvas
from tools.demo_model.tokenizer import build, check

KINDS: tuple[Kind, ...] = ("single", "count", "relation")


def some(number: int, kind: Kind | None = None, held_out: bool = False) -> Iterator[tuple[Example, Random]]:
    for i in range(number):
        random = Random(f"{kind} {held_out} {i}")
        yield example(random, kind, held_out), random


# ---- the data set --------------------------------------------------------------------------------------------------


def test_what_is_held_out_is_in_no_picture_that_is_trained_on() -> None:
    trained_on = [one for one, _ in some(3000)]
    assert not any(thing.held_out for one in trained_on for thing in one.things)
    assert not any(one.landscape.thing in HELD_OUT for one in trained_on if one.landscape)
    for kind in KINDS:
        assert all(any(thing.held_out for thing in one.things) for one, _ in some(200, kind, held_out=True))


def test_prompts_say_what_is_drawn() -> None:
    for kind in KINDS:
        for one, _ in some(200, kind, held_out=True):
            assert one.background in one.prompt
            assert all(thing.colour in one.prompt and thing.shape in one.prompt for thing in one.things)
    for one, _ in some(100, "count", held_out=True):
        assert NUMBERS[len(one.things) - 1] in one.prompt


def test_a_seed_is_a_picture() -> None:
    (one, random), (again, randomly) = next(some(1)), next(some(1))
    assert one == again
    assert one.draw(96, 128, random).tobytes() == again.draw(96, 128, randomly).tobytes()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("width", "height"), [(96, 96), (144, 192)])
def test_a_thing_is_one_piece(shape: str, width: int, height: int) -> None:
    canvas = Canvas.blank(width, height, COLOURS["white"])
    for x in (0.25, 0.75):
        canvas.draw(shape, x, 0.5, 0.3, COLOURS["black"])
    drawn = np.asarray(canvas.picture()).sum(axis=2) < 600
    assert len(list(pieces(drawn))) == 2


# ---- the judge -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "height"), [(128, 128), (96, 96), (144, 192)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_judge_agrees_with_the_pictures_of_the_data_set(kind: Kind, width: int, height: int) -> None:
    found = rates([judge(one.draw(width, height, random), one) for one, random in some(25, kind, held_out=True)])
    assert set(found.values()) == {1.0}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_judge_knows_what_has_soft_edges(shape: str) -> None:
    thing = Thing("blue", shape, 0.25, 0.5, 0.35)
    one = Example("single", "", "white", (thing,))
    blurred = one.draw(96, 96, Random(0)).filter(ImageFilter.GaussianBlur(0.8))
    assert judge(blurred, one)["everything"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_judge_sees_another_picture(kind: Kind) -> None:
    shown = [one.draw(128, 128, random) for one, random in some(25, kind, held_out=True)]
    others = [one for one, _ in some(50, kind, held_out=True)][25:]
    found = rates([judge(picture, one) for picture, one in zip(shown, others, strict=True)])
    assert found["everything"] <= 0.04 and found["background"] < 0.4 and found["shape"] < 0.5


def test_the_judge_sees_nothing_in_an_empty_picture() -> None:
    for kind in KINDS:
        [(one, _)] = some(1, kind, held_out=True)
        assert not judge(Image.new("RGB", (128, 128), COLOURS[one.background]), one)["shape"]


# ---- training computes what the pipeline computes ------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Qwen2Tokenizer:
    return Qwen2Tokenizer.from_pretrained(DEMO / "tokenizer")


def test_the_tokenizer_keeps_the_length_of_the_template(tokenizer: Qwen2Tokenizer) -> None:
    check(tokenizer)
    built = build(seed=1, prompts=1000)
    assert built.decode(built("a red star 星").input_ids) == "a red star 星"
    longer = template().replace("Describe", "Describe well")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="and the pipeline drops 34"):
        patch.setattr("tools.demo_model.tokenizer.template", lambda: longer)
        check(built)


def test_flat_convolutions_are_those_of_a_single_frame() -> None:
    vae = make_vae().eval()
    x = torch.stack([pixels(one.draw(64, 48, random)) for one, random in some(2)])
    expected = vae.encode(x).latent_dist.mode()
    with flat(vae):
        latents, _ = encode(vae, x)
        drawn = decode(vae, latents)
    torch.testing.assert_close(latents, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(drawn.clamp(-1, 1), vae.decode(expected).sample, atol=1e-5, rtol=1e-5)


def test_the_denoiser_is_what_the_pipeline_runs(tokenizer: Qwen2Tokenizer) -> None:
    pipeline = QwenImagePipeline.from_pretrained(DEMO, dtype=torch.float32)
    prompts = ["a red circle", "a tiny blue house to the left of a large green cat on a white background"]
    model = Denoiser(pipeline.text_encoder.model.language_model, pipeline.transformer)
    noisy, sigma = torch.randn(2, 12, 64), torch.tensor([0.25, 0.75])
    with torch.no_grad():
        embeddings, mask = pipeline.encode_prompt(prompts)
        expected = pipeline.transformer(
            noisy, embeddings, mask, sigma, img_shapes=[[(1, 3, 4)]] * 2, return_dict=False
        )[0]
        velocity = model(noisy, sigma, Prompts.of(prompts, tokenizer), (3, 4))
    torch.testing.assert_close(velocity, expected, atol=1e-5, rtol=1e-5)


def test_a_layer_that_is_not_there_passes_its_input_on(tokenizer: Qwen2Tokenizer, tmp_path: Path) -> None:
    small = make_text_encoder(tokenizer)
    del small.model.language_model.layers[TEXT_LAYERS - 1 :]
    small.config.text_config.num_hidden_layers = TEXT_LAYERS - 1
    small.config.text_config.layer_types = ["full_attention"] * (TEXT_LAYERS - 1)
    small.save_pretrained(tmp_path)
    large = make_text_encoder(tokenizer)
    begin_with(large, tmp_path)
    ids = torch.tensor([[1, 2, 3]])
    hidden = [model.model.language_model(input_ids=ids).last_hidden_state for model in (small, large)]
    torch.testing.assert_close(*hidden, atol=1e-6, rtol=1e-5)


# ---- all of it -----------------------------------------------------------------------------------------------------


def test_a_stopped_run_ends_as_one_that_was_not(tmp_path: Path) -> None:
    def run(folder: Path, stop: int | None = None) -> torch.Tensor:
        torch.manual_seed(0)
        module = nn.Linear(3, 1)
        folder.mkdir(exist_ok=True)
        loop = Loop("run", folder, SMOKE, module, 4, torch.optim.Adam(module.parameters(), lr=0.1))
        for step in loop.steps():
            if step == stop:
                break
            loop.learn(module(torch.full((1, 3), float(step))).square().sum())
        loop.use_average()
        return module.weight.detach()

    whole = run(tmp_path / "whole")
    stopped = run(tmp_path / "stopped", stop=3)  # what was learned since the second step is lost
    assert not torch.equal(stopped, whole)
    assert torch.equal(run(tmp_path / "stopped"), whole)


def test_one_command_makes_a_pipeline_from_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main(["train", "--smoke", "--work", str(tmp_path)])
    folder = tmp_path / "demo"
    assert Checkpoint.open(str(folder)).capabilities == Checkpoint.open("demo").capabilities
    assert str(tmp_path) not in "".join(file.read_text() for file in folder.rglob("*.json"))
    assert json.loads((folder / "tokenizer" / "tokenizer.json").read_text())["padding"] is None
    how = scores.Drawing(width=64, height=48, steps=2)
    [picture] = scores.draw(scores.load(folder), ["a red star on a blue background"], how)
    assert picture.size == (64, 48)
    page = tmp_path / "page.md"
    page.write_text("Scores\n<!-- scores -->\n\n<!-- end of scores -->\n")
    monkeypatch.setattr(scores, "SIZES", [(128, 96)])
    monkeypatch.setattr(scores, "GUIDANCES", [4.0])
    main(["judge", str(folder), "--number", "2", "--steps", "2", "--page", str(page)])
    assert "per cent of 2 pictures" in page.read_text() and "| one object | 128x96 | " in page.read_text()
    assert page.read_text().endswith("<!-- end of scores -->\n")
    main(["train", "--smoke", "--work", str(tmp_path / "again")])
    weights = [path.relative_to(folder) for path in folder.rglob("*.safetensors")]
    assert len(weights) == 3
    for path in weights:
        assert (folder / path).read_bytes() == (tmp_path / "again" / "demo" / path).read_bytes()
    other = tmp_path / "other"
    making.make(replace(SMOKE, steps=2), other, other / "demo", begin=folder)
    assert (other / "tokenizer" / "tokenizer.json").read_bytes() == (
        folder / "tokenizer" / "tokenizer.json"
    ).read_bytes()


def test_the_server_reads_the_settings_that_the_tool_writes() -> None:
    assert json.loads((DEMO / "darkroom.json").read_text()) == making.SETTINGS


def test_the_shipped_folder_is_small_and_draws_what_it_is_told() -> None:
    assert making.size_of(DEMO) <= 12_000_000
    pipeline = scores.load(DEMO)
    for kind in KINDS:
        found = rates(scores.score(pipeline, kind, 12, scores.Drawing()))
        assert found["everything"] >= 0.9, f"{kind}: {found}"
    found = rates(scores.score(pipeline, "single", 8, scores.Drawing(width=96, height=128)))
    assert found["place"] >= 0.9 and found["everything"] >= 0.85, found
