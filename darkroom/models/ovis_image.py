"""Ovis-Image: text to image in FLUX's form, made for text in pictures (https://github.com/AIDC-AI/Ovis-Image)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from darkroom.configs.capabilities import Capabilities
from darkroom.parallel.plan import Colwise, Part

from .autoencoder_kl import VAE
from .base import Component
from .flux_form import FluxForm, transformer_plan
from .language_models import QWEN3

if TYPE_CHECKING:
    import torch


class OvisImage(FluxForm):
    pipelines = ("OvisImagePipeline",)
    capabilities = Capabilities(
        family="Ovis-Image",
        tasks=("text-to-image",),
        size_multiple=16,
        min_edge=64,
        max_pixels=2048 * 2048,
        default_size=(1024, 1024),
        num_inference_steps=50,
        quality_steps={"low": 20, "medium": 35, "high": 50},
        guidance_parameter="guidance_scale",
        guidance_scale=5.0,
        max_sequence_length=256,
        text_window=256,
        guidance_branches=2,
        axes=("cfg", "ring", "ulysses", "tp", "vae"),
    )
    components: ClassVar = {
        "transformer": Component(
            module="diffusers.models.transformers.transformer_ovis_image",
            name="OvisImageTransformer2DModel",
            plan=transformer_plan(mlp_in=Colwise(parts=(Part(), Part()))),  # SwiGLU: values and their gates
            ranks="tp",
        ),
        "text_encoder": QWEN3,
        "vae": VAE,
    }

    def encode(self, prompt: str, max_sequence_length: int) -> tuple[torch.Tensor, torch.Tensor]:
        embeds, _, positions, _ = self.pipe.encode_prompt(
            prompt, do_classifier_free_guidance=False, device=self.device, max_sequence_length=max_sequence_length
        )
        return embeds, positions
