"""Which encoders of pipelines without a family file are cut, and which of their layers nobody reads."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from darkroom.models import any_diffusers
from darkroom.models.stock import Source, find_class
from darkroom.models.stock_encoders import cut_encoder


def source(pipeline: str) -> Source:
    found = find_class(pipeline, "pipelines")
    assert found is not None
    return found


NUMBERS = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 40}
CONFIG = {**NUMBERS, "text_config": {**NUMBERS, "model_type": "mistral"}, "vision_config": {"num_heads": 4}}


@pytest.mark.parametrize(
    ("pipeline", "part", "cls", "unread"),
    [
        ("Flux2Pipeline", "text_encoder", "Mistral3ForConditionalGeneration", 10),  # states 10, 20 and 30
        ("Flux2KleinPipeline", "text_encoder", "Qwen3ForCausalLM", 13),
        ("Lumina2Pipeline", "text_encoder", "Gemma2Model", 1),  # the one before the last
        ("LuminaPipeline", "text_encoder", "GemmaModel", 1),  # in either of its calls
        ("HunyuanVideoPipeline", "text_encoder", "LlamaModel", 2),  # as far from the end as a parameter says
        ("SkyReelsV2ImageToVideoPipeline", "image_encoder", "CLIPVisionModelWithProjection", 1),
        ("HunyuanImagePipeline", "text_encoder", "Qwen2_5_VLForConditionalGeneration", 2),  # of two by one name
        ("BriaFiboPipeline", "text_encoder", "SmolLM3ForCausalLM", 0),  # all
        ("HunyuanVideo15Pipeline", "text_encoder", "Qwen2_5_VLTextModel", 2),  # and of a function without self
        ("StableDiffusion3PAGPipeline", "text_encoder_2", "CLIPTextModelWithProjection", 0),  # and what is pooled
    ],
)
def test_layers_that_nobody_reads_are_found(pipeline: str, part: str, cls: str, unread: int) -> None:
    found = cut_encoder(part, cls, source(pipeline), CONFIG)
    assert found is not None
    assert (found.unread_layers if found.unread else 0) == unread


@pytest.mark.parametrize(
    ("pipeline", "part", "cls", "config"),
    [
        ("PRXPipeline", "text_encoder", "T5GemmaEncoder", CONFIG),  # there is no plan
        ("SanaPipeline", "text_encoder", "Gemma2ForCausalLM", CONFIG),  # its first output are the logits
        ("Krea2Pipeline", "text_encoder", "Qwen3VLForConditionalGeneration", {**CONFIG, "text_config": {}}),
        ("HunyuanVideoImageToVideoPipeline", "text_encoder", "LlavaForConditionalGeneration", CONFIG),
        ("Kandinsky6TI2VAPipeline", "text_encoder", "Qwen2_5_VLForConditionalGeneration", CONFIG),  # lets it write
        ("FluxPipeline", "image_encoder", "CLIPVisionModelWithProjection", CONFIG),  # reads its projection
        ("LTX2Pipeline", "text_encoder", "Gemma3ForConditionalGeneration", {"text_config": {"hidden_size": 4}}),
        ("Lumina2Pipeline", "text_encoder", "Gemma2Model", {**CONFIG, "quantization_config": {}}),
    ],
)
def test_others_stay_whole(pipeline: str, part: str, cls: str, config: dict[str, Any]) -> None:
    assert cut_encoder(part, cls, source(pipeline), config) is None


def test_an_encoder_that_sees_pictures_keeps_its_eyes() -> None:
    for pipeline, name in (
        ("Kandinsky5T2IPipeline", "Qwen2_5_VLTextModel"),
        ("Kandinsky5I2IPipeline", "Qwen2_5_VLModel"),
        ("QwenImageEditInpaintPipeline", "Qwen2_5_VLModel"),
        ("Krea2Pipeline", "Qwen3VLTextModel"),
        ("QwenImage21Pipeline", "Qwen3VLModel"),  # it also asks for its `model`
        ("JoyImageEditPipeline", "Qwen3VLModel"),
        ("NucleusMoEImagePipeline", "Qwen3VLModel"),  # for more of its config than a text model has
        ("Ideogram4Pipeline", "Qwen3VLModel"),  # for its `language_model`, whose layers it calls one by one
    ):
        cls = "Qwen3VLForConditionalGeneration" if "3" in name else "Qwen2_5_VLForConditionalGeneration"
        found = cut_encoder("text_encoder", cls, source(pipeline), CONFIG)
        assert found is not None and found.name == name


def test_prompts_are_rewritten_only_where_a_parameter_asks_for_it() -> None:
    for pipeline, parameter in (
        ("Flux2Pipeline", "caption_upsample_temperature"),
        ("LTX2Pipeline", "enable_prompt_enhancement"),
        ("LTX2ImageToVideoPipeline", "enable_prompt_enhancement"),
    ):
        assert not source(pipeline).parameters("__call__")[parameter]
        assert f"if {parameter}" in source(pipeline).code("__call__")
        assert parameter not in inspect.getsource(any_diffusers)
