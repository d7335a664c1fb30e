"""The command line: `darkroom serve | generate | check | hash-key`, and a bare `serve`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from . import offline
from .configs.config import CheckConfig, EngineConfig, GenerateConfig, ServeConfig, engine_config
from .configs.devices import cuda_devices, resolve_device
from .configs.errors import ConfigError, RequestError
from .models.checkpoint import Checkpoint, open_checkpoint

_USAGE = """usage: darkroom COMMAND MODEL [flags]

  darkroom serve MODEL              serve the OpenAI API (also as a bare `serve`)
  darkroom generate MODEL PROMPT    make a picture, with no server
  darkroom check MODEL              say whether a configuration is valid, and what each rank would hold
  darkroom hash-key NAME            read a key from standard input, print its line for --api-key-file

MODEL is a hub id such as owner/name, a folder in the diffusers layout, or 'demo'.
`darkroom COMMAND --help` lists the flags."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 for a failure, 2 for what the operator can mend."""
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in ("-h", "--help", "help"):
        print(_USAGE)
        return 0
    commands: dict[str, Callable[[list[str]], int]] = {
        "serve": serve,
        "generate": generate,
        "check": check,
        "hash-key": hash_key,
    }
    if command not in commands:
        print(f"darkroom: no command '{command}'; known: {', '.join(commands)}", file=sys.stderr)
        return 2
    return _reported(commands[command], rest)


def serve_main() -> int:
    """The bare `serve` command."""
    return _reported(serve, sys.argv[1:])


def _reported(command: Callable[[list[str]], int], arguments: list[str]) -> int:
    try:
        return command(arguments)
    except (ConfigError, RequestError, offline.GenerationError) as e:
        print(f"darkroom: {' '.join(str(e).split())}", file=sys.stderr)  # one line, whatever library it comes from
        return 1 if isinstance(e, offline.GenerationError) else 2
    except KeyboardInterrupt:
        return 130


def serve(arguments: list[str]) -> int:
    from .server.run import run_server  # FastAPI: other commands start faster without it

    config = ServeConfig.parse(arguments)
    checkpoint = open_checkpoint(config)
    engine = resolve_device(engine_config(config))
    held = checkpoint.footprint(engine, engine.dtype)
    return run_server(config, checkpoint.pin(engine), checkpoint.capabilities, _describe(checkpoint, engine, held))


def generate(arguments: list[str]) -> int:
    config = GenerateConfig.parse(arguments)
    request = open_checkpoint(config).capabilities.resolve(config.prompt, config.sampling_params)
    request = offline.with_format(request, config.output.suffix)
    _check_writable(config.output)
    options = config.model_dump(include=set(EngineConfig.model_fields) - {"model"}, exclude_unset=True)
    with (
        offline.Darkroom(config.model, **options) as darkroom,
        tqdm(total=(request.num_inference_steps - request.first_step) * config.n, unit="step") as bar,
    ):
        finished = darkroom.run([request.picture(i) for i in range(config.n)], lambda *_: bar.update())
    files = [(file, picture.seed) for picture in finished for file in picture.files]
    for i, (file, seed) in enumerate(files):
        path = config.output if len(files) == 1 else config.output.with_stem(f"{config.output.stem}-{i}")
        try:
            path.write_bytes(file)
        except OSError as e:
            raise ConfigError(f"--output {path}: {e.strerror}") from None
        print(f"{path} (seed {seed})")
    return 0


def _check_writable(path: Path) -> None:
    """Raises ConfigError, before a picture is made in vain."""
    if not path.parent.is_dir():
        raise ConfigError(f"--output {path}: the folder does not exist")
    if path.is_dir():
        raise ConfigError(f"--output {path}: this is a folder")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"--output {path}: may not be written")


def check(arguments: list[str]) -> int:
    config = CheckConfig.parse(arguments)
    checkpoint = open_checkpoint(config)
    engine = resolve_device(engine_config(config), elsewhere=True)
    print(_describe(checkpoint, engine, checkpoint.footprint(engine, engine.dtype)))
    print("valid")
    return 0


def hash_key(arguments: list[str]) -> int:
    from .server.keys import hashed_line

    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise ConfigError("hash-key takes the key's NAME; the key itself is read from standard input")
    print(hashed_line(arguments[0], sys.stdin.readline().strip()))
    return 0


def _describe(checkpoint: Checkpoint, config: EngineConfig, held: list[dict[str, int]]) -> str:
    """A compact table: what runs, on what, spread how, and the weights of each rank."""
    axes = [f"{name} {degree}" for name, degree in config.axes.items() if degree > 1]
    device = f"{config.world_size} {config.device} {'ranks' if config.world_size > 1 else 'rank'}"
    rows = [
        ("model", f"{config.model} ({checkpoint.capabilities.family})"),
        ("devices", f"{device}, {config.dtype}{_none_here(config)}"),
        ("axes", ", ".join(axes) or "none"),
        ("vae", _describe_vae(config)),
    ]
    for ranks, parts in _alike(held):
        sizes = ", ".join(f"{name} {_gigabytes(size)}" for name, size in parts.items() if size)
        rows.append((ranks, f"{_gigabytes(sum(parts.values()))} of weights: {sizes}"))
    rows += [("note", note) for note in checkpoint.notes(config)]
    return "\n".join(f"  {name:<10} {value}" for name, value in rows)


def _none_here(config: EngineConfig) -> str:
    return " (there are none on this machine)" if config.device == "cuda" and not cuda_devices() else ""


def _describe_vae(config: EngineConfig) -> str:
    how = "tiles" if config.vae_use_tiling else "patches" if config.vae_size > 1 else "whole"
    ranks = f"decodes on {config.vae_size} {'ranks' if config.vae_size > 1 else 'rank'}, {how}"
    if config.vae_patch_parallel_size > config.vae_size:
        ranks += f" (--vae-pp {config.vae_patch_parallel_size} is cut to the {config.world_size} ranks there are)"
    return ranks


def _alike(held: list[dict[str, int]]) -> list[tuple[str, dict[str, int]]]:
    """Runs of ranks that hold the same, as ("rank 0", parts) or ("ranks 1-3", parts)."""
    runs: list[tuple[int, int, dict[str, int]]] = []
    for rank, parts in enumerate(held):
        if runs and runs[-1][2] == parts:
            runs[-1] = (runs[-1][0], rank, parts)
        else:
            runs.append((rank, rank, parts))
    return [(f"rank {a}" if a == b else f"ranks {a}-{b}", parts) for a, b, parts in runs]


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB"
