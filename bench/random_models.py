"""Models at their real shapes with random weights, made on the device, and the matrix products that they consist of.

Modules are built without memory (as `models/build.py` does) and filled where they will run: 41 GB never pass through
the host. Weights are normal with variance 1 / fan-in, so activations stay finite and of the usual size: on zeros, or on
NaN, a GPU draws less power and is faster than on real pictures.
"""

# S image tokens, T text tokens, d width

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    ZImageTransformer2DModel,
)
from torch import nn
from transformers import AutoTokenizer
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

from darkroom.models.checkpoint import DEMO

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Gemm:
    """`count` products of [rows, inner] by [inner, columns] in one forward pass."""

    count: int
    rows: int
    inner: int
    columns: int

    @property
    def flops(self) -> int:
        return 2 * self.count * self.rows * self.inner * self.columns


@dataclass(frozen=True)
class Attention:
    """`count` attentions of `tokens` over themselves in one forward pass."""

    count: int
    tokens: int
    heads: int
    head_dim: int

    @property
    def flops(self) -> int:
        return 4 * self.count * self.tokens**2 * self.heads * self.head_dim


Work = Gemm | Attention


@dataclass(frozen=True, kw_only=True)
class QwenShape:
    """Qwen-Image as released: 20.4 billion numbers, a text encoder of 7.1, a VAE of 0.1."""

    layers: int = 60
    heads: int = 24
    head_dim: int = 128
    rope: tuple[int, ...] = (16, 56, 56)
    text_width: int = 3584
    text_mlp: int = 18944
    text_layers: int = 28
    text_heads: int = 28
    text_kv_heads: int = 4
    text_rope: tuple[int, ...] = (16, 24, 24)
    vocabulary: int = 152_064
    vae_width: int = 96

    def work(self, S: int, T: int) -> Iterator[Work]:
        """One forward pass of the transformer."""
        d = self.heads * self.head_dim
        for tokens in (S, T):
            yield Gemm(4 * self.layers, tokens, d, d)
            yield Gemm(self.layers, tokens, d, 4 * d)
            yield Gemm(self.layers, tokens, 4 * d, d)
        yield Gemm(2 * self.layers, 1, d, 6 * d)  # modulation
        yield Gemm(1, S, 64, d)
        yield Gemm(1, T, self.text_width, d)
        yield Gemm(1, S, d, 64)
        yield Attention(self.layers, S + T, self.heads, self.head_dim)


@dataclass(frozen=True, kw_only=True)
class ZShape:
    """Z-Image's transformer as released: 6.2 billion numbers; 2 + 2 refiners and 30 blocks."""

    layers: int = 30
    refiners: int = 2
    heads: int = 30
    rope: tuple[int, ...] = (32, 48, 48)
    text_width: int = 2560

    def work(self, S: int, T: int) -> Iterator[Work]:
        """One forward pass of the transformer. Both streams are padded to multiples of 32."""
        S, T = S + -S % 32, T + -T % 32
        head_dim = sum(self.rope)
        d = self.heads * head_dim
        for layers, tokens in ((self.refiners, S), (self.refiners, T), (self.layers, S + T)):
            yield Gemm(4 * layers, tokens, d, d)
            yield Gemm(2 * layers, tokens, d, d // 3 * 8)
            yield Gemm(layers, tokens, d // 3 * 8, d)
            yield Attention(layers, tokens, self.heads, head_dim)
        yield Gemm(self.refiners + self.layers, 1, min(d, 256), 4 * d)  # modulation
        yield Gemm(1, S, 64, d)
        yield Gemm(1, T, self.text_width, d)
        yield Gemm(1, S + T, d, 64)


SMOKE_QWEN = QwenShape(
    layers=2,
    heads=4,
    head_dim=16,
    rope=(4, 6, 6),
    text_width=64,
    text_mlp=96,
    text_layers=2,
    text_heads=4,
    text_kv_heads=2,
    text_rope=(2, 3, 3),
    vocabulary=757,
    vae_width=8,
)
SMOKE_Z = ZShape(layers=2, refiners=1, heads=3, rope=(4, 10, 10), text_width=32)
"""Small enough for seconds on a CPU. The vocabulary is that of the demo's tokenizer."""


def qwen_image(shape: QwenShape, device: torch.device, dtype: torch.dtype) -> QwenImagePipeline:
    """The stock pipeline. Its tokenizer is the demo's, whose template has the real 34 tokens."""
    transformer = _random(
        lambda: QwenImageTransformer2DModel(
            num_layers=shape.layers,
            num_attention_heads=shape.heads,
            attention_head_dim=shape.head_dim,
            axes_dims_rope=shape.rope,
            joint_attention_dim=shape.text_width,
        ),
        device,
        dtype,
    )
    vae = _random(lambda: AutoencoderKLQwenImage(base_dim=shape.vae_width), device, dtype)
    text_encoder = _random(lambda: Qwen2_5_VLTextModel._from_config(_text_config(shape)), device, dtype)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(
        DEMO / "scheduler", base_image_seq_len=256, max_image_seq_len=8192, base_shift=0.5, max_shift=0.9
    )
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "tokenizer")
    pipe = QwenImagePipeline(scheduler, vae, text_encoder, tokenizer, transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _text_config(shape: QwenShape) -> Qwen2_5_VLTextConfig:
    demo: dict[str, Any] = json.loads((DEMO / "text_encoder" / "config.json").read_text())["text_config"]
    rope = {**demo["rope_parameters"], "rope_theta": 1e6, "mrope_section": list(shape.text_rope)}
    own = {
        "hidden_size": shape.text_width,
        "intermediate_size": shape.text_mlp,
        "num_hidden_layers": shape.text_layers,
        "layer_types": ["full_attention"] * shape.text_layers,
        "num_attention_heads": shape.text_heads,
        "num_key_value_heads": shape.text_kv_heads,
        "vocab_size": shape.vocabulary,
        "rope_parameters": rope,
    }
    return Qwen2_5_VLTextConfig(**{**demo, **own})


def z_image_transformer(shape: ZShape, device: torch.device, dtype: torch.dtype) -> ZImageTransformer2DModel:
    return _random(
        lambda: ZImageTransformer2DModel(
            dim=shape.heads * sum(shape.rope),
            n_layers=shape.layers,
            n_refiner_layers=shape.refiners,
            n_heads=shape.heads,
            n_kv_heads=shape.heads,
            cap_feat_dim=shape.text_width,
            axes_dims=list(shape.rope),
        ),
        device,
        dtype,
    )


def _random(build: Callable[[], M], device: torch.device, dtype: torch.dtype) -> M:
    """The module with its parameters drawn on the device; buffers, which are computed, keep their values."""
    with init_empty_weights(include_buffers=False):
        module = build()
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                value = _draw(name, parameter.shape, device, dtype)
                owner._parameters[name] = nn.Parameter(value, requires_grad=False)
    filled: M = module.eval().to(device)
    return filled


def _draw(name: str, shape: torch.Size, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    value = torch.empty(shape, device=device, dtype=dtype)
    if name == "bias":
        return value.zero_()
    if name == "gamma" or len(shape) == 1:  # norms
        return value.fill_(1.0)
    return value.normal_(0.0, math.sqrt(shape[0] / math.prod(shape)))


def size_of(module: nn.Module) -> int:
    """Bytes of its parameters."""
    return sum(parameter.nbytes for parameter in module.parameters())
