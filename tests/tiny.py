"""Builders of tiny checkpoints: the real classes with random weights, in the real on-disk layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    LongCatImageTransformer2DModel,
    OvisImageTransformer2DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    ZImageTransformer2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    Gemma2Config,
    Gemma2Model,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

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
    return _save(folder, "QwenImagePipeline", parts, dtype, shard_size)


def z_image(folder: Path, *, heads: int = 4, layers: int = 2, dtype: torch.dtype = torch.float32) -> Path:
    """A Z-Image pipeline of `heads` x 16, with two refiner blocks a stream as the real one has."""
    torch.manual_seed(0)
    transformer = ZImageTransformer2DModel(
        in_channels=16,
        dim=HEAD_DIM * heads,
        n_layers=layers,
        n_refiner_layers=2,
        n_heads=heads,
        n_kv_heads=heads,
        cap_feat_dim=64,
        axes_dims=[4, 6, 6],
    )
    with torch.no_grad():
        for token in (transformer.x_pad_token, transformer.cap_pad_token):
            token.normal_(std=0.02)
    parts = {
        "transformer": transformer,
        "vae": _vae(),
        "text_encoder": _qwen3(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }
    return _save(folder, "ZImagePipeline", parts, dtype)


def longcat_image(folder: Path, *, heads: int = 4, dtype: torch.dtype = torch.float32) -> Path:
    """A LongCat-Image pipeline of `heads` x 16. The processor's folder is as the hub has it: what nobody can load."""
    parts = {
        "transformer": _flux_form(LongCatImageTransformer2DModel, heads),
        "vae": _vae(),
        "text_encoder": _text_encoder(64, 4, 2),
        "scheduler": _shifting_scheduler(),
    }
    _save(folder, "LongCatImagePipeline", parts, dtype, text_processor=["transformers", "Qwen2VLProcessor"])
    (folder / "text_processor").mkdir()
    config = {"processor_class": "Qwen2VLProcessor", "image_processor_type": "Qwen2VLImageProcessor"}
    (folder / "text_processor" / "preprocessor_config.json").write_text(json.dumps(config))
    return folder


def ovis_image(folder: Path, *, heads: int = 4, dtype: torch.dtype = torch.float32) -> Path:
    """An Ovis-Image pipeline of `heads` x 16. The demo's tokenizer makes 28 tokens of what comes before the prompt."""
    parts = {
        "transformer": _flux_form(OvisImageTransformer2DModel, heads),
        "vae": _vae(),
        "text_encoder": _qwen3(),
        "scheduler": _shifting_scheduler(),
    }
    return _save(folder, "OvisImagePipeline", parts, dtype)


def flux(folder: Path, *, heads: int = 4) -> Path:
    """A FLUX.1 pipeline of `heads` x 16, with guidance as an input of the transformer. No family is written for it."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=heads,
        joint_attention_dim=64,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    clip = CLIPTextConfig(
        vocab_size=757, hidden_size=32, intermediate_size=64, num_attention_heads=4, num_hidden_layers=2, eos_token_id=1
    )
    parts = {
        "transformer": transformer,
        "vae": _vae(),
        "text_encoder": CLIPTextModel(clip),
        "text_encoder_2": T5EncoderModel(T5Config(**_T5)),
        "scheduler": _shifting_scheduler(),
    }
    _save(folder, "FluxPipeline", parts, torch.float32, tokenizer_2=["transformers", "Qwen2Tokenizer"])
    shutil.copytree(folder / "tokenizer", folder / "tokenizer_2")
    return _with_window(folder, 77)


def flux2_klein(folder: Path, *, heads: int = 4, is_distilled: bool = False) -> Path:
    """A FLUX.2 Klein pipeline, which evaluates one guidance branch after another. It reads hidden states up to 27."""
    torch.manual_seed(0)
    transformer = Flux2Transformer2DModel(
        in_channels=128,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=heads,
        joint_attention_dim=96,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    vae = AutoencoderKLFlux2(
        sample_size=128, block_out_channels=(8, 8, 16, 16), layers_per_block=1, latent_channels=32, norm_num_groups=4
    )
    parts = {
        "transformer": transformer,
        "vae": vae,
        "text_encoder": Qwen3ForCausalLM(_qwen3_config(hidden_size=32, num_hidden_layers=28)),
        "scheduler": _shifting_scheduler(),
    }
    return _save(folder, "Flux2KleinPipeline", parts, torch.float32, is_distilled=is_distilled)


def aura_flow(folder: Path) -> Path:
    """An AuraFlow pipeline, which evaluates both guidance branches as one batch. It has no sequence plan."""
    torch.manual_seed(0)
    transformer = AuraFlowTransformer2DModel(
        sample_size=16,
        in_channels=16,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=4,
        joint_attention_dim=64,
        caption_projection_dim=64,
        out_channels=16,
        pos_embed_max_size=1024,
    )
    parts = {
        "transformer": transformer,
        "vae": _vae(),
        "text_encoder": UMT5EncoderModel(UMT5Config(**_T5)),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
    }
    return _save(folder, "AuraFlowPipeline", parts, torch.float32)


def pixart_sigma(folder: Path) -> Path:
    """A PixArt-Sigma pipeline: both branches in one batch, and the callback of older pipelines."""
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        sample_size=32,
        num_layers=2,
        num_attention_heads=4,
        attention_head_dim=HEAD_DIM,
        in_channels=16,
        out_channels=32,
        cross_attention_dim=64,
        caption_channels=64,
        norm_num_groups=4,
        use_additional_conditions=False,
    )
    parts = {
        "transformer": transformer,
        "vae": _vae(),
        "text_encoder": T5EncoderModel(T5Config(**_T5)),
        # at the usual 0.02, the first steps multiply a random model's rounding by hundreds, and its latents too
        "scheduler": DPMSolverMultistepScheduler(beta_end=0.002),
    }
    return _save(folder, "PixArtSigmaPipeline", parts, torch.float32)


def sana(folder: Path) -> Path:
    """A Sana pipeline, whose VAE no plan is known for."""
    torch.manual_seed(0)
    transformer = SanaTransformer2DModel(
        sample_size=32,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=4,
        attention_head_dim=HEAD_DIM,
        num_cross_attention_heads=4,
        cross_attention_head_dim=HEAD_DIM,
        cross_attention_dim=64,
        caption_channels=64,
    )
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=["ResBlock"] * 6,
        decoder_block_types=["ResBlock"] * 6,
        encoder_block_out_channels=[8] * 6,
        decoder_block_out_channels=[8] * 6,
        encoder_qkv_multiscales=[()] * 6,
        decoder_qkv_multiscales=[()] * 6,
        encoder_layers_per_block=[1] * 6,
        decoder_layers_per_block=[1] * 6,
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    parts = {
        "transformer": transformer,
        "vae": vae,
        "text_encoder": Gemma2Model(Gemma2Config(**_DECODER)),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }
    return _save(folder, "SanaPipeline", parts, torch.float32)


_T5: dict[str, Any] = {
    "vocab_size": 757,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": False,
}


def _with_window(folder: Path, tokens: int) -> Path:
    config = folder / "tokenizer" / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_max_length": tokens}))
    return folder


def _flux_form(cls: Any, heads: int) -> Any:
    torch.manual_seed(0)
    return cls(
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=heads,
        joint_attention_dim=64,
        axes_dims_rope=(4, 6, 6),
    )


def _shifting_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        sample_size=128,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.1159,
        scaling_factor=0.3611,
    )


def _qwen3() -> Qwen3Model:
    torch.manual_seed(1)
    return Qwen3Model(_qwen3_config())


def _qwen3_config(**values: Any) -> Qwen3Config:
    return Qwen3Config(**{**_DECODER, **values})


_DECODER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 757,
}


def _save(
    folder: Path,
    pipeline: str,
    parts: dict[str, Any],
    dtype: torch.dtype,
    shard_size: str = "10GB",
    **others: Any,
) -> Path:
    """The diffusers layout. The tokenizer is the demo's, with a chat template for those that use one.

    `others`: parts that the index names beside those that are saved here.
    """
    index: dict[str, Any] = {"_class_name": pipeline, "tokenizer": ["transformers", "Qwen2Tokenizer"], **others}
    for name, part in parts.items():
        if isinstance(part, torch.nn.Module):
            part.to(dtype).save_pretrained(folder / name, max_shard_size=shard_size)
        else:
            part.save_pretrained(folder / name)
        index[name] = [type(part).__module__.partition(".")[0], type(part).__name__]
    shutil.copytree(DEMO / "tokenizer", folder / "tokenizer")
    config = folder / "tokenizer" / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": _CHAT}))
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


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
