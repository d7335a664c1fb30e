"""Tiny checkpoints of pipelines that make videos, and that no family is written for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import (
    AdaptiveProjectedGuidance,
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLMochi,
    CogVideoXDDIMScheduler,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoTransformer3DModel,
    Kandinsky5Transformer3DModel,
    LatteTransformer3DModel,
    LTXVideoTransformer3DModel,
    MochiTransformer3DModel,
    MotifVideoTransformer3DModel,
    SanaVideoTransformer3DModel,
    SkyReelsV2Transformer3DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    Gemma2Config,
    Gemma2Model,
    LlamaConfig,
    LlamaModel,
)

from tests import tiny


def ltx(folder: Path, *, timed: bool = False) -> Path:
    """An LTX pipeline: both guidance branches as one batch. Of 9 frames of 64 x 64 its VAE makes two of 2 x 2.

    `timed`: with a VAE that is told how noisy its latents are, as of 0.9.1."""
    torch.manual_seed(0)
    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_layers=2,
        num_attention_heads=4,
        attention_head_dim=tiny.HEAD_DIM,
        cross_attention_dim=64,
        caption_channels=64,
    )
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        timestep_conditioning=timed,
    )
    parts = {
        "transformer": transformer,
        "vae": vae,
        "text_encoder": tiny._small_t5(),
        "scheduler": tiny._shifting_scheduler(),
    }
    return tiny._save(folder, "LTXPipeline", parts, torch.float32)


def cogvideox(folder: Path, *, begins: bool = False) -> Path:
    """A CogVideoX pipeline, whose VAE decodes latents two by two; or one whose videos begin with a picture."""
    torch.manual_seed(0)
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=tiny.HEAD_DIM,
        in_channels=8 if begins else 4,
        out_channels=4,
        time_embed_dim=16,
        text_embed_dim=64,
        num_layers=2,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        max_text_seq_length=16,
        use_rotary_positional_embeddings=True,
    )
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2
    )
    parts = {
        "transformer": transformer,
        "vae": vae,
        "text_encoder": tiny._small_t5(),
        "scheduler": CogVideoXDDIMScheduler(),
    }
    name = f"CogVideoX{'ImageToVideo' if begins else ''}Pipeline"
    return tiny._save(folder, name, parts, torch.float32)


def sana_video(folder: Path, *, begins: bool = False) -> Path:
    """A Sana-Video pipeline with Wan's VAE; or one whose videos begin with a picture."""
    torch.manual_seed(0)
    transformer = SanaVideoTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=tiny.HEAD_DIM,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=tiny.HEAD_DIM,
        cross_attention_dim=32,
        caption_channels=64,
        rope_max_seq_len=64,
    )
    parts = {
        "transformer": transformer,
        "vae": tiny._wan_vae(False),
        "text_encoder": Gemma2Model(Gemma2Config(**tiny._DECODER)),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
    }
    return tiny._save(folder, f"Sana{'ImageTo' if begins else ''}VideoPipeline", parts, torch.float32)


def skyreels_v2(folder: Path) -> Path:
    """A SkyReels V2 pipeline: one guidance branch after another, and Wan's VAE."""
    torch.manual_seed(0)
    transformer = SkyReelsV2Transformer3DModel(
        num_attention_heads=4,
        attention_head_dim=tiny.HEAD_DIM,
        text_dim=64,
        freq_dim=32,
        ffn_dim=90,
        num_layers=2,
        rope_max_seq_len=64,
    )
    parts = {
        "transformer": transformer,
        "vae": tiny._wan_vae(False),
        "text_encoder": tiny._umt5(),
        "scheduler": tiny._unipc(),
    }
    tiny._save(folder, "SkyReelsV2Pipeline", parts, torch.float32, tokenizer=["transformers", "T5TokenizerFast"])
    return tiny._save_t5_tokenizer(folder)


def hunyuan_video(folder: Path) -> Path:
    """A HunyuanVideo pipeline, with guidance as an input of the transformer, beside the other kind."""
    torch.manual_seed(0)
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=tiny.HEAD_DIM,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=64,
        pooled_projection_dim=32,
        rope_axes_dim=(4, 6, 6),
    )
    parts = {
        "transformer": transformer,
        "vae": _hunyuan_vae(),
        "text_encoder": LlamaModel(LlamaConfig(**tiny._DECODER)),
        "text_encoder_2": _clip(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0),
    }
    tiny._save(folder, "HunyuanVideoPipeline", parts, torch.float32, tokenizer_2=["transformers", "Qwen2Tokenizer"])
    shutil.copytree(folder / "tokenizer", folder / "tokenizer_2")
    return folder


def mochi(folder: Path) -> Path:
    """A Mochi pipeline, whose VAE makes 6 frames of a frame of latents."""
    torch.manual_seed(0)
    transformer = MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=12,
        text_embed_dim=64,
        time_embed_dim=8,
        max_sequence_length=16,
    )
    vae = AutoencoderKLMochi(
        latent_channels=12,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    )
    parts = {
        "transformer": transformer,
        "vae": vae,
        "text_encoder": tiny._small_t5(),
        "scheduler": FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
    }
    return tiny._save(folder, "MochiPipeline", parts, torch.float32, force_zeros_for_empty_prompt=True)


def kandinsky5(folder: Path, *, begins: bool = False) -> Path:
    """A Kandinsky 5 pipeline, whose tokenizer is a processor of pictures too; or one whose videos begin with one."""
    torch.manual_seed(0)
    transformer = Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        in_text_dim=64,
        in_text_dim2=32,
        time_dim=16,
        out_visual_dim=4,
        model_dim=48,
        ff_dim=64,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
        visual_cond=begins,
    )
    parts = {
        "transformer": transformer,
        "vae": _hunyuan_vae(),
        "text_encoder": tiny._text_encoder(64, 4, 2),
        "text_encoder_2": _clip(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=5.0),
    }
    name = f"Kandinsky5{'I' if begins else 'T'}2VPipeline"
    tokenizers = {"tokenizer": ["transformers", "Qwen2VLProcessor"], "tokenizer_2": ["transformers", "Qwen2Tokenizer"]}
    tiny._save(folder, name, parts, torch.float32, **tokenizers)
    shutil.copytree(folder / "tokenizer", folder / "tokenizer_2")
    tiny._with_window(folder, 77)  # of the second's: they are exchanged
    (folder / "tokenizer").rename(folder / "x")
    (folder / "tokenizer_2").rename(folder / "tokenizer")
    (folder / "x").rename(folder / "tokenizer_2")
    (folder / "tokenizer" / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor"})
    )
    return folder


def _hunyuan_vae() -> AutoencoderKLHunyuanVideo:
    return AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    )


def _clip() -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=757, hidden_size=32, intermediate_size=64, num_attention_heads=4, num_hidden_layers=2, eos_token_id=1
    )
    return CLIPTextModel(config)


def latte(folder: Path) -> Path:
    """A Latte pipeline, whose transformer has a place for each of 4 frames, and whose VAE makes pictures."""
    torch.manual_seed(0)
    transformer = LatteTransformer3DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=64,
        in_channels=16,
        cross_attention_dim=24,
        out_channels=32,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        video_length=4,
    )
    parts = {
        "transformer": transformer,
        "vae": tiny._vae(),
        "text_encoder": tiny._small_t5(),
        "scheduler": CogVideoXDDIMScheduler(),
    }
    return tiny._save(folder, "LattePipeline", parts, torch.float32)


def motif_video(folder: Path) -> Path:
    """A Motif-Video pipeline, guided by a part of its own, which remembers past predictions."""
    torch.manual_seed(0)
    transformer = MotifVideoTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=tiny.HEAD_DIM,
        num_layers=1,
        num_single_layers=1,
        text_embed_dim=64,
        rope_axes_dim=(4, 6, 6),
    )
    parts = {
        "transformer": transformer,
        "vae": tiny._wan_vae(False),
        "text_encoder": tiny._small_t5(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0),
        "guider": AdaptiveProjectedGuidance(guidance_scale=5.0, adaptive_projected_guidance_momentum=0.5),
    }
    return tiny._save(folder, "MotifVideoPipeline", parts, torch.float32, feature_extractor=[None, None])


def ltx_condition(folder: Path) -> Path:
    """An LTX pipeline as of 0.9.5: with a picture or without, and a VAE that is told how noisy its latents are."""
    tiny.renamed(ltx(folder.with_name("plain"), timed=True), folder, "LTXConditionPipeline")
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "use_dynamic_shifting": False}))
    return folder


def ltx_image_to_video(folder: Path) -> Path:
    """An LTX pipeline whose videos begin with a picture."""
    return tiny.renamed(ltx(folder.with_name("plain")), folder, "LTXImageToVideoPipeline")
