"""Pictures without a server."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from darkroom import Darkroom, ParallelConfig, RequestError, SamplingParams
from darkroom.configs import ConfigError
from darkroom.models.checkpoint import DEMO
from darkroom.offline import GenerationError, with_format
from tests import golden
from tests.engine.peer import eventually, have_gone, tree

PARAMS = SamplingParams(width=112, height=80, num_inference_steps=3, seed=7)


@pytest.fixture(scope="module")
def darkroom() -> Iterator[Darkroom]:
    with Darkroom("demo", ParallelConfig(ulysses_degree=2), device="cpu") as darkroom:
        yield darkroom


def expected(prompt: str, seed: int) -> np.ndarray[Any, Any]:
    """What one process makes of it."""
    usual = json.loads((DEMO / "darkroom.json").read_text())["guidance_scale"]
    with golden.worker(DEMO, ParallelConfig()) as one:
        [(_, decoded)] = golden.generate(one, [golden.request(prompt, guidance_scale=usual, seed=seed)]).values()
        assert decoded is not None
        return np.asarray(one.model.pictures(decoded)[0], int)


def test_pictures_are_those_of_one_process(darkroom: Darkroom) -> None:
    first, second = darkroom.generate("a red circle", SamplingParams(**{**vars(PARAMS), "n": 2}))
    for seed, picture in ((7, first), (8, second)):
        assert isinstance(picture, Image.Image)
        assert (picture.size, picture.mode, picture.info["seed"]) == ((112, 80), "RGB", seed)
        assert np.abs(np.asarray(picture, int) - expected("a red circle", seed)).max() <= 1


def test_progress_is_told_over_all_pictures(darkroom: Darkroom) -> None:
    heard: list[tuple[int, int]] = []
    darkroom.generate("a cat", SamplingParams(**{**vars(PARAMS), "n": 2}), on_progress=lambda *x: heard.append(x))
    assert heard == [(i, 6) for i in range(1, 7)]


def test_more_than_the_engine_lets_wait() -> None:
    """Pictures to make, and bytes of pictures to begin with."""
    params = SamplingParams(seed=5, num_inference_steps=2, width=64, height=64, n=20)
    noise = Image.frombytes("RGB", (512, 512), np.random.default_rng(0).bytes(512 * 512 * 3))  # no PNG makes it smaller
    with Darkroom("demo", device="cpu", max_queue=3, max_queue_mb=1) as small:
        pictures = small.generate("a star", params)
        assert [picture.info["seed"] for picture in pictures] == list(range(5, 25))
        huge = golden.request(width=2**20, height=2**20)
        with pytest.raises(GenerationError):
            small.run([huge] + [golden.request()] * 20)
        assert len(small.generate("a star", params)) == 20
        assert len(small.generate("a star", replace(params, n=3), images=[noise])) == 3


def test_calls_from_several_threads_wait_for_each_other(darkroom: Darkroom) -> None:
    params = [SamplingParams(seed=seed, num_inference_steps=2, width=64, height=64) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        pictures = list(pool.map(lambda each: darkroom.generate("a star", each)[0], params))
    assert [picture.info["seed"] for picture in pictures] == [0, 1, 2, 3]


def test_defaults_are_the_models(darkroom: Darkroom) -> None:
    steps: list[int] = []
    [picture] = darkroom.generate("a cat", on_progress=lambda done, total: steps.append(total))
    assert picture.size == darkroom.capabilities.default_size == (128, 128)
    assert steps == [20] * 20
    assert 0 <= picture.info["seed"] < 2**32


@pytest.mark.parametrize(
    ("values", "param"),
    [({"width": 100}, "size"), ({"num_inference_steps": 0}, "num_inference_steps"), ({"n": 0}, "n")],
)
def test_what_the_model_cannot_take(values: dict[str, int], param: str, darkroom: Darkroom) -> None:
    with pytest.raises(RequestError) as caught:
        darkroom.generate("a cat", SamplingParams(**values))
    assert caught.value.param == param
    with pytest.raises(RequestError, match="blank"):
        darkroom.generate("")


def test_a_picture_that_is_cut_off(darkroom: Darkroom) -> None:
    broken = SamplingParams(images=(golden.picture_file(128, 128)[:-300],))
    with pytest.raises(RequestError, match="cannot be decoded") as caught:
        darkroom.generate("a cat", broken)
    assert caught.value.param == "image"


def test_a_failure_of_the_engine_is_no_fault_of_the_request(darkroom: Darkroom) -> None:
    huge = golden.request(width=2**20, height=2**20)  # never let through by `generate`
    with pytest.raises(GenerationError):
        darkroom.run([huge, golden.request()])
    assert len(darkroom.generate("a cat", PARAMS)) == 1


def test_an_interrupted_call_leaves_nothing_behind(darkroom: Darkroom) -> None:
    def interrupt(done: int, _: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        darkroom.generate("a cat", SamplingParams(num_inference_steps=200, n=4), on_progress=interrupt)
    [picture] = darkroom.generate("a red circle", PARAMS)
    assert np.abs(np.asarray(picture, int) - expected("a red circle", 7)).max() <= 1


def test_a_dead_engine_is_noticed_and_closing_ends_all(darkroom: Darkroom) -> None:
    """The last test with this engine."""
    processes = tree(darkroom._engine.process.pid)
    assert len(processes) >= 4

    def kill(done: int, _: int) -> None:
        darkroom._engine.process.kill()

    with pytest.raises(GenerationError, match="the engine process ended with exit code -9"):
        darkroom.generate("a cat", SamplingParams(num_inference_steps=200), on_progress=kill)
    darkroom.close()
    assert have_gone(processes)
    assert not darkroom._engine.run_dir.exists()
    darkroom.close()  # a second time does nothing


# ---- videos ------------------------------------------------------------------------------------------------------


def test_a_video_is_frames_or_a_file(checkpoints: dict[str, Path]) -> None:
    """The frames are those of one process; the file's, what is left of them in H.264."""
    params = SamplingParams(width=96, height=64, num_frames=5, fps=8, num_inference_steps=2, seed=3)
    with Darkroom(checkpoints["wan_2_2"], ParallelConfig(cfg_parallel_size=2), device="cpu") as darkroom:
        frames = darkroom.generate("a red star", params)
        file = darkroom.generate_video("a red star", params)
        wanted = darkroom.capabilities.resolve("a red star", params)
    with golden.worker(checkpoints["wan_2_2"], ParallelConfig()) as one:
        [(_, decoded)] = golden.generate(one, [wanted]).values()
        assert decoded is not None
        alone = one.model.pictures(decoded)
    assert [frame.info["seed"] for frame in frames] == [3] * 5
    for frame, other in zip(frames, alone, strict=True):
        assert np.abs(np.asarray(frame, int) - np.asarray(other, int)).max() <= 1
    with av.open(io.BytesIO(file)) as video:
        coded = [np.asarray(frame.to_image(), int) for frame in video.decode(video=0)]
    for frame, other in zip(coded, alone, strict=True):
        assert frame.shape == (64, 96, 3) and np.abs(frame - np.asarray(other, int)).mean() < 40


# ---- what cannot be ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("./nothing", {}, "is no folder"),
        ("demo", {"device": "gpu"}, "--device 'gpu'"),
        ("demo", {"tp": 0}, "--tp 0"),
        ("demo", {"nope": 1}, "--nope 1: extra inputs are not permitted"),
        ("demo", {"ulysses_degree": 64}, "the transformer has"),
    ],
)
def test_a_bad_configuration_is_refused_at_once(model: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Darkroom(model, **options)


def test_a_checkpoint_that_cannot_be_loaded(
    checkpoints: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(checkpoints["qwen_image_4_heads"], tmp_path / "model"))
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:9999])
    with pytest.raises(ConfigError, match=r"vae/diffusion_pytorch_model\.safetensors is not a whole safetensors file"):
        Darkroom(folder, device="cpu")
    assert capfd.readouterr().err == ""  # so that a command can say it in one line


@pytest.mark.parametrize(
    ("suffix", "output_format"), [(".png", "png"), (".JPG", "jpeg"), (".jpeg", "jpeg"), (".webp", "webp")]
)
def test_a_files_ending_names_its_format(suffix: str, output_format: str) -> None:
    assert with_format(golden.request(), suffix).output_format == output_format


@pytest.mark.parametrize("suffix", ["", ".gif", "png"])
def test_an_ending_that_names_no_format(suffix: str) -> None:
    with pytest.raises(ConfigError, match=r"known: \.png, \.jpg, \.jpeg, \.webp"):
        with_format(golden.request(), suffix)


# ---- as a script -----------------------------------------------------------------------------------------------

SCRIPT = """
from darkroom import Darkroom, ParallelConfig, SamplingParams

darkroom = Darkroom(model="demo", device="cpu")
[picture] = darkroom.generate("a red circle", SamplingParams(width=112, height=80, num_inference_steps=3, seed=7))
picture.save("picture.png")
print(darkroom._engine.run_dir)
"""


def test_a_script_needs_no_main_guard_and_may_forget_to_close(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    picture = np.asarray(Image.open(tmp_path / "picture.png"), int)
    assert np.abs(picture - expected("a red circle", 7)).max() <= 1
    assert eventually(lambda: not Path(done.stdout.strip()).exists())
