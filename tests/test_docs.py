"""What the documentation quotes is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_walk_through_quotes_the_file() -> None:
    page = (ROOT / "docs" / "adding-a-model.md").read_text()
    source = (ROOT / "darkroom" / "models" / "ovis_image.py").read_text()
    quotes = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(quotes) == 4
    assert [quote for quote in quotes if quote not in source] == []


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))])
def test_the_files_that_a_page_links_to_are_there(page: str) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text())
    assert [link for link in links if not ((ROOT / page).parent / link).exists()] == []
