"""Draws the data set once and keeps what the VAE makes of it: the transformer sees every picture several times."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from diffusers import AutoencoderKLQwenImage
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import Qwen2Tokenizer

from tools.demo_model.autoencoder import encode, flat, pixels
from tools.demo_model.components import template
from tools.demo_model.examples import example
from tools.demo_model.recipe import Recipe, Size
from tools.demo_model.tokenizer import TEMPLATE_TOKENS

# N pictures, S tokens of a picture, T tokens of a prompt, C latent channels


@dataclass(frozen=True)
class Prompts:
    """Prompts as the text encoder reads them, in the template."""

    ids: Tensor
    """(N, T) with the template's beginning"""

    lengths: Tensor
    """(N,): what comes after is padding"""

    @classmethod
    def of(cls, texts: list[str], tokenizer: Qwen2Tokenizer) -> Prompts:
        rows = tokenizer([template().format(text) for text in texts], padding=True, return_tensors="pt")
        return cls(rows.input_ids, rows.attention_mask.sum(dim=1))

    def padded(self, width: int) -> Prompts:
        """With any token behind, which none before it sees."""
        return Prompts(functional.pad(self.ids, (0, width - self.ids.shape[1])), self.lengths)

    def to(self, device: torch.device) -> Prompts:
        return Prompts(self.ids.to(device), self.lengths.to(device))


@dataclass(frozen=True)
class Latents:
    """The pictures of one size. Latents are normal, and packed as the transformer takes them."""

    size: Size
    packed: Tensor
    """(N, S, 4 * C), in bfloat16"""

    prompts: Prompts


def pack(latents: Tensor) -> Tensor:
    """(N, C, 1, rows, columns) -> (N, S, 4 * C): a token is 2 x 2 latents, channel by channel."""
    pictures, channels, _, rows, columns = latents.shape
    x = latents.reshape(pictures, channels, rows // 2, 2, columns // 2, 2)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(pictures, rows * columns // 4, 4 * channels)


def make(vae: AutoencoderKLQwenImage, tokenizer: Qwen2Tokenizer, recipe: Recipe, folder: Path) -> list[Latents]:
    """Of every size as many as it needs for each picture to be seen as often. What is in `folder` is made already."""
    folder.mkdir(exist_ok=True)
    seen = {size: size.share / size.tokens for size in recipe.sizes}
    made = []
    for size in recipe.sizes:
        file = folder / f"{size.width}x{size.height}.safetensors"
        if not file.exists():
            number = round(recipe.pictures * seen[size] / sum(seen.values()))
            save_file(_encode(vae, recipe, Drawings(recipe, size, number, tokenizer)), file)
        kept = load_file(file)
        made.append(Latents(size, kept["packed"], Prompts(kept["ids"].long(), kept["lengths"])))
    return made


@dataclass(frozen=True)
class Drawings(Dataset[tuple[Tensor, str]]):  # type: ignore[misc]
    """Pictures of one size with their prompts, which must not be too long."""

    recipe: Recipe
    size: Size
    number: int
    tokenizer: Qwen2Tokenizer

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, i: int) -> tuple[Tensor, str]:
        width, height = self.size.width, self.size.height
        random = Random(f"{self.recipe.seed} {width}x{height} {i}")
        while True:
            made = example(random)
            if Prompts.of([made.prompt], self.tokenizer).ids.shape[1] <= TEMPLATE_TOKENS + self.recipe.prompt_tokens:
                return pixels(made.draw(width, height, random)), made.prompt


def _encode(vae: AutoencoderKLQwenImage, recipe: Recipe, drawings: Drawings) -> dict[str, Tensor]:
    shape = (1, -1, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean, device=vae.device).view(shape)
    deviation = torch.tensor(vae.config.latents_std, device=vae.device).view(shape)
    packed: list[Tensor] = []
    texts: list[str] = []
    title = f"latents {drawings.size.width}x{drawings.size.height}"
    batches = DataLoader(drawings, max(1, recipe.tokens // drawings.size.tokens), num_workers=recipe.workers)
    with flat(vae), torch.no_grad(), torch.autocast(vae.device.type, torch.bfloat16):
        for x, prompts in tqdm(batches, desc=title, unit="batch"):
            latents, _ = encode(vae, x.to(vae.device))
            packed.append(pack((latents - mean) / deviation).bfloat16().cpu())
            texts += prompts
    prompts = Prompts.of(texts, drawings.tokenizer).padded(TEMPLATE_TOKENS + recipe.prompt_tokens)
    return {"packed": torch.cat(packed), "ids": prompts.ids.short(), "lengths": prompts.lengths}
