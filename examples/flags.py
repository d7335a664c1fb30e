"""The flags that the examples share."""

import argparse

from darkroom import ParallelConfig

DEGREES = {
    "tensor": "tensor_parallel_size",
    "Ulysses": "ulysses_degree",
    "ring": "ring_degree",
    "CFG": "cfg_parallel_size",
    "VAE": "vae_patch_parallel_size",
}


def parser(description: str | None, model: str, prompt: str) -> argparse.ArgumentParser:
    """With the model, the prompt, how the work is spread, and how the picture is sampled."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", default=model)
    parser.add_argument("--prompt", default=prompt)
    for kind, name in DEGREES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", f"--{name}", type=int, default=1, help=f"{kind} parallelism")
    parser.add_argument("--vae-use-tiling", "--vae_use_tiling", action="store_true")
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--num-inference-steps", "--num_inference_steps", type=int)
    parser.add_argument("--negative-prompt", "--negative_prompt")
    parser.add_argument("--seed", type=int)
    return parser


def parallel_config(args: argparse.Namespace) -> ParallelConfig:
    degrees = {name: getattr(args, name) for name in DEGREES.values()}
    return ParallelConfig(**degrees, vae_use_tiling=args.vae_use_tiling)


def sampling(args: argparse.Namespace) -> dict[str, object]:
    """What `SamplingParams` takes of the flags above."""
    names = ("height", "width", "num_inference_steps", "negative_prompt", "seed")
    return {name: getattr(args, name) for name in names}
