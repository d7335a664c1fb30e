"""What a trained folder scores: pictures of held-out combinations, drawn by the stock pipeline and judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from time import process_time

import torch
from diffusers import QwenImagePipeline
from PIL import Image

from tools.demo_model.autoencoder import signal_to_noise
from tools.demo_model.examples import Example, Kind, example
from tools.demo_model.judge import Score, colour_of, judge, rates
from tools.demo_model.making import SETTINGS, size_of
from tools.demo_model.recipe import Recipe

KINDS: tuple[Kind, ...] = ("single", "count", "relation")
SIZES = ((128, 128), (96, 96), (192, 192), (96, 128), (128, 96))
GUIDANCES = (1.0, 1.5, 2.5, 4.0, 6.0)
PLAIN_SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "cross", "hexagon")
"""of one colour"""

BATCH = 16


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn."""

    width: int = 128
    height: int = 128
    steps: int = 12
    guidance: float = SETTINGS["guidance_scale"]


def load(folder: Path, dtype: torch.dtype = torch.float32) -> QwenImagePipeline:
    pipeline = QwenImagePipeline.from_pretrained(folder, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(
    pipeline: QwenImagePipeline, prompts: Sequence[str], how: Drawing, negatives: Sequence[str] | None = None
) -> list[Image.Image]:
    """The picture of number i has the seed i."""
    pictures: list[Image.Image] = []
    for start in range(0, len(prompts), BATCH):
        batch = slice(start, start + BATCH)
        here = list(prompts[batch])
        pictures += pipeline(
            prompt=here,
            negative_prompt=list(negatives[batch]) if negatives else [" "] * len(here),
            true_cfg_scale=how.guidance,
            width=how.width,
            height=how.height,
            num_inference_steps=how.steps,
            generator=[torch.Generator().manual_seed(start + i) for i in range(len(here))],
        ).images
    return pictures


def held_out(kind: Kind, number: int) -> list[Example]:
    return [example(Random(f"held out {kind} {i}"), kind, held_out=True) for i in range(number)]


def score(pipeline: QwenImagePipeline, kind: Kind, number: int, how: Drawing) -> list[Score]:
    examples = held_out(kind, number)
    pictures = draw(pipeline, [one.prompt for one in examples], how)
    return [judge(picture, one) for picture, one in zip(pictures, examples, strict=True)]


def avoided(pipeline: QwenImagePipeline, number: int, how: Drawing) -> float:
    """Of things whose colour the prompt leaves open: the share that keeps its colour when drawn again, from the same
    noise, with a negative prompt that names it."""
    random = Random("avoided")
    shapes = [random.choice(PLAIN_SHAPES) for _ in range(number)]
    prompts = [f"a {shape} on a white background" for shape in shapes]
    before = [colour_of(picture) for picture in draw(pipeline, prompts, how)]
    negatives = [f"a {colour} {shape}" for colour, shape in zip(before, shapes, strict=True)]
    after = [colour_of(picture) for picture in draw(pipeline, prompts, how, negatives)]
    return sum(a == b for a, b in zip(before, after, strict=True)) / number


def seconds(folder: Path, steps: int = 12, rounds: int = 5) -> float:
    """The median time that one core works on a picture of 128 x 128 with guidance."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pipeline = load(folder)
    times = []
    for _ in range(rounds + 1):
        began = process_time()
        draw(pipeline, ["a red star on a blue background"], Drawing(steps=steps))
        times.append(process_time() - began)
    torch.set_num_threads(threads)
    return sorted(times[1:])[rounds // 2]


QUESTIONS = ("background", "colour", "place", "shape", "size", "count", "everything")
NAMES = {"single": "one object", "count": "one to five of a thing", "relation": "two objects with a relation"}


def report(folder: Path, number: int, how: Drawing) -> str:
    """All scores of a folder, as Markdown; each row is of `number` pictures."""
    pipeline = load(folder)
    lines = [
        f"Held-out combinations, {how.steps} steps, `true_cfg_scale` {how.guidance:g}; per cent of {number} pictures.",
        "",
        f"| | size | {' | '.join(QUESTIONS)} |",
        f"|---|---|{'---|' * len(QUESTIONS)}",
    ]
    for width, height in SIZES:
        for kind in KINDS:
            found = rates(score(pipeline, kind, number, replace(how, width=width, height=height)))
            cells = [f"{100 * found[question]:.1f}" if question in found else "" for question in QUESTIONS]
            lines.append(f"| {NAMES[kind]} | {width}x{height} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    lines += ["", "| `true_cfg_scale`, two objects at 96x96 | everything |", "|---|---|"]
    for guidance in GUIDANCES:
        found = rates(score(pipeline, "relation", number, replace(how, width=96, height=96, guidance=guidance)))
        lines.append(f"| {guidance:g} | {100 * found['everything']:.1f} |")
        print(lines[-1], flush=True)
    kept = avoided(pipeline, number, how)
    ratio = signal_to_noise(pipeline.vae, Recipe(measured=min(number, 256)))
    lines += [
        "",
        f"* Things of a colour that no prompt asked for: {100 * kept:.1f} % keep it when a negative one names it.",
        f"* Peak signal-to-noise ratio of the VAE on the data set: {ratio:.1f} dB.",
        f"* A picture of 128x128 in 12 steps, guidance included, on one core: {seconds(folder):.2f} s.",
        f"* The folder: {size_of(folder) / 1e6:.2f} MB.",
    ]
    return "\n".join(lines)
