"""What a large decode takes of each rank's memory, and how long: whole, by rows on 2 and 4 ranks, and in tiles.

`python -m bench.vae [--edge 1024] [--width 64]`

Real processes and gloo, one thread each; AutoencoderKL with random weights, four levels deep as the published ones,
`--width` channels in the last (theirs: 128). The memory is what the process's peak grows by in the decode. Run
it alone.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import AutoencoderKL

from darkroom.configs import ParallelConfig
from darkroom.models.autoencoder_kl import VAE, tiling
from darkroom.parallel.mesh import Mesh
from darkroom.parallel.spatial import PatchDecoder, map_tiles

from .tables import Row, print_table

Figures = tuple[float, float]
"""Megabytes that a rank's peak grew by, and seconds."""


def main() -> None:
    parser = argparse.ArgumentParser(description="memory and time of a large decode")
    parser.add_argument("--edge", type=int, default=1024, help="width and height in pixels (default 1024)")
    parser.add_argument("--width", type=int, default=64, help="channels of the last level (default 64)")
    args = parser.parse_args()
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
        ranks = run(size, tiled, args.edge, args.width)
        largest, seconds = max(memory for memory, _ in ranks), max(took for _, took in ranks)
        alone = alone or largest
        each = ", ".join(f"{memory:.0f}" for memory, _ in ranks)
        rows.append((name, f"{each} MB", f"{100 * largest / alone:.0f} % of one, {seconds:.1f} s"))
    print_table(rows)


def run(size: int, tiled: bool, edge: int, width: int) -> list[Figures]:
    """Every rank's figures."""
    context = get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        results: Any = context.Queue()
        arguments = (size, tiled, edge, width, folder, results)
        processes = [context.Process(target=decode, args=(rank, *arguments)) for rank in range(size)]
        for process in processes:
            process.start()
        figures = dict(results.get() for _ in processes)
        for process in processes:
            process.join()
    return [figures[rank] for rank in range(size)]


def decode(rank: int, size: int, tiled: bool, edge: int, width: int, folder: str, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(Path(folder) / "store"), size), rank=rank, world_size=size)
    mesh = Mesh(ParallelConfig(ulysses_degree=size, vae_patch_parallel_size=size), rank)
    assert mesh.vae is not None
    vae = make_vae(width)
    latents = torch.randn(1, 16, edge // 8, edge // 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        vae.decode(latents[..., :8, :8])  # what is made once
        dist.barrier()
        before, start = peak(), time.monotonic()
        if tiled:
            map_tiles(latents, lambda z: vae.decode(z).sample, tiling(vae), mesh.vae)
        else:
            PatchDecoder(vae, VAE.plan, mesh.vae).decode(latents, lambda z: vae.decode(z).sample)
        results.put((rank, (peak() - before, time.monotonic() - start)))
    dist.barrier()
    dist.destroy_process_group()


def make_vae(width: int) -> Any:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(width, 2 * width, 4 * width, 4 * width),
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=2,
        latent_channels=16,
        sample_size=256,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def peak() -> float:
    """Megabytes that this process has held at most."""
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


if __name__ == "__main__":
    main()
