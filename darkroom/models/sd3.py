"""Stable Diffusion 3 and 3.5: text to image with joint blocks over picture and text (https://arxiv.org/abs/2403.03206)."""

# B batch, T text tokens, S image tokens (a 2x2 patch of latents each)

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
)

from .autoencoder_kl import VAE, AutoencoderKLModel
from .base import Component, Sample, noise_generator
from .from_picture import begin
from .text_encoders import CLIP, T5

if TYPE_CHECKING:
    import torch

_BLOCK = "transformer_blocks.*"
_HEADS = Heads("num_attention_heads")
_TOKENS = SequenceParallelInput(split_dim=1, expected_dims=3, stream=True)

TRANSFORMER = Plan(
    tensor={
        **{f"{_BLOCK}.{attn}.to_{name}": Colwise(_HEADS) for attn in ("attn", "attn2") for name in "qkv"},
        **{f"{_BLOCK}.attn.add_{name}_proj": Colwise(_HEADS) for name in "qkv"},
        **{f"{_BLOCK}.{name}": Rowwise(_HEADS) for name in ("attn.to_out.0", "attn2.to_out.0", "attn.to_add_out")},
        **{f"{_BLOCK}.{attn}": LocalHeads(_HEADS, "heads") for attn in ("attn", "attn2")},
        **{f"{_BLOCK}.{mlp}.net.0.proj": Colwise() for mlp in ("ff", "ff_context")},
        **{f"{_BLOCK}.{mlp}.net.2": Rowwise() for mlp in ("ff", "ff_context")},
        **{f"{_BLOCK}.{norm}.linear": Colwise(gather=True) for norm in ("norm1", "norm1_context")},  # a third of all
    },
    sequence={
        "transformer_blocks.0": {"hidden_states": _TOKENS, "encoder_hidden_states": _TOKENS},
        "proj_out": SequenceParallelOutput(gather_dim=1, expected_dims=3),
    },
    streams={f"{_BLOCK}.attn2": ("hidden_states",)},
    optional=(f"{_BLOCK}.attn2",),  # 3.5 medium has a second attention, of the picture alone, in some blocks
)


class JointAttention:
    """What the model's own processor computes, by diffusers' dispatcher, which that one goes round."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: None = None,  # always: no text is masked
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attention over the picture's tokens [B, S, width] and, behind them, those of the text [B, T, width]."""
        import torch
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        def heads(x: torch.Tensor, layers: Sequence[Any], norms: Sequence[Any]) -> list[torch.Tensor]:
            projected = [layer(x).unflatten(-1, (attn.heads, -1)) for layer in layers]
            return [y if norm is None else norm(y) for y, norm in zip(projected, norms, strict=True)]

        qkv = heads(hidden_states, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k, None))
        if encoder_hidden_states is not None:
            layers, norms = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj), (attn.norm_added_q, attn.norm_added_k)
            text = heads(encoder_hidden_states, layers, (*norms, None))
            qkv = [torch.cat(pair, 1) for pair in zip(qkv, text, strict=True)]
        out = dispatch_attention_fn(*qkv, backend=self._attention_backend, parallel_config=self._parallel_config)
        picture, words = out.flatten(2).tensor_split([hidden_states.shape[1]], 1)
        picture = attn.to_out[1](attn.to_out[0](picture))
        if encoder_hidden_states is None:
            return picture
        return picture, words if attn.context_pre_only else attn.to_add_out(words)


class StableDiffusion3(AutoencoderKLModel):
    pipelines = (
        "StableDiffusion3Pipeline",
        "StableDiffusion3Img2ImgPipeline",
        "StableDiffusion3InpaintPipeline",
    )
    capabilities = Capabilities(
        family="Stable Diffusion 3",
        tasks=("text-to-image", "image-to-image", "inpaint"),
        max_images=1,
        size_multiple=16,
        min_edge=64,
        max_edge=3072,
        max_pixels=2048 * 2048,
        default_size=(1024, 1024),
        num_inference_steps=28,
        quality_steps={"low": 20, "medium": 28, "high": 40},
        guidance_parameter="guidance_scale",
        guidance_scale=4.5,
        max_sequence_length=256,
        text_window=512,
        guidance_branches=2,
        axes=("cfg", "ring", "ulysses", "tp", "vae"),
    )
    components: ClassVar = {
        "transformer": Component(
            module="diffusers.models.transformers.transformer_sd3",
            name="SD3Transformer2DModel",
            plan=TRANSFORMER,
            ranks="tp",
            processor=JointAttention,
        ),
        "text_encoder": CLIP,
        "text_encoder_2": CLIP,
        "text_encoder_3": T5,
        "vae": VAE,
    }
    files = (
        *AutoencoderKLModel.files,
        (("tokenizer_2/tokenizer.json",), ("tokenizer_2/vocab.json", "tokenizer_2/merges.txt")),
        (("tokenizer_3/tokenizer.json",), ("tokenizer_3/spiece.model",)),
    )
    optional = ("text_encoder_3", "tokenizer_3")  # the largest part by far: zeros stand for what it would say

    @classmethod
    def describe(cls, index: Mapping[str, Any], configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Positions are a square table, of which the picture takes the middle."""
        transformer, vae = configs["transformer"], configs["vae"]
        scale = 2 ** (len(vae["block_out_channels"]) - 1)
        return {"max_edge": transformer.get("pos_embed_max_size", 96) * transformer.get("patch_size", 2) * scale}

    def prepare(self, request: Request) -> Sample:
        branches = [self._encode(prompt, request.max_sequence_length) for prompt in self.prompts(request)]
        patch = self.pipe.vae_scale_factor * self.pipe.transformer.config.patch_size
        image_tokens = (request.height // patch) * (request.width // patch)
        scheduler = self._scheduler(request.num_inference_steps, image_tokens)
        text_tokens = self._count(request.prompt, request.max_sequence_length)
        dtype = branches[0]["encoder_hidden_states"].dtype
        return begin(self, request, scheduler, branches, dtype, text_tokens=text_tokens, image_tokens=image_tokens)

    def noise(self, request: Request, dtype: torch.dtype) -> torch.Tensor:
        channels = self.pipe.transformer.config.in_channels
        noise: torch.Tensor = self.pipe.prepare_latents(
            1, channels, request.height, request.width, dtype, self.device, noise_generator(request)
        )
        return noise

    def _encode(self, prompt: str, max_sequence_length: int) -> dict[str, Any]:
        """Hidden states of CLIP's 77 tokens, and behind them T5's; and CLIP's summaries."""
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            *(prompt, None, None),  # the same for all encoders
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=max_sequence_length,
        )
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def _count(self, prompt: str, max_sequence_length: int) -> int:
        """The prompt's tokens that are used, as the encoder with the larger window counts them."""
        clip, t5 = self.pipe.tokenizer, self.pipe.tokenizer_3
        tokenizer, window = (t5, max_sequence_length) if self.pipe.text_encoder_3 else (clip, clip.model_max_length)
        return len(tokenizer(prompt, truncation=True, max_length=window).input_ids)

    def _scheduler(self, steps: int, image_tokens: int) -> Any:
        """A sample's own scheduler. The published checkpoints shift their sigmas alike for all sizes."""
        if self.pipe.scheduler.config.get("use_dynamic_shifting"):
            return self.shifted_scheduler(None, image_tokens, steps)
        return self.timed_scheduler(steps)

    def predict(self, samples: Sequence[Sample], branch: int) -> torch.Tensor:
        import torch

        if len({sample.request.max_sequence_length for sample in samples}) > 1:  # nothing could hide the padding
            return torch.cat([self.predict([sample], branch) for sample in samples])
        texts = [sample.branches[branch] for sample in samples]
        prediction: torch.Tensor = self.pipe.transformer(
            hidden_states=torch.cat([sample.latents for sample in samples]),
            timestep=torch.stack([sample.timestep for sample in samples]),
            **{name: torch.cat([text[name] for text in texts]) for name in texts[0]},
            return_dict=False,
        )[0]
        return prediction
