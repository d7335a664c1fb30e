"""A training loop that can be stopped at any time and goes on where it was: the same weights come out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from tools.demo_model.recipe import Recipe


class Loop:
    """The optimizers of one module, the moving average of its weights, and the file that holds it all.

    What a step does must follow from its number alone: then a run that was stopped ends as one that was not.
    """

    def __init__(
        self, name: str, folder: Path, recipe: Recipe, module: nn.Module, total: int, *optimizers: torch.optim.Optimizer
    ) -> None:
        self.name, self.recipe, self.total = name, recipe, total
        self.file = folder / f"{name}.pt"
        self.module, self.optimizers = module, optimizers
        self.rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.average = [parameter.detach().clone() for parameter in self.parameters]
        self.step = 0
        if self.file.exists():
            self._load()

    def steps(self) -> Iterator[int]:
        """The steps that are left. Each must end in `learn`."""
        with tqdm(total=self.total, initial=self.step, desc=self.name, unit="step", smoothing=0.02) as self.bar:
            while self.step < self.total:
                yield self.step

    def learn(self, loss: Tensor) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * self.share_of_rate()
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        keep = min(self.recipe.averaging, self.step / (self.step + 10))
        with torch.no_grad():
            for average, parameter in zip(self.average, self.parameters, strict=True):
                average.lerp_(parameter, 1 - keep)
        self.bar.update()
        if self.step % 50 == 0:
            self.bar.set_postfix(loss=f"{loss.item():.4f}")
        if self.step % self.recipe.save_every == 0 or self.step == self.total:
            self._save()

    def share_of_rate(self) -> float:
        """Up to 1, held there, and down to nothing at the end."""
        left = 1 - self.step / self.total
        return min(1.0, (self.step + 1) / self.recipe.warm_up, left / self.recipe.decay)

    def use_average(self) -> None:
        """Leaves the averaged weights in the module: they are what is shipped."""
        with torch.no_grad():
            for parameter, average in zip(self.parameters, self.average, strict=True):
                parameter.copy_(average)

    def _save(self) -> None:
        """Under another name first, so that the file is whole whenever the run is stopped."""
        state = {
            "step": self.step,
            "weights": [parameter.detach() for parameter in self.parameters],
            "average": self.average,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        whole = self.file.with_suffix(".new")
        torch.save(state, whole)
        whole.replace(self.file)

    def _load(self) -> None:
        state = torch.load(self.file, map_location=self.parameters[0].device, weights_only=True)
        self.step, self.average = state["step"], state["average"]
        with torch.no_grad():
            for parameter, weight in zip(self.parameters, state["weights"], strict=True):
                parameter.copy_(weight)
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
