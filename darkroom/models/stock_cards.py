"""What the model cards of pipelines without a family file say, and neither their sources nor their configs do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_HUNYUAN = {"fps": 24}
_CARDS: dict[str, dict[str, Any]] = {
    "MochiPipeline": {"fps": 30},
    "HunyuanVideoPipeline": _HUNYUAN,
    "HunyuanSkyreelsImageToVideoPipeline": _HUNYUAN,
    # the frames after the picture are scaled by five latents' mean and deviation: of fewer there is none
    "Kandinsky5I2VPipeline": {"min_frames": 17},
}
_COG_VIDEO_X_1_5 = {"fps": 16, "default_size": (1360, 768), "num_frames": 81}
"""Its config says 300 x 300 latents, as far as positions reach."""


def card(name: str, transformer: Mapping[str, Any]) -> dict[str, Any]:
    """The capabilities of the pipeline `name` that its card says; by what its transformer's config is."""
    if name.startswith("CogVideoX") and transformer.get("patch_size_t"):
        return _COG_VIDEO_X_1_5
    return _CARDS.get(name, {})
