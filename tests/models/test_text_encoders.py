"""The names of text encoders' weights. What they compute, whole and cut, the families' golden tests compare."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from darkroom.models.base import Component
from darkroom.models.checkpoint import Checkpoint
from darkroom.models.text_encoders import QWEN2_5_VL, QWEN3, UMT5

LAYER = "layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("component", "key", "name"),
    [
        (QWEN2_5_VL, f"model.{LAYER}", LAYER),  # as transformers 4 wrote it
        (QWEN2_5_VL, f"model.language_model.{LAYER}", LAYER),
        (QWEN2_5_VL, "visual.blocks.0.mlp.up_proj.weight", None),
        (QWEN2_5_VL, "model.visual.blocks.0.mlp.up_proj.weight", None),
        (QWEN2_5_VL, "lm_head.weight", None),
        (QWEN3, LAYER, LAYER),
        (QWEN3, f"model.{LAYER}", LAYER),  # of the class that has logits
        (QWEN3, "lm_head.weight", None),
        (UMT5, "encoder.block.1.layer.0.SelfAttention.q.weight", "block.1.layer.0.SelfAttention.q.weight"),
        (UMT5, "shared.weight", "embed_tokens.weight"),  # most hold it by this name alone
        (UMT5, "encoder.embed_tokens.weight", "embed_tokens.weight"),
        (UMT5, "decoder.embed_tokens.weight", None),
    ],
)
def test_keys_are_renamed_or_left_out(component: Component, key: str, name: str | None) -> None:
    assert component.rename(key) == name


@pytest.mark.parametrize(
    "name", ["qwen_image_4_heads", "z_image_4_heads", "longcat_image_4_heads", "ovis_image_4_heads", "wan_2_1_4_heads"]
)
def test_a_checkpoint_holds_the_parameters_and_no_others(name: str, checkpoints: dict[str, Path]) -> None:
    checkpoint = Checkpoint.open(str(checkpoints[name]))
    component = checkpoint.family.components["text_encoder"]
    cls = getattr(importlib.import_module(component.module), component.name)
    with torch.device("meta"):
        module = cls(cls.config_class(**checkpoint.configs["text_encoder"]))
    shapes = {key: stored.shape for key, stored in checkpoint.tensors("text_encoder").items()}
    assert shapes == {key: tuple(parameter.shape) for key, parameter in module.named_parameters()}
