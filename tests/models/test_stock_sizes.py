"""What is derived of pipelines that make videos and have no family file: sizes, lengths, frame rates and steps."""

from __future__ import annotations

from typing import Any

import pytest

from darkroom.configs import ConfigError, RequestError, SamplingParams
from darkroom.configs.capabilities import Capabilities
from darkroom.models import stock_sizes
from darkroom.models.base import Component
from darkroom.models.stock import Source, find_class
from darkroom.models.stock_capabilities import capabilities as derived
from tests.golden import picture_file

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
        (16, (960, 544), 97, 4, 24),
    ),
    "HunyuanVideoPipeline": (
        "HunyuanVideoTransformer3DModel",
        "AutoencoderKLHunyuanVideo",
        (16, (1280, 720), 129, 4, 24),
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
    return dict.fromkeys(("transformer", "vae"), Component(module="diffusers.models", name="X", ranks="all"))


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


def params(model: Capabilities) -> SamplingParams:
    needs = "text-to-video" not in model.tasks
    width, height = model.default_size
    return SamplingParams(images=(picture_file(64, 64),) if needs else (), width=width, height=height)


def with_settings(name: str, **transformer: Any) -> Capabilities:
    """What is derived where the transformer's config says this too."""
    parts = configs(name)
    parts["transformer"] |= transformer
    return derived(name, source(name), {}, parts, tiny_components())


@pytest.mark.parametrize(
    ("name", "edge", "frames"),
    [("SkyReelsV2Pipeline", 16_384, 241), ("SanaVideoPipeline", 16_384, 241), ("Kandinsky5T2VPipeline", 2048, 241)],
)
def test_no_edge_is_longer_than_the_table_of_positions(name: str, edge: int, frames: int) -> None:
    """1,024 places for tokens of 16 pixels; Kandinsky's has 128."""
    model = capabilities(name)
    assert (model.max_edge, model.max_frames) == (edge, frames)
    with pytest.raises(RequestError, match=f"at most {edge} pixels"):
        model.resolve("a cat", SamplingParams(width=edge + model.size_multiple, height=model.size_multiple))
    assert with_settings("SkyReelsV2Pipeline", rope_max_seq_len=5).max_frames == 17


@pytest.mark.parametrize("name", ["CogVideoXPipeline", "CogVideoXImageToVideoPipeline"])
def test_a_table_of_which_a_corner_is_taken(name: str) -> None:
    """CogVideoX 1.5's: 150 tokens of 16 pixels. 1.0 scales its table to any size."""
    model = with_settings(name, patch_size_t=2, sample_width=300, sample_height=300)
    assert (model.max_edge, model.default_size) == (2400, (1360, 768))
    if model.tasks == ("image-to-video",):
        wide = model.resolve("a cat", SamplingParams(images=(picture_file(1800, 300),)))
        assert (wide.width, wide.height) == (2400, 416)
    assert with_settings(name).max_edge is None


def test_texts_have_places_too() -> None:
    """Lumina-Image 2.0's: 300, of which the picture takes the one behind the text."""
    parts = {
        "transformer": {"_class_name": "Lumina2Transformer2DModel", "patch_size": 2, "axes_lens": [300, 512, 512]},
        "vae": {"_class_name": "AutoencoderKL", "block_out_channels": [8] * 4},
    }
    model = derived("Lumina2Pipeline", source("Lumina2Pipeline"), {}, parts, tiny_components())
    assert (model.text_window, model.max_sequence_length, model.max_edge) == (299, 256, 8192)


def test_learned_positions_are_of_one_size_and_length() -> None:
    """CogVideoX-5b-I2V's: its own size, whatever the picture's is."""
    learned = {"use_rotary_positional_embeddings": True, "use_learned_positional_embeddings": True}
    model = with_settings("CogVideoXImageToVideoPipeline", max_text_seq_length=226, **learned)
    wanted = model.resolve("a cat", SamplingParams(images=(picture_file(64, 64),)))
    assert (wanted.width, wanted.height, wanted.num_frames, wanted.max_sequence_length) == (720, 480, 49, 226)
    for other, words in (
        ({"width": 480, "height": 720}, "480x720: CogVideoXImageToVideoPipeline makes 720x480 and no other"),
        ({"num_frames": 41}, "num_frames"),
        ({"max_sequence_length": 100}, "cuts no prompt off"),
    ):
        with pytest.raises(RequestError, match=words):
            model.resolve("a cat", SamplingParams(images=(picture_file(64, 64),), **other))
    rotary = with_settings("CogVideoXPipeline", max_text_seq_length=226, use_rotary_positional_embeddings=True)
    assert not rotary.one_size and rotary.max_sequence_length == 226
    assert with_settings("CogVideoXPipeline", max_text_seq_length=226).max_sequence_length is None  # 2b adds a table


def test_schedules_without_a_single_step() -> None:
    assert capabilities("MochiPipeline").min_inference_steps == 2
    assert capabilities("LTXConditionPipeline").min_inference_steps == 1  # its own linear one has
    stretched = {**configs("LTXPipeline"), "scheduler": {"shift_terminal": 0.1}}
    assert capabilities("LTXPipeline").min_inference_steps == 1
    assert derived("LTXPipeline", source("LTXPipeline"), {}, stretched, tiny_components()).min_inference_steps == 2


def test_negative_prompts_that_pipelines_bring() -> None:
    assert capabilities("Kandinsky5T2VPipeline").negative_prompt.startswith("Static, 2D cartoon")


def test_what_is_not_known_is_refused() -> None:
    pipeline = source("SanaVideoPipeline")
    parts = configs("SanaVideoPipeline")
    with pytest.raises(ConfigError, match="is not known: the configs have no scale_factor_"):
        stock_sizes.sizes("X", pipeline, {**parts, "vae": {"_class_name": "AutoencoderDC"}})
    with pytest.raises(ConfigError, match="its vae is a MyVae, which is no class of diffusers"):
        stock_sizes.sizes("X", pipeline, {**parts, "vae": {"_class_name": "MyVae"}})
    with pytest.raises(ConfigError, match="its transformer makes 2 frames of latents a token"):
        stock_sizes.sizes("X", pipeline, {**parts, "transformer": {**parts["transformer"], "patch_size": [2, 2, 2]}})
    with pytest.raises(ConfigError, match="does not say how many frames a second has"):
        stock_sizes.sizes("X", source("MochiPipeline"), configs("MochiPipeline"))
    with pytest.raises(ConfigError, match="'attention_type': 'nabla'"):
        with_settings("Kandinsky5T2VPipeline", attention_type="nabla")
    allegro = {
        "transformer": {"_class_name": "AllegroTransformer3DModel"},
        "vae": {"_class_name": "AutoencoderKLAllegro"},
    }
    with pytest.raises(ConfigError, match="AutoencoderKLAllegro, decodes in nothing but tiles"):
        stock_sizes.sizes("X", source("AllegroPipeline"), allegro)
    latte = configs("LattePipeline")
    with pytest.raises(ConfigError, match="not known how many frames it makes"):
        stock_sizes.sizes(
            "X", source("LattePipeline"), {**latte, "transformer": {**latte["transformer"], "video_length": None}}
        )
