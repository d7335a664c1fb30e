"""The contract between a model family's file and the engine.

A family file borrows a diffusers pipeline's components and helper methods; the denoising loop is the engine's. Its
module level needs no torch, so that the command line can read capabilities and plans at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from darkroom.configs.capabilities import Capabilities
from darkroom.configs.request import Request
from darkroom.parallel.plan import Plan, head_counts, lookup

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from PIL import Image
    from torch import nn

    from darkroom.parallel.mesh import Mesh
    from darkroom.parallel.spatial import Tiling

    Decode = Callable[[torch.Tensor], torch.Tensor]

PROMPTS = ("prompt", "negative_prompt")
"""The fields of a request that the guidance branches read, in the order of `Model.prompts`."""


@dataclass(frozen=True, kw_only=True)
class Component:
    """One folder of the checkpoint: which class runs it, and how it is cut over which ranks."""

    module: str
    """Where the class is defined; worker processes import it before they fork."""
    name: str
    """The class."""
    plan: Plan = field(default_factory=Plan)
    ranks: Literal["tp", "world", "vae", "all"]
    """`tp`: cut over the tensor-parallel axis. `world`: over all ranks. `vae`: whole, on the ranks that decode.
    `all`: whole, on every rank, as its own library loads it."""
    section: str | None = None
    """The part of config.json that describes the class, where the folder holds more than it."""
    nested: tuple[str, ...] = ()
    """Sections of config.json that older checkpoints have flat, on its top level."""
    prefixes: Mapping[str, str] = field(default_factory=lambda: {"": ""})
    """What a key of the checkpoint begins with, and what the class has there; keys with none of these are left out."""
    leave_out: tuple[str, ...] = ()
    """Prefixes of keys that the class has no use for."""
    unread: str | None = None
    """A list of layers of which nobody reads what the last one makes: it hands on what it gets, without weights."""
    unread_layers: int = 1
    """How many last ones of `unread` that is true of."""
    around: str | None = None
    """What the class is called in the one around it, that has logits too: a pipeline may ask for either."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What the class's configuration holds whatever config.json says."""
    processor: Callable[[], Any] | None = None
    """Makes an attention processor, one for each module that attends, instead of the class's own."""
    exact: tuple[str, ...] = ()
    """Names in the paths of parameters that the class keeps in fp32: its `_keep_in_fp32_modules`."""

    def exact_in(self, dtype: str) -> tuple[str, ...]:
        """diffusers keeps them in fp32 beside any dtype, and transformers beside float16 alone."""
        return self.exact if self.module.startswith("diffusers.") or dtype == "float16" else ()

    def rename(self, key: str) -> str | None:
        """A checkpoint's key -> the parameter's name, or None for what the class has no use for."""
        if key.startswith(self.leave_out):
            return None
        for prefix, own in self.prefixes.items():
            if key.startswith(prefix):
                return own + key.removeprefix(prefix)
        return None

    def described(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The part of a config.json that describes the class."""
        whole = {**{name: config for name in self.nested}, **config}
        part: Mapping[str, Any] = whole.get(self.section, whole) if self.section else whole
        return part

    def missing_number(self, part: Mapping[str, Any]) -> str | None:
        """What the plan reads in that part and does not find there, if there is such a thing."""
        return next((key for key in head_counts(self.plan) if not _is_count(part, key)), None)


def _is_count(config: Mapping[str, Any], key: str) -> bool:
    try:
        return lookup(config, key) > 0
    except (KeyError, TypeError, ValueError):
        return False


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Inpainting: the picture of which everything outside the mask stays. All are shaped as the latents are."""

    latents: torch.Tensor
    noise: torch.Tensor
    mask: torch.Tensor
    """One where the picture is drawn anew, zero where it stays."""

    def within(self, known: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
        """What is drawn, and around it what is known."""
        return (1 - self.mask) * known + self.mask * drawn


@dataclass(kw_only=True)
class Sample:
    """One request in flight: what changes from step to step, and what its forward passes need."""

    request: Request
    latents: torch.Tensor
    scheduler: Any
    """This request's own scheduler object: some keep state from step to step."""
    branches: list[dict[str, Any]]
    """The transformer's conditioning, one set per guidance branch, the conditional first."""
    text_tokens: int
    image_tokens: int
    estimate: torch.Tensor | None = None
    """The clean latents as the last step saw them; kept for requests that want previews."""
    step: int = 0
    first_step: int = 0
    """Of the schedule: an image-to-image request begins further on."""
    kept: Kept | None = None
    context: torch.Tensor | None = None
    """The clean latents of the pictures that are edited, which the transformer sees behind the sample's own."""

    @property
    def input_image_tokens(self) -> int:
        """Tokens of the pictures that came with the request: seen beside the sample's own, or begun from."""
        return self.image_tokens * len(self.request.images) if self.context is None else int(self.context.shape[1])

    @property
    def timestep(self) -> torch.Tensor:
        timestep: torch.Tensor = self.scheduler.timesteps[self.first_step + self.step]
        return timestep

    @property
    def sigma(self) -> torch.Tensor:
        sigma: torch.Tensor = self.scheduler.sigmas[self.first_step + self.step]
        return sigma

    @property
    def num_steps(self) -> int:
        return len(self.scheduler.timesteps) - self.first_step


class Model(ABC):
    """One family: its declarations, and the arithmetic that is its own."""

    pipelines: ClassVar[tuple[str, ...]]
    """diffusers' pipeline classes, as named in model_index.json. The first is what runs."""
    capabilities: ClassVar[Capabilities]
    components: ClassVar[dict[str, Component]]
    files: ClassVar[tuple[tuple[tuple[str, ...], ...], ...]] = (
        (("scheduler/scheduler_config.json",),),
        (("tokenizer/tokenizer.json",), ("tokenizer/vocab.json", "tokenizer/merges.txt")),
    )
    """Files beside the components that the pipeline needs: of each entry, one of the alternatives."""
    unused: ClassVar[tuple[str, ...]] = ()
    """Parts of the pipeline that no request needs: they may be missing, and are not loaded."""
    optional: ClassVar[tuple[str, ...]] = ()
    """Parts of the pipeline that a checkpoint may do without: its model_index.json then names no class for them."""

    def __init__(
        self,
        pipe: DiffusionPipeline,
        vae: nn.Module,
        capabilities: Capabilities,
        mesh: Mesh,
        device: torch.device,
        *,
        use_tiling: bool = False,
    ) -> None:
        """`pipe` and `vae` hold this rank's parts: the VAE of a rank that takes no part in it is without weights.

        `capabilities` are the class's, with what the checkpoint has otherwise.
        """
        from darkroom.parallel.spatial import PatchDecoder, SharedEncoder

        self.pipe: Any = pipe
        self.vae: Any = vae
        self.options = capabilities
        self.mesh = mesh
        self.device = device
        self.use_tiling = use_tiling
        self.patches = PatchDecoder(vae, self.components["vae"].plan, mesh.vae) if mesh.vae else None
        tiling = self.encode_tiling() if use_tiling else None
        self.pipe.vae = self.encoder = SharedEncoder(vae, mesh, device, self.vae.dtype, tiling)

    @classmethod
    def processors(cls, folder: Path) -> dict[str, Any]:
        """Parts of the pipeline that it cannot load by itself."""
        return {}

    @classmethod
    def describe(cls, index: Mapping[str, Any], configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """The capabilities that follow from a checkpoint: its model_index.json, and configs by component, with the
        scheduler's."""
        return {}

    @abstractmethod
    def tiling(self) -> Tiling:
        """The tiles that the stock VAE works in where it is told to."""

    def encode_tiling(self) -> Tiling:
        """Those that it encodes in: for most VAEs of the same sizes."""
        return self.tiling()

    @abstractmethod
    def prepare(self, request: Request) -> Sample:
        """Encode the prompts, draw the noise, set the timesteps. Every rank gets the same sample."""

    @abstractmethod
    def predict(self, samples: Sequence[Sample], branch: int) -> torch.Tensor:
        """One forward pass of the transformer over a batch. -> [B, tokens, channels]"""

    @abstractmethod
    def decode(self, samples: Sequence[Sample], latents: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """Latents of samples of one size -> pictures in [-1, 1], on the output rank; None elsewhere.

        [B, 3, H, W], or with what else a sample's pictures are: frames, layers, an alpha channel.
        """

    def guide(self, sample: Sample, predictions: Sequence[torch.Tensor]) -> torch.Tensor:
        """Combine the branches' predictions for one sample, in the order of `sample.branches`.

        Classifier-free guidance (https://arxiv.org/abs/2207.12598), where a model does not combine them otherwise.
        """
        if len(predictions) == 1:
            return predictions[0]
        cond, uncond = predictions
        return uncond + self.guidance_scale(sample) * (cond - uncond)

    def guidance_scale(self, sample: Sample) -> float:
        """How strongly this step of the sample is guided."""
        return sample.request.guidance_scale

    def prompts(self, request: Request) -> list[str]:
        """The texts of the guidance branches, the conditional first."""
        guided = request.guidance_scale > self.options.no_guidance
        return [request.prompt, request.negative_prompt] if guided else [request.prompt]

    def spread_decode(
        self, z: torch.Tensor, decode: Decode, decode_tile: Decode, finish: Decode | None = None
    ) -> torch.Tensor | None:
        """The VAE's own `decode` over the ranks that take part: by rows, or by tiles where tiling is asked for.

        `finish` is what the VAE does to tiles once they are one. The picture on the output rank, None on the others.
        """
        from darkroom.parallel.spatial import map_tiles

        if self.patches is None or self.mesh.vae is None:
            return None
        tiling = self.tiling()
        if self.use_tiling and tiling.applies(*z.shape[-2:]):
            decoded = map_tiles(z, decode_tile, tiling, self.mesh.vae)
            return decoded if decoded is None or finish is None else finish(decoded)
        return self.patches.decode(z, decode)

    def pictures(self, decoded: torch.Tensor) -> list[Image.Image]:
        """One sample's part of what `decode` gave, [1, 3, H, W] -> its pictures, rounded as the stock pipeline does.

        One for most models, the frames of a video, the layers of a layered picture.
        """
        images: list[Image.Image] = self.pipe.image_processor.postprocess(decoded, output_type="pil")
        return images

    def advance(self, sample: Sample, prediction: torch.Tensor) -> None:
        """One step of the sample's scheduler along the guided prediction."""
        if sample.request.partial_images:
            estimate = self.clean_estimate(sample, prediction)
            sample.estimate = sample.kept.within(sample.kept.latents, estimate) if sample.kept else estimate
        sample.latents = sample.scheduler.step(prediction, sample.timestep, sample.latents, return_dict=False)[0]
        sample.step += 1
        if sample.kept:
            sample.latents = self._keep(sample, sample.kept)

    def _keep(self, sample: Sample, kept: Kept) -> torch.Tensor:
        """Put back what stays of the picture, as noisy as the rest of it is by now."""
        known = kept.latents
        if sample.step < sample.num_steps:
            known = sample.scheduler.scale_noise(known, sample.timestep[None], kept.noise)
        return kept.within(known, sample.latents)

    def clean_estimate(self, sample: Sample, prediction: torch.Tensor) -> torch.Tensor:
        """x0 under flow matching (https://arxiv.org/abs/2210.02747): x_t = (1 - sigma) x0 + sigma noise, and the
        prediction is noise - x0."""
        estimate: torch.Tensor = sample.latents - sample.sigma * prediction
        return estimate.to(sample.latents.dtype)

    def drop(self, sample: Sample) -> None:
        """The sample is not needed any more: it is finished, or was given up on the way."""
        return

    def new_scheduler(self) -> Any:
        return deepcopy(self.pipe.scheduler)

    def timed_scheduler(self, steps: int | None, **options: Any) -> Any:
        """A sample's own scheduler at the beginning of so many steps, or of those that `options` say to it."""
        scheduler = self.new_scheduler()
        scheduler.set_timesteps(steps, device=self.device, **options)
        scheduler.set_begin_index(0)
        return scheduler

    def shifted_scheduler(self, sigmas: Any, image_tokens: int, steps: int | None = None) -> Any:
        """A sample's own scheduler over `sigmas`, or over `steps` of its own, which large pictures shift towards the
        noise, as the stock pipelines' `calculate_shift` does it (https://arxiv.org/abs/2403.03206, section 5.3.2)."""
        option = self.pipe.scheduler.config.get
        low, high = option("base_image_seq_len", 256), option("max_image_seq_len", 4096)
        base, most = option("base_shift", 0.5), option("max_shift", 1.15)
        slope = (most - base) / (high - low)
        return self.timed_scheduler(steps, sigmas=sigmas, mu=image_tokens * slope + (base - slope * low))


def with_context(samples: Sequence[Sample]) -> torch.Tensor:
    """The latents of a batch, each with its context behind it. [B, tokens, channels]"""
    import torch

    tokens = [
        sample.latents if sample.context is None else torch.cat([sample.latents, sample.context], 1)
        for sample in samples
    ]
    return torch.cat(tokens)


def noise_generator(request: Request) -> torch.Generator:
    """On the CPU: the same seed gives the same picture on any device."""
    import torch

    return torch.Generator("cpu").manual_seed(request.seed)
