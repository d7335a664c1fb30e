"""What a layout of CPU ranks costs, with the demo: seconds per denoising step, and the weights of each rank.

`python -m bench.parallel [--steps 20] [--size 128]`

* Step: real worker processes and gloo, one thread each; `Step` commands of one request in flight, both guidance
  branches, through the engine's own WorkerGroup; the median. The demo has 64 image tokens at 128x128 and fits one core,
  so this shows what a layout adds (collectives, and more ranks than cores), not what it gains: that takes GPUs.
* Weights: what each rank of a tensor-parallel group reads of the transformer's file, and then holds.
"""

from __future__ import annotations

import argparse
import math
import os

import torch
from accelerate import init_empty_weights
from diffusers import QwenImageTransformer2DModel

from darkroom.configs import Request
from darkroom.engine.messages import Prepare, Step
from darkroom.models.checkpoint import Checkpoint
from darkroom.parallel.loading import Report, load
from darkroom.parallel.mesh import Axis
from darkroom.parallel.tensor import shard

from .processes import Workers
from .tables import Row, median, print_table

LAYOUTS: tuple[dict[str, int], ...] = (
    {},
    {"tp": 2},
    {"usp": 2},
    {"ring": 2},
    {"cfg": 2},
    {"usp": 3},
    {"tp": 4},
    {"usp": 4},
    {"ring": 4},
    {"usp": 2, "ring": 2},
    {"tp": 2, "usp": 2},
    {"cfg": 2, "usp": 2},
    {"cfg": 2, "tp": 2},
)


def main() -> None:
    parser = argparse.ArgumentParser(description="layouts of CPU ranks with the demo")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps measured (default 20)")
    parser.add_argument("--size", type=int, default=128, help="width and height in pixels (default 128)")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    cores = len(os.sched_getaffinity(0))
    print_table([*step_rows(args.steps, args.size, cores), *weight_rows()])


# ---- steps -------------------------------------------------------------------------------------------------------


def step_rows(steps: int, size: int, cores: int) -> list[Row]:
    rows: list[Row] = []
    alone = 0.0
    for layout in LAYOUTS:
        seconds = step_seconds(layout, steps, size)
        alone = alone or seconds
        name = ", ".join(f"{axis} {degree}" for axis, degree in layout.items()) or "one process"
        ranks = math.prod(layout.values())
        remark = f"{ranks} ranks on {cores} cores" if ranks > cores else ""
        rows.append((f"a step, {name}", f"{1000 * seconds:.1f} ms  {seconds / alone:.2f} x", remark))
    return rows


def step_seconds(layout: dict[str, int], steps: int, size: int) -> float:
    request = Request(
        prompt="a green star on a white background",
        negative_prompt=" ",
        width=size,
        height=size,
        num_inference_steps=steps + 2,
        guidance_scale=2.5,
        max_sequence_length=512,
        seed=0,
    )
    with Workers(**layout) as group:
        group.run(Prepare(ids=("0",), requests=(request,)))
        seconds = [group.run(Step(ids=("0",))) for _ in range(steps + 2)]
    return median(seconds[2:])  # the first two warm up


# ---- weights -----------------------------------------------------------------------------------------------------


def weight_rows() -> list[Row]:
    rows: list[Row] = []
    whole = 0
    for size in (1, 2, 3, 4):
        reports = [_load_transformer(size, rank) for rank in range(size)]
        read, held = (max(getattr(report, name) for report in reports) for name in ("elements_read", "elements_held"))
        whole = whole or held
        figure = f"{4 * read / 1e6:.2f} / {4 * held / 1e6:.2f} MB"
        rows.append(
            (f"tp {size}: a rank reads / holds", figure, f"{read / whole:.1%} / {held / whole:.1%} of the whole")
        )
    return rows


def _load_transformer(size: int, rank: int) -> Report:
    """The demo's transformer as one rank of a tensor-parallel group has it. Loading takes no process group."""
    checkpoint = Checkpoint.open("demo")
    plan, config = checkpoint.family.components["transformer"].plan, checkpoint.configs["transformer"]
    with init_empty_weights(include_buffers=False):
        module = QwenImageTransformer2DModel.from_config(config)
    axis = Axis("tp", size, rank)
    shard(module, plan, config, axis)
    return load(module, checkpoint.tensors("transformer"), plan, config, axis, torch.device("cpu"), torch.float32)


if __name__ == "__main__":
    main()
