"""What a large decode takes of each rank's memory, and how long: whole, by rows on 2 and 4 ranks, and in tiles.

`python -m bench.vae [KIND ...] [--edge 1024] [--share 0.5]`, about 5 minutes for all kinds

Real processes and gloo, one thread each; random weights in bfloat16, four levels deep as the published ones, with
`--share` of their channels. Wan's decodes a video of nine frames, of half the edge. The memory is the most that tensors
take at once in the decode, above what they took before it: what an accelerator would need. A process's peak on a CPU
says little about that, since the libraries there copy what they convolve, and in float32 how often depends on its size.
Run it alone.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import AutoencoderKL, AutoencoderKLQwenImage, AutoencoderKLWan
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from darkroom.configs import ParallelConfig
from darkroom.models import autoencoder_causal, autoencoder_kl
from darkroom.parallel.mesh import Mesh
from darkroom.parallel.plan import Plan
from darkroom.parallel.spatial import PatchDecoder, Tiling, map_tiles

from .tables import Row, print_table

Figures = tuple[float, float]
"""Megabytes that a rank's tensors took at most, and seconds."""


def main() -> None:
    parser = argparse.ArgumentParser(description="memory and time of a large decode")
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"{', '.join(KINDS)} (default: all)")
    parser.add_argument("--edge", type=int, default=1024, help="width and height in pixels (default 1024)")
    parser.add_argument("--share", type=float, default=0.5, help="of the published channels (default 0.5)")
    args = parser.parse_args()
    rows = [row for kind in args.kinds or KINDS for row in rows_of(kind, args.edge, args.share)]
    print_table(rows)


def rows_of(kind: str, edge: int, share: float) -> list[Row]:
    cases = {
        "whole": (1, False),
        "rows on 2": (2, False),
        "rows on 4": (4, False),
        "tiles": (1, True),
        "tiles on 2": (2, True),
    }
    rows: list[Row] = []
    alone = 0.0
    for name, (size, tiled) in cases.items():
        ranks = run(kind, size, tiled, edge, share)
        largest, seconds = max(memory for memory, _ in ranks), max(took for _, took in ranks)
        alone = alone or largest
        each = ", ".join(f"{memory:.0f}" for memory, _ in ranks)
        rows.append((f"{kind}: {name}", f"{each} MB", f"{100 * largest / alone:.0f} % of one, {seconds:.1f} s"))
    return rows


def run(kind: str, size: int, tiled: bool, edge: int, share: float) -> list[Figures]:
    """Every rank's figures."""
    context = get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        results: Any = context.Queue()
        arguments = (kind, size, tiled, edge, share, folder, results)
        processes = [context.Process(target=decode, args=(rank, *arguments)) for rank in range(size)]
        for process in processes:
            process.start()
        figures = dict(results.get() for _ in processes)
        for process in processes:
            process.join()
    return [figures[rank] for rank in range(size)]


def decode(rank: int, kind: str, size: int, tiled: bool, edge: int, share: float, folder: str, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(Path(folder) / "store"), size), rank=rank, world_size=size)
    mesh = Mesh(ParallelConfig(ulysses_degree=size, vae_patch_parallel_size=size), rank)
    assert mesh.vae is not None
    torch.manual_seed(0)
    vae, plan, tiling, shape = KINDS[kind](edge, share)
    nn.Module.to(vae, torch.bfloat16)  # diffusers' own `to` warns
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    rows = None if tiled else PatchDecoder(vae, plan, mesh.vae)

    def work() -> Tensor | None:
        if rows is None:
            return map_tiles(latents, lambda z: vae.decode(z).sample, tiling, mesh.vae)
        return rows.decode(latents, lambda z: vae.decode(z).sample)

    with torch.inference_mode():
        vae.decode(latents[..., :8, :8])  # what is made once
        dist.barrier()
        start = time.monotonic()
        work()
        seconds = time.monotonic() - start
        results.put((rank, (peak(work, Path(folder) / f"{rank}.json"), seconds)))
    dist.barrier()
    dist.destroy_process_group()


def kl(edge: int, share: float) -> Case:
    """Of SD3, Z-Image and FLUX."""
    width = int(128 * share)
    vae = AutoencoderKL(
        block_out_channels=(width, 2 * width, 4 * width, 4 * width),
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=2,
        latent_channels=16,
        sample_size=256,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()
    return vae, autoencoder_kl.VAE.plan, autoencoder_kl.tiling(vae), (1, 16, edge // 8, edge // 8)


def qwen_image(edge: int, share: float) -> Case:
    vae = AutoencoderKLQwenImage(base_dim=int(96 * share)).eval()
    return vae, CAUSAL, autoencoder_causal.tiling(vae), (1, 16, 1, edge // 8, edge // 8)


def wan(edge: int, share: float) -> Case:
    vae = AutoencoderKLWan(base_dim=int(96 * share)).eval()
    return vae, CAUSAL, autoencoder_causal.tiling(vae), (1, 16, 3, edge // 16, edge // 16)


Case = tuple[Any, Plan, Tiling, tuple[int, ...]]
"""The VAE, how it is spread, its tiles, and the shape of the latents."""
CAUSAL = autoencoder_causal.vae("", "").plan
KINDS: dict[str, Callable[[int, float], Case]] = {"kl": kl, "qwen_image": qwen_image, "wan": wan}


def peak(work: Callable[[], object], trace: Path) -> float:
    """Megabytes that tensors take at most while `work` is done, above what they take before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    profiled.export_chrome_trace(str(trace))
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
    first, *_ = found = [event["args"] for event in sorted(events, key=lambda event: event["ts"])]
    before = first["Total Allocated"] - first["Bytes"]
    return float(max(args["Total Allocated"] for args in found) - before) / (1 << 20)


if __name__ == "__main__":
    main()
