"""One CUDA GPU, no network: Darkroom against the stock pipeline at real shapes, and against the card's own ceiling.

`python -m bench.gpu --output figures.json`, under 8 minutes; `--golden` runs the golden tests on the GPU too; `--smoke`
runs every line with tiny shapes in seconds, on a CPU where there is no GPU. Needs 80 GB of GPU memory.

Weights are random bf16, made on the device (`random_models.py`). All times are the device's own, by CUDA events, and
are medians; Darkroom and stock take turns (A B A B) with the very same modules.

* Ceiling: bf16 products of the model's own shapes, each timed by itself, weighted as one forward pass has them.
* Qwen-Image, at 1024x1024 and 512x512: a denoising step (two guidance branches) through Darkroom's `Worker` and in the
  stock pipeline; the share of the ceiling that it reaches, its operations counted analytically; what of the step the
  products and the attention take by themselves; encoding both prompts; the VAE decode, plain and tiled; peak memory.
* Z-Image: the stock transformer's forward, which is one step of Z-Image-Turbo.

A section that fails or would overrun the budget leaves a line that says so; the table is printed in every case.

A bare machine may lack what `pyproject.toml` pins; RESULTS.md says which wheels to carry there.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
import transformers
from diffusers import QwenImagePipeline

from darkroom.configs import ParallelConfig, Request
from darkroom.engine.messages import Decode, Drop, Prepare, Step
from darkroom.engine.worker import Worker
from darkroom.models.qwen_image import QwenImage
from darkroom.parallel.mesh import Mesh

from .random_models import (
    SMOKE_QWEN,
    SMOKE_Z,
    Attention,
    Gemm,
    QwenShape,
    Work,
    ZShape,
    qwen_image,
    size_of,
    z_image_transformer,
)
from .tables import Row, median, print_table

DTYPE = torch.bfloat16
PROMPT = "a lighthouse on a cliff above a stormy sea at dusk, oil on canvas, thick strokes, warm light in its windows"
GOLDEN = ["tests/models/test_qwen_image.py", "tests/parallel/test_attention.py"]
GRACE = 30.0
"""Seconds after the budget at which the process is ended, whatever it hangs in."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    name: str
    value: float
    unit: str
    note: str = ""
    detail: bool = False
    """In the JSON only: the table is short, and tells it in another figure's note."""


class Report:
    """The figures so far. Each is on disk as soon as it is known."""

    def __init__(self, output: Path | None, machine: dict[str, Any]) -> None:
        self.output = output
        self.machine = machine
        self.figures: list[Figure] = []
        self.troubles: list[str] = []

    def add(self, figure: Figure) -> None:
        self.figures.append(figure)
        self._save()

    def add_trouble(self, text: str) -> None:
        self.troubles.append(text)
        self._save()

    def print(self) -> None:
        rows: list[Row] = [(name, str(value), "") for name, value in self.machine.items()]
        rows += [(f.name, f"{f.value:.4g} {f.unit}", f.note) for f in self.figures if not f.detail]
        rows += [("TROUBLE", "", trouble) for trouble in self.troubles]
        print_table(rows)

    def _save(self) -> None:
        if self.output:
            content = {"machine": self.machine, "figures": [asdict(f) for f in self.figures], "troubles": self.troubles}
            self.output.write_text(json.dumps(content, indent=2) + "\n")


class Clock:
    """Marks in the device's own time: events on a GPU, which nothing has to wait for; the wall clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.is_cuda = device.type == "cuda"
        self.marks: list[Any] = []

    def mark(self) -> None:
        if not self.is_cuda:
            self.marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append(event)

    def intervals(self) -> list[float]:
        """Seconds between the marks, which are then forgotten."""
        marks, self.marks = self.marks, []
        if not self.is_cuda:
            return [b - a for a, b in pairwise(marks)]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1000 for a, b in pairwise(marks)]  # which are milliseconds

    def mean(self, call: Callable[[], object], repeats: int) -> float:
        """Seconds of one call out of many in a row, after two to warm up."""
        for _ in range(2):
            call()
        self.mark()
        for _ in range(repeats):
            call()
        self.mark()
        return self.intervals()[0] / repeats


@dataclass(frozen=True, kw_only=True)
class Settings:
    device: torch.device
    qwen: QwenShape
    z: ZShape
    sizes: tuple[int, ...]
    """Width and height of the pictures."""
    cube: int
    steps: int
    """Of one run; the first is not measured."""
    rounds: int
    """Runs of either side."""
    repeats: int
    """Of a matrix product or an attention."""


def main() -> int:
    parser = argparse.ArgumentParser(description="one CUDA GPU: Darkroom against stock and against the card's ceiling")
    parser.add_argument("--output", type=Path, help="write every figure to this JSON file")
    parser.add_argument("--golden", action="store_true", help="run the golden tests on the GPU too")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, to try every line")
    parser.add_argument("--budget", type=float, default=400.0, help="seconds for all of it (default 400)")
    args = parser.parse_args()
    if not args.smoke and not torch.cuda.is_available():
        print("no CUDA device; --smoke runs tiny shapes on a CPU", file=sys.stderr)
        return 2
    deadline = time.monotonic() + args.budget
    report = Report(args.output, _machine())
    _end_at(deadline + GRACE, report)
    settings = _settings(args.smoke)
    sections: list[tuple[str, float, Callable[[], Iterator[Figure]]]] = [
        ("ceiling", 10, partial(ceiling, settings)),
        ("Qwen-Image", 60, partial(qwen, settings)),
        ("Z-Image", 30, partial(z_image, settings)),
    ]
    if args.golden:
        sections.append(("golden tests", 60, lambda: golden(deadline)))
    for name, needed, section in sections:
        _run(name, needed, section, report, deadline)
    report.print()
    return 1 if report.troubles else 0


def _settings(smoke: bool) -> Settings:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)  # on a busy machine, threads that wait for each other take ten times as long
    if smoke:
        sizes, counts = (288, 64), {"cube": 64, "steps": 3, "rounds": 1, "repeats": 2}
        return Settings(device=device, qwen=SMOKE_QWEN, z=SMOKE_Z, sizes=sizes, **counts)
    sizes, counts = (1024, 512), {"cube": 8192, "steps": 6, "rounds": 3, "repeats": 20}
    return Settings(device=device, qwen=QwenShape(), z=ZShape(), sizes=sizes, **counts)


def _machine() -> dict[str, Any]:
    versions = {
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
    }
    if not torch.cuda.is_available():
        return {"device": "cpu", **versions}
    card = torch.cuda.get_device_properties(0)
    return {"device": f"{card.name}, {card.total_memory / 1e9:.0f} GB, CUDA {torch.version.cuda}", **versions}


def _run(name: str, needed: float, section: Callable[[], Iterator[Figure]], report: Report, deadline: float) -> None:
    """Take a section's figures as they come. Its failure is not the others'."""
    start = time.monotonic()
    if deadline - start < needed:
        report.add_trouble(f"{name}: left out, the budget of time is nearly spent")
        return
    try:
        for figure in section():
            report.add(figure)
            print(f"{time.monotonic() - start:6.1f} s  {figure.name}: {figure.value:.4g} {figure.unit}", flush=True)
            if time.monotonic() > deadline:
                report.add_trouble(f"{name}: broken off at the end of the budget")
                break
    except Exception as e:
        traceback.print_exc()
        report.add_trouble(f"{name}: {type(e).__name__}: {str(e)[:300]}")
    gc.collect()  # modules hold each other in cycles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _end_at(deadline: float, report: Report) -> None:
    """A kernel that hangs can be neither interrupted nor waited for."""

    def end() -> None:
        report.add_trouble("ended by the clock: something hangs, or is far slower than thought")
        report.print()
        sys.stdout.flush()
        os._exit(1)

    timer = threading.Timer(deadline - time.monotonic(), end)
    timer.daemon = True
    timer.start()


# ---- the card's ceiling ------------------------------------------------------------------------------------------


def ceiling(settings: Settings) -> Iterator[Figure]:
    n = settings.cube
    seconds = work_seconds(Gemm(1, n, n, n), settings)
    yield Figure(name=f"bf16 product of {n}x{n}x{n}", value=2 * n**3 / seconds / 1e12, unit="TFLOP/s")


def work_seconds(work: Work, settings: Settings) -> float:
    """Seconds of one product or attention of these shapes, by itself, on random numbers."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=settings.device, dtype=DTYPE)

    clock = Clock(settings.device)
    match work:
        case Gemm(rows=rows, inner=inner, columns=columns):
            x = random(rows, inner)
            layers = [random(columns, inner) for _ in range(4)]  # in turn, so that no cache holds the weights
            calls = iter(range(10**9))
            return clock.mean(lambda: F.linear(x, layers[next(calls) % 4]), settings.repeats)
        case Attention(tokens=tokens, heads=heads, head_dim=head_dim):
            q, k, v = (random(1, tokens, heads, head_dim).transpose(1, 2) for _ in range(3))
            return clock.mean(lambda: F.scaled_dot_product_attention(q, k, v), settings.repeats)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Forward passes taken apart: what their products and attentions take, each by itself, one after the other."""

    flops: float
    product_flops: float
    product_seconds: float
    attention_seconds: float

    @classmethod
    def of(cls, forwards: Sequence[Sequence[Work]], settings: Settings) -> Parts:
        items = [work for forward in forwards for work in forward]
        with torch.inference_mode():
            seconds = [work.count * work_seconds(work, settings) for work in items]
        products = [(work.flops, s) for work, s in zip(items, seconds, strict=True) if isinstance(work, Gemm)]
        return cls(
            flops=sum(work.flops for work in items),
            product_flops=sum(flops for flops, _ in products),
            product_seconds=sum(s for _, s in products),
            attention_seconds=sum(seconds) - sum(s for _, s in products),
        )

    def figures(self, what: str, seconds: float) -> Iterator[Figure]:
        """`seconds` is what the passes take in truth."""
        rate = self.product_flops / self.product_seconds
        rest = seconds - self.product_seconds - self.attention_seconds
        parts = {"products": self.product_seconds, "attention": self.attention_seconds, "the rest": rest}
        note = ", ".join(f"{name} {100 * part / seconds:.0f} %" for name, part in parts.items())
        share = 100 * self.flops / seconds / rate
        yield Figure(name=f"{what}: ceiling, products of its shapes", value=rate / 1e12, unit="TFLOP/s")
        yield Figure(name=f"{what}: share of that ceiling", value=share, unit="%", note=f"of the time: {note}")
        yield Figure(name=f"{what}: operations", value=self.flops / 1e12, unit="TFLOP", detail=True)
        for name, part in parts.items():
            yield Figure(name=f"{what}: {name}, alone", value=1000 * part, unit="ms", detail=True)


# ---- Qwen-Image --------------------------------------------------------------------------------------------------


def qwen(settings: Settings) -> Iterator[Figure]:
    start = time.monotonic()
    pipe = qwen_image(settings.qwen, settings.device, DTYPE)
    _synchronize(settings.device)
    held = sum(size_of(module) for module in (pipe.transformer, pipe.text_encoder, pipe.vae))
    note = f"made in {time.monotonic() - start:.0f} s"
    yield Figure(name="Qwen-Image: weights", value=held / 1e9, unit="GB", note=note)
    for size in settings.sizes:
        yield from qwen_steps(pipe, size, settings)
        yield from qwen_decodes(pipe, size, settings)


def _request(size: int, steps: int) -> Request:
    return Request(
        prompt=PROMPT,
        negative_prompt=" ",
        width=size,
        height=size,
        num_inference_steps=steps,
        guidance_scale=4.0,
        max_sequence_length=512,
        seed=0,
    )


def _worker(pipe: QwenImagePipeline, settings: Settings, *, use_tiling: bool = False) -> Worker:
    return Worker(QwenImage(pipe, Mesh(ParallelConfig()), settings.device, use_tiling=use_tiling))


def qwen_steps(pipe: QwenImagePipeline, size: int, settings: Settings) -> Iterator[Figure]:
    worker, request = _worker(pipe, settings), _request(size, settings.steps)
    ours: list[float] = []
    theirs: list[float] = []
    encoding: list[float] = []
    _our_steps(worker, _request(size, 2), settings)
    _stock_steps(pipe, _request(size, 2), settings)
    _reset_peak(settings.device)
    for _ in range(settings.rounds):
        prepared, steps, latents = _our_steps(worker, request, settings)
        encoding.append(prepared)
        ours += steps
        steps, expected = _stock_steps(pipe, request, settings)
        theirs += steps
    peak = _peak(settings.device)
    what, step, stock = f"Qwen-Image {size}x{size}", median(ours), median(theirs)
    yield from _compared(f"{what}: a step", step, stock, _difference(latents, expected))
    yield Figure(name=f"{what}: prompts, noise, timesteps", value=1000 * median(encoding), unit="ms")
    yield Figure(name=f"{what}: peak memory of steps", value=peak / 1e9, unit="GB")
    shapes = [list(settings.qwen.work(latents.shape[1], tokens)) for tokens in _text_tokens(worker, request)]
    yield from Parts.of(shapes, settings).figures(f"{what}: a step", step)


def _compared(what: str, seconds: float, stock: float, difference: float) -> Iterator[Figure]:
    note = f"{seconds / stock:.3f} x stock's {1000 * stock:.4g} ms; results differ by {difference:.2g} at most"
    yield Figure(name=what, value=1000 * seconds, unit="ms", note=note)
    yield Figure(name=f"{what}, stock", value=1000 * stock, unit="ms", detail=True)
    yield Figure(name=f"{what}: largest difference from stock", value=difference, unit="", detail=True)


def _our_steps(worker: Worker, request: Request, settings: Settings) -> tuple[float, list[float], torch.Tensor]:
    """-> seconds to prepare, seconds of every step but the first, the latents"""
    clock = Clock(settings.device)
    with torch.inference_mode():
        clock.mark()
        worker.execute(Prepare(ids=("0",), requests=(request,)))
        clock.mark()
        [prepared] = clock.intervals()
        for _ in range(request.num_inference_steps):
            worker.execute(Step(ids=("0",)))
            clock.mark()
        latents = worker.samples["0"].latents
        worker.execute(Drop(ids=("0",)))
    return prepared, clock.intervals(), latents


def _stock_steps(pipe: QwenImagePipeline, request: Request, settings: Settings) -> tuple[list[float], torch.Tensor]:
    """-> seconds of every step but the first, the latents"""
    clock = Clock(settings.device)

    def after_step(*_: Any) -> dict[str, Any]:
        clock.mark()
        return {}

    latents = pipe(
        request.prompt,
        negative_prompt=request.negative_prompt,
        true_cfg_scale=request.guidance_scale,
        width=request.width,
        height=request.height,
        num_inference_steps=request.num_inference_steps,
        max_sequence_length=request.max_sequence_length,
        generator=torch.Generator("cpu").manual_seed(request.seed),
        output_type="latent",
        callback_on_step_end=after_step,
    ).images
    return clock.intervals(), latents


def _text_tokens(worker: Worker, request: Request) -> list[int]:
    """Of each branch."""
    with torch.inference_mode():
        branches = worker.model.prepare(request).branches
    return [branch["encoder_hidden_states"].shape[1] for branch in branches]


def qwen_decodes(pipe: QwenImagePipeline, size: int, settings: Settings) -> Iterator[Figure]:
    request = _request(size, 2)
    for tiled in (False, True):
        worker = _worker(pipe, settings, use_tiling=tiled)
        with torch.inference_mode():
            worker.execute(Prepare(ids=("0",), requests=(request,)))
        latents = worker.samples["0"].latents.clone()
        ours = partial(_our_decode, worker)
        stock = partial(_stock_decode, pipe, latents, size, tiled)
        difference = _difference(ours(), stock())
        _reset_peak(settings.device)
        seconds, stock_seconds = _in_turn(ours, stock, settings)
        what = f"Qwen-Image {size}x{size}: decode{', tiled' if tiled else ''}"
        yield from _compared(what, seconds, stock_seconds, difference)
        yield Figure(name=f"{what}: peak memory", value=_peak(settings.device) / 1e9, unit="GB", detail=tiled)


def _our_decode(worker: Worker) -> torch.Tensor:
    with torch.inference_mode():
        picture = worker.decode(Decode(ids=("0",)))
    assert picture is not None
    return picture


def _stock_decode(pipe: QwenImagePipeline, latents: torch.Tensor, size: int, tiled: bool) -> torch.Tensor:
    """The stock pipeline's last lines."""
    config = pipe.vae.config
    z = pipe._unpack_latents(latents, size, size, pipe.vae_scale_factor).to(pipe.vae.dtype)
    mean = torch.tensor(config.latents_mean).view(1, config.z_dim, 1, 1, 1).to(z.device, z.dtype)
    std = 1.0 / torch.tensor(config.latents_std).view(1, config.z_dim, 1, 1, 1).to(z.device, z.dtype)
    pipe.vae.use_tiling = tiled
    with torch.no_grad():
        picture: torch.Tensor = pipe.vae.decode(z / std + mean, return_dict=False)[0][:, :, 0]
    pipe.vae.use_tiling = False
    return picture


def _in_turn(a: Callable[[], object], b: Callable[[], object], settings: Settings) -> tuple[float, float]:
    """Median seconds of two calls that take turns."""
    clock = Clock(settings.device)
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(2 * settings.rounds):
        for call, taken in zip((a, b), seconds, strict=True):
            clock.mark()
            call()
            clock.mark()
            taken += clock.intervals()
    return median(seconds[0]), median(seconds[1])


# ---- Z-Image -----------------------------------------------------------------------------------------------------


def z_image(settings: Settings) -> Iterator[Figure]:
    transformer = z_image_transformer(settings.z, settings.device, DTYPE)
    yield Figure(name="Z-Image: weights of the transformer", value=size_of(transformer) / 1e9, unit="GB")
    text_tokens, clock = 128, Clock(settings.device)
    text = torch.randn(text_tokens, settings.z.text_width, device=settings.device, dtype=DTYPE)
    timestep = torch.full((1,), 0.5, device=settings.device)
    for size in settings.sizes:
        latents = torch.randn(16, 1, size // 8, size // 8, device=settings.device, dtype=DTYPE)
        forward = partial(transformer, [latents], timestep, [text], return_dict=False)
        _reset_peak(settings.device)
        with torch.inference_mode():
            forward()
            for _ in range(settings.steps * settings.rounds):
                clock.mark()
                forward()
            clock.mark()
        seconds = median(clock.intervals())
        what = f"Z-Image {size}x{size}: a forward, stock"
        yield Figure(name=what, value=1000 * seconds, unit="ms", note="a step of Z-Image-Turbo")
        yield Figure(name=f"{what}: peak memory", value=_peak(settings.device) / 1e9, unit="GB")
        shapes = list(settings.z.work((size // 16) ** 2, text_tokens))
        yield from Parts.of([shapes], settings).figures(what, seconds)


# ---- golden tests ------------------------------------------------------------------------------------------------


def golden(deadline: float) -> Iterator[Figure]:
    """In a process of their own: they set precisions, and expect a fresh torch."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-W", "default", *GOLDEN]
    done = subprocess.run(command, text=True, capture_output=True, timeout=deadline - time.monotonic())
    print(done.stdout, done.stderr, flush=True)
    words = done.stdout.strip().splitlines()[-1].replace(",", "").split()
    counts = {word: int(number) for number, word in pairwise(words) if number.isdigit()}
    for outcome in ("passed", "skipped", "failed", "error", "errors"):
        if outcome in counts:
            yield Figure(name=f"golden tests on the GPU, {outcome}", value=counts[outcome], unit="tests")
    if done.returncode:
        raise RuntimeError(f"pytest ended with exit code {done.returncode}")


# ---- the device --------------------------------------------------------------------------------------------------


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).abs().max())


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak(device: torch.device) -> int:
    """Bytes in tensors at the most, weights included; 0 on a CPU, which does not tell."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
