"""Wan 2.1 and 2.2: text to video with one transformer, or two that share the steps (https://arxiv.org/abs/2503.20314).

2.2's small model also begins from a picture: the first frame's latents are the picture's, and their timestep is zero.
"""

# B batch, F frames, H W rows and columns; C f h w the same of latents; S tokens (a 1x2x2 patch of latents each)

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from darkroom.configs.capabilities import Capabilities
from darkroom.configs.request import Request
from darkroom.parallel.plan import (
    Colwise,
    Heads,
    LocalHeads,
    NormAcross,
    Plan,
    Rowwise,
    SequenceParallelInput,
    SequenceParallelOutput,
)

from .base import Component, Sample
from .experts import TRANSFORMERS, high_noise_steps, transformer_config, transformers
from .text_encoders import UMT5
from .video import VAE, VideoModel, VideoSample

if TYPE_CHECKING:
    import torch

_ATTENTION = ("blocks.*.attn1", "blocks.*.attn2")  # over the video, and from the video to the text
_TO_PICTURE = ("blocks.*.attn2.add_k_proj", "blocks.*.attn2.add_v_proj")  # and from the video to a picture
_TO_PICTURE_NORM = "blocks.*.attn2.norm_added_k"
_HEADS = Heads("num_attention_heads")
_ROPE = SequenceParallelInput(split_dim=1, expected_dims=4, split_output=True)

TRANSFORMER = Component(
    module="diffusers.models.transformers.transformer_wan",
    name="WanTransformer3DModel",
    plan=Plan(
        tensor={
            **{f"{attn}.to_{name}": Colwise(_HEADS) for attn in _ATTENTION for name in "qkv"},
            **{f"{attn}.norm_{name}": NormAcross(_HEADS) for attn in _ATTENTION for name in "qk"},
            **{f"{attn}.to_out.0": Rowwise(_HEADS) for attn in _ATTENTION},
            **{attn: LocalHeads(_HEADS, "heads") for attn in _ATTENTION},
            **dict.fromkeys(_TO_PICTURE, Colwise(_HEADS)),
            _TO_PICTURE_NORM: NormAcross(_HEADS),
            "blocks.*.ffn.net.0.proj": Colwise(),
            "blocks.*.ffn.net.2": Rowwise(),
        },
        sequence={
            "": {"timestep": SequenceParallelInput(split_dim=1, expected_dims=2)},  # where every token has its own
            "rope": {0: _ROPE, 1: _ROPE},
            "blocks.0": {"hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3, stream=True)},
            "proj_out": SequenceParallelOutput(gather_dim=1, expected_dims=3),
        },
        attention=("blocks.*.attn1",),  # every rank holds the whole text
        optional=(*_TO_PICTURE, _TO_PICTURE_NORM),
    ),
    ranks="tp",
    exact=("rope", "time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"),
)


@dataclass(kw_only=True)
class WanSample(VideoSample):
    high_noise_steps: int
    beside: torch.Tensor | None = None
    """Channels [1, 4 + C, f, h, w] that the transformer sees behind the video's: which frame is a picture, and its
    latents."""

    @property
    def is_high_noise(self) -> bool:
        return self.step < self.high_noise_steps

    def with_channels(self) -> torch.Tensor:
        """What the transformer sees: [1, C or 4 + 2 C, f, h, w]"""
        import torch

        return self.latents if self.beside is None else torch.cat([self.latents, self.beside], 1)


class Wan(VideoModel):
    pipelines: ClassVar[tuple[str, ...]] = ("WanPipeline",)
    capabilities = Capabilities(
        family="Wan",
        tasks=("text-to-video",),
        size_multiple=16,
        min_edge=64,
        max_edge=16384,
        max_pixels=1920 * 1088,
        default_size=(832, 480),
        num_inference_steps=50,
        quality_steps={"low": 20, "medium": 35, "high": 50},
        guidance_parameter="guidance_scale",
        guidance_scale=5.0,
        max_sequence_length=512,
        text_window=512,
        guidance_branches=2,
        num_frames=81,
        frame_multiple=4,
        max_frames=241,
        fps=16,
        axes=("cfg", "ring", "ulysses", "tp", "vae"),
    )
    components: ClassVar = {
        **dict.fromkeys(TRANSFORMERS, TRANSFORMER),
        "text_encoder": UMT5,
        "vae": VAE,
    }
    files: ClassVar[tuple[tuple[tuple[str, ...], ...], ...]] = (
        (("scheduler/scheduler_config.json",),),
        (("tokenizer/tokenizer.json",), ("tokenizer/spiece.model",)),
    )
    optional: ClassVar[tuple[str, ...]] = TRANSFORMERS

    @classmethod
    def describe(cls, index: Mapping[str, Any], configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """A token's size in pixels and frames, and how many there are places for along either edge and in time; and
        what 2.2's model cards say, which its index tells from 2.1."""
        transformer, boundary = transformer_config(index, configs), index.get("boundary_ratio")
        patch, places = transformer.get("patch_size", (1, 2, 2))[-1], transformer.get("rope_max_seq_len", 1024)
        unit = configs["vae"].get("scale_factor_spatial", 8) * patch
        frames = configs["vae"].get("scale_factor_temporal", 4)
        described = {
            "size_multiple": unit,
            "max_edge": places * unit,
            "frame_multiple": frames,
            "max_frames": min(cls.capabilities.max_frames, (places - 1) * frames + 1),
        }
        if index.get("expand_timesteps"):
            pictures = {"tasks": ("text-to-video", "image-to-video"), "max_images": 1, "image_area": 1280 * 704}
            return {**described, **pictures, "default_size": (1280, 704), "num_frames": 121, "fps": 24}
        if boundary is not None:
            steps = {"num_inference_steps": 40, "quality_steps": {"low": 20, "medium": 30, "high": 40}}
            scales = {"guidance_scale": 4.0, "guidance_scale_2": 3.0}
            return {**described, **steps, **scales, "default_size": (1280, 720)}
        return described

    def prepare(self, request: Request) -> WanSample:
        scheduler = self.timed_scheduler(request.num_inference_steps)
        latents = self.noise(request)
        begins = request.images and self.pipe.config.expand_timesteps
        first_frame = self.encode_video(self.picture(request)) if begins else None
        return WanSample(
            request=request,
            latents=latents,
            scheduler=scheduler,
            branches=[self.encode(prompt, request.max_sequence_length) for prompt in self.prompts(request)],
            text_tokens=min(len(self.pipe.tokenizer(request.prompt).input_ids), request.max_sequence_length),
            image_tokens=latents[0, 0].numel() // math.prod(transformers(self.pipe)[0].config.patch_size),
            high_noise_steps=high_noise_steps(self.pipe, scheduler),
            first_frame=first_frame,
        )

    def encode(self, prompt: str, max_sequence_length: int) -> dict[str, Any]:
        """Padded with zeros to the window, and never masked."""
        embeds, _ = self.pipe.encode_prompt(
            prompt, do_classifier_free_guidance=False, max_sequence_length=max_sequence_length, device=self.device
        )
        return {"encoder_hidden_states": embeds.to(transformers(self.pipe)[0].dtype)}

    def predict(self, samples: Sequence[Sample], branch: int) -> torch.Tensor:
        """[B, C, f, h, w]"""
        import torch

        if len({(_own(sample).is_high_noise, sample.request.max_sequence_length) for sample in samples}) > 1:
            return torch.cat([self.predict([sample], branch) for sample in samples])
        transformer = self.pipe.transformer if _own(samples[0]).is_high_noise else self.pipe.transformer_2
        branches = [sample.branches[branch] for sample in samples]
        prediction: torch.Tensor = transformer(
            hidden_states=torch.cat([_own(sample).with_channels() for sample in samples]).to(transformer.dtype),
            timestep=torch.stack([self._times(sample) for sample in samples]),
            return_dict=False,
            **{name: torch.cat([texts[name] for texts in branches]) for name in branches[0]},
        )[0]
        return prediction

    def _times(self, sample: Sample) -> torch.Tensor:
        """The timestep, or [S] where every token has its own: zero for those of a picture."""
        if not self.pipe.config.expand_timesteps:
            return sample.timestep
        times = sample.timestep.float().repeat(sample.image_tokens)
        if _own(sample).first_frame is not None:
            times[: sample.image_tokens // sample.latents.shape[2]] = 0  # the tokens of a frame
        return times

    def guidance_scale(self, sample: Sample) -> float:
        low_noise = sample.request.guidance_scale_2
        return sample.request.guidance_scale if low_noise is None or _own(sample).is_high_noise else low_noise


def _own(sample: Sample) -> WanSample:
    assert isinstance(sample, WanSample)
    return sample
