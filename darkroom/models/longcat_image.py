"""LongCat-Image: text to image in FLUX's form, guided within a norm (https://arxiv.org/abs/2512.07584)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from darkroom.configs.capabilities import Capabilities
from darkroom.parallel.plan import Colwise

from .autoencoder_kl import VAE
from .base import Component, Sample
from .flux_form import FluxForm, transformer_plan
from .text_encoders import QWEN2_5_VL

if TYPE_CHECKING:
    import torch


class LongCatImage(FluxForm):
    pipelines = ("LongCatImagePipeline",)
    capabilities = Capabilities(
        family="LongCat-Image",
        tasks=("text-to-image",),
        size_multiple=16,
        min_edge=64,
        max_pixels=2048 * 2048,
        default_size=(1024, 1024),
        num_inference_steps=50,
        min_inference_steps=1,
        max_inference_steps=200,
        quality_steps={"low": 20, "medium": 35, "high": 50},
        guidance_parameter="guidance_scale",
        guidance_scale=4.5,
        max_guidance=100.0,
        negative_prompt="",
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
    unused = ("text_processor",)  # it rewrites prompts, which no request asks for; and loading it needs torchvision

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
