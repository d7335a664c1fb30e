"""The names of text encoders' weights. What they compute, whole and cut, the families' golden tests compare."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from darkroom.configs import ParallelConfig
from darkroom.configs.pictures import load_picture
from darkroom.models.base import Component
from darkroom.models.build import _axis, _component, hand_on
from darkroom.models.checkpoint import Checkpoint
from darkroom.models.language_models import (
    GEMMA3,
    MISTRAL,
    QWEN2_5_VL,
    QWEN2_5_VL_TEXT,
    QWEN2_5_VL_WITH_VISION,
    QWEN3,
)
from darkroom.models.text_encoders import BERT, CLIP, CLIP_TEXT, CLIP_VISION, T5, UMT5
from darkroom.parallel.mesh import Mesh
from tests.faults import parts_are_cut_as_one
from tests.golden import TOLERANCE, picture_file, worker
from tests.ranks import run_ranks
from tests.subjects import SUBJECTS

LAYER = "layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("component", "key", "name"),
    [
        (QWEN2_5_VL, f"model.{LAYER}", LAYER),  # as transformers 4 wrote it
        (QWEN2_5_VL, f"model.language_model.{LAYER}", LAYER),
        (QWEN2_5_VL, "visual.blocks.0.mlp.up_proj.weight", None),
        (QWEN2_5_VL, "model.visual.blocks.0.mlp.up_proj.weight", None),
        (QWEN2_5_VL, "lm_head.weight", None),
        (QWEN2_5_VL_WITH_VISION, f"model.{LAYER}", f"language_model.{LAYER}"),
        (QWEN2_5_VL_WITH_VISION, f"model.language_model.{LAYER}", f"language_model.{LAYER}"),
        (QWEN2_5_VL_WITH_VISION, "visual.merger.ln_q.weight", "visual.merger.ln_q.weight"),
        (QWEN2_5_VL_WITH_VISION, "model.visual.merger.ln_q.weight", "visual.merger.ln_q.weight"),
        (QWEN2_5_VL_WITH_VISION, "lm_head.weight", None),
        (QWEN3, LAYER, LAYER),
        (QWEN3, f"model.{LAYER}", LAYER),  # of the class that has logits
        (QWEN3, "lm_head.weight", None),
        (GEMMA3, f"model.language_model.{LAYER}", LAYER),
        (GEMMA3, f"language_model.model.{LAYER}", LAYER),  # as transformers 4 wrote it
        (MISTRAL, f"language_model.{LAYER}", LAYER),  # of the class that has no logits
        (MISTRAL, "language_model.lm_head.weight", None),
        (MISTRAL, "vision_tower.ln_pre.weight", None),
        (MISTRAL, "model.multi_modal_projector.norm.weight", None),
        (QWEN2_5_VL_TEXT, LAYER, LAYER),
        (CLIP, "text_projection.weight", "text_projection.weight"),
        (CLIP, "text_model.embeddings.position_ids", None),  # as transformers wrote it before 4.31
        (CLIP_TEXT, "text_model.final_layer_norm.weight", "final_layer_norm.weight"),  # as transformers 4 wrote it
        (CLIP_TEXT, "final_layer_norm.weight", "final_layer_norm.weight"),
        (CLIP_TEXT, "text_projection.weight", None),
        (CLIP_TEXT, "text_model.embeddings.position_ids", None),
        (CLIP_VISION, "vision_model.post_layernorm.bias", "post_layernorm.bias"),  # as transformers 4 wrote it
        (CLIP_VISION, "post_layernorm.bias", "post_layernorm.bias"),
        (CLIP_VISION, "vision_model.embeddings.position_ids", None),
        (CLIP_VISION, "visual_projection.weight", None),  # of the class around it
        (BERT, "bert.embeddings.LayerNorm.bias", "embeddings.LayerNorm.bias"),  # of the class that guesses words
        (BERT, "embeddings.LayerNorm.bias", "embeddings.LayerNorm.bias"),
        (BERT, "cls.predictions.bias", None),
        (T5, "shared.weight", "embed_tokens.weight"),
        (T5, "encoder.embed_tokens.weight", "embed_tokens.weight"),
        (T5, "encoder.block.0.layer.1.DenseReluDense.wo.weight", "block.0.layer.1.DenseReluDense.wo.weight"),
        (T5, "decoder.embed_tokens.weight", None),
        (UMT5, "encoder.block.1.layer.0.SelfAttention.q.weight", "block.1.layer.0.SelfAttention.q.weight"),
        (UMT5, "shared.weight", "embed_tokens.weight"),  # most hold it by this name alone
        (UMT5, "encoder.embed_tokens.weight", "embed_tokens.weight"),
        (UMT5, "decoder.embed_tokens.weight", None),
    ],
)
def test_keys_are_renamed_or_left_out(component: Component, key: str, name: str | None) -> None:
    assert component.rename(key) == name


@pytest.mark.parametrize(
    ("name", "encoder"),
    [
        ("qwen_image_4_heads", "text_encoder"),
        ("qwen_image_edit_4_heads", "text_encoder"),
        ("z_image_4_heads", "text_encoder"),
        ("longcat_image_4_heads", "text_encoder"),
        ("ovis_image_4_heads", "text_encoder"),
        ("sd3_4_heads", "text_encoder"),
        ("sd3_4_heads", "text_encoder_2"),
        ("sd3_4_heads", "text_encoder_3"),
        ("wan_2_2", "text_encoder"),
        ("wan_image_to_video_2_1", "image_encoder"),
        ("flux2_klein_4_heads", "text_encoder"),
        ("flux_4_heads", "text_encoder"),
    ],
)
def test_a_checkpoint_holds_the_parameters_and_no_others(name: str, encoder: str, checkpoints: dict[str, Path]) -> None:
    checkpoint = Checkpoint.open(str(checkpoints[name]))
    component = checkpoint.family.components[encoder]
    cls = getattr(importlib.import_module(component.module), component.name)
    with torch.device("meta"):
        module = cls(cls.config_class(**checkpoint.configs[encoder]))
    if component.unread:
        for layer in module.get_submodule(component.unread)[-component.unread_layers :]:
            hand_on(layer)
    shapes = {key: stored.shape for key, stored in checkpoint.tensors(encoder).items()}
    assert shapes == {key: tuple(parameter.shape) for key, parameter in module.named_parameters()}


FIRST = [f"{name}_{next(iter(subject.variants))}" for name, subject in SUBJECTS.items()]
UNREAD = {
    ("z_image_4_heads", "text_encoder"): ("layers.1.", "layers.2."),
    ("wan_image_to_video_2_1", "image_encoder"): ("encoder.layers.1.", "encoder.layers.2."),
    ("flux2_klein_4_heads", "text_encoder"): ("layers.26.", "layers.27."),
}
"""The last layer that is read, and one of which nobody reads what it makes."""
Held = dict[tuple[str, str], dict[str, int]]
"""Bytes by checkpoint and encoder, then by parameter."""


def hold(rank: int, size: int, folders: dict[str, Path]) -> Held:
    """What this rank holds of all text and picture encoders."""
    config = ParallelConfig.model_validate({"usp": size})
    mesh, held = Mesh(config, rank), {}
    for name, folder in folders.items():
        checkpoint = Checkpoint.open(str(folder))
        for part in (part for part in checkpoint.components if "encoder" in part):
            axis = _axis(checkpoint.components[part], mesh)
            assert axis is not None
            module = _component(checkpoint, part, axis, torch.device("cpu"), torch.float32)
            held[name, part] = {key: x.numel() * x.element_size() for key, x in module.named_parameters()}
    return held


def spread(held: dict[str, int]) -> int:
    """Bytes without a picture's first layer, which is whole everywhere: of the tiny ones it is the most."""
    return sum(size for key, size in held.items() if "patch_embed" not in key)


def test_every_encoder_is_cut_over_all_ranks(checkpoints: dict[str, Path]) -> None:
    """Ranks of sequence parallelism too, which share the transformer whole. And what nobody reads is on none."""
    folders = {name: checkpoints[name] for name in FIRST}
    [whole], halves = run_ranks(hold, 1, folders), run_ranks(hold, 2, folders)
    assert {name for name, _ in whole} == {*FIRST}
    told = {name: Checkpoint.open(str(folder)) for name, folder in folders.items()}
    two = {name: one.footprint(ParallelConfig.model_validate({"usp": 2}), "float32") for name, one in told.items()}
    for rank, held in enumerate(halves):
        for name, part in whole:
            assert sum(held[name, part].values()) == two[name][rank][part], (name, part)
            assert spread(held[name, part]) <= 0.65 * spread(whole[name, part]), (name, part)
    for encoder, (read, unread) in UNREAD.items():
        assert any(key.startswith(read) for key in whole[encoder])
        assert not any(key.startswith(unread) for key in whole[encoder])


def see(rank: int, size: int, folder: Path) -> torch.Tensor:
    """What the encoder makes of a picture and a text."""
    cell = {"tp": size} if size > 1 else {}
    with worker(folder, ParallelConfig.model_validate(cell), rank) as one:
        pipe = one.model.pipe
        pictures = [load_picture(picture_file(112, 84))]
        inputs = pipe.processor(
            text=["<|vision_start|><|image_pad|><|vision_end|> b"], images=pictures, return_tensors="pt"
        )
        return pipe.text_encoder(**inputs).last_hidden_state.clone()


@pytest.mark.parametrize("size", [2, 3])
def test_the_vision_tower_on_ranks_is_one_process(size: int, checkpoints: dict[str, Path]) -> None:
    """Two heads: the third rank has one of zeros."""
    folder = checkpoints["qwen_image_edit_4_heads"]
    alone = see(0, 1, folder)
    for got in run_ranks(see, size, folder):
        assert float((got - alone).abs().max()) <= TOLERANCE
    for got in run_ranks(see_with_a_fault, 2, folder):
        assert float((got - alone).abs().max()) > 10 * TOLERANCE


def see_with_a_fault(rank: int, size: int, folder: Path) -> torch.Tensor:
    with parts_are_cut_as_one():
        return see(rank, size, folder)
