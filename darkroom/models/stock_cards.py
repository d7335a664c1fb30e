"""What is known of pipelines without a family file that cannot be derived: most of it their model cards say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_HUNYUAN = {"fps": 24}
_CARDS: dict[str, dict[str, Any]] = {
    "MochiPipeline": {"fps": 30},
    "HunyuanVideoPipeline": _HUNYUAN,
    "HunyuanSkyreelsImageToVideoPipeline": _HUNYUAN,
    # by its source: its first four latents are scaled by those behind them, of which fewer than five have none
    "Kandinsky5I2VPipeline": {"min_frames": 17},
}
_COG_VIDEO_X_1_5 = {"fps": 16, "default_size": (1360, 768), "num_frames": 81}
"""Its config says 300 x 300 latents, which is how far positions reach."""


def card(name: str, transformer: Mapping[str, Any]) -> dict[str, Any]:
    """The capabilities of the pipeline `name` that are known so; by what its transformer's config is."""
    if name.startswith("CogVideoX") and transformer.get("patch_size_t"):
        return _COG_VIDEO_X_1_5
    return _CARDS.get(name, {})
