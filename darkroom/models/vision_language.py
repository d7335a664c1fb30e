"""Qwen2.5-VL with pictures: its processor, and the positions that the stock pipelines forget to ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoTokenizer, Qwen2VLImageProcessorPil, Qwen2VLProcessor
from transformers.processing_utils import ProcessorMixin

from darkroom.configs.errors import RequestError


class PictureProcessor(Qwen2VLProcessor):  # type: ignore[misc]
    """Qwen2VLProcessor for texts and pictures. The class itself also wants to read videos, and torchvision for that.

    Pictures are scaled by Pillow on every machine, so that they are the same with and without torchvision.
    """

    def __init__(self, image_processor: Any, tokenizer: Any, chat_template: str | None = None) -> None:
        """The parent looks for its parts by the names in this signature; a video processor is not among them."""
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids([self.image_token, self.video_token])
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    def check(self, prompt: str, param: str) -> None:
        """Raises RequestError, alike on every rank, where the field `param` holds a token that stands for a picture."""
        for token in (self.image_token, self.video_token):
            if token in prompt:
                raise RequestError(f"'{param}' holds '{token}', which stands for a picture.", param=param)

    def beginning(self, prompt: str, tokens: int) -> str:
        """So much of the prompt, to whole characters."""
        ids = self.tokenizer(prompt).input_ids
        if len(ids) <= tokens:
            return prompt
        kept: str = self.tokenizer.decode(ids[: max(tokens, 0)], clean_up_tokenization_spaces=False)
        return kept.rstrip("\ufffd")

    def without_end(self, prompt: str, tokens: int) -> str:
        """The prompt less so many tokens at its end."""
        return self.beginning(prompt, len(self.tokenizer(prompt).input_ids) - tokens)


def load_processor(folder: Path, tokenizer: Path | None = None) -> PictureProcessor:
    """From a checkpoint's processor folder, whichever class it names; the tokenizer may lie in a folder of its own."""
    return PictureProcessor(
        Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True),
        AutoTokenizer.from_pretrained(tokenizer or folder, local_files_only=True),
    )


def mark_pictures(text_encoder: nn.Module) -> None:
    """Say which tokens are pictures, wherever the encoder is called without it.

    From transformers 5 on, Qwen2.5-VL gives pictures their rows and columns as positions only where
    `mm_token_type_ids` names them; diffusers 0.42's pipelines do not pass it, and get one long line of text.
    """

    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if kwargs.get("mm_token_type_ids") is None:
            kwargs["mm_token_type_ids"] = (kwargs["input_ids"] == module.config.image_token_id).int()
        return args, kwargs

    text_encoder.register_forward_pre_hook(before, with_kwargs=True)
