"""CLIP, BERT and T5, as pipelines use them: which class computes what is read, and how it is cut."""

from __future__ import annotations

from dataclasses import replace

from darkroom.parallel.plan import (
    Colwise,
    EmbeddingColumns,
    HeadBias,
    Heads,
    LocalHeads,
    Plan,
    Rowwise,
    TensorStyle,
)

from .base import Component

_HEADS = Heads("num_attention_heads")


def _clip_layers(encoder: str) -> dict[str, TensorStyle]:
    """The layers of either half of CLIP."""
    layer = f"{encoder}.layers.*"
    return {
        **{f"{layer}.self_attn.{name}_proj": Colwise(_HEADS) for name in "qkv"},
        f"{layer}.self_attn.out_proj": Rowwise(_HEADS),
        f"{layer}.mlp.fc1": Colwise(),
        f"{layer}.mlp.fc2": Rowwise(),
    }


CLIP = Component(  # position_ids are counted by the class; transformers before 4.31 stored them
    module="transformers.models.clip.modeling_clip",
    name="CLIPTextModelWithProjection",
    plan=Plan(
        tensor={
            "text_model.embeddings.token_embedding": EmbeddingColumns(),
            **_clip_layers("text_model.encoder"),
        }
    ),
    ranks="world",
    leave_out=("text_model.embeddings.position_ids",),
)

CLIP_TEXT = replace(  # without the projection, which the class does not have; nor the prefix, from transformers 5 on
    CLIP,
    name="CLIPTextModel",
    plan=Plan(tensor={path.removeprefix("text_model."): style for path, style in CLIP.plan.tensor.items()}),
    prefixes={"text_model.": "", "": ""},
    leave_out=(*CLIP.leave_out, "embeddings.position_ids", "text_projection."),
)

CLIP_VISION = Component(  # the class had its layers in `vision_model` until transformers 5
    module="transformers.models.clip.modeling_clip",
    name="CLIPVisionModel",
    plan=Plan(tensor=_clip_layers("encoder")),
    ranks="world",
    prefixes={"vision_model.": "", "": ""},
    unread="encoder.layers",
    leave_out=("vision_model.embeddings.position_ids", "visual_projection."),
)

_BERT_LAYER = "encoder.layer.*"

BERT = Component(
    module="transformers.models.bert.modeling_bert",
    name="BertModel",
    plan=Plan(
        tensor={
            "embeddings.word_embeddings": EmbeddingColumns(),
            **{f"{_BERT_LAYER}.attention.self.{name}": Colwise(_HEADS) for name in ("query", "key", "value")},
            f"{_BERT_LAYER}.attention.output.dense": Rowwise(_HEADS),
            f"{_BERT_LAYER}.intermediate.dense": Colwise(),
            f"{_BERT_LAYER}.output.dense": Rowwise(),
        }
    ),
    ranks="world",
    prefixes={"bert.": "", "": ""},
    leave_out=("cls.",),  # of the classes around it, which guess words
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


def processor_files(folder: str) -> tuple[tuple[str, ...], ...]:
    """The file that says how pictures become the encoder's pixels: of transformers 4, or of 5."""
    return (f"{folder}/preprocessor_config.json",), (f"{folder}/processor_config.json",)
