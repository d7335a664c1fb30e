"""The JSON files of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from darkroom.configs.errors import ConfigError


def read_json(file: Path, trouble: str) -> dict[str, Any]:
    """The object that a file holds. Raises ConfigError, which begins with `trouble` where the file is missing."""
    if not file.is_file():
        raise ConfigError(f"{trouble}: {file.parent.name}/{file.name} is missing")
    try:
        value = json.loads(file.read_text())
    except ValueError as e:
        raise ConfigError(f"{file.parent.name}/{file.name} is not JSON: {e}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{file.parent.name}/{file.name} holds no JSON object")
    return value
