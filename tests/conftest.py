"""Tiny checkpoints, built once per run."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # in the server's processes too: more threads than cores crawl
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read at import: stands before what imports the hub's client

from pathlib import Path

import pytest
import torch

from tests.subjects import SUBJECTS

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--matrix", action="store_true", help="try every family in every layout, not in a subset")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--matrix"):
        for item in items:
            if item.get_closest_marker("matrix"):
                item.add_marker(pytest.mark.skip(reason="in the whole matrix only: --matrix"))


@pytest.fixture(scope="session")
def whole_matrix(pytestconfig: pytest.Config) -> bool:
    return bool(pytestconfig.getoption("--matrix"))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By name: `z_image_4_heads` is the variant `4_heads` of the subject `z_image`."""
    root = tmp_path_factory.mktemp("checkpoints")
    variants = {f"{name}_{variant}": build for name, one in SUBJECTS.items() for variant, build in one.variants.items()}
    return {name: build(root / name) for name, build in variants.items()}
