"""The OpenAI SDK against `darkroom serve demo`: one plain call, and one with previews.

python examples/openai_client.py "two red cats on a white background"
"""

import argparse
import base64
from pathlib import Path

from openai import OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", default="a green star on a white background")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--output", type=Path, default=Path("out.png"))
    args = parser.parse_args()
    client = OpenAI(base_url=args.base_url, api_key="none")

    response = client.images.generate(prompt=args.prompt)
    args.output.write_bytes(base64.b64decode(response.data[0].b64_json))
    print(f"{args.output}: {response.size}, {response.usage.total_tokens} tokens")

    for event in client.images.generate(prompt=args.prompt, stream=True, partial_images=2):
        is_preview = event.type == "image_generation.partial_image"
        name = f"-preview{event.partial_image_index}" if is_preview else "-streamed"
        path = args.output.with_stem(args.output.stem + name)
        path.write_bytes(base64.b64decode(event.b64_json))
        print(path)


if __name__ == "__main__":
    main()
