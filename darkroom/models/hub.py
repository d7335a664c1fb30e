"""The Hugging Face hub: small files first, weights only when they are needed, and weights' headers without them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from httpx2 import HTTPError
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError
from tqdm.auto import tqdm

from darkroom.configs.errors import ConfigError
from darkroom.parallel.loading import Stored, choose_weights

_SMALL = ["*.json", "*.txt", "*.model", "*.jinja"]


class _Silent(tqdm):  # type: ignore[misc]
    """No progress bar, for files that come in no time."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "disable": True})


def fetch(repository: str, revision: str | None, weights: Sequence[str] = ()) -> Path:
    """The folder of the hub's snapshot, from the cache where that holds it. Raises `ConfigError`.

    It holds every small file, and the files of weights that are named.
    """
    try:
        bar = tqdm if weights else _Silent
        return Path(
            snapshot_download(repository, revision=revision, allow_patterns=[*_SMALL, *weights], tqdm_class=bar)
        )
    except (HTTPError, HFValidationError, OSError) as e:
        reason = str(e).strip().splitlines()[0]
        raise ConfigError(f"'{repository}' is no folder here, and the hub did not give it: {reason}") from None


def weight_files(repository: str, revision: str, component: Path) -> list[str]:
    """The files of a component's weights, by their paths in the repository. Raises `ConfigError`.

    `component` is the component's folder in the snapshot, which holds the index if there is one.
    """
    try:
        listed = [PurePosixPath(file) for file in HfApi().list_repo_files(repository, revision=revision)]
    except (HTTPError, OSError) as e:
        raise _no_weights(repository, component, e) from None
    names = [file.name for file in listed if str(file.parent) == component.name]
    return [f"{component.name}/{name}" for name in choose_weights(component, names)]


def remote_tensors(
    repository: str, revision: str, component: Path, rename: Callable[[str], str | None]
) -> dict[str, Stored]:
    """What `read_headers` gives, of weights that are not here: range requests read the headers alone."""
    tensors = {}
    for file in weight_files(repository, revision, component):
        try:
            stored = HfApi().parse_safetensors_file_metadata(repository, file, revision=revision).tensors
        except (HTTPError, OSError, ValueError) as e:
            raise _no_weights(repository, component, e) from None
        for key, tensor in stored.items():
            if parameter := rename(key):
                tensors[parameter] = Stored(Path(file), key, tuple(tensor.shape))
    return tensors


def _no_weights(repository: str, component: Path, error: Exception) -> ConfigError:
    reason = str(error).strip().splitlines()[0]
    return ConfigError(f"'{repository}': the hub did not give the weights of {component.name}/: {reason}")
