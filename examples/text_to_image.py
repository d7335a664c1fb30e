"""A picture without a server: `python examples/text_to_image.py --model demo --prompt "a red star"`."""

import argparse

from darkroom import Darkroom, ParallelConfig, SamplingParams


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="Qwen/Qwen-Image")
    parser.add_argument("--prompt", default="A cat sitting on a windowsill")
    parser.add_argument("--ulysses-degree", type=int, default=1)
    parser.add_argument("--ring-degree", type=int, default=1)
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--cfg-parallel-size", type=int, default=1)
    parser.add_argument("--vae-patch-parallel-size", type=int, default=1)
    parser.add_argument("--vae-use-tiling", action="store_true")
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--num-inference-steps", type=int)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--output", default="out.png")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    parallel_config = ParallelConfig(
        ulysses_degree=args.ulysses_degree,
        ring_degree=args.ring_degree,
        tensor_parallel_size=args.tensor_parallel_size,
        cfg_parallel_size=args.cfg_parallel_size,
        vae_patch_parallel_size=args.vae_patch_parallel_size,
        vae_use_tiling=args.vae_use_tiling,
    )
    params = SamplingParams(
        height=args.height, width=args.width, num_inference_steps=args.num_inference_steps, seed=args.seed
    )
    with Darkroom(model=args.model, parallel_config=parallel_config) as darkroom:
        [picture] = darkroom.generate(args.prompt, params)
    picture.save(args.output)
    print(f"{args.output}: {picture.width}x{picture.height}, seed {picture.info['seed']}")


if __name__ == "__main__":
    main()
