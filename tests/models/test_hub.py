"""The hub's client against a real HTTP server that answers as the hub does."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from darkroom.models.checkpoint import DEMO

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """One repository, `someone/tiny`, with the demo's files. Remembers the bytes of weights that it gave."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files = {str(path.relative_to(DEMO)): path.read_bytes() for path in DEMO.rglob("*") if path.is_file()}
        self.weight_bytes = 0


class Answer(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if re.fullmatch(r"/api/models/someone/tiny(/revision/[^/]+)?", path):
            siblings = [{"rfilename": name} for name in self.server.files]
            self.answer(200, json.dumps({"id": "someone/tiny", "sha": COMMIT, "siblings": siblings}).encode())
        elif re.fullmatch(r"/api/models/someone/tiny/tree/[^/]+", path):
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": sha256(data).hexdigest()}
                for name, data in self.server.files.items()
            ]
            self.answer(200, json.dumps(entries).encode())
        elif (match := re.fullmatch(r"/someone/tiny/resolve/[^/]+/(.+)", path)) and match[1] in self.server.files:
            self.file(match[1])
        else:
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def file(self, name: str) -> None:
        data, status, headers = self.server.files[name], 200, {}
        headers = {"ETag": f'"{sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(match[1]), min(int(match[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data, status = data[first : last + 1], 206
        if name.endswith(".safetensors") and self.command == "GET":
            self.server.weight_bytes += len(data)
        self.answer(status, data, headers)

    def answer(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Silent."""


@contextmanager
def running() -> Iterator[Hub]:
    with Hub() as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        yield hub
        hub.shutdown()


def darkroom(hub: Hub, cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [str(Path(sys.executable).parent / "darkroom"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)


def test_check_reads_headers_only_and_generate_then_fetches_the_weights(tmp_path: Path) -> None:
    with running() as hub:
        hub.files["vae/diffusion_pytorch_model.fp16.safetensors"] = b"a variant, which is not needed"
        checked = darkroom(hub, tmp_path, "check", "someone/tiny", "--tp", "2")
        assert (checked.returncode, checked.stdout.splitlines()[-1]) == (0, "valid"), checked.stderr
        local = darkroom(hub, tmp_path, "check", str(DEMO), "--tp", "2").stdout
        assert [line for line in checked.stdout.splitlines() if "weights" in line] == [
            line for line in local.splitlines() if "weights" in line
        ]
        assert 0 < hub.weight_bytes < sum(len(data) for name, data in hub.files.items() if "safetensors" in name) / 10
        assert not list(tmp_path.rglob("*.safetensors"))

        out = tmp_path / "out.png"
        made = darkroom(
            hub, tmp_path, "generate", "someone/tiny", "a star", "-o", str(out), "--num-inference-steps", "2"
        )
        assert made.returncode == 0 and out.stat().st_size > 1000, made.stderr
        assert len(list(tmp_path.rglob("snapshots/**/*.safetensors"))) == 3
        before = hub.weight_bytes
        again = darkroom(hub, tmp_path, "check", "someone/tiny", "--revision", "main")
        assert (again.returncode, hub.weight_bytes) == (0, before)


@pytest.mark.parametrize("arguments", [("someone/unknown",), ("someone/tiny", "--tp", "64")])
def test_nothing_is_fetched_for_what_cannot_be(arguments: tuple[str, ...], tmp_path: Path) -> None:
    with running() as hub:
        refused = darkroom(hub, tmp_path, "serve", *arguments)
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1), refused.stderr
        assert hub.weight_bytes == 0
