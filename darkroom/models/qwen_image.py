"""Qwen-Image: text to image with a 60-block dual-stream transformer (https://arxiv.org/abs/2508.02324)."""

# B batch, T text tokens, S image tokens (a 2x2 patch of latents each), C latent channels

from __future__ import annotations

import math
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

from .autoencoder_causal import AutoencoderCausalModel, vae
from .base import Component, Sample, noise_generator, with_context
from .from_picture import begin
from .language_models import QWEN2_5_VL

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


class QwenImage(AutoencoderCausalModel):
    pipelines: ClassVar[tuple[str, ...]] = ("QwenImagePipeline", "QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline")
    capabilities = Capabilities(
        family="Qwen-Image",
        tasks=("text-to-image", "image-to-image", "inpaint"),
        max_images=1,
        size_multiple=16,
        min_edge=64,
        max_edge=2 * (4096 - 1024) * 16,  # of 4096 positions, half an edge's tokens stand before those of the text
        max_pixels=4096 * 4096,
        default_size=(1328, 1328),
        num_inference_steps=50,
        min_inference_steps=2,  # with one step, the scheduler's terminal shift divides zero by zero
        quality_steps={"low": 20, "medium": 35, "high": 50},
        guidance_parameter="true_cfg_scale",
        guidance_scale=4.0,
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
        "vae": vae("autoencoder_kl_qwenimage", "AutoencoderKLQwenImage"),
    }

    def prepare(self, request: Request) -> Sample:
        grid = self.grid(request.width, request.height)
        branches = [{**self._encode(request, prompt), "img_shapes": [grid]} for prompt in self.prompts(request)]
        scheduler, text = self.schedule(request), branches[0]["encoder_hidden_states"]
        return begin(
            self, request, scheduler, branches, text.dtype, text_tokens=text.shape[1], image_tokens=math.prod(grid)
        )

    def _encode(self, request: Request, prompt: str) -> dict[str, Any]:
        embeds, _ = self.pipe.encode_prompt(
            prompt=prompt, device=self.device, max_sequence_length=request.max_sequence_length
        )
        return {"encoder_hidden_states": embeds}  # one prompt has no padding, hence no mask

    def schedule(self, request: Request) -> Any:
        import numpy as np

        steps, image_tokens = request.num_inference_steps, math.prod(self.grid(request.width, request.height))
        return self.shifted_scheduler(np.linspace(1.0, 1 / steps, steps), image_tokens)

    def noise(self, request: Request, dtype: torch.dtype) -> torch.Tensor:
        noise: torch.Tensor = self.pipe.prepare_latents(
            1, self.channels, request.height, request.width, dtype, self.device, noise_generator(request)
        )
        return noise

    @property
    def channels(self) -> int:
        channels: int = self.pipe.transformer.config.in_channels // 4
        return channels

    def pack(self, latents: torch.Tensor) -> torch.Tensor:
        """[1, C, h, w] -> [1, S, 4 C]"""
        packed: torch.Tensor = self.pipe._pack_latents(latents, *latents.shape)
        return packed

    def predict(self, samples: Sequence[Sample], branch: int) -> torch.Tensor:
        import torch

        texts = [sample.branches[branch] for sample in samples]
        if any(text["img_shapes"] != texts[0]["img_shapes"] for text in texts):  # a batch has one set of places
            return torch.cat([self.predict([sample], branch) for sample in samples])
        hidden_states = with_context(samples)
        timestep = torch.stack([sample.timestep for sample in samples]).to(hidden_states.dtype)
        least = self.mesh.sequence.size  # the class cannot rotate no tokens: each rank gets one
        embeds, mask = _pad([text["encoder_hidden_states"] for text in texts], least)
        prediction: torch.Tensor = self.pipe.transformer(
            hidden_states=hidden_states,
            timestep=timestep / 1000,
            encoder_hidden_states=embeds,
            encoder_hidden_states_mask=mask,
            img_shapes=[texts[0]["img_shapes"]] * len(samples),
            return_dict=False,
            **self.transformer_options(len(samples)),
        )[0]
        return prediction[:, : samples[0].latents.shape[1]]

    def transformer_options(self, batch_size: int) -> dict[str, Any]:
        """What this variant of the transformer takes besides."""
        return {}

    def grid(self, width: int, height: int) -> tuple[int, int, int]:
        """Frames, rows and columns of a picture's tokens."""
        patch = self.pipe.vae_scale_factor * 2
        return 1, height // patch, width // patch

    def guide(self, sample: Sample, predictions: Sequence[torch.Tensor]) -> torch.Tensor:
        """Classifier-free guidance that keeps the norm of the conditional prediction."""
        guided = super().guide(sample, predictions)
        if len(predictions) == 1:
            return guided
        return guided * (predictions[0].norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))

    def decode(self, samples: Sequence[Sample], latents: Sequence[torch.Tensor]) -> torch.Tensor | None:
        import torch

        request, pipe = samples[0].request, self.pipe
        packed = torch.cat(list(latents))
        z = pipe._unpack_latents(packed, request.height, request.width, pipe.vae_scale_factor)
        return self.decode_pictures(z)


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
