"""LiteLLM's picture and video calls against real servers.

LiteLLM needs an older openai and huggingface-hub than this project, and 340 MB: so it lives in an environment of its
own, which `--matrix` makes (in 40 s) and pytest's cache keeps.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench.processes import Server
from tests.golden import picture_file

LITELLM = "litellm==1.106.2"


@pytest.fixture(scope="module")
def python(pytestconfig: pytest.Config, whole_matrix: bool) -> Path:
    """The interpreter of an environment with LiteLLM."""
    if not (cache := getattr(pytestconfig, "cache", None)):
        pytest.skip("there is no cache to keep its environment in")
    folder = cache.mkdir(LITELLM)
    found, done = folder / "bin" / "python", folder / "done"
    if not done.exists():
        if not whole_matrix:
            pytest.skip(f"no environment with {LITELLM}: --matrix makes one")
        shutil.rmtree(folder)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True, timeout=60)
        subprocess.run([found, "-m", "pip", "install", "--quiet", LITELLM], check=True, timeout=170)
        done.touch()
    return found


@pytest.mark.timeout(400)
def test_its_calls(python: Path, picture_server: Server, video_server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture_file(64, 64))
    script = Path(__file__).with_name("litellm_calls.py")
    command = [python, "-P", script, picture_server.url, video_server.url, tmp_path / "a.png"]
    # without the second variable it asks the internet for a list of prices
    environment = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "PYTHONPATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-5000:]
    png = ["PNG", True]
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "pictures": {
            "generation": ["PNG", *png],
            "generation, async": png,
            "edit": png,
            "edit of a list": png,
            "edit, async": png,
            "variation": png,
            "bad size": "BadRequestError",
            "bad model": "NotFoundError",
        },
        "videos": {
            "video": ["video", "64x64", "1", "completed"],
            "content": "ftyp",
            "thumbnail": "WEBP",
            "remix": [True, "completed"],
            "list": 2,
            "video, async": "completed",
        },
    }
