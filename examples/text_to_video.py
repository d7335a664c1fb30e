"""A video: `python examples/text_to_video.py --model Wan-AI/Wan2.2-T2V-A14B-Diffusers --cfg-parallel-size 2`.

With `--image`, and a model that takes one, a video that begins with it.
"""

from pathlib import Path

from flags import parallel_config, parser, sampling

from darkroom import Darkroom, SamplingParams


def main() -> None:
    flags = parser(__doc__, "Wan-AI/Wan2.2-T2V-A14B-Diffusers", "A red fox runs through fresh snow")
    flags.add_argument("--image", type=Path)
    flags.add_argument("--num-frames", "--num_frames", type=int)
    flags.add_argument("--fps", type=int)
    flags.add_argument("--guidance-scale", "--guidance_scale", type=float)
    flags.add_argument("--guidance-scale-2", "--guidance_scale_2", type=float)
    flags.add_argument("--output", default="out.mp4", type=Path)
    args = flags.parse_args()
    params = SamplingParams(
        **sampling(args),
        num_frames=args.num_frames,
        fps=args.fps,
        guidance_scale=args.guidance_scale,
        guidance_scale_2=args.guidance_scale_2,
    )
    with Darkroom(model=args.model, parallel_config=parallel_config(args)) as darkroom:
        video = darkroom.generate_video(args.prompt, params, images=[args.image] if args.image else [])
    args.output.write_bytes(video)
    print(f"{args.output}: {len(video)} bytes")


if __name__ == "__main__":
    main()
