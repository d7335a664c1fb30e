"""Flags and YAML. Which model can be spread how is checked elsewhere: see tests/models/test_checkpoint.py."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any, get_args

import pytest
from diffusers.models.attention_dispatch import AttentionBackendName
from pydantic import SecretStr, ValidationError

from darkroom.configs import CheckConfig, ConfigError, EngineConfig, GenerateConfig, SamplingParams, ServeConfig
from darkroom.configs.config import AttentionBackend, engine_config

Command = type[ServeConfig] | type[CheckConfig] | type[GenerateConfig]
COMMANDS: list[Command] = [ServeConfig, CheckConfig, GenerateConfig]

ENGINE_FLAGS = [
    ("--usp", "2", "ulysses_degree", 2),
    ("--ulysses-degree", "2", "ulysses_degree", 2),
    ("--ring", "3", "ring_degree", 3),
    ("--ring-degree", "3", "ring_degree", 3),
    ("--tp", "4", "tensor_parallel_size", 4),
    ("--tensor-parallel-size", "4", "tensor_parallel_size", 4),
    ("--cfg", "2", "cfg_parallel_size", 2),
    ("--cfg-parallel-size", "2", "cfg_parallel_size", 2),
    ("--vae-pp", "4", "vae_patch_parallel_size", 4),
    ("--vae-patch-parallel-size", "4", "vae_patch_parallel_size", 4),
    ("--vae-use-tiling", None, "vae_use_tiling", True),
    ("--no-vae-use-tiling", None, "vae_use_tiling", False),
    ("--revision", "main", "revision", "main"),
    ("--device", "cuda", "device", "cuda"),
    ("--dtype", "float16", "dtype", "float16"),
    ("--attention-backend", "_native_math", "attention_backend", "_native_math"),
    ("--log-level", "debug", "log_level", "debug"),
    ("--log-format", "json", "log_format", "json"),
    ("--max-queue", "7", "max_queue", 7),
    ("--max-queue-mb", "7", "max_queue_mb", 7),
    ("--step-timeout", "2.5", "step_timeout", 2.5),
]
SERVE_FLAGS = [
    ("--host", "0.0.0.0", "host", "0.0.0.0"),
    ("--port", "0", "port", 0),
    ("--served-model-name", "a/b", "served_model_name", "a/b"),
    ("--data-dir", "/srv/videos", "data_dir", Path("/srv/videos")),
    ("--database-url", "postgresql://host/jobs", "database_url", "postgresql://host/jobs"),
    ("--files-url", "s3://bucket/videos", "files_url", "s3://bucket/videos"),
    ("--job-ttl", "3600", "job_ttl", 3600.0),
    ("--disk-budget", "0.5", "disk_budget", 0.5),
    ("--max-videos", "2", "max_videos", 2),
    ("--omni", None, "omni", True),
    ("--max-upload-mb", "7", "max_upload_mb", 7),
    ("--max-uploads-mb", "2000", "max_uploads_mb", 2000),
    ("--max-image-mb", "7", "max_image_mb", 7),
    ("--max-image-pixels", "7", "max_image_pixels", 7),
    ("--max-form-fields", "7", "max_form_fields", 7),
    ("--max-field-kb", "7", "max_field_kb", 7),
    ("--url-seconds", "7", "url_seconds", 7),
    ("--url-storage-mb", "7", "url_storage_mb", 7),
    ("--api-key", "secret-1", "api_key", [SecretStr("secret-1")]),
    ("--api-key-file", "keys", "api_key_file", Path("keys")),
    ("--protect-metrics", None, "protect_metrics", True),
    ("--protect-docs", None, "protect_docs", True),
    ("--rate-limit", "60/minute", "rate_limit", "60/minute"),
    ("--max-concurrent-per-key", "2", "max_concurrent_per_key", 2),
    ("--cors-origin", "https://a.example", "cors_origin", ["https://a.example"]),
    ("--allow-remote-media", "*.a.example", "allow_remote_media", ["*.a.example"]),
    ("--log-prompts", None, "log_prompts", True),
    ("--otlp-endpoint", "http://127.0.0.1:4318", "otlp_endpoint", "http://127.0.0.1:4318"),
    ("--drain-timeout", "2.5", "drain_timeout", 2.5),
    ("--root-path", "/a/b", "root_path", "/a/b"),
    ("--forwarded-allow-ips", "10.0.0.1", "forwarded_allow_ips", "10.0.0.1"),
    ("--ssl-certfile", "a.pem", "ssl_certfile", Path("a.pem")),
]
GENERATE_FLAGS = [
    ("--output", "a.jpg", "output", Path("a.jpg")),
    ("-o", "a.jpg", "output", Path("a.jpg")),
    ("--negative-prompt", "[red], {blue}", "negative_prompt", "[red], {blue}"),
    ("--width", "128", "width", 128),
    ("--height", "128", "height", 128),
    ("--num-inference-steps", "9", "num_inference_steps", 9),
    ("--true-cfg-scale", "1.5", "true_cfg_scale", 1.5),
    ("--guidance-scale", "2.5", "guidance_scale", 2.5),
    ("--guidance-scale-2", "1.5", "guidance_scale_2", 1.5),
    ("--max-sequence-length", "99", "max_sequence_length", 99),
    ("--image", "a.png", "image", [Path("a.png")]),
    ("--mask-image", "a.png", "mask_image", Path("a.png")),
    ("--strength", "0.5", "strength", 0.5),
    ("--num-frames", "9", "num_frames", 9),
    ("--fps", "8", "fps", 8),
    ("--layers", "2", "layers", 2),
    ("--seed", "5", "seed", 5),
    ("-n", "3", "n", 3),
]
FLAGS: dict[Command, list[tuple[str, str | None, str, Any]]] = {
    ServeConfig: ENGINE_FLAGS + SERVE_FLAGS,
    CheckConfig: ENGINE_FLAGS,
    GenerateConfig: ENGINE_FLAGS + GENERATE_FLAGS,
}
EACH = [pytest.param(c, *row, id=f"{c.__name__} {row[0]}") for c, rows in FLAGS.items() for row in rows]


def positionals(command: Command) -> list[str]:
    return ["demo", "a cat"] if command is GenerateConfig else ["demo"]


def parse(command: Command, *arguments: str) -> Any:
    return command.parse([*positionals(command), *arguments])


def error(command: Command, *arguments: str) -> str:
    """What a user is told: one line."""
    with pytest.raises(ConfigError) as caught:
        parse(command, *arguments)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


# ---- flags ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("command", "flag", "text", "name", "value"), EACH)
def test_a_flag_sets_its_field(command: Command, flag: str, text: str | None, name: str, value: Any) -> None:
    arguments = [flag] if text is None else [flag, text]
    config = command.parse([*arguments, *positionals(command)])
    assert getattr(config, name) == value
    assert config.model_fields_set == {"model", name, *(["prompt"] if command is GenerateConfig else [])}
    if text is not None and flag.startswith("--"):
        assert parse(command, f"{flag}={text}") == config


@pytest.mark.parametrize("command", COMMANDS)
def test_every_field_has_a_row_above(command: Command) -> None:
    tested = {name for _, _, name, _ in FLAGS[command]}
    if command is ServeConfig:
        tested |= {
            "ssl_keyfile",
            "ssl_keyfile_password",
            "ssl_ca_certs",
            "ssl_ciphers",
        }  # need --ssl-certfile: see test_operations.py
    assert tested | {"model", "prompt", "config"} == set(command.model_fields) | {"prompt"}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_every_flag(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command.parse(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    words = text.replace(",", " ").split()
    assert {flag for flag, *_ in FLAGS[command]} | {"--config", "MODEL"} <= set(words)
    assert "==SUPPRESS==" not in text
    assert text.count("--tensor-parallel-size") == 1


def test_the_model_may_stand_anywhere() -> None:
    assert ServeConfig.parse(["--usp", "2", "demo", "--omni"]) == ServeConfig.parse(["demo", "--omni", "--usp=2"])


@pytest.mark.parametrize("prompt", ["", "null", "true", "[1, 2]", '{"a": 1}', 'a "quoted, \\ [cat]', " spaced ", "12"])
def test_a_prompt_is_taken_as_it_is(prompt: str) -> None:
    assert GenerateConfig.parse(["demo", prompt]).prompt == prompt


def test_the_last_of_two_flags_counts() -> None:
    assert parse(ServeConfig, "--usp", "2", "--ulysses-degree", "4").ulysses_degree == 4


def test_the_environment_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USP", "4")
    monkeypatch.setenv("PORT", "9")
    monkeypatch.setenv("DARKROOM_PORT", "9")
    assert parse(ServeConfig) == ServeConfig.parse(["demo", "--port", "8000"])


def test_attention_backends_are_those_of_diffusers() -> None:
    known = {name.value for name in AttentionBackendName}
    assert set(get_args(AttentionBackend)) - {"auto"} <= known


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--tp", "0"], "--tp '0': input should be greater than or equal to 1"),
        (["--usp", "-1"], "--usp"),
        (["--ring", "two"], "--ring 'two': input should be a valid integer"),
        (["--cfg", "1.5"], "--cfg '1.5'"),
        (["--vae-pp"], "--vae-pp"),
        (["--device", "gpu"], "--device 'gpu': input should be 'auto', 'cpu' or 'cuda'"),
        (["--dtype", "int8"], "'bfloat16'"),
        (["--attention-backend", "flsh"], "'flash'"),
        (["--log-level", "loud"], "'debug'"),
        (["--max-queue", "0"], "greater than or equal to 1"),
        (["--step-timeout", "0"], "greater than 0"),
        (["--step-timeout", "inf"], "--step-timeout 'inf'"),
        (["--step-timeout", "nan"], "--step-timeout 'nan'"),
        (["--port", "65536"], "less than or equal to 65535"),
        (["--port", "-1"], "--port"),
        (["--served-model-name", ""], "at least 1 character"),
        (["--nope"], "--nope"),
        (["--uly", "2"], "--uly"),  # no abbreviations: a new flag must not change what an old command means
        (["--omni=yes"], "--omni"),
        (["another"], "another"),
        (["--max-upload-mb", "9", "--max-uploads-mb", "8"], "--max-upload-mb 9 is more than --max-uploads-mb 8: "),
        (["--max-uploads-mb", "127"], "--max-upload-mb 128 is more than --max-uploads-mb 127: "),
        (["--max-upload-mb", "1", "--max-uploads-mb", "1"], "--max-uploads-mb '1': input should be greater than or"),
    ],
)
def test_a_bad_flag_gets_one_line(arguments: list[str], expected: str) -> None:
    assert expected in error(ServeConfig, *arguments)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["-n", "11"], "-n '11': input should be less than or equal to 10"),
        (["-n", "0"], "-n '0'"),
        (["--seed", "x"], "--seed 'x'"),
        (["--width", "1e3x"], "--width"),
        (["--port", "1"], "--port"),
    ],
)
def test_a_bad_flag_of_generate_gets_one_line(arguments: list[str], expected: str) -> None:
    assert expected in error(GenerateConfig, *arguments)


@pytest.mark.parametrize(
    ("command", "arguments", "expected"),
    [(ServeConfig, [], "MODEL"), (ServeConfig, [""], "at least 1 character"), (GenerateConfig, ["demo"], "PROMPT")],
)
def test_what_is_missing_is_named(command: Command, arguments: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        command.parse(arguments)


# ---- YAML ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "darkroom.yaml"


FLAGS_ALONE = ("-o", "--no-vae-use-tiling")
"""Spellings of the command line that are no keys."""
STRINGS = ("negative_prompt", "revision", "allow_remote_media")


def spellings(flag: str) -> set[str]:
    return {flag.strip("-"), flag.strip("-").replace("-", "_")}


@pytest.mark.parametrize(
    ("command", "flag", "text", "name", "value"), [row for row in EACH if row.values[1] not in FLAGS_ALONE]
)
def test_a_yaml_key_sets_the_same_field(
    command: Command, flag: str, text: str | None, name: str, value: Any, file: Path
) -> None:
    for key in spellings(flag):
        file.write_text(f"{key}: {'true' if text is None else json.dumps(text) if name in STRINGS else text}")
        assert getattr(parse(command, "--config", str(file)), name) == value
        assert getattr(parse(command, f"--config={file}"), name) == value


@pytest.mark.parametrize("key", ["usp", "ulysses-degree", "ulysses_degree"])
@pytest.mark.parametrize("flag", ["--usp", "--ulysses-degree"])
def test_flags_win_over_yaml(key: str, flag: str, file: Path) -> None:
    file.write_text(f"{key}: 2\nport: 1\nvae-use-tiling: true")
    config = parse(ServeConfig, flag, "4", "--config", str(file), "--no-vae-use-tiling")
    assert (config.ulysses_degree, config.port, config.vae_use_tiling) == (4, 1, False)


@pytest.mark.parametrize("text", ["", "# nothing", "{}"])
def test_an_empty_file_changes_nothing(text: str, file: Path) -> None:
    file.write_text(text)
    assert parse(ServeConfig, "--config", str(file)).model_fields_set == {"model", "config"}


@pytest.mark.parametrize("key", ["nope", "1", "ulysses", "USP", "model", "prompt", "config", "port\n "])
def test_an_unknown_key_is_named_with_those_that_are_known(key: str, file: Path) -> None:
    """MODEL is no flag: a key that the command line always overrules would be ignored silently."""
    file.write_text(f"{json.dumps(key)}: 2")
    message = error(ServeConfig, "--config", str(file))
    assert f"unknown key {key!r}; known: allow-remote-media, api-key, " in message


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"usp: zero", "--usp 'zero': input should be a valid integer"),
        (b"usp: null", "--usp None"),
        (b"usp: [2]", "--usp [2]"),
        (b"tp: 0", "--tp 0"),
        (b"ulysses_degree: 0", "0: input should be greater than or equal to 1"),
        (b"step_timeout: .inf", "--step-timeout inf"),
        (b"revision: 1.0", "--revision 1.0: input should be a valid string"),
        (b"- usp", "expected keys and values, such as 'usp: 2'"),
        (b"usp", "expected keys and values, such as 'usp: 2'"),
        (b"usp: [", "cannot be read"),
        (b"a: b: c", "cannot be read"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"usp: !!python/object/apply:os.getcwd []", "cannot be read"),
    ],
)
def test_a_bad_file_gets_one_line(data: bytes, expected: str, file: Path) -> None:
    file.write_bytes(data)
    assert expected in error(ServeConfig, "--config", str(file))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    assert str(tmp_path) in error(ServeConfig, "--config", str(tmp_path))
    assert "No such file" in error(ServeConfig, "--config", str(tmp_path / "none.yaml"))
    assert "--config" in error(ServeConfig, "--config")


def test_the_last_file_counts(file: Path, tmp_path: Path) -> None:
    file.write_text("usp: 2")
    assert parse(ServeConfig, "--config", str(tmp_path / "none.yaml"), f"--config={file}").ulysses_degree == 2


# ---- what the configurations are -----------------------------------------------------------------------------------


def test_the_engines_part_travels_as_json() -> None:
    config = parse(ServeConfig, "--tp", "2", "--vae-pp", "2", "--port", "1", "--revision", "ünï\ncode")
    part = engine_config(config)
    assert type(part) is EngineConfig
    line = part.model_dump_json()
    assert "\n" not in line
    assert EngineConfig.model_validate_json(line) == part
    assert part.tensor_parallel_size == 2


def test_check_gives_one_line() -> None:
    assert EngineConfig.check({"model": "demo", "usp": 2}).ulysses_degree == 2
    with pytest.raises(ConfigError, match=r"^--device 'gpu': input should be 'auto', 'cpu' or 'cuda'$"):
        EngineConfig.check({"model": "demo", "device": "gpu"})
    with pytest.raises(ConfigError, match=r"^--nope 1: extra inputs are not permitted$"):
        EngineConfig.check({"model": "demo", "nope": 1})


def test_a_configuration_is_frozen() -> None:
    with pytest.raises(ValidationError):
        parse(ServeConfig).port = 1
    pickle.dumps(parse(ServeConfig))


def test_the_served_name_is_the_models_unless_set() -> None:
    assert parse(ServeConfig).served_name == "demo"
    assert parse(ServeConfig, "--served-model-name", "a/b").served_name == "a/b"


def test_generates_flags_become_sampling_params(tmp_path: Path) -> None:
    assert parse(GenerateConfig).sampling_params == SamplingParams()
    file = tmp_path / "a.png"
    file.write_bytes(b"a picture")
    flags = [
        (flag, str(file) if text == "a.png" else text or "", name, value)
        for flag, text, name, value in GENERATE_FLAGS[2:]
    ]
    arguments = [word for flag, text, *_ in flags for word in (flag, text)]
    params = {name: value for *_, name, value in flags if name not in ("image", "mask_image")}
    wanted = SamplingParams(**params, images=(b"a picture",), mask=b"a picture")
    assert parse(GenerateConfig, *arguments).sampling_params == wanted


def test_several_pictures(tmp_path: Path, file: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(name.encode())
    one, two = str(tmp_path / "a"), str(tmp_path / "b")
    assert parse(GenerateConfig, "--image", one, "--image", two).sampling_params.images == (b"a", b"b")
    file.write_text(f"image: [{one}, {two}]")
    assert parse(GenerateConfig, "--config", str(file)).sampling_params.images == (b"a", b"b")


@pytest.mark.parametrize("flag", ["--image", "--mask-image"])
def test_a_picture_that_is_not_there(flag: str, tmp_path: Path) -> None:
    config = parse(GenerateConfig, flag, str(tmp_path / "none.png"))
    with pytest.raises(ConfigError, match=f"^{flag} .*none.png: No such file or directory$"):
        _ = config.sampling_params
