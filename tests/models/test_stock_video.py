"""Pipelines that make videos: which of them run without a family file, and what is derived of those."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from darkroom.configs import ConfigError
from darkroom.configs.capabilities import Capabilities
from darkroom.models import MODELS, stock_video
from darkroom.models.checkpoint import Checkpoint
from darkroom.models.stock import Source, find_class
from darkroom.models.stock_capabilities import capabilities as derived
from darkroom.models.stock_family import why_not
from tests import tiny, tiny_video
from tests.matrix import refusal

RUN: dict[str, tuple[str, str, tuple[int, tuple[int, int], int, int, int]]] = {
    "AnyFlowPipeline": ("AnyFlowTransformer3DModel", "AutoencoderKLWan", (16, (832, 480), 81, 4, 16)),
    "CogVideoXPipeline": ("CogVideoXTransformer3DModel", "AutoencoderKLCogVideoX", (16, (720, 480), 49, 8, 8)),
    "CogVideoXImageToVideoPipeline": (
        "CogVideoXTransformer3DModel",
        "AutoencoderKLCogVideoX",
        (16, (720, 480), 49, 8, 8),
    ),
    "EasyAnimatePipeline": ("EasyAnimateTransformer3DModel", "AutoencoderKLMagvit", (16, (512, 512), 49, 4, 8)),
    "HunyuanSkyreelsImageToVideoPipeline": (
        "HunyuanVideoTransformer3DModel",
        "AutoencoderKLHunyuanVideo",
        (16, (960, 544), 97, 4, 15),
    ),
    "HunyuanVideoPipeline": (
        "HunyuanVideoTransformer3DModel",
        "AutoencoderKLHunyuanVideo",
        (16, (1280, 720), 129, 4, 15),
    ),
    "Kandinsky5T2VPipeline": (
        "Kandinsky5Transformer3DModel",
        "AutoencoderKLHunyuanVideo",
        (16, (768, 512), 121, 4, 24),
    ),
    "Kandinsky5I2VPipeline": (
        "Kandinsky5Transformer3DModel",
        "AutoencoderKLHunyuanVideo",
        (16, (768, 512), 121, 4, 24),
    ),
    "LTXPipeline": ("LTXVideoTransformer3DModel", "AutoencoderKLLTXVideo", (32, (704, 512), 161, 8, 25)),
    "LTXConditionPipeline": ("LTXVideoTransformer3DModel", "AutoencoderKLLTXVideo", (32, (704, 512), 161, 8, 25)),
    "LTXImageToVideoPipeline": ("LTXVideoTransformer3DModel", "AutoencoderKLLTXVideo", (32, (704, 512), 161, 8, 25)),
    "LattePipeline": ("LatteTransformer3DModel", "AutoencoderKL", (8, (512, 512), 16, 15, 8)),
    "MochiPipeline": ("MochiTransformer3DModel", "AutoencoderKLMochi", (16, (848, 480), 19, 6, 30)),
    "MotifVideoPipeline": ("MotifVideoTransformer3DModel", "AutoencoderKLWan", (16, (1280, 736), 121, 4, 24)),
    "MotifVideoImage2VideoPipeline": (
        "MotifVideoTransformer3DModel",
        "AutoencoderKLWan",
        (16, (1280, 736), 121, 4, 24),
    ),
    "SanaVideoPipeline": ("SanaVideoTransformer3DModel", "AutoencoderKLWan", (32, (832, 480), 81, 4, 16)),
    "SanaImageToVideoPipeline": ("SanaVideoTransformer3DModel", "AutoencoderKLWan", (32, (832, 480), 81, 4, 16)),
    "SkyReelsV2Pipeline": ("SkyReelsV2Transformer3DModel", "AutoencoderKLWan", (16, (960, 544), 97, 4, 24)),
    "SkyReelsV2ImageToVideoPipeline": ("SkyReelsV2Transformer3DModel", "AutoencoderKLWan", (16, (960, 544), 97, 4, 24)),
}
"""Those that run: their transformer, their VAE, and (size multiple, default size, frames, frame multiple, frames a
second), of which the first four are from the classes' configs by default."""

OTHER_SETTINGS: dict[str, dict[str, Any]] = {
    "LattePipeline": {"transformer": {"video_length": 16, "patch_size": 2}, "vae": {"block_out_channels": [8] * 3}},
}

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
    "Cosmos3OmniPipeline": NO_PLACE,
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


def source(name: str) -> Source:
    found = find_class(name, "pipelines")
    assert found is not None
    return found


def configs(name: str) -> dict[str, dict[str, Any]]:
    own, (transformer, vae, _) = OTHER_SETTINGS.get(name, {}), RUN[name]
    return {
        part: {"_class_name": cls, **own.get(part, {})} for part, cls in (("transformer", transformer), ("vae", vae))
    }


def capabilities(name: str) -> Capabilities:
    return derived(name, source(name), {}, configs(name), tiny_components())


def tiny_components() -> dict[str, Any]:
    from darkroom.models.base import Component

    return dict.fromkeys(("transformer", "vae"), Component(module="diffusers.models", name="X", ranks="all"))


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


@pytest.mark.parametrize("name", RUN)
def test_what_is_derived(name: str) -> None:
    model, (unit, size, frames, multiple, fps) = capabilities(name), RUN[name][2]
    assert (model.size_multiple, model.default_size, model.fps) == (unit, size, fps)
    assert (model.num_frames, model.frame_multiple) == (frames, multiple)
    assert model.resolve("a cat", params(model)).num_frames == frames
    assert model.max_frames >= frames and (model.max_frames - 1) % multiple == 0
    begins = "ImageToVideo" in name or "I2V" in name or "Image2Video" in name
    both = ("text-to-video", "image-to-video") if name == "LTXConditionPipeline" else ("text-to-video",)
    assert model.tasks == (("image-to-video",) if begins else both)


def params(model: Capabilities) -> Any:
    from darkroom.configs import SamplingParams
    from tests.golden import picture_file

    needs = "text-to-video" not in model.tasks
    width, height = model.default_size
    return SamplingParams(images=(picture_file(64, 64),) if needs else (), width=width, height=height)


def test_negative_prompts_that_pipelines_bring() -> None:
    assert capabilities("Kandinsky5T2VPipeline").negative_prompt.startswith("Static, 2D cartoon")


def test_what_is_not_known_is_refused() -> None:
    pipeline = source("SanaVideoPipeline")
    parts = configs("SanaVideoPipeline")
    with pytest.raises(ConfigError, match="is not known: the configs have no scale_factor_"):
        stock_video.sizes("X", pipeline, {**parts, "vae": {"_class_name": "AutoencoderDC"}})
    with pytest.raises(ConfigError, match="its vae is a MyVae, which is no class of diffusers"):
        stock_video.sizes("X", pipeline, {**parts, "vae": {"_class_name": "MyVae"}})
    with pytest.raises(ConfigError, match="its transformer makes 2 frames of latents a token"):
        stock_video.sizes("X", pipeline, {**parts, "transformer": {**parts["transformer"], "patch_size": [2, 2, 2]}})
    with pytest.raises(ConfigError, match="does not say how many frames a second has"):
        stock_video.sizes("X", source("MochiPipeline"), configs("MochiPipeline"))
    allegro = {
        "transformer": {"_class_name": "AllegroTransformer3DModel"},
        "vae": {"_class_name": "AutoencoderKLAllegro"},
    }
    with pytest.raises(ConfigError, match="AutoencoderKLAllegro, decodes in nothing but tiles"):
        stock_video.sizes("X", source("AllegroPipeline"), allegro)
    latte = configs("LattePipeline")
    with pytest.raises(ConfigError, match="not known how many frames it makes"):
        stock_video.sizes(
            "X", source("LattePipeline"), {**latte, "transformer": {**latte["transformer"], "video_length": None}}
        )


def test_a_folder_is_checked(tmp_path: Path) -> None:
    folder = tiny_video.ltx(tmp_path / "ltx")
    assert refusal({"cfg": 2}, folder) is None
    assert "has no plan for vae parallelism; it has: cfg" in (refusal({"cfg": 2, "vae-pp": 2}, folder) or "")
    assert Checkpoint.open(str(folder)).capabilities.frame_multiple == 8
    assert NO_PLACE in (refusal({}, tiny.renamed(folder, tmp_path / "x", "LTX2Pipeline")) or "")
