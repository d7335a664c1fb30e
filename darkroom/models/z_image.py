"""Z-Image: text to image with a single-stream transformer (https://arxiv.org/abs/2511.22699); Turbo has no guidance."""

# B batch, S image tokens (a 2x2 patch of latents each), C latent channels, h w latent rows and columns

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from darkroom.configs.capabilities import Capabilities
from darkroom.configs.request import Request
from darkroom.parallel.plan import (
    Colwise,
    Heads,
    LocalHeads,
    Plan,
    Rowwise,
    SequenceParallelInput,
    SequenceParallelOutput,
    SequenceRule,
)

from .autoencoder_kl import VAE, AutoencoderKLModel
from .base import Component, Sample, noise_generator
from .from_picture import begin
from .language_models import QWEN3

if TYPE_CHECKING:
    import torch

_HEADS = Heads("n_heads")
_TOKENS = SequenceParallelInput(split_dim=1, expected_dims=3, stream=True)
_PER_TOKEN: SequenceRule = {
    "freqs_cis": SequenceParallelInput(split_dim=1, expected_dims=3),
    "attn_mask": SequenceParallelInput(split_dim=1, expected_dims=2),
}
_GATHER = SequenceParallelOutput(gather_dim=1, expected_dims=3)
_BLOCKS = ("layers.*", "noise_refiner.*", "context_refiner.*")

TRANSFORMER = Plan(
    tensor={
        **{f"{block}.attention.to_{name}": Colwise(_HEADS) for block in _BLOCKS for name in "qkv"},
        **{f"{block}.attention.to_out.0": Rowwise(_HEADS) for block in _BLOCKS},
        **{f"{block}.attention": LocalHeads(_HEADS, "heads") for block in _BLOCKS},
        **{f"{block}.feed_forward.{name}": Colwise() for block in _BLOCKS for name in ("w1", "w3")},
        **{f"{block}.feed_forward.w2": Rowwise() for block in _BLOCKS},
    },
    sequence={  # the text's two refiner blocks stay whole on every rank: they see at most 512 tokens
        "noise_refiner.0": {"x": _TOKENS},
        "noise_refiner.*": _PER_TOKEN,
        "noise_refiner.-1": _GATHER,
        "layers.0": {"x": _TOKENS},
        "layers.*": _PER_TOKEN,
        "all_final_layer.2-1": _GATHER,
    },
    attention=("noise_refiner.*.attention", "layers.*.attention"),
)


class ZImage(AutoencoderKLModel):
    pipelines = ("ZImagePipeline", "ZImageImg2ImgPipeline", "ZImageInpaintPipeline")
    capabilities = Capabilities(
        family="Z-Image",
        tasks=("text-to-image", "image-to-image", "inpaint"),
        max_images=1,
        size_multiple=16,
        min_edge=64,
        max_edge=8192,
        max_pixels=2048 * 2048,
        default_size=(1024, 1024),
        num_inference_steps=9,
        quality_steps={"low": 6, "medium": 8, "high": 9},
        guidance_parameter="guidance_scale",
        guidance_scale=0.0,
        no_guidance=0.0,
        max_sequence_length=512,
        text_window=512,
        guidance_branches=2,
        axes=("cfg", "ring", "ulysses", "tp", "vae"),
    )
    components: ClassVar = {
        "transformer": Component(
            module="diffusers.models.transformers.transformer_z_image",
            name="ZImageTransformer2DModel",
            plan=TRANSFORMER,
            ranks="tp",
        ),
        "text_encoder": replace(QWEN3, unread="layers"),  # the hidden states before the last layer are taken
        "vae": VAE,
    }

    @classmethod
    def describe(cls, index: Mapping[str, Any], configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Turbo and the base model differ in their weights and in the schedule's shift, 3 and 6, and in nothing else
        that a checkpoint says. The base model is guided, as its card has it. Rows and columns are looked up in tables.
        """
        tokens = min(configs["transformer"].get("axes_lens", (1024, 512, 512))[1:])
        described = {"max_edge": tokens * cls.capabilities.size_multiple}
        if configs["scheduler"].get("shift", 3.0) < 6:
            return described
        steps = {"low": 28, "medium": 40, "high": 50}
        return {**described, "num_inference_steps": 50, "guidance_scale": 4.0, "quality_steps": steps}

    def prepare(self, request: Request) -> Sample:
        from diffusers.pipelines.z_image.pipeline_z_image import get_default_z_image_sigmas

        branches = [self._encode(prompt, request.max_sequence_length) for prompt in self.prompts(request)]
        patch = self.pipe.vae_scale_factor * 2
        image_tokens = (request.height // patch) * (request.width // patch)
        scheduler = self.shifted_scheduler(get_default_z_image_sigmas(request.num_inference_steps), image_tokens)
        text = branches[0]["cap_feats"]
        return begin(self, request, scheduler, branches, text.dtype, text_tokens=len(text), image_tokens=image_tokens)

    def _encode(self, prompt: str, max_sequence_length: int) -> dict[str, Any]:
        [embeds], _ = self.pipe.encode_prompt(
            prompt, self.device, do_classifier_free_guidance=False, max_sequence_length=max_sequence_length
        )
        return {"cap_feats": embeds}

    def noise(self, request: Request, _dtype: torch.dtype) -> torch.Tensor:
        """[1, C, h, w] in fp32, which the latents stay in whatever the model computes in."""
        import torch

        noise: torch.Tensor = self.pipe.prepare_latents(
            1,
            self.pipe.transformer.in_channels,
            request.height,
            request.width,
            torch.float32,
            self.device,
            noise_generator(request),
        )
        return noise

    def predict(self, samples: Sequence[Sample], branch: int) -> torch.Tensor:
        """The model predicts the data's side of the velocity at time 1 - sigma: negated, it is the scheduler's."""
        import torch

        transformer = self.pipe.transformer
        latents = [sample.latents[0, :, None].to(transformer.dtype) for sample in samples]
        timestep = (1000 - torch.stack([sample.timestep for sample in samples])) / 1000
        texts = [sample.branches[branch]["cap_feats"] for sample in samples]
        predictions = transformer(latents, timestep, texts, return_dict=False)[0]
        return -torch.stack([prediction.float() for prediction in predictions]).squeeze(2)

    def guide(self, sample: Sample, predictions: Sequence[torch.Tensor]) -> torch.Tensor:
        if len(predictions) == 1:
            return predictions[0]
        cond, uncond = predictions
        return cond + sample.request.guidance_scale * (cond - uncond)
