"""End to end: the real command, the real processes, the real OpenAI SDK, on the demo model."""

from __future__ import annotations

import atexit
import base64
import io
import json
import os
import shutil
import signal
import sqlite3
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import psutil
import pytest
import trustme
from openai import OpenAI
from PIL import Image

from darkroom.models.checkpoint import DEMO
from darkroom.server.keys import hashed_line
from tests.tiny import qwen_image_edit

PROMPT = "three yellow stars on a blue background"
START_SECONDS = 60.0
TEMPORARY = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))
"""Where these servers put their sockets, and no others do; short, because a socket's path is."""
atexit.register(shutil.rmtree, TEMPORARY, ignore_errors=True)


class Server:
    """A running `darkroom serve`."""

    def __init__(self, process: subprocess.Popen[str], url: str, printed: str) -> None:
        self.process = process
        self.url = url
        self.printed = printed
        self.client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

    @property
    def tree(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    @property
    def workers(self) -> list[psutil.Process]:
        """Processes that wait for commands, in order of rank: those of the forkserver, or with no children."""
        [forkserver] = [p for p in self.tree if any("forkserver" in word for word in p.cmdline()) and p.children()]
        return sorted(forkserver.children(), key=lambda process: process.pid)

    def picture(self, prompt: str = PROMPT, **options: Any) -> Any:
        extra = {"seed": 5, "num_inference_steps": 8, **options.pop("extra_body", {})}
        response = self.client.images.generate(prompt=prompt, extra_body=extra, **options)
        return pixels(response.data[0].b64_json)


def pixels(data: str | None) -> Any:
    assert data is not None
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")).astype(int)


def start(*arguments: str, stderr: int | None = None) -> subprocess.Popen[str]:
    command = [str(Path(sys.executable).parent / "darkroom"), "serve", *arguments, "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(TEMPORARY)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment)


@contextmanager
def serve(*arguments: str, stderr: int | None = None) -> Iterator[Server]:
    process = start(*arguments, stderr=stderr)
    try:
        printed = ""
        assert process.stdout is not None
        for line in process.stdout:
            printed += line
            if line.startswith("ready: "):
                yield Server(process, line.removeprefix("ready: ").strip().removesuffix("/v1"), printed)
                break
        else:
            raise AssertionError(f"the server ended with {process.wait()} before it was ready:\n{printed}")
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=10)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serve("demo") as running:
        yield running


@pytest.fixture(scope="module")
def expected(server: Server) -> Any:
    return server.picture()


def wait_until(condition: Any, seconds: float = 15.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return bool(condition())


def run_folders() -> set[Path]:
    return set(TEMPORARY.glob("darkroom-*"))


# ---- what it says, and what it serves ------------------------------------------------------------------------------


def test_it_says_what_runs_and_where(server: Server) -> None:
    for words in ("demo (Darkroom demo)", "1 cpu rank, float32", "axes", f"address    {server.url}", "ready: "):
        assert words in server.printed


def test_the_sdk_gets_the_picture_and_all_that_belongs_to_it(server: Server) -> None:
    response = server.client.images.generate(
        prompt=PROMPT, size="112x80", n=2, quality="low", output_format="webp", extra_body={"seed": 9}
    )
    assert response.data is not None and response.usage is not None
    assert [picture.seed for picture in response.data] == [9, 10]  # type: ignore[attr-defined]
    for picture in response.data:
        opened = Image.open(io.BytesIO(base64.b64decode(picture.b64_json or "")))
        assert (opened.format, opened.size) == ("WEBP", (112, 80))
    assert (response.size, response.quality, response.output_format) == ("112x80", "low", "webp")
    assert response.usage.output_tokens == 2 * 7 * 5
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens


def test_picture_i_of_n_is_the_one_of_seed_plus_i(server: Server) -> None:
    response = server.client.images.generate(prompt=PROMPT, n=2, extra_body={"seed": 4, "num_inference_steps": 8})
    assert response.data is not None
    assert np.array_equal(pixels(response.data[1].b64_json), server.picture())


def test_no_seed_is_a_random_one_which_is_told(server: Server) -> None:
    seeds = set()
    for _ in range(2):
        response = server.client.images.generate(prompt=PROMPT, extra_body={"num_inference_steps": 2})
        assert response.data is not None
        seeds.add(response.data[0].seed)  # type: ignore[attr-defined]
    assert len(seeds) == 2


def test_a_stream_ends_with_the_same_picture_and_its_previews_approach_it(server: Server, expected: Any) -> None:
    events = list(
        server.client.images.generate(
            prompt=PROMPT, stream=True, partial_images=2, extra_body={"seed": 5, "num_inference_steps": 8}
        )
    )
    assert [event.type.removeprefix("image_generation.") for event in events] == [
        "partial_image",
        "partial_image",
        "completed",
    ]
    first, second, last = (pixels(event.b64_json) for event in events)
    assert np.array_equal(last, expected)
    assert abs(second - last).mean() < abs(first - last).mean()
    assert abs(first - last).mean() < 80  # the estimate of the clean picture, not the noise


def test_the_negative_prompt_and_the_scale_change_the_picture(server: Server, expected: Any) -> None:
    assert not np.array_equal(server.picture(extra_body={"negative_prompt": "yellow"}), expected)
    assert not np.array_equal(server.picture(extra_body={"true_cfg_scale": 1}), expected)


def test_requests_side_by_side_are_each_alone(server: Server, expected: Any) -> None:
    with ThreadPoolExecutor(6) as pool:
        pictures = list(pool.map(lambda i: server.picture(extra_body={"seed": 5 + i % 2}), range(6)))
    assert all(np.array_equal(picture, expected) for picture in pictures[::2])
    assert all(np.array_equal(picture, pictures[1]) for picture in pictures[1::2])


def test_a_client_that_goes_away_stops_its_work(server: Server) -> None:
    with pytest.raises(openai.APITimeoutError):
        server.client.with_options(timeout=0.5).images.generate(
            prompt=PROMPT, size="512x512", extra_body={"num_inference_steps": 200}
        )
    health = f"{server.url}/health"
    assert wait_until(lambda: httpx.get(health).json() == {"status": "ready", "waiting": 0, "running": 0})


def test_models_health_metrics_and_the_document(server: Server, expected: Any) -> None:
    assert expected.any()  # one picture was made, which the metrics count
    assert [model.id for model in server.client.models.list()] == ["demo"]
    assert server.client.models.retrieve("demo").owned_by == "darkroom"
    assert httpx.get(f"{server.url}/health").json()["status"] == "ready"
    assert (
        'darkroom_requests_total{outcome="ok",route="/v1/images/generations"}'
        in httpx.get(f"{server.url}/metrics").text
    )
    assert "/v1/images/generations" in httpx.get(f"{server.url}/openapi.json").json()["paths"]


def test_a_bad_request_is_refused_while_a_picture_is_made(server: Server) -> None:
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(server.picture, extra_body={"num_inference_steps": 60})
        with pytest.raises(openai.BadRequestError) as caught:
            server.client.images.generate(prompt=PROMPT, size="100x100")
        assert not long.done()
        assert (caught.value.param, caught.value.code) == ("size", "invalid_value")
        long.result()


# ---- pictures in ---------------------------------------------------------------------------------------------------

HALF = Image.new("RGBA", (128, 128), "black")
HALF.paste((0, 0, 0, 0), (64, 0, 128, 128))  # what is transparent is drawn anew


def file_of(picture: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return buffer.getvalue()


def test_a_mask_leaves_what_it_covers(server: Server, expected: Any) -> None:
    before = Image.fromarray(expected.astype(np.uint8))
    response = server.client.images.edit(
        image=file_of(before),
        mask=file_of(HALF),
        prompt="a green circle on a red background",
        extra_body={"seed": 1, "num_inference_steps": 8},
    )
    assert response.data is not None and response.usage is not None
    change = abs(pixels(response.data[0].b64_json) - expected).mean(axis=(0, 2))
    assert change[:48].mean() < 16 < change[80:].mean()  # the VAE draws again what is kept, and blurs the edge
    assert response.usage.input_tokens_details.image_tokens == 8 * 8
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens


def test_a_variation_is_near_its_picture(server: Server, expected: Any) -> None:
    picture = file_of(Image.fromarray(expected.astype(np.uint8)), "JPEG")
    changes = []
    for strength in (0.3, 1):
        options = {"seed": 1, "num_inference_steps": 10, "strength": strength}
        with pytest.deprecated_call():
            response = server.client.images.create_variation(image=picture, extra_body=options)
        assert response.data is not None
        changes.append(abs(pixels(response.data[0].b64_json) - expected).mean())
    assert 0 < changes[0] < changes[1]


def test_a_picture_that_is_cut_off_is_400_and_the_server_goes_on(server: Server, expected: Any) -> None:
    whole = file_of(Image.fromarray(expected.astype(np.uint8)))
    for broken in (whole[: len(whole) // 2], whole[:400]):
        with pytest.raises(openai.BadRequestError, match="cannot be decoded") as caught:
            server.client.images.edit(image=broken, prompt=PROMPT)
        assert (caught.value.param, caught.value.code) == ("image", "invalid_value")
    assert np.array_equal(server.picture(), expected)


def test_a_url_is_the_picture(server: Server, expected: Any) -> None:
    extra = {"seed": 5, "num_inference_steps": 8}
    response = server.client.images.generate(prompt=PROMPT, response_format="url", extra_body=extra)
    assert response.data is not None and response.data[0].url is not None
    fetched = httpx.get(response.data[0].url)
    assert fetched.headers["content-type"] == "image/png"
    assert np.array_equal(pixels(base64.b64encode(fetched.content).decode()), expected)


def test_an_editing_model_edits(tmp_path: Path) -> None:
    model = qwen_image_edit(tmp_path / "edit", several=True)
    red, blue = (file_of(Image.new("RGB", (96, 64), colour)) for colour in ("red", "blue"))
    extra = {"seed": 5, "num_inference_steps": 2}
    with serve(str(model)) as server:
        edit = server.client.images.edit
        whole = edit(image=[red, blue], prompt="both", extra_body=extra)
        assert whole.data is not None and whole.usage is not None
        picture = pixels(whole.data[0].b64_json)
        assert whole.size == f"{picture.shape[1]}x{picture.shape[0]}"
        assert whole.usage.input_tokens_details.image_tokens >= 2 * 16
        other = edit(image=[red, red], prompt="both", extra_body=extra)
        assert other.data is not None
        assert not np.array_equal(pixels(other.data[0].b64_json), picture)  # the second picture is seen
        events = list(edit(image=[red, blue], prompt="both", stream=True, partial_images=1, extra_body=extra))
        assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]
        assert np.array_equal(pixels(events[-1].b64_json), picture)
        with pytest.raises(openai.BadRequestError, match="POST /v1/images/edits"):
            server.client.images.generate(prompt="x")
        with pytest.raises(openai.BadRequestError, match="no mask"):
            edit(image=red, mask=red, prompt="x")


# ---- every layout draws the same picture ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        "--tp 2 --usp 2 --vae-pp 4",
        *(
            pytest.param(flags, marks=pytest.mark.matrix)
            for flags in ("--usp 2 --ring 2", "--tp 4", "--cfg 2 --usp 2 --omni")
        ),
    ],
)
def test_four_workers_draw_what_one_draws(flags: str, expected: Any) -> None:
    with serve("demo", *flags.split()) as server:
        assert abs(server.picture() - expected).max() <= 1
        assert len(server.workers) == 4


# ---- failures and ends ---------------------------------------------------------------------------------------------


def test_a_worker_that_is_killed_is_an_error_and_not_the_end() -> None:
    with serve("demo", "--usp", "2") as server, ThreadPoolExecutor(2) as pool:
        requests = [pool.submit(server.picture, extra_body={"num_inference_steps": 200}) for _ in range(2)]
        assert wait_until(lambda: httpx.get(f"{server.url}/health").json()["running"] == 2)
        server.workers[1].kill()
        for request in requests:
            with pytest.raises(openai.InternalServerError) as caught:
                request.result(30)
            assert caught.value.status_code == 503
        assert wait_until(lambda: httpx.get(f"{server.url}/health").status_code == 200, 30)
        assert server.picture().shape == (128, 128, 3)


def test_workers_that_cannot_be_started_again_end_the_server(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(DEMO, tmp_path / "model"))
    with serve(str(folder)) as server:
        (folder / "transformer").rename(tmp_path / "elsewhere")
        server.workers[0].kill()
        assert server.process.wait(40) == 2


@pytest.mark.parametrize(
    ("number", "has_engine"),
    [
        (signal.SIGINT, False),
        (signal.SIGTERM, True),
        pytest.param(signal.SIGTERM, False, marks=pytest.mark.matrix),
        pytest.param(signal.SIGINT, True, marks=pytest.mark.matrix),
    ],
)
def test_a_server_that_is_stopped_while_it_starts_leaves_nothing(number: signal.Signals, has_engine: bool) -> None:
    """Before anything answers, and when the engine listens."""
    before = run_folders()
    process = start("demo")

    def has_come() -> bool:
        new = run_folders() - before
        return any(file.is_socket() for folder in new for file in folder.rglob("*")) if has_engine else bool(new)

    assert wait_until(has_come)
    tree = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    try:
        process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0
    assert wait_until(lambda: not any(alive(child) for child in tree) and run_folders() == before)


def test_without_an_engine_the_server_ends() -> None:
    with serve("demo") as server:
        tree = server.tree
        [engine] = [process for process in tree if "darkroom.engine" in process.cmdline()]
        engine.kill()
        assert server.process.wait(15) == 1
        assert wait_until(lambda: not any(alive(process) for process in tree))


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.matrix), signal.SIGTERM, signal.SIGKILL]
)
def test_nothing_is_left_however_it_ends(number: signal.Signals) -> None:
    before = run_folders()
    with serve("demo", "--ring", "2", "--drain-timeout", "0") as server, ThreadPoolExecutor(1) as pool:
        request = pool.submit(server.picture, extra_body={"num_inference_steps": 200})
        assert wait_until(lambda: httpx.get(f"{server.url}/health").json()["running"] == 1)
        options = {"response_format": "url", "extra_body": {"num_inference_steps": 2}}
        server.client.images.generate(prompt=PROMPT, **options)
        tree, made = server.tree, run_folders() - before
        assert any(list(folder.rglob("*.png")) for folder in made)
        assert not any(file.is_socket() for folder in made for file in folder.rglob("*"))
        started = time.monotonic()
        server.process.send_signal(number)
        code = server.process.wait(15)
        if number != signal.SIGKILL:
            assert (code, time.monotonic() - started < 5.5) == (0, True)
        assert wait_until(lambda: not any(alive(process) for process in tree))
        assert wait_until(lambda: not any(folder.exists() for folder in made))
        with pytest.raises(openai.APIError):
            request.result(5)


def test_sigterm_lets_what_runs_end_and_a_second_one_does_not() -> None:
    with serve("demo") as server, ThreadPoolExecutor(2) as pool:
        request = pool.submit(server.picture, extra_body={"num_inference_steps": 60})
        assert wait_until(lambda: httpx.get(f"{server.url}/health").json()["running"] == 1)
        server.process.send_signal(signal.SIGTERM)
        assert wait_until(lambda: httpx.get(f"{server.url}/health").json()["status"] == "draining")
        with pytest.raises(openai.InternalServerError, match="takes no new work") as caught:
            server.picture()
        assert (caught.value.status_code, caught.value.response.headers["retry-after"]) == (503, "10")
        assert request.result(60).shape == (128, 128, 3)
        assert server.process.wait(15) == 0
    with serve("demo") as server, ThreadPoolExecutor(2) as pool:
        request = pool.submit(server.picture, extra_body={"num_inference_steps": 200}, size="512x512")
        assert wait_until(lambda: httpx.get(f"{server.url}/health").json()["running"] == 1)
        for _ in range(2):
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
        assert server.process.wait(15) == 0
        with pytest.raises(openai.APIError):
            request.result(5)


def test_all_that_guards_a_server_at_once(tmp_path: Path) -> None:
    """TLS, a key file, JSON logs of every process, and a key that nothing shows."""
    key, authority = "sk-0123456789abcdef", trustme.CA()
    certificate, keys, logs = (tmp_path / name for name in ("tls.pem", "keys", "log"))
    certificate.write_bytes(authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.bytes())
    keys.write_text(hashed_line("alice", key))
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    flags = ["--ssl-certfile", str(certificate), "--api-key-file", str(keys), "--log-format", "json"]
    with (
        logs.open("w") as stderr,
        serve("demo", *flags, stderr=stderr.fileno()) as server,
        httpx.Client(verify=trust, timeout=30) as client,
    ):
        assert server.url.startswith("https://")
        sdk = OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, http_client=client)
        assert sdk.images.generate(prompt=PROMPT, extra_body={"num_inference_steps": 2}).data
        with pytest.raises(openai.AuthenticationError):
            sdk.with_options(api_key="sk-other").images.generate(prompt=PROMPT)
        assert key not in str([process.cmdline() for process in [psutil.Process(server.process.pid), *server.tree]])
    lines = [json.loads(line) for line in logs.read_text().splitlines()]
    assert [(line["status"], line.get("key")) for line in lines if line["message"] == "request"] == [
        (200, "alice"), (401, None),
    ]  # fmt: skip
    assert key not in logs.read_text()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--api-key-file", "/nowhere"], "--api-key-file /nowhere: No such file"),
        (["--ssl-certfile", "/nowhere"], "--ssl-certfile /nowhere: cannot be used"),
        (["--api-key", "schlüssel"], "printable ASCII"),
    ],
)
def test_what_cannot_guard_a_server_ends_it(flags: list[str], words: str) -> None:
    code, errors = ended("demo", *flags)
    assert (code, words in errors, "schlüssel" in errors) == (2, True, False)


def ended(*arguments: str) -> tuple[int, str]:
    """The exit code of a server that cannot start, and what it wrote to standard error."""
    process = start(*arguments, stderr=subprocess.PIPE)
    _, errors = process.communicate(timeout=START_SECONDS)
    return process.returncode, errors


def alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def test_weights_that_do_not_fit_their_config_are_named(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(DEMO, tmp_path / "unfit"))
    config = folder / "transformer" / "config.json"
    config.write_text(config.read_text().replace('"joint_attention_dim": 128', '"joint_attention_dim": 64'))
    code, errors = ended(str(folder))
    [line] = [line for line in errors.splitlines() if line.startswith("darkroom: ")]
    assert (code, "config.json does not fit the weights" in line) == (2, True)


def test_an_address_in_use_is_named(server: Server) -> None:
    port = server.url.rsplit(":", 1)[1]
    process = subprocess.run(
        [str(Path(sys.executable).parent / "serve"), "demo", "--port", port], capture_output=True, text=True, timeout=30
    )
    assert (process.returncode, "Address already in use" in process.stderr) == (2, True)
    assert process.stderr.count("\n") == 1


# ---- videos --------------------------------------------------------------------------------------------------------


def video_demo(folder: Path) -> Path:
    """The demo model, declared as one that makes videos, of a single frame."""
    model = Path(shutil.copytree(DEMO, folder / "model"))
    file = model / "darkroom.json"
    declared = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**declared, "tasks": ["text-to-video"], "fps": 8, "max_frames": 1}))
    return model


def test_videos_outlive_the_server(tmp_path: Path) -> None:
    """A killed server makes them when it is back, and SIGTERM lets the one end that is being made."""
    folder = video_demo(tmp_path)
    flags = (str(folder), "--data-dir", str(tmp_path / "data"), "--drain-timeout", "120")
    with serve(*flags) as server, server.client:
        made = server.client.videos.create(prompt=PROMPT, extra_body={"num_inference_steps": 200})
        assert wait_until(lambda: server.client.videos.retrieve(made.id).status == "in_progress")
        server.process.kill()
    with serve(*flags) as server, server.client:
        assert server.client.videos.poll(made.id, poll_interval_ms=100).status == "completed"
        assert server.client.videos.download_content(made.id).content[4:8] == b"ftyp"
        ids = [server.client.videos.create(prompt=PROMPT, extra_body={"num_inference_steps": 60}).id for _ in range(2)]
        assert wait_until(lambda: server.client.videos.retrieve(ids[0]).status == "in_progress")
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(120) == 0
    with closing(sqlite3.connect(tmp_path / "data" / "videos.sqlite")) as database:
        found = database.execute("SELECT id, status FROM video_jobs ORDER BY id").fetchall()
    assert found == [(made.id, "completed"), (ids[0], "completed"), (ids[1], "queued")]


def test_a_folder_for_videos_that_cannot_be_had_is_named(tmp_path: Path) -> None:
    folder = video_demo(tmp_path)
    code, errors = ended(str(folder), "--data-dir", str(folder / "darkroom.json"))
    assert (code, errors.count("\n")) == (2, 1), errors
    assert errors.startswith("darkroom: --data-dir ")
