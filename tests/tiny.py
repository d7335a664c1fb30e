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
    AutoencoderKLWan,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    HunyuanDiT2DModel,
    LongCatImageTransformer2DModel,
    OvisImageTransformer2DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UniPCMultistepScheduler,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from tokenizers import pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
    Gemma2Config,
    Gemma2Model,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from darkroom.models.checkpoint import DEMO

HEAD_DIM = 16
IMAGE_AREA, CONDITION_AREA = 96 * 96, 64 * 64
"""Pixels of pictures that are edited: the models' own would take seconds."""


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
    parts = _qwen_parts(heads, layers, encoder_heads, encoder_kv_heads)
    return _save(folder, "QwenImagePipeline", parts, dtype, shard_size)


def _qwen_parts(
    heads: int, layers: int = 2, encoder_heads: int = 4, encoder_kv_heads: int = 2, **variant: bool
) -> dict[str, Any]:
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
        **variant,
    )
    vae = AutoencoderKLQwenImage(base_dim=8, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1)
    return {
        "transformer": transformer,
        "vae": vae,
        "text_encoder": _text_encoder(HEAD_DIM * encoder_heads, encoder_heads, encoder_kv_heads),
        "scheduler": FlowMatchEulerDiscreteScheduler.from_pretrained(DEMO / "scheduler"),
    }


def qwen_image_edit(folder: Path, *, heads: int = 4, several: bool = False, zero_cond_t: bool = False) -> Path:
    """A Qwen-Image-Edit pipeline, or of its successors for several pictures, which it makes small."""
    parts = _qwen_parts(heads, zero_cond_t=zero_cond_t)
    _save(folder, f"QwenImageEdit{'Plus' if several else ''}Pipeline", parts, torch.float32)
    _save_processor(folder, "processor")
    (folder / "darkroom.json").write_text(json.dumps({"image_area": IMAGE_AREA, "condition_area": CONDITION_AREA}))
    return folder


def qwen_image_layered(folder: Path, *, heads: int = 4) -> Path:
    """A Qwen-Image-Layered pipeline, whose VAE has an alpha channel."""
    parts = _qwen_parts(heads, use_additional_t_cond=True, use_layer3d_rope=True)
    parts["vae"] = AutoencoderKLQwenImage(
        base_dim=8, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1, input_channels=4
    )
    _save(folder, "QwenImageLayeredPipeline", parts, torch.float32, processor=["transformers", "Qwen2VLProcessor"])
    (folder / "darkroom.json").write_text(json.dumps({"image_area": IMAGE_AREA}))
    return folder


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


def longcat_image_edit(folder: Path, *, heads: int = 4) -> Path:
    """A LongCat-Image-Edit pipeline of `heads` x 16."""
    parts = {
        "transformer": _flux_form(LongCatImageTransformer2DModel, heads),
        "vae": _vae(),
        "text_encoder": _text_encoder(64, 4, 2),
        "scheduler": _shifting_scheduler(),
    }
    _save(folder, "LongCatImageEditPipeline", parts, torch.float32)
    _save_processor(folder, "text_processor")
    (folder / "darkroom.json").write_text(json.dumps({"image_area": IMAGE_AREA}))
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


def sd3(
    folder: Path,
    *,
    heads: int = 4,
    dual: bool = True,
    qk_norm: str | None = "rms_norm",
    dtype: torch.dtype = torch.float32,
) -> Path:
    """A Stable Diffusion 3.5 pipeline of `heads` x 16: with `dual` attention in some blocks as medium has it, without
    as large; and as 3 without `qk_norm` too."""
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=32,
        in_channels=16,
        num_layers=3,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=heads,
        joint_attention_dim=64,
        caption_projection_dim=HEAD_DIM * heads,
        pooled_projection_dim=48,
        pos_embed_max_size=24,
        dual_attention_layers=(0, 1) if dual else (),
        qk_norm=qk_norm,
    )
    transformer.pos_embed.pos_embed += 0.1 * torch.randn_like(transformer.pos_embed.pos_embed)  # not what is computed
    vae = _vae()
    with torch.no_grad():  # pictures within [-1, 1], as a trained one makes them
        vae.decoder.conv_out.weight *= 0.25
    parts = {
        "transformer": transformer,
        "vae": vae,
        "text_encoder": _clip(24, 3),
        "text_encoder_2": _clip(32, 4),
        "text_encoder_3": _t5(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "tokenizer_3": _t5_tokenizer(),
    }
    clip = ["transformers", "CLIPTokenizer"]
    _save(folder, "StableDiffusion3Pipeline", parts, dtype, tokenizer=clip, tokenizer_2=clip)
    shutil.rmtree(folder / "tokenizer")
    for name in ("tokenizer", "tokenizer_2"):
        _clip_tokenizer(folder / name)
    config = folder / "text_encoder_3" / "config.json"  # as the real one has it; the class writes what it changed
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_cache": True, "is_encoder_decoder": True}))
    return folder


def _clip(width: int, heads: int) -> CLIPTextModelWithProjection:
    torch.manual_seed(width)
    tokens = len(_clip_vocabulary())
    config = CLIPTextConfig(
        vocab_size=tokens,
        hidden_size=width,
        intermediate_size=50,
        num_hidden_layers=3,
        num_attention_heads=heads,
        projection_dim=24,
        bos_token_id=tokens - 2,
        eos_token_id=tokens - 1,
        pad_token_id=tokens - 1,
    )
    return CLIPTextModelWithProjection(config)


def _clip_vocabulary() -> dict[str, int]:
    """Bytes inside a word, bytes at its end, and what merges make of them."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merged = ["".join(pair) for pair in _CLIP_MERGES]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *merged, "<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(tokens)}


_CLIP_MERGES = [("c", "a"), ("ca", "t</w>"), ("r", "e"), ("re", "d</w>")]


def _clip_tokenizer(folder: Path) -> None:
    """As the hub has it: without tokenizer.json."""
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(_clip_vocabulary()))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in _CLIP_MERGES), ""]))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "CLIPTokenizer",
                "model_max_length": 77,
                "bos_token": "<|startoftext|>",
                "eos_token": "<|endoftext|>",
                "pad_token": "<|endoftext|>",
                "unk_token": "<|endoftext|>",
            }
        )
    )


def _t5() -> T5EncoderModel:
    """5 heads, which no number of ranks divides."""
    torch.manual_seed(2)
    config = T5Config(
        vocab_size=len(_t5_tokenizer()),
        d_model=64,
        d_kv=16,
        d_ff=90,
        num_layers=2,
        num_heads=5,
        feed_forward_proj="gated-gelu",
    )
    model = T5EncoderModel(config)
    with torch.no_grad():  # large enough to matter
        model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.normal_(std=2.0)
    return model


def _t5_tokenizer() -> T5Tokenizer:
    """Single characters, and two words."""
    pieces = ["\u2581", *map(chr, range(33, 127)), "\u2581cat", "\u2581red"]
    special = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>")]
    vocabulary = [*special, *((piece, -3.0) for piece in pieces)]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=512)


def _save_t5_tokenizer(folder: Path) -> Path:
    """In place of the demo's."""
    shutil.rmtree(folder / "tokenizer")
    _t5_tokenizer().save_pretrained(folder / "tokenizer")
    return folder


def _small_t5() -> T5EncoderModel:
    return T5EncoderModel(T5Config(**_T5))


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
        "text_encoder_2": _small_t5(),
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
        "text_encoder": _small_t5(),
        # at the usual 0.02, the first steps multiply a random model's rounding by hundreds, and its latents too
        "scheduler": DPMSolverMultistepScheduler(beta_end=0.002),
    }
    return _save(folder, "PixArtSigmaPipeline", parts, torch.float32)


def hunyuan_dit(folder: Path) -> Path:
    """A HunyuanDiT pipeline, read to by BERT and T5, without the safety checker that it has a place for."""
    torch.manual_seed(0)
    transformer = HunyuanDiT2DModel(
        num_attention_heads=4,
        attention_head_dim=HEAD_DIM,
        in_channels=16,
        patch_size=2,
        sample_size=16,
        hidden_size=64,
        num_layers=2,
        cross_attention_dim=64,
        cross_attention_dim_t5=64,
        pooled_projection_dim=32,
        use_style_cond_and_image_meta_size=False,
    )
    bert = BertConfig(vocab_size=757, hidden_size=64, intermediate_size=64, num_attention_heads=4, num_hidden_layers=2)
    parts = {
        "transformer": transformer,
        "vae": _vae(),
        "text_encoder": BertModel(bert),
        "text_encoder_2": _small_t5(),
        "scheduler": DDPMScheduler(beta_end=0.002),
        "safety_checker": None,
        "feature_extractor": None,
    }
    tokenizer = {"tokenizer_2": ["transformers", "Qwen2Tokenizer"]}
    _save(folder, "HunyuanDiTPipeline", parts, torch.float32, **tokenizer, requires_safety_checker=True)
    shutil.copytree(folder / "tokenizer", folder / "tokenizer_2")
    return folder


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


def renamed(folder: Path, to: Path, name: str, **values: Any) -> Path:
    """A copy of a checkpoint whose model_index.json names another pipeline, and other `values`."""
    shutil.copytree(folder, to)
    index = json.loads((to / "model_index.json").read_text())
    (to / "model_index.json").write_text(json.dumps({**index, "_class_name": name, **values}))
    return to


def wan(
    folder: Path,
    *,
    heads: int = 4,
    boundary: float | None = None,
    first: bool = True,
    small: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """A Wan pipeline of `heads` x 16. `boundary`: two transformers, as in 2.2 A14B, or the second alone. `small`: as
    2.2 5B, with timesteps for every token, and a VAE that makes patches of pixels."""
    torch.manual_seed(0)
    parts = {
        "transformer": _wan_transformer(heads) if first else None,
        "transformer_2": None if boundary is None else _wan_transformer(heads),
        "vae": _wan_vae(small),
        "text_encoder": _umt5(),
        "scheduler": _unipc(),
    }
    settings = {"boundary_ratio": boundary, "expand_timesteps": small, "tokenizer": ["transformers", "T5TokenizerFast"]}
    _save(folder, "WanPipeline", parts, dtype, **settings)
    return _save_t5_tokenizer(folder)


def wan_image_to_video(folder: Path, *, heads: int = 4, boundary: float | None = None, small: bool = False) -> Path:
    """A Wan pipeline that begins with a picture: as 2.1, which also reads it, or 2.2 as `wan` has it."""
    torch.manual_seed(0)
    reads = boundary is None and not small
    variant: dict[str, Any] = {} if small else {"in_channels": 36, "out_channels": 16}
    variant |= {"image_dim": 24, "added_kv_proj_dim": HEAD_DIM * heads} if reads else {}
    parts = {
        "transformer": _wan_transformer(heads, **variant),
        "transformer_2": None if boundary is None else _wan_transformer(heads, **variant),
        "vae": _wan_vae(small),
        "text_encoder": _umt5(),
        "scheduler": _unipc(),
        "image_encoder": _clip_vision() if reads else None,
        "image_processor": CLIPImageProcessorPil(**_CLIP_SIZES) if reads else None,
    }
    settings = {"boundary_ratio": boundary, "expand_timesteps": small, "tokenizer": ["transformers", "T5TokenizerFast"]}
    _save(folder, "WanImageToVideoPipeline", parts, torch.float32, **settings)
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("CLIPImageProcessorPil", "CLIPImageProcessor"))  # as the hub has it
    return _save_t5_tokenizer(folder)


_CLIP_SIZES: dict[str, Any] = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}


def _clip_vision() -> CLIPVisionModel:
    """3 heads: 2 ranks do not divide them. Five tokens a picture."""
    torch.manual_seed(3)
    config = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=50,
        num_hidden_layers=3,
        num_attention_heads=3,
        image_size=28,
        patch_size=14,
    )
    return CLIPVisionModel(config)


def _unipc() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=2
    )


def _wan_transformer(heads: int, **variant: Any) -> WanTransformer3DModel:
    """Norms that weigh every feature differently: one that is cut wrongly is then seen."""
    transformer = WanTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=HEAD_DIM,
        text_dim=64,
        freq_dim=32,
        ffn_dim=90,
        num_layers=2,
        **variant,
    )
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if ".norm_" in name:
                parameter.uniform_(0.5, 1.5)
    return transformer


def _wan_vae(small: bool) -> AutoencoderKLWan:
    patches = {"patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16, "is_residual": True}
    return AutoencoderKLWan(
        base_dim=8,
        z_dim=16,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        **(patches if small else {}),
    )


def _umt5() -> UMT5EncoderModel:
    """6 heads: 4 ranks do not divide them. Like the published ones, it says that its embeddings are not tied."""
    torch.manual_seed(1)
    config = UMT5Config(
        vocab_size=160,
        d_model=64,
        d_kv=8,
        d_ff=96,
        num_layers=2,
        num_heads=6,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    return UMT5EncoderModel(config)


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

    `others`: what the index holds beside the parts that are saved here; a part that is None is one that is missing.
    """
    index: dict[str, Any] = {"_class_name": pipeline, "tokenizer": ["transformers", "Qwen2Tokenizer"], **others}
    for name, part in parts.items():
        if part is None:
            index[name] = [None, None]
            continue
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


def _save_processor(folder: Path, name: str) -> None:
    """A processor's folder as the hubs have it: the tokenizer's files, and how pictures become pixels."""
    shutil.copytree(folder / "tokenizer", folder / name)
    config = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
        "size": {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 64},
    }
    (folder / name / "preprocessor_config.json").write_text(json.dumps(config))
    index = folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), name: ["transformers", "Qwen2VLProcessor"]}))


def _text_encoder(hidden: int, heads: int, kv_heads: int) -> Qwen2_5_VLForConditionalGeneration:
    torch.manual_seed(1)
    return Qwen2_5_VLForConditionalGeneration(qwen2_5_vl_config(hidden, heads, kv_heads))


def qwen2_5_vl_config(hidden: int, heads: int, kv_heads: int) -> Qwen2_5_VLConfig:
    demo: dict[str, Any] = json.loads((DEMO / "text_encoder" / "config.json").read_text())
    text = demo["text_config"]
    rope = {**text["rope_parameters"], "mrope_section": [2, 3, 3]}
    return Qwen2_5_VLConfig(
        **{name: id for name, id in demo.items() if name.endswith("token_id")},
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
