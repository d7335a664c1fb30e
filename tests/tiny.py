"""Builders of tiny checkpoints: the real classes with random weights, in the real on-disk layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from darkroom.models.checkpoint import DEMO

HEAD_DIM = 16


def qwen_image(
    folder: Path,
    *,
    heads: int = 4,
    layers: int = 2,
    encoder_heads: int = 4,
    encoder_kv_heads: int = 2,
    dtype: torch.dtype = torch.float32,
    shard_size: str = "10GB",
) -> Path:
    """A Qwen-Image pipeline of `heads` x 16. The tokenizer is the demo's: its template has the real 34 tokens."""
    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=64,
        out_channels=16,
        num_layers=layers,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=heads,
        joint_attention_dim=HEAD_DIM * encoder_heads,
        axes_dims_rope=(4, 6, 6),
    )
    vae = AutoencoderKLQwenImage(base_dim=8, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1)
    parts = {
        "transformer": transformer,
        "vae": vae,
        "text_encoder": _text_encoder(HEAD_DIM * encoder_heads, encoder_heads, encoder_kv_heads),
        "scheduler": FlowMatchEulerDiscreteScheduler.from_pretrained(DEMO / "scheduler"),
    }
    for name, part in parts.items():
        sharded = {} if name == "scheduler" else {"max_shard_size": shard_size}
        part = part.to(dtype) if isinstance(part, torch.nn.Module) else part
        part.save_pretrained(folder / name, **sharded)
    shutil.copytree(DEMO / "tokenizer", folder / "tokenizer")
    shutil.copy(DEMO / "model_index.json", folder)
    return folder


def _text_encoder(hidden: int, heads: int, kv_heads: int) -> Qwen2_5_VLForConditionalGeneration:
    torch.manual_seed(1)
    text: dict[str, Any] = json.loads((DEMO / "text_encoder" / "config.json").read_text())["text_config"]
    rope = {**text["rope_parameters"], "mrope_section": [2, 3, 3]}
    config = Qwen2_5_VLConfig(
        text_config={
            **text,
            "hidden_size": hidden,
            "intermediate_size": 96,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "rope_parameters": rope,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "num_heads": 2,
            "out_hidden_size": hidden,
            "intermediate_size": 32,
        },
    )
    return Qwen2_5_VLForConditionalGeneration(config)
