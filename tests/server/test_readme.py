"""The README's commands for clients, as they stand there, in a real shell against a real server."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import httpx
from PIL import Image

from bench.processes import Server

README = (Path(__file__).parents[2] / "README.md").read_text()
ADDRESS = "http://127.0.0.1:8000"
"""Where the README's server listens; a test's has a port of its own."""


def commands(word: str) -> list[str]:
    """Those that begin with the word, each with the lines that continue it."""
    found: list[str] = []
    for line in re.findall(r"^    (.*)$", README, re.MULTILINE):
        if found and found[-1].endswith("\\"):
            found[-1] += f"\n{line}"
        elif line.startswith(f"{word} "):
            found.append(line)
    return found


def run(command: str, folder: Path, server: Server) -> str:
    line = command.replace(ADDRESS, server.url)
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", line], cwd=folder, capture_output=True, timeout=120)
    assert done.returncode == 0, (line, done.stderr.decode())
    return done.stdout.decode()


def test_the_curl_commands(picture_server: Server, tmp_path: Path) -> None:
    first, *others = commands("curl")
    assert len(others) == 3 and all(ADDRESS in line for line in (first, *others))
    run(first, tmp_path, picture_server)
    with Image.open(tmp_path / "out.png") as picture:
        assert (picture.format, picture.size) == ("PNG", (64, 64))
    mask = Image.new("RGBA", (64, 64), "black")
    mask.paste((0, 0, 0, 0), (16, 16, 48, 48))
    mask.save(tmp_path / "mask.png")
    numbers = []
    for line in others:
        data = json.loads(run(line, tmp_path, picture_server))["data"]
        numbers.append(len(data))
        assert all(httpx.get(item["url"]).headers["content-type"] == "image/png" for item in data)
    assert numbers == [1, 1, 2]


def test_the_client_in_python(picture_server: Server, tmp_path: Path) -> None:
    [code] = [code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "OpenAI(" in code]
    (tmp_path / "client.py").write_text(code.replace(ADDRESS, picture_server.url))
    printed = run(f"{sys.executable} client.py", tmp_path, picture_server)
    kinds = [line.split()[0] for line in printed.splitlines()]
    assert kinds == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
