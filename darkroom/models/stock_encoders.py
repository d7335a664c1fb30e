"""How the encoders of a pipeline without a family file are cut: by its source, only where no more is read of them than
the plan's class computes. Any other encoder stays whole."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from . import language_models as language
from .base import Component
from .stock import Source
from .text_encoders import BERT, CLIP, CLIP_TEXT, CLIP_VISION, T5, UMT5

BY_CLASS = {
    "BertModel": BERT,
    "CLIPTextModel": CLIP_TEXT,
    "CLIPTextModelWithProjection": CLIP,
    "CLIPVisionModel": CLIP_VISION,
    "CLIPVisionModelWithProjection": CLIP_VISION,
    "GemmaModel": language.GEMMA,
    "GemmaForCausalLM": language.GEMMA,
    "Gemma2Model": language.GEMMA2,
    "Gemma2ForCausalLM": language.GEMMA2,
    "Gemma3ForConditionalGeneration": language.GEMMA3,
    "GlmModel": language.GLM,
    "GlmForCausalLM": language.GLM,
    "LlamaModel": language.LLAMA,
    "LlamaForCausalLM": language.LLAMA,
    "Mistral3Model mistral": language.MISTRAL,
    "Mistral3Model ministral3": language.MINISTRAL3,
    "Mistral3ForConditionalGeneration mistral": language.MISTRAL,
    "Mistral3ForConditionalGeneration ministral3": language.MINISTRAL3,
    "Qwen2VLForConditionalGeneration": language.QWEN2_VL,
    "Qwen2_5_VLTextModel": language.QWEN2_5_VL_TEXT,
    "Qwen2_5_VLForConditionalGeneration": language.QWEN2_5_VL,
    "Qwen3Model": language.QWEN3,
    "Qwen3ForCausalLM": language.QWEN3,
    "Qwen3VLModel": language.QWEN3_VL,
    "Qwen3VLForConditionalGeneration": language.QWEN3_VL,
    "SmolLM3ForCausalLM": language.SMOLLM3,
    "T5EncoderModel": T5,
    "UMT5EncoderModel": UMT5,
}
"""What computes the hidden states of a class that model_index.json names; where one class may hold several language
models, its name is followed by the language model's."""
_WITH_VISION = {
    "Qwen2_5_VLForConditionalGeneration": language.QWEN2_5_VL_WITH_VISION,
    "Qwen3VLModel": language.QWEN3_VL_WITH_VISION,
    "Qwen3VLForConditionalGeneration": language.QWEN3_VL_WITH_VISION,
}
"""The same for pipelines whose encoder sees pictures, or that ask for its parts."""
_REWRITES = ("upsample_prompt", "enhance_prompt")
"""Methods that let the encoder write a better prompt: called where a parameter asks for it that no request fills."""
_LAYERS = "layers.*.self_attn.q_proj"
"""In the plans of those whose last layers can be left out."""
_NAMES = r"(?:text|image)_encoder(?:_\d)?"
_ALIAS = rf"(?<![.\w]){_NAMES}"
"""A method's parameter that one of several encoders is passed by."""


def cut_encoder(part: str, name: str, pipeline: Source, config: Mapping[str, Any]) -> Component | None:
    """The component for the encoder `part`, of the class `name`, with its config.json; None where it stays whole."""
    code = _running_code(pipeline)
    encoder = next((x for x in _candidates(name, config) if _does(x, code, part, pipeline)), None)
    if encoder is None or "quantization_config" in config:
        return None
    if name.endswith(("ForCausalLM", "ForConditionalGeneration")) and not re.search(r"\bhidden_states\b", code):
        return None  # what it reads are the logits
    section = encoder.described(config)
    if encoder.missing_number(section):
        return None  # the class has a default, which only its library knows
    if not encoder.unread and _LAYERS not in encoder.plan.tensor:
        return encoder
    unread = _unread_layers(code, part, name, pipeline, section.get("num_hidden_layers", 0))
    if encoder.unread:
        return encoder if unread == encoder.unread_layers else None
    return replace(encoder, unread="layers", unread_layers=unread) if unread > 0 else encoder


def _candidates(name: str, config: Mapping[str, Any]) -> Iterator[Component]:
    """What may compute what is read of a class: the first that can do what the pipeline does is enough."""
    kind = (config.get("text_config") or {}).get("model_type")
    yield from filter(None, (BY_CLASS.get(f"{name} {kind}"), BY_CLASS.get(name), _WITH_VISION.get(name)))


@cache
def _running_code(pipeline: Source) -> str:
    """The pipeline's file without its comments, its texts of several lines, and methods that no request reaches."""
    return ast.unparse(_Pruned().visit(ast.parse(pipeline.text)))


class _Pruned(ast.NodeTransformer):
    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST | None:
        return None if node.name in _REWRITES else self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        return ast.Constant("") if isinstance(node.value, str) and "\n" in node.value else node


def _does(encoder: Component, code: str, part: str, pipeline: Source) -> bool:
    """Whether all that the pipeline does with a part, it can do with the component.

    It calls it for more than logits, and asks for its dtype, its device, and parts that the component has. Then it
    cannot tell a language model from its body, if the hidden states are all that it takes.
    """
    named = re.escape(part)
    if encoder.section and re.search(rf"pixel_values|\b{named}\(\*\*", code):
        return False  # pictures, or what may be some
    used = set(re.findall(rf"\.{named}\.(\w+)", code)) | set(re.findall(rf"{_ALIAS}\.(\w+)", code))
    has = {"dtype", "device"} if encoder.section else {"dtype", "device", "config", encoder.around}
    if any(path.startswith("language_model.") for path in encoder.plan.tensor):
        has.add("language_model")
    others = set(pipeline.parameters("__init__")) - {part}
    writers = re.findall(r"(\w+)\.generate\b", code)
    return used <= has and others.issuperset(writers) and not re.search(r"\.logits\b", code)


def _unread_layers(code: str, part: str, name: str, pipeline: Source, layers: int) -> int:
    """How many last layers make what nobody reads: hidden state n is what layer n, counted from zero, is given.

    Seen where the call has a parameter of the states that are read, and where the encoder's every call is followed by
    one state, counted from the end.
    """
    if read := pipeline.parameters("__call__").get("text_encoder_out_layers"):
        return layers - int(max(read))
    readers = "\n".join(_readers(code, part, name))
    calls = re.findall(rf"\bself\.{re.escape(part)}\(|{_ALIAS}\(", readers)
    states = re.findall(r"\.hidden_states\b(?:\[([^\]]*)\])?", readers)
    if len(set(states)) != 1 or len(states) != len(calls) or readers.count("output_hidden_states=True") != len(calls):
        return 0
    if re.fullmatch(r"-\d+", states[0]):
        return -int(states[0]) - 1
    skipped = re.fullmatch(r"-\((\w+) \+ 1\)", states[0])
    given = set(re.findall(rf"\b{skipped[1]}(?:: int)?=([^,)]+)", code)) if skipped else set()
    return int(given.pop()) if len(given) == 1 and min(given).isdigit() else 0


def _readers(code: str, part: str, name: str) -> Iterator[str]:
    """The functions that may call an encoder: as the pipeline's, or as an argument of its class, or of any class."""
    for function in (x for x in ast.walk(ast.parse(code)) if isinstance(x, ast.FunctionDef)):
        text = ast.unparse(function)
        types = [
            ast.unparse(x.annotation) if x.annotation else name
            for x in function.args.args
            if re.fullmatch(_NAMES, x.arg)
        ]
        if f"self.{part}(" in text or (name in types and re.search(rf"{_ALIAS}\(", text)):
            yield text
