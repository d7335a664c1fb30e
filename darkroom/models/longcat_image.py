"""LongCat-Image and LongCat-Image-Edit: FLUX's form, guided within a norm (https://arxiv.org/abs/2512.07584)."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any, ClassVar

from darkroom.configs.capabilities import Capabilities
from darkroom.configs.pictures import load_picture
from darkroom.configs.request import Request
from darkroom.parallel.plan import Colwise

from .autoencoder_kl import VAE
from .base import PROMPTS, Component, Sample, noise_generator
from .flux_form import FluxForm, transformer_plan
from .language_models import QWEN2_5_VL, QWEN2_5_VL_WITH_VISION
from .text_encoders import processor_files

if TYPE_CHECKING:
    import torch
    from PIL import Image

_CONTRACTION = re.compile(r"[a-zA-Z]+'[a-zA-Z]+")
_QUOTED = re.compile("'[^']*'|\"[^\"]*\"|\u2018[^\u2018\u2019]*\u2019|\u201c[^\u201c\u201d]*\u201d")


def split_quotation(prompt: str) -> list[tuple[str, bool]]:
    """The prompt's parts, and whether each is a quotation: those are read letter by letter, quotes included.

    An apostrophe inside a word is no quote. diffusers 0.42's own function loses words where several have one, and
    which ones, in the order of a set of strings: each process, having its own, would read another prompt.
    """
    hidden = _CONTRACTION.sub(lambda word: word[0].replace("'", "-"), prompt)  # as long as the prompt
    parts, end = [], 0
    for quoted in _QUOTED.finditer(hidden):
        parts += [(prompt[end : quoted.start()], False), (prompt[quoted.start() : quoted.end()], True)]
        end = quoted.end()
    return [(text, is_quoted) for text, is_quoted in (*parts, (prompt[end:], False)) if text]


def mend_quotations(pipe: Any) -> None:
    """Let this pipeline read prompts by `split_quotation` above: its own method, where it looks for that name."""
    stock = type(pipe)._encode_prompt
    pipe._encode_prompt = MethodType(
        FunctionType(stock.__code__, {**stock.__globals__, "split_quotation": split_quotation}), pipe
    )


class LongCatImage(FluxForm):
    pipelines: ClassVar[tuple[str, ...]] = ("LongCatImagePipeline",)
    capabilities = Capabilities(
        family="LongCat-Image",
        tasks=("text-to-image",),
        size_multiple=16,
        min_edge=64,
        max_pixels=2048 * 2048,
        default_size=(1024, 1024),
        num_inference_steps=50,
        quality_steps={"low": 20, "medium": 35, "high": 50},
        guidance_parameter="guidance_scale",
        guidance_scale=4.5,
        max_sequence_length=512,
        text_window=512,
        guidance_branches=2,
        axes=("cfg", "ring", "ulysses", "tp", "vae"),
    )
    components: ClassVar = {
        "transformer": Component(
            module="diffusers.models.transformers.transformer_longcat_image",
            name="LongCatImageTransformer2DModel",
            plan=transformer_plan(mlp_in=Colwise()),
            ranks="tp",
        ),
        "text_encoder": QWEN2_5_VL,
        "vae": VAE,
    }
    unused: ClassVar[tuple[str, ...]] = (
        "text_processor",
    )  # it rewrites prompts, which no request asks for; and loading it needs torchvision

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        mend_quotations(self.pipe)

    def encode(self, prompt: str, max_sequence_length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Pads to the window, which is the pipeline's attribute: the picture's positions begin behind it."""
        self.pipe.tokenizer_max_length = max_sequence_length
        embeds, positions = self.pipe.encode_prompt(prompt)
        return embeds, positions

    def guide(self, sample: Sample, predictions: Sequence[torch.Tensor]) -> torch.Tensor:
        """Classifier-free guidance that does not exceed the norm of the conditional prediction."""
        guided = super().guide(sample, predictions)
        if len(predictions) == 1:
            return guided
        norms = predictions[0].norm(dim=-1, keepdim=True) / (guided.norm(dim=-1, keepdim=True) + 1e-8)
        return guided * norms.clamp(max=1.0)


class LongCatImageEdit(LongCatImage):
    """The picture's latents stand behind those that are drawn, and are of their size."""

    pipelines = ("LongCatImageEditPipeline",)
    capabilities = LongCatImage.capabilities.override(
        {"family": "LongCat-Image-Edit", "tasks": ("edit",), "max_images": 1, "max_edge": 200 * 64}
    )  # the text encoder sees the picture in the shape that is asked for, and none that is thinner
    components: ClassVar = {**LongCatImage.components, "text_encoder": QWEN2_5_VL_WITH_VISION}
    files = (*FluxForm.files, processor_files("text_processor"))
    unused = ()
    guide = FluxForm.guide  # the stock pipeline keeps to no norm when it edits

    def __init__(self, *args: Any, **options: Any) -> None:
        from .vision_language import mark_pictures

        super().__init__(*args, **options)
        mark_pictures(self.pipe.text_encoder)

    @classmethod
    def processors(cls, folder: Path) -> dict[str, Any]:
        from .vision_language import load_processor

        return {"text_processor": load_processor(folder / "text_processor", folder / "tokenizer")}

    def prepare(self, request: Request) -> Sample:
        import torch

        resize, width, height = self.pipe.image_processor.resize, request.width, request.height
        picture = resize(load_picture(request.images[0]).convert("RGB"), height, width)
        seen = resize(picture, height // 2, width // 2)
        prompts = self.prompts(request)
        for param, prompt in zip(PROMPTS, prompts, strict=False):
            self.pipe.text_processor.check(prompt, param)
        texts = [self._read(prompt, seen, request.max_sequence_length) for prompt in prompts]
        latents, context, *positions = self.pipe.prepare_latents(
            self.pipe.image_processor.preprocess(picture, height, width),
            1,
            self.pipe.transformer.config.in_channels // 4,
            height,
            width,
            texts[0][0].dtype,
            texts[0][0].shape[1],
            self.device,
            noise_generator(request),
        )
        return self.sample(request, texts, latents, torch.cat(positions), context)

    def _read(self, prompt: str, seen: Image.Image, window: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.pipe.tokenizer_max_length = window
        embeds, positions = self.pipe.encode_prompt(self._cut(prompt, window), image=seen)
        return embeds, positions

    def _cut(self, prompt: str, window: int) -> str:
        """The prompt's beginning of at most `window` tokens. diffusers 0.42's own cut fails on its warning."""

        def too_long(length: int) -> bool:
            return self._count(prompt[:length]) > window

        if not too_long(len(prompt)):  # though some of its beginnings may be: those that end within a quotation
            return prompt
        return prompt[: bisect_left(range(1, len(prompt) + 1), True, key=too_long)]

    def _count(self, prompt: str) -> int:
        words = [part for text, quoted in split_quotation(prompt) for part in (text if quoted else [text])]
        return sum(len(self.pipe.tokenizer(word, add_special_tokens=False).input_ids) for word in words)
