"""The parts of the demo model: diffusers' and transformers' own classes at a tiny size."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from torch import nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

HEADS, HEAD_DIM, LAYERS = 4, 32, 6
TEXT_WIDTH, TEXT_LAYERS = 128, 3
LATENT_CHANNELS = 16


def template() -> str:
    """The pipeline's own, around a prompt."""
    empty = QwenImagePipeline(scheduler=None, vae=None, text_encoder=None, tokenizer=None, transformer=None)
    text: str = empty.prompt_template_encode
    return text


def make_vae() -> AutoencoderKLQwenImage:
    """For single frames: the taps of the causal kernels that would look at earlier ones are zero, and stay so."""
    vae = AutoencoderKLQwenImage(
        base_dim=16,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 3, 3],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, nn.Conv3d) and module.kernel_size == (3, 3, 3):
                module.weight[:, :, :-1] = 0
                module.weight[:, :, -1] *= 3**0.5  # as much comes out as of all three
        means, variances = slice(0, LATENT_CHANNELS), slice(LATENT_CHANNELS, None)
        vae.quant_conv.weight[means] *= 3  # with nearly no noise at first: else the decoder learns to ignore latents
        vae.quant_conv.weight[variances] = 0
        vae.quant_conv.bias[variances] = -5
    return vae


def make_text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    ids = {token: tokenizer.convert_tokens_to_ids(f"<|{token}|>") for token in _SPECIAL}
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": TEXT_WIDTH,
            "intermediate_size": 2 * TEXT_WIDTH,
            "num_hidden_layers": TEXT_LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "rope_parameters": rope,
            "tie_word_embeddings": True,
            "bos_token_id": ids["endoftext"],
            "eos_token_id": ids["im_end"],
            "pad_token_id": ids["endoftext"],
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": TEXT_WIDTH,
            "fullatt_block_indexes": [0],
            "window_size": 56,
        },
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
        tie_word_embeddings=True,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


_SPECIAL = ("endoftext", "im_end", "image_pad", "video_pad", "vision_start", "vision_end")


def make_transformer() -> QwenImageTransformer2DModel:
    """At first every block passes its input on, and the output is zero."""
    transformer = QwenImageTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=LAYERS,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        axes_dims_rope=(8, 12, 12),
        joint_attention_dim=TEXT_WIDTH,
    )
    gates = [gate for block in transformer.transformer_blocks for gate in (block.img_mod[1], block.txt_mod[1])]
    for linear in (*gates, transformer.norm_out.linear, transformer.proj_out):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return transformer


def make_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        base_image_seq_len=64,
        max_image_seq_len=256,
        shift_terminal=0.02,
    )


def begin_with(module: nn.Module, folder: Path) -> None:
    """The weights that lie in `folder`. Layers of the text encoder that are not there pass their input on."""
    trained = type(module).from_pretrained(folder, dtype=torch.float32)
    missing, unexpected = module.load_state_dict(trained.state_dict(), strict=False)
    if unexpected:
        raise ValueError(f"{folder} has {unexpected[0]}, which is nowhere in this {type(module).__name__}")
    with torch.no_grad():
        for name in missing:
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                module.get_parameter(name).zero_()
