"""What LiteLLM's picture and video calls come to: `python litellm_calls.py PICTURES_URL VIDEOS_URL PNG`, as JSON.

Runs in an environment of its own, and so imports nothing of this project.
"""

from __future__ import annotations

import asyncio
import base64
import json
import sys
import time
from pathlib import Path
from typing import Any

import litellm

COMMON: dict[str, Any] = {"api_key": "any", "num_retries": 0}
PICTURES = {**COMMON, "model": "openai/tiny-pictures"}
VIDEOS = {**COMMON, "custom_llm_provider": "openai"}


def summary(answer: Any) -> list[Any]:
    """The first bytes of each picture, or that it has a URL; whether the usage adds up."""
    pictures = ["url" if item.url else base64.b64decode(item.b64_json)[1:4].decode("latin1") for item in answer.data]
    usage = answer.usage
    return [*pictures, usage.input_tokens + usage.output_tokens == usage.total_tokens]


def pictures(url: str, png: Path) -> dict[str, Any]:
    options = {**PICTURES, "api_base": f"{url}/v1"}
    edit = {**options, "prompt": "x", "size": "64x64"}
    found = {
        "generation": summary(litellm.image_generation("x", n=2, size="64x64", quality="low", **options)),
        "generation, async": summary(asyncio.run(litellm.aimage_generation(prompt="x", size="96x64", **options))),
        "edit": summary(litellm.image_edit(image=png.open("rb"), **edit)),
        "edit of a list": summary(litellm.image_edit(image=[png.read_bytes()], **edit)),
        "edit, async": summary(asyncio.run(litellm.aimage_edit(image=png.open("rb"), **edit))),
        "variation": summary(litellm.image_variation(image=png.open("rb"), n=1, size="64x64", **options)),
    }
    for fields, name in (({"size": "1x1"}, "bad size"), ({"model": "openai/none"}, "bad model")):
        try:
            litellm.image_generation("x", **{**options, **fields})
        except Exception as e:
            found[name] = type(e).__name__
    return found


def videos(url: str, png: Path) -> dict[str, Any]:
    options = {**VIDEOS, "api_base": f"{url}/v1"}
    model = {**options, "model": "openai/tiny-videos"}
    made = litellm.video_generation("x", seconds="1", size="64x64", input_reference=png.open("rb"), **model)
    found: dict[str, Any] = {"video": [made.object, made.size, made.seconds, ended(made.id, options)]}
    found["content"] = litellm.video_content(made.id, **options)[4:8].decode("latin1")
    found["thumbnail"] = litellm.video_content(made.id, variant="thumbnail", **options)[8:12].decode("latin1")
    remix = litellm.video_remix(made.id, "y", **options)
    found["remix"] = [remix.id != made.id, ended(remix.id, options)]
    found["list"] = len(litellm.video_list(limit=2, **options)["data"])
    other = asyncio.run(litellm.avideo_generation(prompt="x", seconds="1", **model))
    found["video, async"] = ended(other.id, options)
    return found


def ended(id: str, options: dict[str, Any]) -> str:
    deadline = time.monotonic() + 60
    while (status := litellm.video_status(id, **options).status) in ("queued", "in_progress"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return str(status)


def main() -> None:
    png = Path(sys.argv[3])
    print(json.dumps({"pictures": pictures(sys.argv[1], png), "videos": videos(sys.argv[2], png)}))


if __name__ == "__main__":
    main()
