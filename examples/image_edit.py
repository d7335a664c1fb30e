"""Edit a picture: `python examples/image_edit.py --image input.png --prompt "make it snow" --tensor-parallel-size 2`.

With a model that edits, from one picture or several; with one that draws, over the picture (`--strength`), or only
where `--mask-image` says. A model of layers takes the picture apart: out-0.png, out-1.png, ...
"""

from pathlib import Path

from flags import parallel_config, parser, sampling

from darkroom import Darkroom, SamplingParams


def main() -> None:
    flags = parser(__doc__, "Qwen/Qwen-Image-Edit", "Turn the day into night")
    flags.add_argument("--image", nargs="+", type=Path, required=True, help="several, where the model takes them")
    flags.add_argument("--mask-image", "--mask_image", type=Path)
    flags.add_argument("--strength", type=float)
    flags.add_argument("--layers", type=int)
    flags.add_argument("--output", default="out.png", type=Path)
    args = flags.parse_args()
    params = SamplingParams(**sampling(args), strength=args.strength, layers=args.layers)
    with Darkroom(model=args.model, parallel_config=parallel_config(args)) as darkroom:
        pictures = darkroom.generate(args.prompt, params, images=args.image, mask=args.mask_image)
    for i, picture in enumerate(pictures):
        path = args.output if len(pictures) == 1 else args.output.with_stem(f"{args.output.stem}-{i}")
        picture.save(path)
        print(f"{path}: {picture.width}x{picture.height}, seed {picture.info['seed']}")


if __name__ == "__main__":
    main()
