"""Pipelines that make videos: which of them run without a family file, and what is derived of those."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

from darkroom.models import MODELS, stock_video
from darkroom.models.checkpoint import Checkpoint
from darkroom.models.stock import Source
from darkroom.models.stock_family import why_not
from tests import tiny, tiny_video
from tests.matrix import refusal
from tests.models.test_stock_sizes import RUN

NO_PLACE = "it makes sound with its videos"
SAFETY = "it needs a 'safety_checker'"
REDRAWS = "it redraws a 'video'"
PIECES = "it makes a video piece by piece"
DO_NOT: dict[str, str] = {
    "AnyFlowFARPipeline": "its loop keeps no progress bar",
    "ChronoEditPipeline": "its call does not keep to 'num_frames': num_frames = 5 if",
    "CogVideoXFunControlPipeline": "it draws by a 'control_video'",
    "CogVideoXVideoToVideoPipeline": REDRAWS,
    "ConsisIDPipeline": "it draws by a 'id_cond'",
    **dict.fromkeys(("Cosmos2_5_PredictBasePipeline", "Cosmos2_5_TransferPipeline"), SAFETY),
    **dict.fromkeys(("Cosmos2VideoToWorldPipeline", "CosmosTextToWorldPipeline"), SAFETY),
    "CosmosVideoToWorldPipeline": SAFETY,
    "Cosmos3OmniPipeline": SAFETY,
    "EasyAnimateControlPipeline": "it draws by a 'control_video'",
    "EasyAnimateInpaintPipeline": "its call takes 'mask_video'",
    "HeliosPipeline": PIECES,
    "HeliosPyramidPipeline": "its call takes no num_inference_steps",
    "HunyuanVideo15Pipeline": "its call takes no callback",
    "HunyuanVideo15ImageToVideoPipeline": "its call takes no height",
    "HunyuanVideoFramepackPipeline": PIECES,
    "HunyuanVideoImageToVideoPipeline": "its call does not keep to 'num_frames': video = video[:, :, 4:",
    "Kandinsky6SRPipeline": "its call takes no prompt",
    "Kandinsky6TI2VAPipeline": NO_PLACE,
    "LTXI2VLongMultiPromptPipeline": PIECES,
    **dict.fromkeys(("LTX2Pipeline", "LTX2ConditionPipeline", "LTX2HDRPipeline"), NO_PLACE),
    **dict.fromkeys(("LTX2InContextPipeline", "LTX2ImageToVideoPipeline"), NO_PLACE),
    **dict.fromkeys(("LTX2DFRPipeline", "LTX2DFRTemporalRefinePipeline"), "its call takes no num_inference_steps"),
    "LucyEditPipeline": REDRAWS,
    "SanaWMPipeline": "it does not return frames alone",
    **dict.fromkeys(("SkyReelsV2DiffusionForcingPipeline", "SkyReelsV2DiffusionForcingImageToVideoPipeline"), PIECES),
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline": REDRAWS,
    "WanAnimatePipeline": "it draws by a 'pose_video'",
    "WanVACEPipeline": "its call takes 'mask'",
    "WanVideoToVideoPipeline": REDRAWS,
}
ONLY_IN_TILES = "AllegroPipeline"


def test_every_pipeline_of_videos_runs_or_says_why() -> None:
    """Of all that diffusers has with a transformer: a new release shows here what it brings."""
    spec, found = importlib.util.find_spec("diffusers"), {}
    assert spec is not None and spec.submodule_search_locations
    for file in sorted(Path(spec.submodule_search_locations[0], "pipelines").rglob("pipeline_*.py")):
        if not re.search(r"frames|video", text := file.read_text()) or "transformer" not in text:
            continue
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith("Pipeline") and node.name not in MODELS:
                pipeline = Source(node, text)
                if stock_video.makes_videos(pipeline) and "transformer" in pipeline.parameters("__init__"):
                    found[node.name] = why_not(pipeline)
    upsamplers = {name for name, reason in found.items() if reason and "it has no " in reason}
    assert {name for name, reason in found.items() if reason is None} == {*RUN, ONLY_IN_TILES}
    assert found.keys() - RUN.keys() - {ONLY_IN_TILES} - upsamplers == DO_NOT.keys()
    assert [name for name, reason in DO_NOT.items() if not (found[name] or "").startswith(reason)] == []


def test_a_folder_is_checked(tmp_path: Path) -> None:
    folder = tiny_video.ltx(tmp_path / "ltx")
    assert refusal({"cfg": 2}, folder) is None
    assert "has no plan for vae parallelism; it has: cfg" in (refusal({"cfg": 2, "vae-pp": 2}, folder) or "")
    assert Checkpoint.open(str(folder)).capabilities.frame_multiple == 8
    assert NO_PLACE in (refusal({}, tiny.renamed(folder, tmp_path / "x", "LTX2Pipeline")) or "")
