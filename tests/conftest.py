"""Tiny checkpoints, built once per run."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # in the server's processes too: more threads than cores crawl
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read at import: stands before what imports the hub's client

from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.matrix import CELLS, PAIRWISE, Cell

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--matrix", action="store_true", help="try every family in every layout, not in a subset")


@pytest.fixture(scope="session")
def layouts(pytestconfig: pytest.Config) -> dict[int, list[Cell]]:
    """By world size."""
    return CELLS if pytestconfig.getoption("--matrix") else PAIRWISE


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By name. Those with 5 heads: no number of ranks divides them."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        "qwen_image_4_heads": tiny.qwen_image(root / "qwen_image_4_heads"),
        "qwen_image_5_heads": tiny.qwen_image(
            root / "qwen_image_5_heads", heads=5, encoder_heads=6, encoder_kv_heads=2
        ),
        "z_image_4_heads": tiny.z_image(root / "z_image_4_heads"),
        "z_image_5_heads": tiny.z_image(root / "z_image_5_heads", heads=5),
        "longcat_image_4_heads": tiny.longcat_image(root / "longcat_image_4_heads"),
        "longcat_image_5_heads": tiny.longcat_image(root / "longcat_image_5_heads", heads=5),
        "ovis_image_4_heads": tiny.ovis_image(root / "ovis_image_4_heads"),
        "ovis_image_5_heads": tiny.ovis_image(root / "ovis_image_5_heads", heads=5),
        "wan_2_1_4_heads": tiny.wan(root / "wan_2_1_4_heads"),
        "wan_2_1_5_heads": tiny.wan(root / "wan_2_1_5_heads", heads=5),
        "wan_2_2": tiny.wan(root / "wan_2_2", boundary=0.875),
        "wan_2_2_small": tiny.wan(root / "wan_2_2_small", heads=5, small=True),
    }
