"""Any other pipeline of diffusers that denoises pictures or videos with a transformer: its own `__call__`, a step at a
time.

What such a pipeline can do is not declared here but derived (`stock_family`), from its source and its checkpoint's
configs; a `darkroom.json` overrides it. Its guidance branches are spread over ranks from outside, and so is its VAE's
decode.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from darkroom.configs.errors import ConfigError
from darkroom.configs.request import Request

from .base import Model, Sample
from .stock_call import arguments, check_texts
from .stock_vaes import SPREADABLE, SpreadableVae

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from darkroom.parallel.guidance import BranchCalls
    from darkroom.parallel.spatial import Tiling

    from .stepwise import StepwiseCall


@dataclass(kw_only=True)
class CallSample(Sample):
    """A request whose loop is the stock pipeline's."""

    steps: int = 0
    call: StepwiseCall | None = None

    @property
    def num_steps(self) -> int:
        return self.steps


class AnyDiffusers(Model):
    """Runs the stock `__call__`. Each sample has its own shallow copy of the pipeline, and its own parts of those that
    keep state from step to step: the scheduler, and what guides by past predictions."""

    files: ClassVar = ((("scheduler/scheduler_config.json",),),)
    parameters: ClassVar[frozenset[str]]
    """What the pipeline's call takes."""
    fixed: ClassVar[Mapping[str, Any]] = {}
    """What every call is given besides what a request says."""
    frames_per_latent: ClassVar[int] = 1
    """Of a video, the first frame aside."""

    processor_parts: ClassVar[tuple[str, ...]] = ()
    """Tokenizers that are processors of pictures and videos too, and are given texts."""

    @classmethod
    def processors(cls, folder: Path) -> dict[str, Any]:
        from .vision_language import load_processor

        return {part: load_processor(folder / part) for part in cls.processor_parts}

    def __init__(self, pipe: Any, vae: Any, *args: Any, use_tiling: bool = False) -> None:
        from .spread_vae import SpreadVae

        if use_tiling and self.components["vae"].plan.spatial is None:
            raise ConfigError(f"--vae-use-tiling: the tiles of {self.components['vae'].name} are not known")
        super().__init__(pipe, vae, *args, use_tiling=use_tiling)
        self.pipe.vae = SpreadVae(self, self.encode_tiling() if use_tiling else None)
        self.forms: dict[Any, Any] = {}
        """What `BranchCalls` has learnt."""

    @property
    def known_vae(self) -> SpreadableVae:
        """For those of which a plan says how they are spread."""
        return SPREADABLE[self.components["vae"].name]

    def tiling(self) -> Tiling:
        return self.known_vae.tiling(self.vae)

    def encode_tiling(self) -> Tiling:
        return self.known_vae.encode_tiling(self.vae)

    def prepare(self, request: Request) -> Sample:
        import torch

        from .stepwise import StepwiseCall

        check_texts(request, [getattr(self.pipe, part) for part in self.processor_parts])
        pixels, multiple = request.width * request.height, self.options.size_multiple
        frames = (request.num_frames - 1) // self.frames_per_latent + 1
        sample = CallSample(
            request=request,
            latents=torch.empty(1, 0, device=self.device),
            scheduler=self.new_scheduler(),
            branches=[{}],  # as the engine sees it: branches are spread within the call
            text_tokens=self._text_tokens(request),
            image_tokens=pixels // multiple**2 * frames,
        )
        sample.call = StepwiseCall(lambda pause: self._call(sample, pause), self.device)
        if not sample.call.resume():
            raise RuntimeError("the pipeline's call ended without a step")
        return sample

    def _call(self, sample: CallSample, pause: Callable[[], None]) -> Any:
        """Runs on the call's thread."""
        from diffusers.guiders.guider_utils import BaseGuidance

        from .stepwise import Steps

        pipe, branches = copy(self.pipe), self._branches(sample.request)
        steps = Steps(sample, pause, branches, self.parameters)
        vars(pipe).update(
            **{name: deepcopy(part) for name, part in pipe.components.items() if isinstance(part, BaseGuidance)},
            scheduler=sample.scheduler,
            transformer=_Transformer(self.pipe.transformer, branches) if branches else self.pipe.transformer,
            progress_bar=steps.of,
        )
        given = arguments(sample.request, self.options, self.parameters)
        return pipe(**given, **self.fixed, **steps.hooks(), return_dict=False)[0]

    def _branches(self, request: Request) -> BranchCalls | None:
        from darkroom.parallel.guidance import BranchCalls

        if self.mesh.cfg.size == 1 or len(self.prompts(request)) == 1:
            return None
        return BranchCalls(self.pipe.transformer, self.mesh.cfg, self.forms)

    def _text_tokens(self, request: Request) -> int:
        parts = (part for name, part in self.pipe.components.items() if name.startswith("tokenizer") and part)
        tokenizers = (getattr(part, "tokenizer", part) for part in parts)
        lengths = [len(tokenizer(request.prompt).input_ids) for tokenizer in tokenizers]
        return min(max(lengths, default=0), request.max_sequence_length)

    def predict(self, samples: Sequence[Sample], branch: int) -> torch.Tensor:
        """One step of each sample's call. -> the latents after it"""
        import torch

        for sample in samples:
            assert isinstance(sample, CallSample) and sample.call
            sample.call.resume()
        return torch.cat([sample.latents for sample in samples])

    def guide(self, sample: Sample, predictions: Sequence[torch.Tensor]) -> torch.Tensor:
        return predictions[0]

    def advance(self, sample: Sample, prediction: torch.Tensor) -> None:
        sample.step += 1  # the call has taken the scheduler's step

    def decode(self, samples: Sequence[Sample], latents: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """The rest of the calls, in which the stock pipelines decode. Pictures lie in [0, 1].

        -> pictures [B, 3, H, W], or videos [B, 3, F, H, W]
        """
        import torch

        made = [x for sample in samples if (x := self._finish(sample)) is not None]
        if self.mesh.rank > 0:
            return None
        return made[0] if len(made) == 1 else torch.cat(made)  # which would copy even one

    def _finish(self, sample: Sample) -> torch.Tensor | None:
        assert isinstance(sample, CallSample) and sample.call
        if sample.step < sample.num_steps:
            raise RuntimeError("a stock pipeline decodes only at the end of its call: there are no previews")
        while sample.call.resume():
            pass
        made: torch.Tensor | None = sample.call.result
        sample.call.result = None  # it may be large, and the sample is dropped later
        return made.transpose(1, 2) if made is not None and self.options.fps else made  # it puts frames first

    def pictures(self, decoded: torch.Tensor) -> list[Image.Image]:
        """Raises RuntimeError for frames of no numbers: in `decode` the output rank would fail alone."""
        from diffusers.image_processor import VaeImageProcessor

        if self.options.fps and not all(x.isfinite() for x in decoded.aminmax()):  # of one too short for the pipeline
            raise RuntimeError("the pipeline made frames that are no numbers")
        made = decoded[0].transpose(0, 1) if self.options.fps else decoded
        pictures: list[Image.Image] = VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(made))
        return pictures

    def drop(self, sample: Sample) -> None:
        if isinstance(sample, CallSample) and sample.call:
            sample.call.end()


class _Transformer:
    """Stands for the transformer in one sample's pipeline: only its calls are other ones."""

    def __init__(self, module: Any, branches: BranchCalls) -> None:
        self._module, self._branches = module, branches

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._branches(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)
