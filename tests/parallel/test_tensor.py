"""Layers cut over ranks against the same layers whole, for numbers that the ranks do not divide."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from safetensors.torch import save_file
from torch import Tensor, nn

from darkroom.configs import ConfigError, ParallelConfig
from darkroom.parallel import loading
from darkroom.parallel.loading import load, read_headers
from darkroom.parallel.mesh import Axis, Mesh
from darkroom.parallel.plan import (
    Colwise,
    EmbeddingColumns,
    HeadBias,
    Heads,
    KeyValueGroups,
    LocalHeads,
    LocalWidth,
    NormAcross,
    Part,
    Plan,
    Rowwise,
    cut_parameter,
)
from darkroom.parallel.tensor import _norm_across, shard
from tests.faults import norms_are_of_a_rank_alone
from tests.ranks import run_ranks

TOLERANCE = 1e-5
HEAD_DIM = 4

# ---- small modules ---------------------------------------------------------------------------------------------------


class MLP(nn.Module):
    """7 features wide inside, and both layers with a bias."""

    config: dict[str, Any] = {}  # noqa: RUF012 - of a test
    plan = Plan(tensor={"up": Colwise(), "down": Rowwise()})

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 7), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.silu(self.up(x)))
        return y


class Modulation(nn.Module):
    """Cut, and put together again behind the layer: 10 features."""

    config: dict[str, Any] = {}  # noqa: RUF012 - of a test
    plan = Plan(tensor={"mod": Colwise(gather=True)})

    def __init__(self) -> None:
        super().__init__()
        self.mod = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        shift, scale = self.mod(F.silu(x)).chunk(2, -1)
        return shift * scale


class Fused(nn.Module):
    """5 heads beside a gated MLP of 14, fused as in a parallel block: one layer in, one out, each in two parts."""

    config: dict[str, Any] = {"heads": 5}  # noqa: RUF012 - of a test
    heads = Heads("heads")
    plan = Plan(
        tensor={
            "": LocalWidth("mlp_width"),
            "attention": LocalHeads(heads, "heads"),
            "attention.to_v": Colwise(heads),
            "proj_mlp": Colwise(parts=(Part(), Part())),
            "proj_out": Rowwise(parts=(Part(width=10, heads=heads), Part(width=7))),
        }
    )

    class Values(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = 5
            self.to_v = nn.Linear(6, 5 * HEAD_DIM)

        def forward(self, x: Tensor) -> Tensor:
            return F.softmax(self.to_v(x).unflatten(-1, (self.heads, -1)), -1).flatten(2)

    def __init__(self) -> None:
        super().__init__()
        self.mlp_width = 14
        self.attention = self.Values()
        self.proj_mlp, self.proj_out = nn.Linear(6, 2 * 14), nn.Linear(5 * HEAD_DIM + 14, 6)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj_mlp(x).split([self.mlp_width, self.mlp_width], -1)
        y: Tensor = self.proj_out(torch.cat([self.attention(x), value * F.silu(gate)], -1))
        return y


class Embedding(nn.Module):
    """A table of 5 features."""

    config: dict[str, Any] = {}  # noqa: RUF012 - of a test
    plan = Plan(tensor={"tokens": EmbeddingColumns()})

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.tokens((x[..., 0].abs() * 3).long())
        return y


class Biased(nn.Module):
    """5 heads with a norm across all of them, and a bias for each by distance: what has no heads of its own."""

    config: dict[str, Any] = {"heads": 5}  # noqa: RUF012 - of a test
    heads = Heads("heads")
    plan = Plan(
        tensor={
            "": LocalHeads(heads, "heads"),
            "to_v": Colwise(heads),
            "norm": NormAcross(heads),
            "bias": HeadBias(heads),
            "to_out": Rowwise(heads),
        }
    )

    def __init__(self, eps: float | None = 0.1) -> None:
        super().__init__()
        self.heads = 5
        self.to_v, self.to_out = nn.Linear(6, 5 * HEAD_DIM), nn.Linear(5 * HEAD_DIM, 6)
        self.norm = nn.RMSNorm(5 * HEAD_DIM, eps=eps)
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)
        self.bias = nn.Embedding(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])
        bias = self.bias((places[:, None] - places).abs()).permute(2, 0, 1)  # [heads, queries, keys]
        values = self.norm(self.to_v(x)).view(*x.shape[:2], self.heads, -1).transpose(1, 2)
        y: Tensor = self.to_out((bias.softmax(-1) @ values).transpose(1, 2).flatten(2))
        return y


class Attention(nn.Module):
    """Grouped-query attention, written as the borrowed classes write it: heads are counted from what came out."""

    heads = Heads("heads", "kv_heads")
    plan = Plan(
        tensor={
            "blocks.*.to_q": Colwise(heads),
            "blocks.*.to_k": Colwise(heads, is_kv=True),
            "blocks.*.to_v": Colwise(heads, is_kv=True),
            "blocks.*.to_out.0": Rowwise(heads),
            "blocks.*": KeyValueGroups(heads, "num_key_value_groups"),
        }
    )

    class Block(nn.Module):
        def __init__(self, heads: int, kv_heads: int) -> None:
            super().__init__()
            self.num_key_value_groups = heads // kv_heads
            self.to_q = nn.Linear(6, heads * HEAD_DIM)
            self.to_k, self.to_v = nn.Linear(6, kv_heads * HEAD_DIM), nn.Linear(6, kv_heads * HEAD_DIM)
            self.to_out = nn.ModuleList([nn.Linear(heads * HEAD_DIM, 6)])

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (layer(x).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for layer in self.qkv)
            k, v = (y.repeat_interleave(self.num_key_value_groups, 1) for y in (k, v))
            out = F.scaled_dot_product_attention(q, k, v)
            return x + self.to_out[0](out.transpose(1, 2).flatten(2))

        @property
        def qkv(self) -> tuple[nn.Module, ...]:
            return self.to_q, self.to_k, self.to_v

    def __init__(self, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.config = {"heads": heads, "kv_heads": kv_heads}
        self.blocks = nn.ModuleList([self.Block(heads, kv_heads) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


MODULES: dict[str, Callable[[], Any]] = {
    "mlp": MLP,
    "modulation": Modulation,
    "embedding": Embedding,
    "fused": Fused,
    "biased": Biased,
    "biased, no eps": lambda: Biased(None),
    "5 heads": lambda: Attention(5, 5),
    "1 head": lambda: Attention(1, 1),
    "8 heads in 4 groups": lambda: Attention(8, 4),
    "6 heads in 2 groups": lambda: Attention(6, 2),
    "7 heads in 1 group": lambda: Attention(7, 1),
    "9 heads in 3 groups": lambda: Attention(9, 3),
}


def made(name: str) -> Any:
    torch.manual_seed(len(name))
    return MODULES[name]().requires_grad_(False)


def inputs() -> Tensor:
    return torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1))


def saved(folder: Path, name: str) -> Path:
    file = folder / f"{name}.safetensors"
    save_file(made(name).state_dict(), file)
    return file


def sharded(file: Path, name: str, axis: Axis) -> Any:
    """Cut on the meta device, then read, as the product does it."""
    with init_empty_weights():
        module = MODULES[name]()
    shard(module, module.plan, module.config, axis)
    tensors = read_headers([file], lambda key: key)
    load(module, tensors, module.plan, module.config, axis, torch.device("cpu"), torch.float32)
    return module


# ---- faults ----------------------------------------------------------------------------------------------------------


@contextmanager
def every_rank_adds_the_bias() -> Iterator[None]:
    def cut(style: Any, name: str, *rest: Any) -> Any:
        return None if isinstance(style, Rowwise) and name == "bias" else cut_parameter(style, name, *rest)

    with patch.object(loading, "cut_parameter", cut):
        yield


@contextmanager
def sums_are_not_taken() -> Iterator[None]:
    with patch.object(Axis, "all_reduce", lambda _axis, x: x):
        yield


# ---- equal to whole --------------------------------------------------------------------------------------------------


def run_modules(rank: int, size: int, folder: Path) -> dict[str, float]:
    axis = Mesh(ParallelConfig.model_validate({"tp": size}), rank).tp

    def difference(name: str) -> float:
        out = sharded(folder / f"{name}.safetensors", name, axis)(inputs())
        return float((out - made(name)(inputs())).abs().max())

    worst = {name: difference(name) for name in MODULES}
    with every_rank_adds_the_bias():
        worst["fault: the bias on every rank"] = difference("mlp")
    with sums_are_not_taken():
        worst["fault: no sum"] = difference("5 heads")
        worst["fault: no sum of parts"] = difference("fused")
    with norms_are_of_a_rank_alone():
        worst["fault: a norm alone"] = difference("biased")
    return worst


@pytest.mark.parametrize("size", [2, 3, 4])
def test_cut_layers_are_the_whole_ones(size: int, tmp_path: Path) -> None:
    for name in MODULES:
        saved(tmp_path, name)
    for worst in run_ranks(run_modules, size, tmp_path):
        assert len(worst) == len(MODULES) + 4
        wrong = {name for name, value in worst.items() if not value <= TOLERANCE}
        assert wrong == {name for name in worst if name.startswith("fault")}


def test_every_rank_holds_its_share_in_shapes_that_are_equal(tmp_path: Path) -> None:
    shapes = []
    for rank in range(3):
        module = sharded(saved(tmp_path, "5 heads"), "5 heads", Axis("tp", 3, rank))
        shapes.append([tuple(parameter.shape) for parameter in module.parameters()])
        assert module.blocks[1].to_q.weight.shape == (2 * HEAD_DIM, 6)
    assert shapes[0] == shapes[1] == shapes[2]


def test_a_bias_is_on_the_first_rank_alone(tmp_path: Path) -> None:
    biases = [sharded(saved(tmp_path, "mlp"), "mlp", Axis("tp", 2, rank)).down.bias for rank in range(2)]
    assert torch.equal(biases[0], made("mlp").down.bias)
    assert not biases[1].any()


def test_the_groups_follow_the_layout(tmp_path: Path) -> None:
    groups = {}
    for name, size in [("8 heads in 4 groups", 2), ("6 heads in 2 groups", 4), ("9 heads in 3 groups", 2)]:
        module = sharded(saved(tmp_path, name), name, Axis("tp", size, 0))
        groups[name] = module.blocks[0].num_key_value_groups
    assert groups == {"8 heads in 4 groups": 2, "6 heads in 2 groups": 2, "9 heads in 3 groups": 1}


def test_attributes_follow_what_is_held(tmp_path: Path) -> None:
    held = []
    for size in (2, 3, 4):
        module = sharded(saved(tmp_path, "fused"), "fused", Axis("tp", size, size - 1))
        held.append((module.attention.heads, module.mlp_width))
        assert module.attention.to_v.weight.shape == (module.attention.heads * HEAD_DIM, 6)
        assert module.proj_mlp.weight.shape == (2 * module.mlp_width, 6)
        assert module.proj_out.weight.shape == (6, module.attention.heads * HEAD_DIM + module.mlp_width)
    assert held == [(3, 7), (2, 5), (2, 4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("eps", [None, 0.1])
def test_a_norm_rounds_as_torch_does(dtype: torch.dtype, eps: float | None) -> None:
    norm = made("biased").norm.to(dtype)
    norm.eps = eps
    x = (inputs().repeat(1, 1, 4)[..., :20] / 10).to(dtype)
    assert torch.allclose(_norm_across(norm, 20, Axis("tp"), x), norm(x), rtol=1e-6 if dtype == torch.float32 else 0)


def test_one_rank_is_left_as_it_is() -> None:
    module = made("mlp")
    shard(module, Plan(), {}, Axis("tp"))
    assert module.up.weight.shape == (7, 6) and not module.down._forward_hooks
    fused = made("fused")
    shard(fused, fused.plan, fused.config, Axis("tp"))
    assert fused.mlp_width == 14 and fused.attention.heads == 5


# ---- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({}, "MLP has no tensor-parallel plan, but tp=2 was asked for"),
        ({"up": Colwise(), "blocks.*.up": Colwise()}, r"the plan names 'blocks\.\*\.up', but MLP has no such module"),
        ({"": Colwise()}, "the plan names '', but MLP has no 'weight'"),
        ({"up": KeyValueGroups(Heads("heads"), "groups")}, "the plan names 'up', but Linear has no 'groups'"),
        ({"": LocalWidth("mlp_width")}, "the plan names '', but MLP has no 'mlp_width'"),
        ({"up": Colwise(), "*": Rowwise()}, r"the plan cuts 'up' twice, as 'up' and as '\*'"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(plan: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shard(MLP(), Plan(tensor=plan), {}, Axis("tp", 2, 0))


def test_what_is_optional_may_be_lacking() -> None:
    """But not what is in it, where it is there."""
    plan = {"up": Colwise(), "down": Rowwise(), "second.up": Colwise()}
    module = MLP()
    shard(module, Plan(tensor=plan, optional=("second",)), {}, Axis("tp", 2, 0))
    assert module.up.weight.shape == (4, 6)
    module.second = nn.Sequential()
    with pytest.raises(ValueError, match=r"the plan names 'second\.up', but MLP has no such module"):
        shard(module, Plan(tensor=plan, optional=("second",)), {}, Axis("tp", 2, 0))


def test_heads_that_do_not_fit_the_layer_are_refused() -> None:
    with pytest.raises(ConfigError, match="a layer of 7 features cannot be cut into 5 heads"):
        shard(MLP(), Plan(tensor={"up": Colwise(Heads("heads"))}), {"heads": 5}, Axis("tp", 2, 0))
