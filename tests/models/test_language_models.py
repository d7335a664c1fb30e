"""Encoders as the pipelines without a family file have them: one process is the stock class, ranks are one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import (
    BertConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
    Gemma2Config,
    Gemma3Config,
    GemmaConfig,
    GlmConfig,
    LlamaConfig,
    Mistral3Config,
    Qwen2VLConfig,
    Qwen3Config,
    Qwen3VLConfig,
    SmolLM3Config,
)

from darkroom.configs import ParallelConfig
from darkroom.models.any_diffusers import AnyDiffusers
from darkroom.models.base import Component
from darkroom.models.build import _axis, _component
from darkroom.models.checkpoint import Checkpoint
from darkroom.models.stock import find_class
from darkroom.models.stock_encoders import cut_encoder
from darkroom.parallel.mesh import Mesh
from tests import tiny
from tests.faults import partial_sums_are_not_reduced, parts_are_cut_as_one
from tests.golden import TOLERANCE
from tests.ranks import run_ranks

TOKENS = torch.tensor([[150, 7, 9, 31, 8, 44, 11, 23, 90, 1], [150, 3, 70, 12, 1, 0, 0, 0, 0, 0]])
MASK = torch.tensor([[1] * 10, [1] * 5 + [0] * 5])
PICTURE: dict[str, Any] = {"image_size": 28, "patch_size": 14}


WORDS = {"vocab_size": 160, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}


def decoder(heads: int, kv_heads: int, **values: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 12 * heads, "intermediate_size": 90, "num_hidden_layers": 3, "head_dim": 16}
    heads_too = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    return {**sizes, **heads_too, **WORDS, **values}


VISION = {"hidden_size": 24, "intermediate_size": 50, "num_hidden_layers": 3, "num_attention_heads": 3}
CLIP = CLIPTextConfig(**VISION, **WORDS, projection_dim=20)
SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}


@dataclass(frozen=True, kw_only=True)
class Case:
    """An encoder as a pipeline of diffusers has it."""

    pipeline: str
    part: str = "text_encoder"
    cls: str
    config: Callable[[], Any]
    read: Callable[[Any], Any]
    """What the pipeline takes of what the encoder makes."""
    unread: int = 0
    """Last layers of which it reads nothing."""
    given: str = "masked"
    """Tokens alone, or with a mask, or with positions or a picture too; or a picture alone."""


def all_states(out: Any) -> torch.Tensor:
    return torch.cat(out.hidden_states, -1)


def reader(kind: str, heads: int, kv_heads: int, **values: Any) -> Mistral3Config:
    vision = {**VISION, **PICTURE, "num_attention_heads": 2, "head_dim": 12, "model_type": "pixtral"}
    return Mistral3Config(text_config={"model_type": kind, **decoder(heads, kv_heads, **values)}, vision_config=vision)


def gemma3() -> Gemma3Config:
    vision = {**VISION, **PICTURE, "model_type": "siglip_vision_model"}
    return Gemma3Config(text_config=decoder(4, 1, **SLIDING), vision_config=vision, mm_tokens_per_image=1)


def qwen2_5_vl() -> Any:
    config = tiny.qwen2_5_vl_config(64, 4, 2)
    config.text_config.num_hidden_layers, config.text_config.layer_types = 4, ["full_attention"] * 4
    return config


def qwen2_vl() -> Qwen2VLConfig:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}
    vision = {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 48}
    return Qwen2VLConfig(text_config=decoder(4, 2, rope_parameters=rope, head_dim=12), vision_config=vision)


def qwen3_vl() -> Qwen3VLConfig:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 48, "intermediate_size": 32}
    return Qwen3VLConfig(
        text_config=decoder(4, 2, rope_parameters=rope),
        vision_config={**vision, "deepstack_visual_indexes": [0]},
        image_token_id=152,
        vision_start_token_id=151,
        vision_end_token_id=153,
    )


CASES = {
    "clip": Case(
        pipeline="FluxPipeline",
        cls="CLIPTextModel",
        config=lambda: CLIP,
        read=lambda x: x.pooler_output,
        given="tokens",
    ),
    "clip, projected": Case(
        pipeline="HiDreamImagePipeline",
        cls="CLIPTextModelWithProjection",
        config=lambda: CLIP,
        read=lambda x: x[0],
        given="tokens",
    ),
    "clip, of pictures": Case(
        pipeline="ChronoEditPipeline",
        part="image_encoder",
        cls="CLIPVisionModel",
        config=lambda: CLIPVisionConfig(**VISION, **PICTURE),
        read=lambda x: x.hidden_states[-2],
        unread=1,
        given="picture",
    ),
    "gemma": Case(
        pipeline="LuminaPipeline",
        cls="GemmaModel",
        config=lambda: GemmaConfig(**decoder(4, 1)),
        read=lambda x: x.hidden_states[-2],
        unread=1,
    ),
    "gemma 2": Case(
        pipeline="Lumina2Pipeline",
        cls="Gemma2Model",
        config=lambda: Gemma2Config(**decoder(4, 2, **SLIDING, query_pre_attn_scalar=12)),
        read=lambda x: x.hidden_states[-2],
        unread=1,
    ),
    "gemma 2, its last state": Case(
        pipeline="SanaPipeline",
        cls="Gemma2Model",
        config=lambda: Gemma2Config(**decoder(4, 2, attn_logit_softcapping=2.0)),
        read=lambda x: x[0],
    ),
    "gemma 3": Case(pipeline="LTX2Pipeline", cls="Gemma3ForConditionalGeneration", config=gemma3, read=all_states),
    "llama": Case(
        pipeline="HunyuanVideoPipeline",
        cls="LlamaModel",
        config=lambda: LlamaConfig(**decoder(6, 2, num_hidden_layers=4)),
        read=lambda x: x.hidden_states[-3],
        unread=2,
    ),
    "llama, with logits": Case(
        pipeline="HiDreamImagePipeline",
        part="text_encoder_4",
        cls="LlamaForCausalLM",
        config=lambda: LlamaConfig(**decoder(5, 5)),
        read=lambda x: torch.cat(x.hidden_states[1:], -1),
    ),
    "mistral": Case(
        pipeline="ErnieImagePipeline",
        cls="Mistral3ForConditionalGeneration",
        config=lambda: reader("mistral", 4, 2),
        read=lambda x: x.hidden_states[-2],
        unread=1,
    ),
    "ministral": Case(
        pipeline="ErnieImagePipeline",
        cls="Mistral3Model",
        config=lambda: reader("ministral3", 8, 2),
        read=lambda x: x.hidden_states[-2],
        unread=1,
    ),
    "glm": Case(
        pipeline="CogView4Pipeline",
        cls="GlmModel",
        config=lambda: GlmConfig(**decoder(4, 2)),
        read=lambda x: x.hidden_states[-2],
        unread=1,
        given="tokens",
    ),
    "smollm": Case(
        pipeline="BriaFiboPipeline",
        cls="SmolLM3ForCausalLM",
        config=lambda: SmolLM3Config(**decoder(4, 2)),
        read=all_states,
    ),
    "qwen 2 vl": Case(
        pipeline="EasyAnimatePipeline",
        cls="Qwen2VLForConditionalGeneration",
        config=qwen2_vl,
        read=lambda x: x.hidden_states[-2],
        unread=1,
    ),
    "qwen 2.5 vl": Case(
        pipeline="HunyuanImageRefinerPipeline",
        cls="Qwen2_5_VLForConditionalGeneration",
        config=qwen2_5_vl,
        read=lambda x: x.hidden_states[-3],
        unread=2,
    ),
    "qwen 2.5 vl, with pictures": Case(
        pipeline="Kandinsky5I2IPipeline",
        cls="Qwen2_5_VLForConditionalGeneration",
        config=qwen2_5_vl,
        read=lambda x: x.hidden_states[-1],
    ),
    "qwen 2.5 vl, its text model": Case(
        pipeline="HunyuanVideo15Pipeline",
        cls="Qwen2_5_VLTextModel",
        config=lambda: qwen2_5_vl().text_config,
        read=lambda x: x.hidden_states[-3],
        unread=2,
    ),
    "qwen 3": Case(
        pipeline="ZImageOmniPipeline",
        cls="Qwen3Model",
        config=lambda: Qwen3Config(**decoder(4, 2)),
        read=lambda x: x.hidden_states[-2],
        unread=1,
    ),
    "qwen 3 vl": Case(
        pipeline="Krea2Pipeline", cls="Qwen3VLModel", config=qwen3_vl, read=all_states, given="positions"
    ),
    "qwen 3 vl, with pictures": Case(
        pipeline="QwenImage21Pipeline",
        cls="Qwen3VLForConditionalGeneration",
        config=qwen3_vl,
        read=lambda x: x.hidden_states[-1],
        given="image and text",
    ),
    "bert": Case(
        pipeline="HunyuanDiTPipeline",
        cls="BertModel",
        config=lambda: BertConfig(**VISION, **WORDS, max_position_embeddings=32),
        read=lambda x: x[0],
    ),
}


FUSED = ("glm", "qwen 3 vl, with pictures")
"""Those with projections of several parts."""


def image_and_text() -> dict[str, Any]:
    """Two by two tokens of a picture among those of a text."""
    tokens = torch.tensor([[150, 151, *[152] * 4, 153, 7, 9]])
    pixels = torch.rand(16, 3 * 2 * 16 * 16, generator=torch.Generator().manual_seed(0))
    kinds = (tokens == 152).int()
    picture = {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]]), "mm_token_type_ids": kinds}
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), **picture}


def given(case: Case) -> dict[str, Any]:
    if case.given == "picture":
        return {"pixel_values": torch.rand(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))}
    if case.given == "image and text":
        return image_and_text()
    mask = {} if case.given == "tokens" else {"attention_mask": MASK}
    positions = (MASK.cumsum(-1) - 1).clamp(min=0).expand(3, -1, -1)
    return {"input_ids": TOKENS, **mask, **({"position_ids": positions} if case.given == "positions" else {})}


def save(case: Case, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """With numbers large enough that every one of them matters, those of norms too."""
    torch.manual_seed(0)
    model = getattr(transformers, case.cls)(case.config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.to(dtype).save_pretrained(folder)


def components(root: Path) -> dict[str, Component]:
    found = {}
    for name, case in CASES.items():
        config = json.loads((root / name / "config.json").read_text())
        pipeline = find_class(case.pipeline, "pipelines")
        cut = pipeline and cut_encoder(case.part, case.cls, pipeline, config)
        assert cut, name
        found[name] = cut
    return found


def load(
    root: Path, name: str, component: Component, mesh: Mesh, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, int]:
    """This rank's part, and how many numbers it holds without a picture's first layer, which is whole."""
    axis = _axis(component, mesh)
    assert axis is not None
    family = type("Encoders", (AnyDiffusers,), {"components": {name: component}})
    checkpoint = Checkpoint(root, family, None)  # type: ignore[arg-type]  # nobody asks what it can do
    module = _component(checkpoint, name, axis, torch.device("cpu"), dtype)
    return module, sum(x.numel() for key, x in module.named_parameters() if "patch_" not in key)


def run(module: nn.Module, case: Case) -> torch.Tensor:
    with torch.inference_mode():
        return case.read(module(**given(case), output_hidden_states=True)).clone()


Read = dict[str, tuple[torch.Tensor, int]]
"""What is read of each encoder, and how many numbers a rank holds of it."""


def read(rank: int, size: int, root: Path, cut: dict[str, Component]) -> Read:
    mesh, made = Mesh(ParallelConfig.model_validate({"usp": size}), rank), {}
    for name, component in cut.items():
        module, numbers = load(root, name, component, mesh)
        made[name] = run(module, CASES[name]), numbers
    return made


def read_with_faults(rank: int, size: int, root: Path, cut: dict[str, Component]) -> list[Read]:
    """Without one, with sums that are partial, and, of those that have any, with parts that are cut as one."""
    whole = read(rank, size, root, cut)
    with partial_sums_are_not_reduced():
        partial = read(rank, size, root, cut)
    with parts_are_cut_as_one():
        return [whole, partial, read(rank, size, root, {name: cut[name] for name in FUSED})]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoders")
    for name, case in CASES.items():
        save(case, folder / name)
    return folder


@pytest.fixture(scope="module")
def cut(root: Path) -> dict[str, Component]:
    return components(root)


@pytest.fixture(scope="module")
def alone(root: Path, cut: dict[str, Component]) -> Read:
    return read(0, 1, root, cut)


@pytest.mark.parametrize("name", CASES)
def test_one_process_reads_what_the_stock_class_gives(
    name: str, root: Path, cut: dict[str, Component], alone: Read
) -> None:
    case = CASES[name]
    assert (cut[name].unread_layers if cut[name].unread else 0) == case.unread
    assert torch.equal(alone[name][0], run(stock(case, root / name), case))


def stock(case: Case, folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    module: nn.Module = getattr(transformers, case.cls).from_pretrained(folder, dtype=dtype)
    for parameter in module.parameters():  # those mapped from a file may lie unaligned, which rounds otherwise
        parameter.data = parameter.data.clone()
    return module.eval()


def test_the_model_inside_is_found_by_its_name_too(root: Path, cut: dict[str, Component]) -> None:
    """As QwenImage21Pipeline does it, to read the last state before its norm."""
    name = "qwen 3 vl, with pictures"
    module, _ = load(root, name, cut[name], Mesh(ParallelConfig(), 0))
    whole: Any = stock(CASES[name], root / name)
    assert len(list(module.parameters())) == len(list(whole.model.parameters()))
    states = []
    for encoder in (module, whole):
        encoder.model.language_model.norm.register_forward_hook(lambda _module, args, _output: args[0])
        states.append(run(encoder, CASES[name]))
    assert torch.equal(*states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_are_as_exact_as_what_is_asked_for(
    dtype: torch.dtype, cut: dict[str, Component], tmp_path: Path
) -> None:
    """Gemma's of its embeddings, whatever dtype config.json names."""
    case = CASES["gemma 2"]
    save(case, tmp_path / "gemma 2", torch.bfloat16)
    module, _ = load(tmp_path, "gemma 2", cut["gemma 2"], Mesh(ParallelConfig(), 0), dtype)
    assert torch.equal(run(module, case), run(stock(case, tmp_path / "gemma 2", dtype), case))


def check(made: Read, alone: Read, size: int) -> None:
    """Each rank holds little more than its part: norms, heads of zeros, and key/value heads that ranks share."""
    for name, (got, held) in made.items():
        wanted, numbers = alone[name]
        assert difference(got, wanted) <= TOLERANCE, name
        assert held <= (1 / size + 0.25) * numbers, name


def difference(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).abs().max())


def test_two_ranks_read_what_one_process_reads(root: Path, cut: dict[str, Component], alone: Read) -> None:
    """And faults are seen."""
    for whole, partial, as_one in run_ranks(read_with_faults, 2, root, cut):
        check(whole, alone, 2)
        for name, (got, _) in (*partial.items(), *as_one.items()):
            assert difference(got, alone[name][0]) > 10 * TOLERANCE, name


@pytest.mark.parametrize("size", [3, 4])
def test_more_ranks_read_what_one_process_reads(size: int, root: Path, cut: dict[str, Component], alone: Read) -> None:
    """Half of the encoders each, for time: among these are all ways to share heads."""
    some = {name: cut[name] for name in list(CASES)[size % 2 :: 2]}
    for made in run_ranks(read, size, root, some):
        check(made, alone, size)
