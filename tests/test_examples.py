"""The examples run as they are described."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import av
import pytest
from PIL import Image

from tests.golden import picture_file

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, folder: Path, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_text_to_image(tmp_path: Path) -> None:
    arguments = ("--model", "demo", "--prompt", "a red star", "--num_inference_steps", "2", "--seed", "3")
    assert run("text_to_image.py", tmp_path, *arguments, "--ulysses_degree", "2") == "out.png: 128x128, seed 3\n"
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.size == (128, 128)


def test_image_edit(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    (tmp_path / "input.png").write_bytes(picture_file(160, 100))
    steps = ("--image", "input.png", "--num-inference-steps", "2")
    model = ("--model", str(checkpoints["qwen_image_edit_4_heads"]), "--prompt", "make it red")
    assert run("image_edit.py", tmp_path, *model, *steps, "--seed", "3") == "out.png: 128x64, seed 3\n"
    layered = ("--model", str(checkpoints["qwen_image_layered_4_heads"]), "--layers", "2", *steps)
    assert len(run("image_edit.py", tmp_path, *layered).splitlines()) == 2
    with Image.open(tmp_path / "out-1.png") as layer:
        assert layer.mode == "RGBA"


def test_text_to_video(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    """With guidance over two ranks."""
    size = ("--width", "96", "--height", "64", "--num-frames", "5", "--num-inference-steps", "2")
    model = ("--model", str(checkpoints["wan_2_2"]), "--prompt", "a red star", "--cfg-parallel-size", "2")
    said = run("text_to_video.py", tmp_path, *model, *size, "--fps", "8", "--seed", "3")
    assert said == f"out.mp4: {(tmp_path / 'out.mp4').stat().st_size} bytes\n"
    with av.open(str(tmp_path / "out.mp4")) as video:
        assert [(frame.width, frame.height) for frame in video.decode(video=0)] == [(96, 64)] * 5
        assert video.streams.video[0].average_rate == 8


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*_*.py")))
def test_every_example_says_what_it_takes(name: str, tmp_path: Path) -> None:
    assert "--" in run(name, tmp_path, "--help")
