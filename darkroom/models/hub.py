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


def fetch(repository: str, revision: str | None, weights_of: Sequence[str] = ()) -> Path:
    """The folder of the hub's snapshot, from the cache where that holds it. Raises `ConfigError`.

    It holds every small file, and the weights of the components named.
    """
    patterns = [*_SMALL, *(f"{component}/*.safetensors" for component in weights_of)]
    try:
        bar = tqdm if weights_of else _Silent
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns, tqdm_class=bar))
    except (HTTPError, HFValidationError, OSError) as e:
        reason = str(e).strip().splitlines()[0]
        raise ConfigError(f"'{repository}' is no folder here, and the hub did not give it: {reason}") from None


def remote_tensors(
    repository: str, revision: str, component: Path, rename: Callable[[str], str | None]
) -> dict[str, Stored]:
    """What `read_headers` gives, of weights that are not here: range requests read the headers alone.

    `component` is the component's folder in the snapshot, which holds the index if there is one.
    """
    api = HfApi()
    try:
        listed = [PurePosixPath(file) for file in api.list_repo_files(repository, revision=revision)]
        names = [file.name for file in listed if str(file.parent) == component.name]
        tensors = {}
        for name in choose_weights(component, names):
            file = f"{component.name}/{name}"
            for key, stored in api.parse_safetensors_file_metadata(repository, file, revision=revision).tensors.items():
                if parameter := rename(key):
                    tensors[parameter] = Stored(Path(file), key, tuple(stored.shape))
    except (HTTPError, OSError, ValueError) as e:
        reason = str(e).strip().splitlines()[0]
        raise ConfigError(f"'{repository}': the hub did not give the headers of {component.name}/: {reason}") from None
    return tensors
