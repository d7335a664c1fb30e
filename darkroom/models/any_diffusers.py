"""Any other pipeline of diffusers that denoises pictures with a transformer: its own `__call__`, a step at a time.

What such a pipeline can do is not declared here but derived, from its source and its checkpoint's configs; a
`darkroom.json` overrides it. Its guidance branches are spread over ranks from outside, and so is its VAE's decode.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from darkroom.configs.capabilities import Capabilities
from darkroom.configs.errors import ConfigError
from darkroom.configs.request import Request, Task
from darkroom.parallel.plan import Plan

from . import autoencoder_kl
from .base import Component, Model, Sample, noise_generator
from .json_file import read_json
from .stock import Source, find_class, sequence_plan, tensor_plan
from .text_encoders import BY_CLASS

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from darkroom.parallel.guidance import BranchCalls
    from darkroom.parallel.spatial import Tiling

    from .stepwise import StepwiseCall

_NEEDED = ("prompt", "height", "width", "num_inference_steps", "generator", "output_type")
_VIDEO = {"num_frames", "frames", "video_length", "video"}
_CONTROLS = {"control_image", "control_guidance_start", "controlnet_conditioning_scale"}
_PICTURE = re.compile(r"image|mask|font")
_TEXT_MASK = re.compile(r"(attention|embeds)_mask")
_PICTURES = {
    "image",
    "mask_image",
    *("num_images_per_prompt", "padding_mask_crop", "masked_image_latents", "image_reference"),
    *("ip_adapter_image", "ip_adapter_image_embeds", "negative_ip_adapter_image", "negative_ip_adapter_image_embeds"),
    *("input_images", "max_input_image_size", "use_input_image_size_as_output"),
    *("prior_token_image_ids", "source_image_grid_thw"),
}
"""Parameters of pictures: the two that are filled, and those that a call does without."""
_AURA_FLOW = "AuraFlowTransformer2DModel"
_VAE_PLANS = {"AutoencoderKL": autoencoder_kl.VAE.plan, "AutoencoderKLFlux2": autoencoder_kl.VAE.plan}


def family_of(name: str, index: Mapping[str, Any], folder: Path) -> type[Model]:
    """The family of a checkpoint whose model_index.json names the pipeline `name`. Raises ConfigError with why not."""
    pipeline = find_class(name, "pipelines")
    if pipeline is None:
        raise ConfigError("it is no pipeline of diffusers")
    if trouble := _refusal(pipeline):
        raise ConfigError(trouble)
    configs = {part: _config(folder / part) for part in ("transformer", "vae")}
    components = _components(pipeline, index, folder)
    attributes = {
        "pipelines": (name,),
        "components": components,
        "capabilities": _capabilities(name, pipeline, index, configs, components),
        "parameters": frozenset(pipeline.parameters("__call__")),
    }
    return type(name.removesuffix("Pipeline"), (AnyDiffusers,), attributes)


def _refusal(pipeline: Source) -> str | None:
    parts, call = pipeline.parameters("__init__"), pipeline.parameters("__call__")
    code = pipeline.code("__call__")
    if missing := [part for part in ("transformer", "vae", "scheduler") if part not in parts]:
        return f"it has no {' and no '.join(missing)}"
    if missing := [parameter for parameter in _NEEDED if parameter not in call]:
        return f"its call takes no {' and no '.join(missing)}"
    if _VIDEO & set(call) or ".frames" in code or "(frames=" in code:
        return "it makes videos"
    if not re.search(r"return \w+\(\s*images?=", code):
        return "it does not return pictures"
    if missing := sorted(_CONTROLS & set(call)):
        return f"it draws by a '{missing[0]}', which no request brings"
    strange = [name for name in call if _PICTURE.search(name) and not _TEXT_MASK.search(name)]
    if missing := sorted(set(strange) - _PICTURES):
        return f"its call takes '{missing[0]}', and it is not known what it does without"
    if not {"callback_on_step_end", "callback"} & set(call):
        return "its call takes no callback after a step"
    if "self.progress_bar(total=" not in code:
        return "its loop keeps no progress bar, which is how steps are told apart"
    return None


def _config(folder: Path) -> dict[str, Any]:
    return read_json(folder / "config.json", "the checkpoint is incomplete")


def _components(pipeline: Source, index: Mapping[str, Any], folder: Path) -> dict[str, Component]:
    """All parts with weights: those whose folder says which class it is."""
    components = {}
    for part, (library, name) in ((part, x) for part, x in index.items() if isinstance(x, list) and all(x)):
        if library not in ("diffusers", "transformers"):
            raise ConfigError(f"model_index.json takes '{part}' from {library}: only diffusers' and transformers' run")
        if not (folder / part / "config.json").is_file():
            continue
        if name in BY_CLASS and pipeline.only_calls(part):
            components[part] = _without_unread(BY_CLASS[name], pipeline, _config(folder / part))
            continue
        plan = _plan(part, name, folder)
        components[part] = Component(
            module="diffusers.models" if library == "diffusers" else library,
            name=name,
            plan=plan,
            ranks="tp" if plan.tensor else "all",
        )
    return components


def _without_unread(encoder: Component, pipeline: Source, config: Mapping[str, Any]) -> Component:
    """Without the last layers of which nobody reads what they make, where the pipeline names the layers that it reads:
    hidden state n is what layer n, counted from zero, is given."""
    read = pipeline.parameters("__call__").get("text_encoder_out_layers")
    unread = config.get("num_hidden_layers", 0) - max(read) if read else 0
    return replace(encoder, unread="layers", unread_layers=unread) if unread > 0 else encoder


def _plan(part: str, name: str, folder: Path) -> Plan:
    if part == "vae":
        return _VAE_PLANS.get(name, Plan())
    source = find_class(name, "models/transformers") if part == "transformer" else None
    if source is None:
        return Plan()
    return Plan(tensor=tensor_plan(source, _config(folder / part)), even_heads=True, sequence=sequence_plan(source))


# ---- capabilities ------------------------------------------------------------------------------------------------


def _capabilities(
    name: str,
    pipeline: Source,
    index: Mapping[str, Any],
    configs: Mapping[str, Mapping[str, Any]],
    components: Mapping[str, Component],
) -> Capabilities:
    call = pipeline.parameters("__call__")
    guidance = "true_cfg_scale" if "true_cfg_scale" in call else "guidance_scale"
    least, steps, most = _steps(pipeline)
    window = _window(pipeline)
    unit, default_size = _sizes(pipeline, configs)
    branches = 2 if _is_guided(pipeline, index) else 1
    spreads = {
        "cfg": branches > 1,
        "ring": bool(components["transformer"].plan.sequence),
        "ulysses": bool(components["transformer"].plan.sequence),
        "tp": bool(components["transformer"].plan.tensor),
        "vae": components["vae"].plan.spatial is not None,
    }
    return Capabilities(
        family=name,
        tasks=_tasks(pipeline),
        max_images=int("image" in call),
        **_picture_limits(pipeline),
        size_multiple=unit,
        min_edge=unit,
        max_edge=_max_edge(configs["transformer"], unit),
        max_pixels=4 * math.prod(default_size),
        default_size=default_size,
        num_inference_steps=steps,
        min_inference_steps=least,
        max_inference_steps=most,
        quality_steps={
            name: max(least, math.ceil(steps * share)) for name, share in (("low", 0.4), ("medium", 0.7), ("high", 1.0))
        },
        guidance_parameter=guidance,
        guidance_scale=call.get(guidance) or 1.0,
        max_guidance=100.0 if guidance in call else 1.0,
        embedded_guidance=call.get("guidance_scale") if guidance == "true_cfg_scale" else None,
        negative_prompt=call.get("negative_prompt") or "",
        takes_negative_prompt="negative_prompt" in call,
        max_sequence_length=call.get("max_sequence_length") or window,
        text_window=window,
        guidance_branches=branches,
        previews=False,
        axes=tuple(axis for axis, has_plan in spreads.items() if has_plan),
    )


def _tasks(pipeline: Source) -> tuple[Task, ...]:
    call = pipeline.parameters("__call__")
    if "image" not in call:
        return ("text-to-image",)
    if "mask_image" in call:
        return ("inpaint",)
    if "strength" in call:
        return ("image-to-image",)
    return ("text-to-image", "edit") if pipeline.is_optional("__call__", "image") else ("edit",)


def _steps(pipeline: Source) -> tuple[int, int, int]:
    """The fewest, those by default and the most. Where inputs are checked for one number it is all three: Sana-Sprint's
    two."""
    if fixed := re.search(r"num_inference_steps != (\d+)", pipeline.code("check_inputs")):
        return (int(fixed[1]),) * 3
    steps = pipeline.parameters("__call__")["num_inference_steps"] or 50
    return 1, steps, max(200, steps)


def _window(pipeline: Source) -> int:
    """The most tokens of text: the bound that the inputs are checked against, or else the default."""
    bound = re.search(r"max_sequence_length > (\d+)", pipeline.code("check_inputs"))
    return int(bound[1]) if bound else pipeline.parameters("__call__").get("max_sequence_length") or 512


def _sizes(pipeline: Source, configs: Mapping[str, Mapping[str, Any]]) -> tuple[int, tuple[int, int]]:
    """What edges are multiples of; and the default (width, height)."""
    transformer, vae, call = configs["transformer"], configs["vae"], pipeline.parameters("__call__")
    stages = vae.get("block_out_channels") or vae.get("encoder_block_out_channels") or [0] * 4
    scale = 2 ** (len(stages) - 1)
    patch = transformer.get("patch_size", 1)
    patch = max(patch[-1] if isinstance(patch, list) else patch, 2 if "// 2" in _packing(pipeline) else 1)
    checked = re.findall(r"(?:height|width) % (\d+)", pipeline.code("check_inputs"))
    edge = (pipeline.constant("default_sample_size") or transformer.get("sample_size") or 128) * scale
    return math.lcm(scale * patch, *map(int, checked)), (call["width"] or edge, call["height"] or edge)


def _picture_limits(pipeline: Source) -> dict[str, Any]:
    """What FLUX.2's pipelines ask of pictures. The others scale what they get."""
    processor = find_class("Flux2ImageProcessor", "pipelines")
    if processor is None or "Flux2ImageProcessor(" not in pipeline.code("__init__"):
        return {}
    limits = processor.parameters("check_image_input")
    return {"min_image_edge": limits["min_side_length"], "max_aspect_ratio": limits["max_aspect_ratio"]}


def _max_edge(transformer: Mapping[str, Any], unit: int) -> int | None:
    """As far as its table of positions reaches. AuraFlow's says how many there are in all, the others' on an edge."""
    if (tokens := transformer.get("pos_embed_max_size")) is None:
        return None
    return unit * (math.isqrt(tokens) if transformer.get("_class_name") == _AURA_FLOW else tokens)


def _packing(pipeline: Source) -> str:
    """The method that puts two by two latents together to a token; "" where the pipeline has none."""
    return pipeline.code("_pack_latents") + pipeline.code("_patchify_latents")


def _is_guided(pipeline: Source, index: Mapping[str, Any]) -> bool:
    """Whether each step has two guidance branches: one call of the transformer after another, or one doubled batch."""
    code, call = pipeline.code("__call__"), pipeline.parameters("__call__")
    if any(index.get(flag) for flag in re.findall(r"not self\.config\.(\w+)", pipeline.code(_GUIDED))):
        return False  # a checkpoint that is distilled to do without, says so
    has_both = code.count("self.transformer(") == 2 or re.search(r"\[latents\] \* 2|\[latents, latents\]", code)
    return bool(has_both) and bool({"guidance_scale", "true_cfg_scale"} & set(call))


_GUIDED = "do_classifier_free_guidance"


# ---- the model ---------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class CallSample(Sample):
    """A request whose loop is the stock pipeline's."""

    steps: int = 0
    call: StepwiseCall | None = None

    @property
    def num_steps(self) -> int:
        return self.steps


class AnyDiffusers(Model):
    """Runs the stock `__call__`. Each sample has its own shallow copy of the pipeline, and its own scheduler."""

    files: ClassVar = ((("scheduler/scheduler_config.json",),),)
    parameters: ClassVar[frozenset[str]]
    """What the pipeline's call takes."""

    def __init__(self, pipe: Any, vae: Any, *args: Any, use_tiling: bool = False) -> None:
        from .spread_vae import SpreadVae

        if use_tiling and self.components["vae"].name not in _VAE_PLANS:
            raise ConfigError(f"--vae-use-tiling: the tiles of {self.components['vae'].name} are not known")
        super().__init__(pipe, vae, *args, use_tiling=use_tiling)
        self.pipe.vae = SpreadVae(self, self.tiling() if use_tiling else None)
        self.forms: dict[Any, Any] = {}
        """What `BranchCalls` has learnt."""

    def tiling(self) -> Tiling:
        return autoencoder_kl.tiling(self.vae)

    def prepare(self, request: Request) -> Sample:
        import torch

        from .stepwise import StepwiseCall

        pixels, multiple = request.width * request.height, self.options.size_multiple
        sample = CallSample(
            request=request,
            latents=torch.empty(1, 0, device=self.device),
            scheduler=self.new_scheduler(),
            branches=[{}],  # as the engine sees it: branches are spread within the call
            text_tokens=self._text_tokens(request),
            image_tokens=pixels // multiple**2,
        )
        sample.call = StepwiseCall(lambda pause: self._call(sample, pause), self.device)
        if not sample.call.resume():
            raise RuntimeError("the pipeline's call ended without a step")
        return sample

    def _call(self, sample: CallSample, pause: Callable[[], None]) -> Any:
        """Runs on the call's thread."""
        pipe, branches = copy(self.pipe), self._branches(sample.request)
        steps = _Steps(sample, pause, branches, ends_in_callback="callback" in self.parameters)
        vars(pipe).update(
            scheduler=sample.scheduler,
            transformer=_Transformer(self.pipe.transformer, branches) if branches else self.pipe.transformer,
            progress_bar=steps.of,
        )
        return pipe(**self._arguments(sample.request), **self._callback(sample, steps), return_dict=False)[0]

    def _callback(self, sample: CallSample, steps: _Steps) -> dict[str, Any]:
        """What tells the latents after each step, under the name that the pipeline has for it."""

        def keep(latents: torch.Tensor) -> dict[str, Any]:
            sample.latents = latents
            return {}

        def end(latents: torch.Tensor) -> None:
            keep(latents)
            steps.end()

        hooks = {
            "callback_on_step_end": lambda _pipe, _step, _time, values: keep(values["latents"]),
            "callback": lambda _step, _time, latents: end(latents),
        }
        return {name: hook for name, hook in hooks.items() if name in self.parameters}

    def _branches(self, request: Request) -> BranchCalls | None:
        from darkroom.parallel.guidance import BranchCalls

        if self.mesh.cfg.size == 1 or len(self.prompts(request)) == 1:
            return None
        return BranchCalls(self.pipe.transformer, self.mesh.cfg, self.forms)

    def _arguments(self, request: Request) -> dict[str, Any]:
        """What the pipeline's call is given, of what it takes."""
        values = {
            "prompt": request.prompt,
            "negative_prompt": request.negative_prompt,
            "height": request.height,
            "width": request.width,
            "max_area": request.width * request.height,  # some scale the size that is asked for to this many pixels
            "num_inference_steps": request.num_inference_steps,
            **self._guidance(request),
            "max_sequence_length": request.max_sequence_length,
            "generator": noise_generator(request),
            "output_type": "pt",
            **self._pictures(request),
        }
        return {name: value for name, value in values.items() if name in self.parameters}

    def _guidance(self, request: Request) -> dict[str, float]:
        values: dict[str, float] = {self.options.guidance_parameter: request.guidance_scale}
        if request.embedded_guidance is not None:
            values["guidance_scale"] = request.embedded_guidance
        return values

    def _pictures(self, request: Request) -> dict[str, Any]:
        from darkroom.configs.pictures import load_mask, load_picture

        if not request.images:
            return {}
        pictures = [load_picture(image).convert("RGB") for image in request.images]
        values = {"image": pictures if len(pictures) > 1 else pictures[0], "strength": request.strength}
        return values if request.mask is None else {**values, "mask_image": load_mask(request.mask)}

    def _text_tokens(self, request: Request) -> int:
        parts = (part for name, part in self.pipe.components.items() if name.startswith("tokenizer") and part)
        lengths = [len(tokenizer(request.prompt).input_ids) for tokenizer in parts]
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
        """The rest of the calls, in which the stock pipelines decode. Pictures lie in [0, 1]."""
        import torch

        pictures = [self._finish(sample) for sample in samples]
        return None if self.mesh.rank > 0 else torch.cat([x for x in pictures if x is not None])

    def _finish(self, sample: Sample) -> torch.Tensor | None:
        assert isinstance(sample, CallSample) and sample.call
        if sample.step < sample.num_steps:
            raise RuntimeError("a stock pipeline decodes only at the end of its call: there are no previews")
        while sample.call.resume():
            pass
        result: torch.Tensor | None = sample.call.result
        return result

    def pictures(self, decoded: torch.Tensor) -> list[Image.Image]:
        processor = self.pipe.image_processor
        pictures: list[Image.Image] = processor.numpy_to_pil(processor.pt_to_numpy(decoded))
        return pictures

    def drop(self, sample: Sample) -> None:
        if isinstance(sample, CallSample) and sample.call:
            sample.call.end()


class _Steps:
    """Stands for the pipeline's progress bar, whose loop pauses when it begins, and after every step.

    `ends_in_callback`: a step is over with the older callback, which comes after the bar moves; the newer comes before.
    """

    def __init__(
        self, sample: CallSample, pause: Callable[[], None], branches: BranchCalls | None, *, ends_in_callback: bool
    ) -> None:
        self._sample, self._pause, self._branches = sample, pause, branches
        self._ends_in_callback = ends_in_callback

    def of(self, total: int) -> _Steps:
        """Stands for the method that makes the bar."""
        self._sample.steps = total
        return self

    def __enter__(self) -> _Steps:
        self._pause()
        return self

    def __exit__(self, *_error: object) -> None:
        return

    def update(self, _steps: int = 1) -> None:
        if not self._ends_in_callback:
            self.end()

    def end(self) -> None:
        if self._branches:
            self._branches.end_step(self._sample.latents)
        self._pause()


class _Transformer:
    """Stands for the transformer in one sample's pipeline: only its calls are other ones."""

    def __init__(self, module: Any, branches: BranchCalls) -> None:
        self._module, self._branches = module, branches

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._branches(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)
