"""From nothing to the shipped folder: tokenizer, VAE, latents, text encoder and transformer, export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline
from torch import nn
from transformers import Qwen2Tokenizer

from tools.demo_model import autoencoder, denoiser, latents, tokenizer
from tools.demo_model.components import (
    begin_with,
    make_scheduler,
    make_text_encoder,
    make_transformer,
    make_vae,
)
from tools.demo_model.recipe import Recipe

SETTINGS: dict[str, Any] = {
    "family": "Darkroom demo",
    "default_size": [128, 128],
    "max_pixels": 512 * 512,
    "num_inference_steps": 20,
    "quality_steps": {"low": 10, "medium": 15, "high": 20},
    "guidance_scale": 1.5,
}
"""darkroom.json: what the server reads beside the pipeline"""


def make(recipe: Recipe, work: Path, out: Path, begin: Path | None = None) -> None:
    """Writes the trained pipeline into `out`. What is done already lies in `work`, and is not done again.

    `begin`: a pipeline of this kind to go on from, instead of from nothing. Its tokenizer is kept.
    """
    work.mkdir(parents=True, exist_ok=True)
    words = _tokenizer(recipe, work / "tokenizer", begin)
    vae = _vae(recipe, work, begin)
    data = latents.make(vae, words, recipe, work / "latents")
    torch.manual_seed(recipe.seed)
    text_encoder, transformer = make_text_encoder(words), make_transformer()
    if begin:
        begin_with(text_encoder, begin / "text_encoder")
        begin_with(transformer, begin / "transformer")
    text_encoder.to(recipe.device)
    model = denoiser.Denoiser(text_encoder.model.language_model, transformer.to(recipe.device))
    denoiser.train(model, words, data, recipe, work)
    export(QwenImagePipeline(make_scheduler(), vae, text_encoder, words, transformer), out)


def _tokenizer(recipe: Recipe, folder: Path, begin: Path | None) -> Qwen2Tokenizer:
    if not folder.exists():
        if begin:
            shutil.copytree(begin / "tokenizer", folder)
        else:
            tokenizer.build(recipe.seed).save_pretrained(folder)
    kept = Qwen2Tokenizer.from_pretrained(folder)
    tokenizer.check(kept)
    return kept


def _vae(recipe: Recipe, work: Path, begin: Path | None) -> AutoencoderKLQwenImage:
    folder = work / "vae"
    if not folder.exists():
        torch.manual_seed(recipe.seed)
        vae = make_vae()
        if begin:
            begin_with(vae, begin / "vae")
        autoencoder.train(vae.to(recipe.device), recipe, work)
        vae.save_pretrained(folder)
    return AutoencoderKLQwenImage.from_pretrained(folder).to(recipe.device)


def export(pipeline: QwenImagePipeline, folder: Path) -> None:
    """As `from_pretrained` and the server read it, in bfloat16, with the server's settings."""
    modules: tuple[nn.Module, ...] = (pipeline.vae, pipeline.text_encoder, pipeline.transformer)
    for module in modules:
        module.to("cpu", torch.bfloat16)
    pipeline.tokenizer.backend_tokenizer.no_padding()  # it keeps what it was last asked for
    pipeline.save_pretrained(folder)
    for file in folder.glob("*/config.json"):  # where the parts were is nobody's business
        config = json.loads(file.read_text())
        config.pop("_name_or_path", None)
        file.write_text(json.dumps(config, indent=2) + "\n")
    (folder / "darkroom.json").write_text(json.dumps(SETTINGS, indent=2) + "\n")


def size_of(folder: Path) -> int:
    """Bytes."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
