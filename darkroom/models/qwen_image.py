"""Qwen-Image: text to image with a 60-block dual-stream transformer (https://arxiv.org/abs/2508.02324)."""

# B batch, T text tokens, S image tokens (a 2x2 patch of latents each), C latent channels

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from darkroom.configs.capabilities import Capabilities
from darkroom.configs.request import Request
from darkroom.parallel.plan import (
    Colwise,
    Heads,
    Plan,
    Rowwise,
    SequenceParallelInput,
    SequenceParallelOutput,
)

from .base import Component, Model, Sample
from .text_encoders import QWEN2_5_VL

if TYPE_CHECKING:
    import torch

_BLOCK = "transformer_blocks.*"
_HEADS = Heads("num_attention_heads")
_TOKENS = SequenceParallelInput(split_dim=1, expected_dims=3, stream=True)
_PER_TOKEN = SequenceParallelInput(split_dim=1, expected_dims=2)
_ROPE = SequenceParallelInput(split_dim=0, expected_dims=2, split_output=True)

TRANSFORMER = Plan(
    tensor={
        **{f"{_BLOCK}.attn.{name}": Colwise(_HEADS) for name in ("to_q", "to_k", "to_v")},
        **{f"{_BLOCK}.attn.{name}": Colwise(_HEADS) for name in ("add_q_proj", "add_k_proj", "add_v_proj")},
        **{f"{_BLOCK}.attn.{name}": Rowwise(_HEADS) for name in ("to_out.0", "to_add_out")},
        **{f"{_BLOCK}.{stream}_mlp.net.0.proj": Colwise() for stream in ("img", "txt")},
        **{f"{_BLOCK}.{stream}_mlp.net.2": Rowwise() for stream in ("img", "txt")},
        **{f"{_BLOCK}.{stream}_mod.1": Colwise(gather=True) for stream in ("img", "txt")},  # a third of the weights
    },
    sequence={
        "transformer_blocks.0": {"hidden_states": _TOKENS, "encoder_hidden_states": _TOKENS},
        "transformer_blocks.*": {"encoder_hidden_states_mask": _PER_TOKEN, "modulate_index": _PER_TOKEN},
        "pos_embed": {0: _ROPE, 1: _ROPE},
        "proj_out": SequenceParallelOutput(gather_dim=1, expected_dims=3),
    },
)


class QwenImage(Model):
    pipelines = ("QwenImagePipeline",)
    capabilities = Capabilities(
        family="Qwen-Image",
        tasks=("text-to-image",),
        size_multiple=16,
        min_edge=64,
        max_pixels=4096 * 4096,
        default_size=(1328, 1328),
        num_inference_steps=50,
        min_inference_steps=2,  # with one step, the scheduler's terminal shift divides zero by zero
        max_inference_steps=200,
        quality_steps={"low": 20, "medium": 35, "high": 50},
        guidance_parameter="true_cfg_scale",
        guidance_scale=4.0,
        max_guidance=100.0,
        negative_prompt=" ",
        max_sequence_length=512,
        text_window=1024,
        guidance_branches=2,
        axes=("cfg", "ring", "ulysses", "tp", "vae"),
    )
    components: ClassVar = {
        "transformer": Component(
            module="diffusers.models.transformers.transformer_qwenimage",
            name="QwenImageTransformer2DModel",
            plan=TRANSFORMER,
            ranks="tp",
        ),
        "text_encoder": QWEN2_5_VL,
        "vae": Component(
            module="diffusers.models.autoencoders.autoencoder_kl_qwenimage",
            name="AutoencoderKLQwenImage",
            plan=Plan(spatial="decoder", whole_rows=("decoder.mid_block.attentions.*",)),
            ranks="vae",
        ),
    }

    def prepare(self, request: Request) -> Sample:
        import numpy as np

        prompts = [request.prompt, request.negative_prompt][: 2 if request.guidance_scale > 1 else 1]
        branches = [self._encode(prompt, request.max_sequence_length) for prompt in prompts]
        embeds = branches[0]["encoder_hidden_states"]
        latents = self._noise(request, embeds.dtype)
        steps = request.num_inference_steps
        return Sample(
            request=request,
            latents=latents,
            scheduler=self.shifted_scheduler(np.linspace(1.0, 1 / steps, steps), latents.shape[1]),
            branches=branches,
            text_tokens=embeds.shape[1],
            image_tokens=latents.shape[1],
        )

    def _encode(self, prompt: str, max_sequence_length: int) -> dict[str, Any]:
        embeds, _ = self.pipe.encode_prompt(prompt=prompt, device=self.device, max_sequence_length=max_sequence_length)
        return {"encoder_hidden_states": embeds}  # one prompt has no padding, hence no mask

    def _noise(self, request: Request, dtype: torch.dtype) -> torch.Tensor:
        """[1, S, 4 C], drawn on the CPU: the same seed gives the same picture on any device."""
        import torch

        generator = torch.Generator("cpu").manual_seed(request.seed)
        channels = self.pipe.transformer.config.in_channels // 4
        noise: torch.Tensor = self.pipe.prepare_latents(
            1, channels, request.height, request.width, dtype, self.device, generator
        )
        return noise

    def predict(self, samples: Sequence[Sample], branch: int) -> torch.Tensor:
        import torch

        latents = torch.cat([sample.latents for sample in samples])
        timestep = torch.stack([sample.timestep for sample in samples]).to(latents.dtype)
        texts = [sample.branches[branch]["encoder_hidden_states"] for sample in samples]
        embeds, mask = _pad(texts, self.mesh.sequence.size)  # the class cannot rotate no tokens: each rank gets one
        request, patch = samples[0].request, self.pipe.vae_scale_factor * 2
        prediction: torch.Tensor = self.pipe.transformer(
            hidden_states=latents,
            timestep=timestep / 1000,
            encoder_hidden_states=embeds,
            encoder_hidden_states_mask=mask,
            img_shapes=[[(1, request.height // patch, request.width // patch)]] * len(samples),
            return_dict=False,
        )[0]
        return prediction

    def guide(self, sample: Sample, predictions: Sequence[torch.Tensor]) -> torch.Tensor:
        """Classifier-free guidance that keeps the norm of the conditional prediction."""
        if len(predictions) == 1:
            return predictions[0]
        cond, uncond = predictions
        guided = uncond + sample.request.guidance_scale * (cond - uncond)
        return guided * (cond.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))

    def decode(self, samples: Sequence[Sample], latents: Sequence[torch.Tensor]) -> torch.Tensor | None:
        from darkroom.parallel.spatial import Tiling

        if (vae := self.pipe.vae) is None:
            return None
        tiling = Tiling(
            tile=(vae.tile_sample_min_height, vae.tile_sample_min_width),
            stride=(vae.tile_sample_stride_height, vae.tile_sample_stride_width),
            scale=vae.spatial_compression_ratio,
        )
        z = self._denormalise(samples[0].request, latents)
        decoded = self.spread_decode(z, lambda x: vae.decode(x, return_dict=False)[0], self._decode_tile, tiling)
        return None if decoded is None else decoded[:, :, 0]

    def _denormalise(self, request: Request, latents: Sequence[torch.Tensor]) -> torch.Tensor:
        """Packed latents [1, S, 4 C] each -> what the VAE decodes: [B, C, 1, h, w]"""
        import torch

        pipe, config = self.pipe, self.pipe.vae.config
        z: torch.Tensor = pipe._unpack_latents(
            torch.cat(list(latents)), request.height, request.width, pipe.vae_scale_factor
        ).to(pipe.vae.dtype)
        mean, std = (torch.tensor(x).view(1, -1, 1, 1, 1).to(z) for x in (config.latents_mean, config.latents_std))
        return z / (1.0 / std) + mean  # in bfloat16 every other order rounds to another picture than stock's

    def _decode_tile(self, z: torch.Tensor) -> torch.Tensor:
        """One tile of one frame, as the stock tiled decode does it: [B, C, 1, h, w] -> [B, 3, 1, H, W], not clamped."""
        vae = self.pipe.vae
        vae.clear_cache()
        tile: torch.Tensor = vae.decoder(vae.post_quant_conv(z), feat_cache=vae._feat_map, feat_idx=[0])
        return tile


def _pad(embeds: Sequence[torch.Tensor], least: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Prompts of [1, T, width] each -> one batch, T at least `least`, and a mask [B, T] where there is padding."""
    import torch

    lengths = {x.shape[1] for x in embeds}
    longest = max(*lengths, least)
    if lengths == {longest}:
        return torch.cat(list(embeds)), None
    pad = torch.nn.functional.pad
    padded = torch.cat([pad(x, (0, 0, 0, longest - x.shape[1])) for x in embeds])
    mask = [pad(x.new_ones(1, x.shape[1], dtype=torch.bool), (0, longest - x.shape[1])) for x in embeds]
    return padded, torch.cat(mask)
