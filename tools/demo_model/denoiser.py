"""Trains text encoder and transformer together: flow matching, in the convention of the pipeline.

At `sigma` between 0 and 1 the transformer sees (1 - sigma) * picture + sigma * noise, and says noise - picture.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import torch
from diffusers import QwenImageTransformer2DModel
from torch import Tensor, nn
from transformers import Qwen2Tokenizer

from tools.demo_model.latents import Latents, Prompts
from tools.demo_model.loop import Loop
from tools.demo_model.recipe import Recipe
from tools.demo_model.tokenizer import TEMPLATE_TOKENS

# B batch, S tokens of a picture, T tokens of a prompt, C latent channels


class Denoiser(nn.Module):  # type: ignore[misc]
    """What is trained: the text encoder's language model, and the transformer."""

    def __init__(self, language_model: nn.Module, transformer: QwenImageTransformer2DModel) -> None:
        super().__init__()
        self.language_model, self.transformer = language_model, transformer

    def forward(self, noisy: Tensor, sigma: Tensor, prompts: Prompts, grid: tuple[int, int]) -> Tensor:
        """(B, S, 4 * C), (B,) -> (B, S, 4 * C)."""
        embeddings = self.read(prompts)
        positions = torch.arange(embeddings.shape[1], device=embeddings.device)
        velocity: Tensor = self.transformer(
            hidden_states=noisy,
            encoder_hidden_states=embeddings,
            encoder_hidden_states_mask=positions < prompts.lengths[:, None] - TEMPLATE_TOKENS,
            timestep=sigma,
            img_shapes=[[(1, *grid)]] * len(noisy),
            return_dict=False,
        )[0]
        return velocity

    def read(self, prompts: Prompts) -> Tensor:
        """(B, T, width), without the template's beginning: that is the same in all prompts, and read once.

        Padding comes last, so causal attention does not see it.
        """
        longest = int(prompts.lengths.max())
        begin, rest = prompts.ids[:1, :TEMPLATE_TOKENS], prompts.ids[:, TEMPLATE_TOKENS:longest]
        cache = self.language_model(input_ids=begin, use_cache=True).past_key_values
        cache.batch_repeat_interleave(len(rest))
        hidden: Tensor = self.language_model(input_ids=rest, past_key_values=cache).last_hidden_state
        return hidden

    def optimizers(self, rate: float) -> tuple[torch.optim.Optimizer, ...]:
        """Muon for the matrices of the layers, AdamW for embeddings, norms and biases."""
        layers = [*self.transformer.transformer_blocks, *self.language_model.layers]
        matrices = [x for layer in layers for x in layer.parameters() if x.ndim == 2]
        chosen = {id(x) for x in matrices}
        others = [x for x in self.parameters() if id(x) not in chosen]
        return (
            torch.optim.Muon(matrices, lr=rate, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0),
        )


def train(model: Denoiser, tokenizer: Qwen2Tokenizer, data: list[Latents], recipe: Recipe, folder: Path) -> None:
    nothing = Prompts.of(["", " "], tokenizer).padded(data[0].prompts.ids.shape[1])
    if recipe.compiled:
        for block in model.transformer.transformer_blocks:
            block.compile(dynamic=True)  # batches and tokens differ by the picture's size
    loop = Loop("denoiser", folder, recipe, model, recipe.steps, *model.optimizers(recipe.rate))
    shares = [latents.size.share for latents in data]
    for step in loop.steps():
        latents = Random(f"{recipe.seed} step {step}").choices(data, shares)[0]
        loop.learn(loss(model, latents, nothing, recipe, torch.Generator().manual_seed(recipe.seed + step)))
    loop.use_average()


def loss(model: Denoiser, latents: Latents, nothing: Prompts, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Of a batch of one size. `nothing`: the prompts that stand for none, as clients send them."""
    batch = max(1, recipe.tokens // latents.size.tokens)
    chosen = torch.randint(len(latents.packed), (batch,), generator=generator)
    clean = latents.packed[chosen].float()
    left_out = torch.rand(batch, generator=generator) < recipe.dropout
    kind = torch.randint(len(nothing.ids), (batch,), generator=generator)
    prompts = Prompts(
        torch.where(left_out[:, None], nothing.ids[kind], latents.prompts.ids[chosen]),
        torch.where(left_out, nothing.lengths[kind], latents.prompts.lengths[chosen]),
    )
    sigma = torch.sigmoid(1.2 * torch.randn(batch, generator=generator) + 0.3).clamp(0.002, 0.9995)
    sigma[torch.rand(batch, generator=generator) < 0.04] = 1  # where every picture begins
    sigma = sigma.bfloat16().float()  # as the transformer will read it
    noise = torch.randn(clean.shape, generator=generator)
    noisy, velocity = torch.lerp(clean, noise, sigma[:, None, None]), noise - clean
    device = model.transformer.device
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):  # no faster on a CPU
        said = model(noisy.to(device), sigma.to(device), prompts.to(device), latents.size.grid)
    return (said.float() - velocity.to(device)).square().mean()
