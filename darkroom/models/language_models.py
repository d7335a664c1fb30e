"""The language models that pipelines read: which class computes their hidden states, and how it is cut.

Of the classes that also have the vocabulary's logits, only what is under them is built.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from darkroom.parallel.plan import (
    Colwise,
    EmbeddingColumns,
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


_HEADS = Heads("num_attention_heads", "num_key_value_heads")
DECODER = Plan(tensor=_decoder("", _HEADS))


def _language_model(family: str, name: str, **values: Any) -> Component:
    """A class of transformers' `family`, stored by itself or with the vocabulary's logits around it."""
    standard: dict[str, Any] = {
        "module": f"transformers.models.{family}.modeling_{family}",
        "plan": DECODER,
        "ranks": "world",
        "prefixes": {"model.": "", "": ""},
        "leave_out": ("lm_head.",),
    }
    return Component(name=name, **{**standard, **values})


def _reader(family: str, name: str) -> Component:
    """The language model of one that also sees pictures, for texts alone. Keys of other parts have no such prefix."""
    prefixes = {"model.language_model.": "", "language_model.model.": "", "language_model.": ""}
    leave_out = ("language_model.lm_head.",)
    return _language_model(family, name, section="text_config", prefixes=prefixes, leave_out=leave_out)


QWEN3 = _language_model("qwen3", "Qwen3Model")
LLAMA = _language_model("llama", "LlamaModel")
GEMMA = _language_model("gemma", "GemmaModel")
GEMMA2 = _language_model("gemma2", "Gemma2Model")
SMOLLM3 = _language_model("smollm3", "SmolLM3Model")

GLM = _language_model(
    "glm",
    "GlmModel",
    plan=Plan(
        tensor={
            **{path: style for path, style in DECODER.tensor.items() if ".mlp." not in path},
            "layers.*.mlp.gate_up_proj": Colwise(parts=(Part(), Part())),
            "layers.*.mlp.down_proj": Rowwise(),
        }
    ),
)

GEMMA3 = _reader("gemma3", "Gemma3TextModel")
MISTRAL = _reader("mistral", "MistralModel")
MINISTRAL3 = _reader("ministral3", "Ministral3Model")
QWEN3_VL = _reader("qwen3_vl", "Qwen3VLTextModel")

QWEN2_5_VL = replace(  # older checkpoints have no section, and the vision tower beside the language model's keys
    _reader("qwen2_5_vl", "Qwen2_5_VLTextModel"),
    prefixes={"model.language_model.": "", "model.": ""},
    leave_out=("model.visual.", "visual.", "lm_head."),
)
QWEN2_VL = replace(QWEN2_5_VL, module="transformers.models.qwen2_vl.modeling_qwen2_vl", name="Qwen2VLTextModel")
QWEN2_5_VL_TEXT = _language_model("qwen2_5_vl", "Qwen2_5_VLTextModel")

_READER = _decoder("language_model.", Heads("text_config.num_attention_heads", "text_config.num_key_value_heads"))
_VISION_HEADS = Heads("vision_config.num_heads")
_SEEING: dict[str, TensorStyle] = {
    "visual.blocks.*.attn.qkv": Colwise(parts=(Part(heads=_VISION_HEADS),) * 3),
    "visual.blocks.*.attn.proj": Rowwise(_VISION_HEADS),
    "visual.blocks.*.attn": LocalHeads(_VISION_HEADS, "num_heads"),
}
_VISION: dict[str, TensorStyle] = {
    **_SEEING,
    "visual.blocks.*.mlp.gate_proj": Colwise(),
    "visual.blocks.*.mlp.up_proj": Colwise(),
    "visual.blocks.*.mlp.down_proj": Rowwise(),
    "visual.merger.mlp.0": Colwise(),
    "visual.merger.mlp.2": Rowwise(),
}

QWEN2_5_VL_WITH_VISION = Component(
    module="transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
    name="Qwen2_5_VLModel",
    plan=Plan(tensor={**_READER, **_VISION}),
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

_TWO_LINEAR = ("visual.blocks.*.mlp", "visual.merger", "visual.deepstack_merger_list.*")

QWEN3_VL_WITH_VISION = _language_model(
    "qwen3_vl",
    "Qwen3VLModel",
    plan=Plan(
        tensor={
            **_READER,
            **_SEEING,
            "visual.pos_embed": EmbeddingColumns(),
            **{f"{mlp}.linear_fc1": Colwise() for mlp in _TWO_LINEAR},
            **{f"{mlp}.linear_fc2": Rowwise() for mlp in _TWO_LINEAR},
        }
    ),
    around="model",
)
