"""Every flag, once: name, YAML key, default, bounds and help text are the fields below.

`EngineConfig` is what runs a model, `ServeConfig` adds what serves it. Both are frozen, and both travel to other
processes as JSON.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    CliApp,
    CliPositionalArg,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from .errors import ConfigError
from .logs import LogFormat
from .operations import OperationsConfig, Several
from .parallel import ParallelConfig
from .pictures import MAX_PIXELS
from .request import SamplingParams

AttentionBackend = Literal[
    "auto", "native", "_native_cudnn", "_native_efficient", "_native_flash", "_native_math",
    "flash", "flash_hub", "_flash_3", "_flash_3_hub", "sage", "sage_hub", "xformers",
]  # fmt: skip


class QueueLimits(BaseModel):
    """How much may wait: the engine holds to it, and the server refuses at once what can never fit."""

    max_queue: int = Field(256, ge=1, description="pictures that may wait; the next one is answered 429")
    max_queue_mb: int = Field(
        1024, ge=1, description="MiB of pictures sent in that may wait with them; the next one is answered 429"
    )


class EngineConfig(QueueLimits, ParallelConfig):
    """Which model, on what, how spread."""

    model: CliPositionalArg[str] = Field(
        min_length=1, description="a hub id such as owner/name, a folder in the diffusers layout, or 'demo'"
    )
    revision: str | None = Field(None, description="branch, tag or commit of the hub repository")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="'auto' takes CUDA where there is a GPU")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="'auto' is bfloat16 on GPUs and float32 on CPUs"
    )
    attention_backend: AttentionBackend = Field("auto", description="a kernel by diffusers' name")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="how much is logged")
    log_format: LogFormat = Field("text", description="one line of text, or one JSON object, for each record")
    step_timeout: float = Field(
        600.0, gt=0, le=86_400, description="seconds after which a worker that does not answer is taken for hung"
    )

    @classmethod
    def check(cls, values: dict[str, Any]) -> Self:
        """The configuration of these values. Raises `ConfigError` with one line."""
        try:
            return cls.model_validate(values)
        except ValidationError as e:
            raise ConfigError(_first_line(e)) from None


class _CommandLine(BaseSettings):
    """A config that is read from flags and, under them, from the YAML file that `--config` names."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        populate_by_name=True,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_exit_on_error=False,
        cli_hide_none_type=True,
        cli_avoid_json=True,
    )

    config: Path | None = Field(None, description="YAML file with any of these flags as keys; flags win over it")

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, *_: Any, **__: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)  # flags come on top of these by themselves

    @classmethod
    def parse(cls, arguments: list[str]) -> Self:
        """Raises `ConfigError` with one line. `--help` prints and exits."""
        try:
            return CliApp.run(cls, cli_args=arguments, **(_read_environment(cls) | _read_yaml(cls, arguments)))
        except SettingsError as e:
            raise ConfigError(str(e).removeprefix("error parsing CLI: ")) from None
        except ValidationError as e:
            raise ConfigError(_first_line(e)) from None


class CheckConfig(EngineConfig, _CommandLine):
    """`darkroom check`: is this configuration valid, and what would each rank hold?"""

    model_config = SettingsConfigDict(cli_prog_name="darkroom check")


class Limits(QueueLimits):
    """What the server takes in, and what it keeps for a while."""

    model_config = ConfigDict(frozen=True)

    max_upload_mb: int = Field(128, ge=1, le=2048, description="MiB of a request with pictures")
    max_uploads_mb: int = Field(  # 2 MiB are what a request without pictures may have
        1024, ge=2, description="MiB of requests that are being taken in at a time; the next one is answered 429"
    )
    max_image_mb: int = Field(50, ge=1, le=2048, description="MiB of one picture that is sent in")
    max_image_pixels: int = Field(MAX_PIXELS, ge=1, le=MAX_PIXELS, description="pixels of one, by its header")
    max_form_fields: int = Field(128, ge=1, le=10_000, description="fields of a form, pictures included")
    max_field_kb: int = Field(256, ge=1, le=10_240, description="KiB of a form's field that is text")
    url_seconds: int = Field(3600, ge=1, le=604_800, description='how long a picture\'s "url" can be fetched')
    url_storage_mb: int = Field(1024, ge=1, description="MiB of pictures kept for it; the oldest go first")

    @model_validator(mode="after")
    def _any_request_has_room(self) -> Self:
        """Else one that may be sent would be told to come again for ever."""
        if self.max_upload_mb > self.max_uploads_mb:
            raise ValueError(
                f"--max-upload-mb {self.max_upload_mb} is more than --max-uploads-mb {self.max_uploads_mb}: "
                "one request must have room among all"
            )
        return self


class ServeConfig(Limits, OperationsConfig, EngineConfig, _CommandLine):
    """`darkroom serve`: the OpenAI-compatible HTTP server."""

    model_config = SettingsConfigDict(cli_prog_name="darkroom serve")

    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 is every interface")
    port: int = Field(8000, ge=0, le=65535, description="0 takes any free port")
    served_model_name: str | None = Field(
        None, min_length=1, description="the model's id in the API, by default the hub id or the folder's name"
    )
    data_dir: Path = Field(
        Path("~/.local/share/darkroom"), description="folder for videos, and for the database of their jobs"
    )
    database_url: str | None = Field(
        None, description="SQLAlchemy URL of that database, such as postgresql://...; by default SQLite in --data-dir"
    )
    files_url: str | None = Field(None, description="s3://bucket/prefix for videos; by default they are in --data-dir")
    job_ttl: float = Field(
        86_400.0, gt=0, le=10**9, description="seconds after which a video is deleted, and fails if it cannot begin"
    )
    disk_budget: float | None = Field(
        None, gt=0, le=10**9, description="gigabytes of videos, beyond which the oldest are deleted; any, if not given"
    )
    max_videos: int = Field(1, ge=1, le=64, description="videos that are made at a time")
    omni: bool = Field(False, description="accepted and without effect: commands for vLLM-Omni work as they are")

    @property
    def served_name(self) -> str:
        """The model's id in the API. A folder's own name: clients are not told paths of the server."""
        folder = Path(self.model).expanduser()
        return self.served_model_name or (folder.resolve().name if folder.is_dir() else self.model)


class GenerateConfig(EngineConfig, _CommandLine):
    """`darkroom generate`: a picture with no server."""

    model_config = SettingsConfigDict(cli_prog_name="darkroom generate", cli_shortcuts={"output": "o"})

    prompt: CliPositionalArg[str] = Field(description="what the picture shows")
    output: Path = Field(Path("out.png"), description="file to write; its ending names the format: png, jpg, webp, mp4")
    image: Annotated[list[Path], Several] = Field(
        [], description="picture to edit or begin from; once for each, where the model takes several"
    )
    mask_image: Path | None = Field(
        None, description="where to draw: what is transparent in it, or without alpha white"
    )
    strength: float | None = Field(None, description="how far the picture is taken back to noise, above 0 to 1")
    negative_prompt: str | None = Field(None, description="what the picture should not show")
    width: int | None = Field(None, description="pixels")
    height: int | None = Field(None, description="pixels")
    num_inference_steps: int | None = Field(None, description="denoising steps")
    true_cfg_scale: float | None = Field(None, description="strength of guidance, for models that call it so")
    guidance_scale: float | None = Field(None, description="strength of guidance, for the other models")
    guidance_scale_2: float | None = Field(None, description="the same for the second transformer of models with two")
    max_sequence_length: int | None = Field(None, description="prompt tokens after which the text is cut off")
    num_frames: int | None = Field(None, description="length of a video")
    fps: int | None = Field(None, description="frames per second of a video")
    layers: int | None = Field(None, description="how many layers to take a picture apart into")
    seed: int | None = Field(None, description="the same seed gives the same picture")
    n: int = Field(1, ge=1, le=10, description="how many pictures; with more than one, files get -0, -1, ...")

    @property
    def sampling_params(self) -> SamplingParams:
        return SamplingParams(
            negative_prompt=self.negative_prompt,
            width=self.width,
            height=self.height,
            num_inference_steps=self.num_inference_steps,
            true_cfg_scale=self.true_cfg_scale,
            guidance_scale=self.guidance_scale,
            guidance_scale_2=self.guidance_scale_2,
            max_sequence_length=self.max_sequence_length,
            images=tuple(_read_file("--image", path) for path in self.image),
            mask=_read_file("--mask-image", self.mask_image) if self.mask_image else None,
            strength=self.strength,
            num_frames=self.num_frames,
            fps=self.fps,
            layers=self.layers,
            seed=self.seed,
            n=self.n,
        )


def _read_file(flag: str, path: Path) -> bytes:
    try:
        return path.expanduser().read_bytes()
    except OSError as e:
        raise ConfigError(f"{flag} {path}: {e.strerror}") from None


_SECRET = ("api_key", "ssl_keyfile_password", "database_url")
"""Flags whose values are not shown, and which a variable of the environment may give: no other user sees it in `ps`."""


def engine_config(config: EngineConfig) -> EngineConfig:
    """The part of a command's configuration that the engine's processes need."""
    return EngineConfig.model_validate({name: getattr(config, name) for name in EngineConfig.model_fields})


def _read_environment(cls: type[_CommandLine]) -> dict[str, Any]:
    """Nothing but secrets, as DARKROOM_API_KEY. An empty one counts: a key that got lost must not open the server."""
    variables = {name: os.environ.get(f"DARKROOM_{name.upper()}") for name in _SECRET if name in cls.model_fields}
    return {name: value for name, value in variables.items() if value is not None}


def _read_yaml(cls: type[_CommandLine], arguments: list[str]) -> dict[str, Any]:
    if (path := _config_file(arguments)) is None:
        return {}
    try:
        values = yaml.safe_load(Path(path).read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise ConfigError(f"--config {path}: cannot be read: {' '.join(str(e).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path}: expected keys and values, such as 'usp: 2'")
    names = _names(cls)
    if unknown := [str(key) for key in values if str(key).replace("_", "-") not in names]:
        raise ConfigError(f"--config {path}: unknown key {unknown[0]!r}; known: {', '.join(sorted(names))}")
    return {names[str(key).replace("_", "-")]: value for key, value in values.items()}


def _names(cls: type[_CommandLine]) -> dict[str, str]:
    """Every spelling of every flag, with dashes -> the spelling that the validation takes."""
    names = {}
    for name, field in cls.model_fields.items():
        if name == "config" or field.is_required():  # what is required are MODEL and PROMPT, which are no flags
            continue
        alias = str(field.validation_alias or name)
        names.update({spelling.replace("_", "-"): alias for spelling in (name, alias)})
    return names


def _config_file(arguments: list[str]) -> str | None:
    """The value of `--config`: the file is read before the other flags, which come on top of it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config")
    try:
        path: str | None = parser.parse_known_args(arguments)[0].config
    except argparse.ArgumentError:  # it lacks its value, as the parser of all flags will say
        return None
    return path


def _first_line(error: ValidationError) -> str:
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    fields = [part for part in first["loc"] if isinstance(part, str)]
    if not fields:  # of several flags
        return message
    name = fields[-1].replace("_", "-")
    flag = f"--{name}" if len(name) > 1 else f"-{name}"
    return f"{flag}: {message}" if fields[-1] in _SECRET else f"{flag} {first['input']!r}: {message}"
