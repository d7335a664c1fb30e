"""A picture without a server: `python examples/text_to_image.py --model demo --prompt "a red star"`."""

from flags import parallel_config, parser, sampling

from darkroom import Darkroom, SamplingParams


def main() -> None:
    flags = parser(__doc__, "Qwen/Qwen-Image", "A cat sitting on a windowsill")
    flags.add_argument("--output", default="out.png")
    args = flags.parse_args()
    with Darkroom(model=args.model, parallel_config=parallel_config(args)) as darkroom:
        [picture] = darkroom.generate(args.prompt, SamplingParams(**sampling(args)))
    picture.save(args.output)
    print(f"{args.output}: {picture.width}x{picture.height}, seed {picture.info['seed']}")


if __name__ == "__main__":
    main()
