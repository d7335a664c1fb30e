"""The text encoders that several families use: which class computes their hidden states, and how it is cut."""

from __future__ import annotations

from dataclasses import replace

from darkroom.parallel.plan import (
    Colwise,
    EmbeddingColumns,
    HeadBias,
    Heads,
    KeyValueGroups,
    LocalHeads,
    Part,
    Plan,
    Rowwise,
    TensorStyle,
)

from .base import Component


def _decoder(prefix: str, heads: Heads) -> dict[str, TensorStyle]:
    """The layers of a language model with grouped-query attention and a gated MLP."""
    layer = f"{prefix}layers.*"
    return {
        f"{prefix}embed_tokens": EmbeddingColumns(),
        f"{layer}.self_attn.q_proj": Colwise(heads),
        f"{layer}.self_attn.k_proj": Colwise(heads, is_kv=True),
        f"{layer}.self_attn.v_proj": Colwise(heads, is_kv=True),
        f"{layer}.self_attn.o_proj": Rowwise(heads),
        f"{layer}.self_attn": KeyValueGroups(heads, "num_key_value_groups"),
        f"{layer}.mlp.gate_proj": Colwise(),
        f"{layer}.mlp.up_proj": Colwise(),
        f"{layer}.mlp.down_proj": Rowwise(),
    }


DECODER = Plan(tensor=_decoder("", Heads("num_attention_heads", "num_key_value_heads")))

_VISION_HEADS = Heads("vision_config.num_heads")
_VISION: dict[str, TensorStyle] = {
    "visual.blocks.*.attn.qkv": Colwise(parts=(Part(heads=_VISION_HEADS),) * 3),
    "visual.blocks.*.attn.proj": Rowwise(_VISION_HEADS),
    "visual.blocks.*.attn": LocalHeads(_VISION_HEADS, "num_heads"),
    "visual.blocks.*.mlp.gate_proj": Colwise(),
    "visual.blocks.*.mlp.up_proj": Colwise(),
    "visual.blocks.*.mlp.down_proj": Rowwise(),
    "visual.merger.mlp.0": Colwise(),
    "visual.merger.mlp.2": Rowwise(),
}

QWEN2_5_VL = Component(  # the vision tower and the vocabulary's logits are not needed for text alone
    module="transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
    name="Qwen2_5_VLTextModel",
    plan=DECODER,
    ranks="world",
    section="text_config",
    prefixes={"model.language_model.": "", "model.": ""},
    leave_out=("model.visual.", "visual.", "lm_head."),
)

QWEN2_5_VL_WITH_VISION = Component(
    module="transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
    name="Qwen2_5_VLModel",
    plan=Plan(
        tensor={
            **_decoder("language_model.", Heads("text_config.num_attention_heads", "text_config.num_key_value_heads")),
            **_VISION,
        }
    ),
    ranks="world",
    nested=("text_config",),
    prefixes={
        "model.language_model.": "language_model.",
        "model.visual.": "visual.",
        "visual.": "visual.",
        "model.": "language_model.",
    },
    leave_out=("lm_head.",),
)

QWEN3 = Component(
    module="transformers.models.qwen3.modeling_qwen3",
    name="Qwen3Model",
    plan=DECODER,
    ranks="world",
    prefixes={"model.": "", "": ""},
    leave_out=("lm_head.",),
)

_CLIP_HEADS, _CLIP_LAYER = Heads("num_attention_heads"), "text_model.encoder.layers.*"

CLIP = Component(  # position_ids are counted by the class; transformers before 4.31 stored them
    module="transformers.models.clip.modeling_clip",
    name="CLIPTextModelWithProjection",
    plan=Plan(
        tensor={
            "text_model.embeddings.token_embedding": EmbeddingColumns(),
            **{f"{_CLIP_LAYER}.self_attn.{name}_proj": Colwise(_CLIP_HEADS) for name in "qkv"},
            f"{_CLIP_LAYER}.self_attn.out_proj": Rowwise(_CLIP_HEADS),
            f"{_CLIP_LAYER}.mlp.fc1": Colwise(),
            f"{_CLIP_LAYER}.mlp.fc2": Rowwise(),
        }
    ),
    ranks="world",
    leave_out=("text_model.embeddings.position_ids",),
)

_VISION_LAYER = "encoder.layers.*"

CLIP_VISION = Component(  # the class had its layers in `vision_model` until transformers 5
    module="transformers.models.clip.modeling_clip",
    name="CLIPVisionModel",
    plan=Plan(
        tensor={
            **{f"{_VISION_LAYER}.self_attn.{name}_proj": Colwise(_CLIP_HEADS) for name in "qkv"},
            f"{_VISION_LAYER}.self_attn.out_proj": Rowwise(_CLIP_HEADS),
            f"{_VISION_LAYER}.mlp.fc1": Colwise(),
            f"{_VISION_LAYER}.mlp.fc2": Rowwise(),
        }
    ),
    ranks="world",
    prefixes={"vision_model.": "", "": ""},
    unread="encoder.layers",
    leave_out=("vision_model.embeddings.position_ids", "visual_projection."),
)

_T5_HEADS, _T5_LAYER = Heads("num_heads"), "block.*.layer"
_T5_TENSOR: dict[str, TensorStyle] = {
    "embed_tokens": EmbeddingColumns(),
    **{f"{_T5_LAYER}.0.SelfAttention.{name}": Colwise(_T5_HEADS) for name in "qkv"},
    f"{_T5_LAYER}.0.SelfAttention.o": Rowwise(_T5_HEADS),
    **{f"{_T5_LAYER}.1.DenseReluDense.{name}": Colwise() for name in ("wi_0", "wi_1")},
    f"{_T5_LAYER}.1.DenseReluDense.wo": Rowwise(),
}

T5 = Component(  # the encoder alone: the class around it has the embedding table twice
    module="transformers.models.t5.modeling_t5",
    name="T5Stack",
    plan=Plan(
        tensor={
            **_T5_TENSOR,
            "block.0.layer.0.SelfAttention.relative_attention_bias": HeadBias(_T5_HEADS),  # for the other layers too
        }
    ),
    ranks="world",
    prefixes={"encoder.": "", "shared.": "embed_tokens."},
    settings={"use_cache": False},  # which an encoder refuses, and config.json asks for
    exact=("wo",),
)

UMT5 = replace(
    T5,
    module="transformers.models.umt5.modeling_umt5",
    name="UMT5Stack",
    plan=Plan(
        tensor={
            **_T5_TENSOR,
            f"{_T5_LAYER}.0.SelfAttention.relative_attention_bias": HeadBias(_T5_HEADS),  # every layer has its own
            f"{_T5_LAYER}.0.SelfAttention": LocalHeads(_T5_HEADS, "n_heads"),
        }
    ),
)

BY_CLASS = {"Qwen3Model": QWEN3, "Qwen3ForCausalLM": QWEN3, "T5EncoderModel": T5, "UMT5EncoderModel": UMT5}
"""What computes the hidden states of a class that model_index.json names."""


def processor_files(folder: str) -> tuple[tuple[str, ...], ...]:
    """The file that says how pictures become the encoder's pixels: of transformers 4, or of 5."""
    return (f"{folder}/preprocessor_config.json",), (f"{folder}/processor_config.json",)
