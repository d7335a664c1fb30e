"""Tiny models for real `darkroom serve` processes: real pipelines with random weights, which answer in 20 ms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.tiny import qwen_image, wan

_QUICK = {
    "num_inference_steps": 3,
    "max_inference_steps": 4,
    "quality_steps": {"low": 2, "medium": 2, "high": 3},
    "max_pixels": 128 * 128,
    "image_area": 64 * 64,
}


def picture_model(folder: Path) -> Path:
    """Makes pictures of 64x64 pixels from text, and draws over what it is sent."""
    return _declared(qwen_image(folder), default_size=[64, 64])


def video_model(folder: Path) -> Path:
    """Makes videos of 64x64 pixels and 5 frames, from text or a picture."""
    return _declared(wan(folder, small=True), default_size=[64, 64], num_frames=5, max_frames=9, fps=4)


def _declared(folder: Path, **values: Any) -> Path:
    file = folder / "darkroom.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**known, **_QUICK, **values}))
    return folder
