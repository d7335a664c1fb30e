"""What is wrong with a JSON file is named, with its folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from darkroom.configs import ConfigError
from darkroom.models.json_file import read_json


def test_an_object_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"heads": 4}')
    assert read_json(tmp_path / "config.json", "it is incomplete") == {"heads": 4}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "it is incomplete: vae/config.json is missing"),
        ("{", "vae/config.json is not JSON"),
        ("[1]", "vae/config.json holds no JSON object"),
    ],
)
def test_what_is_none_is_named(text: str | None, message: str, tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    if text is not None:
        (tmp_path / "vae" / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_json(tmp_path / "vae" / "config.json", "it is incomplete")
