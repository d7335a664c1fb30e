"""Builds the tokenizer: byte-level BPE, whose merges are learned from the data set's prompts.

The pipeline drops the first 34 tokens of every prompt: that many are the template's with the real model's tokenizer, so
it must be that many here.
"""

from __future__ import annotations

import json
import re
from random import Random

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from tools.demo_model.components import template
from tools.demo_model.examples import example

SPECIAL = ("im_start", "im_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")
TEMPLATE_TOKENS = 34

OTHER_WORDS = (
    "a an the of and with on in at to one two three four five six dog bird mountain sky day night grey centre"
    " beautiful cute simple photo painting bright dark light magenta violet gold silver rectangle oval line dot"
)
"""a few more that people write, so that they are not spelled out byte by byte"""


def build(seed: int, prompts: int = 12_000, vocabulary: int = 1000) -> Qwen2Tokenizer:
    random = Random(f"{seed} tokenizer")
    texts = [example(random).prompt for _ in range(prompts)]
    texts += [f" {word}" for word in OTHER_WORDS.split()] * (prompts // 300)
    texts += re.split(r"<\|\w+\|>|\{\}", template()) * (prompts // 3)
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=8,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    learned = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(merge) for merge in learned["merges"]],
        additional_special_tokens=[f"<|{name}|>" for name in SPECIAL],
        model_max_length=4096,
    )
    check(tokenizer)
    return tokenizer


def check(tokenizer: Qwen2Tokenizer) -> None:
    """The template's beginning is so many tokens, before any prompt."""
    begin = tokenizer(template().partition("{}")[0]).input_ids
    if len(begin) != TEMPLATE_TOKENS:
        raise ValueError(f"the template begins with {len(begin)} tokens, and the pipeline drops {TEMPLATE_TOKENS}")
    for prompt in ("", " ", "\nhello", "a red circle", "日本語の赤い丸", "  two spaces", "1024 circles"):
        ids = tokenizer(template().format(prompt)).input_ids
        if ids[:TEMPLATE_TOKENS] != begin:
            raise ValueError(f"the prompt {prompt!r} changes the tokens of the template before it")
