"""The command line: the real command for a few, and a table of what it refuses."""

from __future__ import annotations

import logging
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import av
import pytest
from PIL import Image

from darkroom.cli import main
from darkroom.configs import ConfigError, ParallelConfig, SamplingParams
from darkroom.offline import Darkroom, GenerationError
from tests import tiny
from tests.golden import generate, worker
from tests.subjects import TALL, WIDE

BIN = Path(sys.executable).parent


@pytest.fixture(autouse=True)
def _logging_stays_as_it_is() -> Iterator[None]:
    """A server that cannot start has set up the log of its process, which here is that of all tests."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def run(*command: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A command of this environment, as a user types it."""
    path = [str(BIN / command[0]), *command[1:]]
    return subprocess.run(path, cwd=cwd, capture_output=True, text=True, check=False)


# ---- darkroom ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_help_names_the_commands(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    output = capsys.readouterr().out
    assert all(f"darkroom {command} MODEL" in output for command in ("serve", "generate", "check"))


@pytest.mark.parametrize("command", ["serve", "generate", "check"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: darkroom {command} ")


def test_python_m_darkroom_is_the_command() -> None:
    assert run("python", "-m", "darkroom", "--help").stdout == run("darkroom", "--help").stdout != ""


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unread(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose weights are no weights: what is refused for another reason has not read them."""
    folder = Path(shutil.copytree(checkpoints["qwen_image_4_heads"], tmp_path_factory.mktemp("unread") / "model"))
    for file in folder.rglob("*.safetensors"):
        file.write_bytes(b"")
    return folder


BAD_FLAGS = [
    (["--tp", "0"], "--tp '0': input should be greater than or equal to 1"),
    (["--tp", "5"], "the transformer has 4; use a product of at most 4"),
    (["--usp", "2", "--tp", "4"], "8 ranks share the heads"),
    (["--cfg", "3"], "use --cfg 1 or --cfg 2"),
    (["--ring", "2", "--attention-backend", "native"], "leave the backend at auto"),
    (["--device", "gpu"], "'auto', 'cpu' or 'cuda'"),
    (["--nope"], "--nope"),
    (["--config", "/none.yaml"], "/none.yaml"),
]


@pytest.mark.parametrize("command", ["serve", "generate", "check"])
@pytest.mark.parametrize(("flags", "message"), BAD_FLAGS)
def test_a_bad_flag_gets_one_line_and_exit_code_2(
    command: str, flags: list[str], message: str, unread: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = ["a cat"] if command == "generate" else []
    assert main([command, str(unread), *prompt, *flags]) == 2
    refused(capsys, message)


def refused(capsys: pytest.CaptureFixture[str], message: str) -> None:
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("darkroom: ")
    assert message in output.err
    assert output.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope"], "no command 'nope'; known: serve, generate, check"),
        (["serve"], "MODEL"),
        (["check", "./nothing"], "'./nothing' is no folder, and no hub id"),
        (["generate", "demo"], "PROMPT"),
        (["generate", "demo", ""], "'prompt' is blank"),
        (["generate", "demo", "a cat", "--width", "100"], "the nearest is 96x128"),
        (["generate", "demo", "a cat", "--num-inference-steps", "1"], "Invalid num_inference_steps 1"),
        (["generate", "demo", "a cat", "--seed", "-1"], "Invalid seed -1"),
        (["generate", "demo", "a cat", "-n", "11"], "-n '11'"),
        (["generate", "demo", "a cat", "-o", "out.gif"], "--output: no format for the ending '.gif'"),
        (["generate", "demo", "a cat", "-o", "out"], "known: .png, .jpg, .jpeg, .webp"),
        (
            ["generate", "demo", "a cat", "-o", "/nowhere/out.png"],
            "--output /nowhere/out.png: the folder does not exist",
        ),
        (["serve", "demo", "--host", "not an address", "--port", "0"], "--host not an address"),
    ],
)
def test_what_cannot_be_gets_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert output.err.count("\n") == 1


def test_a_folder_is_no_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out.png").mkdir()
    assert main(["generate", "demo", "a cat", "-o", str(tmp_path / "out.png")]) == 2
    refused(capsys, "this is a folder")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_file_that_may_not_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tmp_path.chmod(0o500)
    assert main(["generate", "demo", "a cat", "-o", str(tmp_path / "out.png")]) == 2
    refused(capsys, "may not be written")


@pytest.mark.parametrize("command", ["serve", "check"])
def test_a_checkpoint_that_is_cut_off_is_named(command: str, unread: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, str(unread), "--port", "0"] if command == "serve" else [command, str(unread)]) == 2
    refused(capsys, "diffusion_pytorch_model.safetensors is not a whole safetensors file")


def test_the_bare_serve_command() -> None:
    refusal = run("serve", "demo", "--tp", "0")
    assert (refusal.returncode, refusal.stdout) == (2, "")
    assert refusal.stderr == "darkroom: --tp '0': input should be greater than or equal to 1\n"


# ---- check ---------------------------------------------------------------------------------------------------------


def test_check_says_what_each_rank_would_hold() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    checked = run("darkroom", "check", "demo", "--device", "cpu", "--tp", "2", "--cfg", "2", "--vae-pp", "2")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (checked.returncode, checked.stderr) == (0, "")
    rows = [line.split(maxsplit=1) for line in checked.stdout.splitlines()]
    assert rows[0] == ["model", "demo (Darkroom demo)"]
    assert rows[1] == ["devices", "4 cpu ranks, float32"]
    assert rows[2] == ["axes", "cfg 2, tp 2"]
    assert rows[3] == ["vae", "decodes on 2 ranks, patches"]
    assert rows[-1] == ["valid"]
    assert "ranks 0-1  0.0" in checked.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2  # without importing torch


def test_check_says_that_the_vae_is_cut_to_the_ranks_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "demo", "--device", "cpu", "--usp", "2", "--vae-pp", "4", "--vae-use-tiling"]) == 0
    output = capsys.readouterr().out
    assert "decodes on 2 ranks, tiles (--vae-pp 4 is cut to the 2 ranks there are)" in output


def test_check_says_what_guidance_in_parallel_is_without_guidance(
    checkpoints: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    def notes(name: str, *flags: str) -> list[str]:
        assert main(["check", str(checkpoints[name]), "--device", "cpu", *flags]) == 0
        return [line for line in capsys.readouterr().out.splitlines() if line.split()[0] == "note"]

    [note] = notes("z_image_4_heads", "--cfg", "2", "--usp", "2")
    assert "--cfg 2: Z-Image draws without guidance unless a request sets guidance_scale above 0" in note
    assert note.endswith("--usp 4 would share it")
    assert notes("z_image_4_heads", "--usp", "2") == []
    assert notes("qwen_image_4_heads", "--cfg", "2") == []


NOTE = "--cfg 2: Z-Image draws without guidance unless a request sets guidance_scale above 0"


def test_the_same_is_said_at_start(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By the server in its table, by the others in the log. Nothing is started."""
    tables: list[str] = []
    monkeypatch.setattr("darkroom.server.run.run_server", lambda *values: tables.append(values[-1]) or 0)
    monkeypatch.setattr("darkroom.offline.EngineProcess", Mock(side_effect=GenerationError("not started")))
    folder = str(checkpoints["z_image_4_heads"])
    for flags, count in (["--cfg", "2"], 1), (["--usp", "2"], 0):
        assert main(["serve", folder, "--device", "cpu", *flags]) == 0
        assert tables.pop().count(NOTE) == count
        assert main(["generate", folder, "a cat", "--device", "cpu", *flags]) == 1
        with pytest.raises(GenerationError):
            Darkroom(folder, device="cpu", **{flags[0].strip("-"): 2})
        assert [NOTE in message for message in caplog.messages] == [True, True][: 2 * count]
        caplog.clear()


@pytest.mark.parametrize("command", ["serve", "generate", "check"])
def test_guidance_in_parallel_without_branches_is_refused(
    command: str, distilled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = ["a cat"] if command == "generate" else []
    assert main([command, str(distilled), *prompt, "--device", "cpu", "--cfg", "2"]) == 2
    refused(capsys, "makes one prediction a step, without guidance branches, which every rank would repeat; use --usp")
    with pytest.raises(ConfigError, match="makes one prediction a step"):
        Darkroom(distilled, device="cpu", cfg=2)


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.flux2_klein(tmp_path_factory.mktemp("distilled") / "klein", is_distilled=True)


def test_check_reads_a_file_of_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "darkroom.yaml").write_text("usp: 2\nring_degree: 2\ndevice: cpu")
    assert main(["check", "demo", "--config", str(tmp_path / "darkroom.yaml"), "--ring", "3"]) == 0
    assert "6 cpu ranks" in capsys.readouterr().out


# ---- generate ------------------------------------------------------------------------------------------------------


def test_generate_writes_files_and_shows_its_progress(tmp_path: Path) -> None:
    flags = "-o out.jpg -n 2 --seed 5 --num-inference-steps 3 --width 112 --height 80 --device cpu"
    done = run("darkroom", "generate", "demo", "a red star", *flags.split(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "out-0.jpg (seed 5)\nout-1.jpg (seed 6)\n"
    assert "6/6" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out-0.jpg", "out-1.jpg"]
    pictures = [Image.open(tmp_path / name) for name in ("out-0.jpg", "out-1.jpg")]
    assert [(picture.format, picture.size) for picture in pictures] == [("JPEG", (112, 80))] * 2
    assert pictures[0].tobytes() != pictures[1].tobytes()


def test_generate_makes_a_video(
    checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out.mp4"
    size = ["--width", "96", "--height", "64", "--num-frames", "5", "--fps", "8"]
    flags = [*size, "--num-inference-steps", "2", "--seed", "3", "--device", "cpu"]
    assert main(["generate", str(checkpoints["wan_2_2"]), "a red star", "-o", str(path), *flags]) == 0
    assert capsys.readouterr().out == f"{path} (seed 3)\n"
    with av.open(str(path)) as video:
        assert [(frame.width, frame.height) for frame in video.decode(video=0)] == [(96, 64)] * 5


def test_generate_edits_pictures(
    checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the pixel what a worker makes of them, in their order."""
    folder, path = checkpoints["qwen_image_edit_plus_2511"], tmp_path / "a.b.png"
    flags = ["--num-inference-steps", "2", "--width", "112", "--height", "80", "--seed", "3", "--device", "cpu"]
    for name, content in (("a.png", WIDE), ("b.png", TALL)):
        (tmp_path / name).write_bytes(content)
        flags += ["--image", str(tmp_path / name)]
    assert main(["generate", str(folder), "make it red", "-o", str(path), *flags]) == 0
    assert capsys.readouterr().out == f"{path} (seed 3)\n"
    params = SamplingParams(width=112, height=80, num_inference_steps=2, seed=3, images=(WIDE, TALL))
    with worker(folder, ParallelConfig()) as one, Image.open(path) as picture:
        [(_, decoded)] = generate(one, [one.model.options.resolve("make it red", params)]).values()
        assert decoded is not None and picture.format == "PNG"
        assert picture.tobytes() == one.model.pictures(decoded)[0].tobytes()


# ---- hash-key --------------------------------------------------------------------------------------------------------


def hash_key(*arguments: str, key: str) -> subprocess.CompletedProcess[str]:
    command = [str(BIN / "darkroom"), "hash-key", *arguments]
    return subprocess.run(command, input=key, capture_output=True, text=True, check=False)


def test_a_key_becomes_a_line_of_the_key_file() -> None:
    done = hash_key("alice", key="0123456789abcdef\n")
    assert (done.returncode, done.stdout[:13], len(done.stdout)) == (0, "alice sha256:", 78)


@pytest.mark.parametrize(
    ("arguments", "key", "words"),
    [
        ([], "0123456789abcdef", "takes the key's NAME"),
        (["a", "0123456789abcdef"], "", "takes the key's NAME"),
        (["a"], "short-one", "at least 16"),
        (["a"], "", "not empty"),
        (["a b"], "0123456789abcdef", "cannot name a key"),
    ],
)
def test_what_is_no_key_is_refused_and_not_shown(arguments: list[str], key: str, words: str) -> None:
    done = hash_key(*arguments, key=key)
    assert (done.returncode, done.stdout, words in done.stderr) == (2, "", True)
    assert not key or key not in done.stderr
