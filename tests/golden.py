"""Run requests through the engine's own code in this process, or on ranks, and give back what came out as floats."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from PIL import Image
from torch import Tensor

from darkroom.configs import EngineConfig, ParallelConfig, Request
from darkroom.engine.messages import Decode, Prepare
from darkroom.engine.worker import Worker
from darkroom.models.any_diffusers import AnyDiffusers
from darkroom.models.base import Model
from darkroom.models.build import build
from darkroom.models.checkpoint import open_checkpoint
from darkroom.models.stepwise import EndOfCall
from darkroom.parallel.mesh import Mesh

TOLERANCE = 1e-5
"""fp32 over gloo: what a different order of summation may change."""

Outputs = dict[str, tuple[Tensor, Tensor | None]]
"""Latents [1, S, C] and, on the output rank, the decoded picture [1, 3, H, W], by request."""


def request(prompt: str = "a red circle", **values: Any) -> Request:
    defaults: dict[str, Any] = {
        "negative_prompt": " ",
        "width": 112,
        "height": 80,
        "num_inference_steps": 3,
        "guidance_scale": 4.0,
        "max_sequence_length": 61,  # texts that are padded to it have a length that no degree divides
        "seed": 0,
    }
    return Request(prompt=prompt, **{**defaults, **values})


def picture_file(width: int, height: int, seed: int = 0, mode: str = "RGB") -> bytes:
    """A PNG of soft colours: what a request brings with it. With "L": a mask, white in its lower right."""
    if mode == "L":
        picture = Image.new("L", (width, height))
        picture.paste(255, (width // 3, height // 4, width, height))
    else:
        coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, len(mode))).astype(np.uint8)
        picture = Image.fromarray(coarse, mode).resize((width, height), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def stock_pipeline(cls: Any, folder: Path, dtype: torch.dtype = torch.float32, **parts: Any) -> Any:
    """diffusers' own, silent. Its parameters are copies: mapped from the file they lie unaligned, and MKL rounds by
    that."""
    pipe = cls.from_pretrained(folder, dtype=dtype, **parts)
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        for parameter in part.parameters() if isinstance(part, torch.nn.Module) else ():
            parameter.data = parameter.data.clone()
    return pipe


@contextmanager
def worker(
    folder: Path, parallel: ParallelConfig, rank: int = 0, device: str = "cpu", dtype: str = "float32", **options: Any
) -> Iterator[Worker]:
    """A rank's worker with the checkpoint loaded. `options`: other flags of the engine."""
    config = EngineConfig.model_validate(
        {"model": str(folder), "device": device, "dtype": dtype, **parallel.model_dump(), **options}
    )
    mesh, torch_dtype = Mesh(config, rank), getattr(torch, dtype)
    with torch.inference_mode():
        yield Worker(build(open_checkpoint(config), config, mesh, torch.device(device), torch_dtype))


def generate(worker: Worker, requests: Sequence[Request], *, batched: bool = False) -> Outputs:
    """All requests in flight at once: their steps take turns, or share forward passes."""
    ids = tuple(str(i) for i in range(len(requests)))
    worker.execute(Prepare(ids=ids, requests=tuple(requests)))
    samples = [worker.samples[id] for id in ids]
    while open_samples := [sample for sample in samples if sample.step < sample.num_steps]:
        for group in [open_samples] if batched else [[sample] for sample in open_samples]:
            worker.step(group)
    return {id: (worker.samples[id].latents, worker.decode(Decode(ids=(id,)))) for id in ids}


def decode_noise(worker: Worker, requests: Sequence[Request]) -> Outputs:
    """Requests that are decoded before their first step."""
    if isinstance(worker.model, AnyDiffusers):
        return {str(i): _decode_drawn(worker.model, each) for i, each in enumerate(requests)}
    ids = tuple(str(i) for i in range(len(requests)))
    worker.execute(Prepare(ids=ids, requests=tuple(requests)))
    return {id: (worker.samples[id].latents, worker.decode(Decode(ids=(id,)))) for id in ids}


def _decode_drawn(model: Model, request: Request) -> tuple[Tensor, Tensor | None]:
    """A stock pipeline decodes at the end of its call only: what it would give its VAE is drawn instead."""
    config = model.pipe.vae.config
    if isinstance(model.vae, AutoencoderKLWan):
        scale, shape = config.scale_factor_spatial, (1, config.z_dim, (request.num_frames - 1) // 4 + 1)
    else:
        scale, shape = 2 ** (len(config.block_out_channels) - 1), (1, config.latent_channels)
    shape = (*shape, request.height // scale, request.width // scale)
    z = torch.randn(shape, generator=torch.Generator().manual_seed(request.seed))
    try:
        return z, model.pipe.vae.decode(z).sample
    except EndOfCall:
        return z, None


def from_stock(folder: Path, request: Request, pipe: Any, run_stock: Callable[..., Any]) -> tuple[float, int]:
    """How far one process is from the stock pipeline: the latents' numbers, and the pictures' levels of 255."""
    with worker(folder, ParallelConfig()) as one:
        [(latents, decoded)] = generate(one, [request]).values()
        assert decoded is not None
        pictures = one.model.pictures(decoded)
    wanted = run_stock(pipe, request, "latent")
    assert latents.shape == wanted.shape
    ours, theirs = (
        np.stack([np.asarray(x).astype(int) for x in xs]) for xs in (pictures, run_stock(pipe, request, "pil"))
    )
    return float((latents - wanted).abs().max()), int(np.abs(ours - theirs).max())


def difference(outputs: Outputs, expected: Outputs) -> float:
    """The largest difference of any number, latents and pictures alike; infinite where one is missing or not finite."""
    worst = 0.0
    for id, (latents, picture) in expected.items():
        got_latents, got_picture = outputs[id]
        for got, want in ((got_latents, latents), (got_picture, picture)):
            if want is None or got is None or not torch.isfinite(got).all():
                return float("inf")
            worst = max(worst, float((got - want).abs().max()))
    return worst
