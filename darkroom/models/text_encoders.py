"""The text encoders that several families use: which class computes their hidden states, and how it is cut."""

from __future__ import annotations

from darkroom.parallel.plan import Colwise, EmbeddingColumns, HeadBias, Heads, KeyValueGroups, LocalHeads, Plan, Rowwise

from .base import Component

_HEADS = Heads("num_attention_heads", "num_key_value_heads")

DECODER = Plan(
    tensor={
        "embed_tokens": EmbeddingColumns(),
        "layers.*.self_attn.q_proj": Colwise(_HEADS),
        "layers.*.self_attn.k_proj": Colwise(_HEADS, is_kv=True),
        "layers.*.self_attn.v_proj": Colwise(_HEADS, is_kv=True),
        "layers.*.self_attn.o_proj": Rowwise(_HEADS),
        "layers.*.self_attn": KeyValueGroups(_HEADS, "num_key_value_groups"),
        "layers.*.mlp.gate_proj": Colwise(),
        "layers.*.mlp.up_proj": Colwise(),
        "layers.*.mlp.down_proj": Rowwise(),
    }
)
"""A language model with grouped-query attention and a gated MLP."""

QWEN2_5_VL = Component(  # the vision tower and the vocabulary's logits are not needed for text alone
    module="transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
    name="Qwen2_5_VLTextModel",
    plan=DECODER,
    ranks="world",
    section="text_config",
    nested=("text_config",),
    prefixes={"model.language_model.": "", "model.": ""},
    leave_out=("model.visual.", "visual.", "lm_head."),
)

QWEN3 = Component(
    module="transformers.models.qwen3.modeling_qwen3",
    name="Qwen3Model",
    plan=DECODER,
    ranks="world",
    prefixes={"model.": "", "": ""},
    leave_out=("lm_head.",),
)

_UMT5_HEADS, _UMT5_LAYER = Heads("num_heads"), "block.*.layer"

UMT5 = Component(  # the encoder alone: the class around it has the embedding table twice
    module="transformers.models.umt5.modeling_umt5",
    name="UMT5Stack",
    plan=Plan(
        tensor={
            "embed_tokens": EmbeddingColumns(),
            **{f"{_UMT5_LAYER}.0.SelfAttention.{name}": Colwise(_UMT5_HEADS) for name in "qkv"},
            f"{_UMT5_LAYER}.0.SelfAttention.o": Rowwise(_UMT5_HEADS),
            f"{_UMT5_LAYER}.0.SelfAttention.relative_attention_bias": HeadBias(_UMT5_HEADS),  # every layer has its own
            f"{_UMT5_LAYER}.0.SelfAttention": LocalHeads(_UMT5_HEADS, "n_heads"),
            **{f"{_UMT5_LAYER}.1.DenseReluDense.{name}": Colwise() for name in ("wi_0", "wi_1")},
            f"{_UMT5_LAYER}.1.DenseReluDense.wo": Rowwise(),
        }
    ),
    ranks="world",
    prefixes={"encoder.": "", "shared.": "embed_tokens."},
    settings={"use_cache": False},  # which an encoder refuses, and config.json asks for
)
