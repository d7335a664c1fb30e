"""Which part of which tensor a rank keeps: pure arithmetic, checked by putting all ranks' parts together again."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from darkroom.configs import ConfigError
from darkroom.parallel.plan import (
    Colwise,
    Cut,
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
    TensorStyle,
    chunk_sizes,
    cut_parameter,
    head_layout,
    lookup,
    matches,
    may_lack,
    style_of,
)

GROUPED = Heads("attention.heads", "attention.kv_heads")
PLAIN = Heads("attention.heads")


def config(heads: int, kv_heads: int | None = None) -> dict[str, Any]:
    return {"attention": {"heads": heads, "kv_heads": kv_heads or heads}}


def take(x: Tensor, cut: Cut | None) -> Tensor:
    """The part that a cut describes, unit by unit."""
    if cut is None:
        return x
    units = x.unflatten(cut.dim, (cut.count, -1)).unbind(cut.dim)
    return torch.cat([torch.zeros_like(units[0]) if unit is None else units[unit] for unit in cut.units], cut.dim)


def take_runs(x: Tensor, cut: Cut) -> Tensor:
    """The same by ranges, as a file is read."""
    parts = []
    for run in cut.runs(x.shape[cut.dim]):
        if isinstance(run, int):
            shape = list(x.shape)
            shape[cut.dim] = run
            parts.append(torch.zeros(shape))
        else:
            parts.append(x.narrow(cut.dim, run[0], run[1] - run[0]))
    return torch.cat(parts, cut.dim)


# ---- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "path", "matching"),
    [
        ("", "", True),
        ("", "proj", False),
        ("blocks.0", "blocks.0", True),
        ("blocks.0", "blocks.01", False),
        ("blocks.0", "blocks.0.attn", False),
        ("blocks.*", "blocks.17", True),
        ("blocks.*", "blocks", False),
        ("blocks.*", "blocks.1.attn", False),
        ("blocks.*.attn", "blocks.1.attn", True),
        ("*.to_q", "a.b.to_q", False),
        ("patch.2-1", "patch.2-1", True),  # keys of a ModuleDict
        ("to_q+", "to_qq", False),  # not a regular expression
        ("a.b", "axb", False),
    ],
)
def test_a_pattern_names_whole_paths(pattern: str, path: str, matching: bool) -> None:
    assert matches(pattern, path) is matching


def test_the_first_style_that_matches_counts_and_groups_are_none() -> None:
    attributes = {"a": KeyValueGroups(GROUPED, "groups"), "b": LocalHeads(PLAIN, "heads"), "b.c": LocalWidth("width")}
    plan = Plan(tensor={**attributes, "*": Colwise(), "b*": Rowwise(), "*.c": Rowwise()})
    assert style_of(plan, "a") == Colwise()
    assert style_of(plan, "b") == Colwise()
    assert style_of(plan, "b.c") == Rowwise()
    assert style_of(plan, "b.c.d") is None


@pytest.mark.parametrize(
    ("pattern", "lacking"),
    [
        ("blocks.*.second", True),
        ("blocks.*.second.to_q", True),
        ("blocks.*.second.to_out.0", True),
        ("blocks.*.secondary", False),  # another name
        ("blocks.*.first", False),
        ("blocks.*", False),  # around it
        ("head.to_q", False),  # of a module that is optional, and there
    ],
)
def test_only_what_is_optional_may_be_lacking(pattern: str, lacking: bool) -> None:
    plan = Plan(optional=("blocks.*.second", "head"))
    assert may_lack(plan, pattern, ["blocks.0", "blocks.0.first", "head"]) is lacking
    assert not may_lack(plan, pattern, ["blocks.0", "blocks.0.first", "blocks.1.second", "head"])
    assert not may_lack(Plan(), pattern, [])


def test_a_key_with_dots_descends() -> None:
    assert lookup({"a": {"b": {"c": 3}}}, "a.b.c") == 3


# ---- cuts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("units", "runs"),
    [
        ((0, 1, 2), [(0, 6)]),
        ((2, 3), [(4, 8)]),
        ((0, 2, 3), [(0, 2), (4, 8)]),
        ((1, None), [(2, 4), 2]),
        ((None, None), [2, 2]),
        ((None, 3, None), [2, (6, 8), 2]),
        ((1, 1, 2), [(2, 4), (2, 6)]),  # a head that is repeated
        ((3, 0), [(6, 8), (0, 2)]),
    ],
)
def test_runs_join_neighbours_and_leave_gaps(units: tuple[int | None, ...], runs: list[Any]) -> None:
    cut = Cut(0, units, 4)
    assert list(cut.runs(8)) == runs
    assert cut.shape((8, 3)) == (2 * len(units), 3)
    assert cut.stored((8, 3)) == 3 * sum(stop - start for start, stop in (r for r in runs if isinstance(r, tuple)))


@pytest.mark.parametrize("dim", [0, 1])
def test_ranges_and_units_say_the_same(dim: int) -> None:
    x = torch.randn(12, 12)
    for units in [(0, 1), (2, None, 3), (None,), (1, 1, 0, 3, 2, None, None)]:
        cut = Cut(dim, units, 4)
        assert torch.equal(take_runs(x, cut), take(x, cut))
        assert take(x, cut).shape == cut.shape(x.shape)
    assert not torch.equal(take_runs(x, Cut(dim, (1, 2), 4)), take(x, Cut(dim, (2, 1), 4)))  # a fault is seen


@pytest.mark.parametrize("parts", range(1, 9))
def test_chunks_are_even_to_one_and_the_first_are_longer(parts: int) -> None:
    for length in range(20):
        sizes = chunk_sizes(length, parts)
        assert len(sizes) == parts and sum(sizes) == length
        assert sizes == sorted(sizes, reverse=True) and max(sizes) - min(sizes) <= 1


# ---- styles ----------------------------------------------------------------------------------------------------------


def cuts(style: TensorStyle, name: str, shape: tuple[int, ...], size: int, of: dict[str, Any]) -> list[Cut | None]:
    return [cut_parameter(style, name, shape, of, size, rank) for rank in range(size)]


@pytest.mark.parametrize("size", [2, 3, 4, 7])
@pytest.mark.parametrize("heads", [None, PLAIN])
def test_parts_of_columns_are_the_whole_and_then_zeros(size: int, heads: Heads | None) -> None:
    weight, bias, numbers = torch.randn(10, 3), torch.randn(10), config(5)
    for name, x in (("weight", weight), ("bias", bias)):
        parts = [take(x, cut) for cut in cuts(Colwise(heads), name, tuple(x.shape), size, numbers)]
        assert len({part.shape for part in parts}) == 1
        joined = torch.cat(parts)
        assert torch.equal(joined[:10], x) and not joined[10:].any()
        assert not torch.equal(torch.cat(parts[::-1])[:10], x)  # a fault is seen


@pytest.mark.parametrize("size", [2, 3, 4, 7])
@pytest.mark.parametrize("heads", [None, PLAIN])
def test_parts_of_rows_meet_those_of_columns(size: int, heads: Heads | None) -> None:
    """What one layer puts out on a rank, the next one takes in: the products add up to the whole product."""
    first, second, numbers = torch.randn(10, 3), torch.randn(4, 10), config(5)
    columns = [take(first, cut) for cut in cuts(Colwise(heads), "weight", (10, 3), size, numbers)]
    rows = [take(second, cut) for cut in cuts(Rowwise(heads), "weight", (4, 10), size, numbers)]
    assert torch.allclose(sum(b @ a for a, b in zip(columns, rows, strict=True)), second @ first, atol=1e-5)
    assert not torch.allclose(sum(b @ a for a, b in zip(columns[::-1], rows, strict=True)), second @ first, atol=1e-5)


GATED = (Part(), Part())
FUSED = (Part(heads=PLAIN), Part(width=2))
"""Attention's 10 features, of 5 heads, and an MLP's 20."""


@pytest.mark.parametrize("size", [2, 3, 4, 7])
@pytest.mark.parametrize("parts", [GATED, FUSED, (Part(width=3), Part(heads=PLAIN), Part(width=2))])
def test_fused_columns_are_each_part_cut_alone(size: int, parts: tuple[Part, ...]) -> None:
    widths, numbers = [10 * part.width for part in parts], config(5)
    weight = torch.randn(sum(widths), 3)
    whole = list(weight.split(widths))
    for rank, cut in enumerate(cuts(Colwise(parts=parts), "weight", tuple(weight.shape), size, numbers)):
        assert cut is not None
        alone = [
            take(x, cut_parameter(Colwise(part.heads), "weight", tuple(x.shape), numbers, size, rank))
            for x, part in zip(whole, parts, strict=True)
        ]
        assert torch.equal(take(weight, cut), torch.cat(alone))
        assert torch.equal(take_runs(weight, cut), torch.cat(alone))
        assert cut.shape(weight.shape) == torch.cat(alone).shape
        assert rank > 0 or not torch.equal(take(weight, cut), torch.cat(alone[::-1]))  # a fault is seen


@pytest.mark.parametrize("size", [2, 3, 4, 7])
def test_fused_rows_take_in_what_two_layers_put_out(size: int) -> None:
    """As a parallel block does it: attention and an MLP, side by side, into one output projection."""
    attention, mlp, out, numbers = torch.randn(10, 3), torch.randn(20, 3), torch.randn(4, 30), config(5)
    heads = [take(attention, cut) for cut in cuts(Colwise(PLAIN), "weight", (10, 3), size, numbers)]
    hidden = [take(mlp, cut) for cut in cuts(Colwise(), "weight", (20, 3), size, numbers)]
    columns = [torch.cat(pair) for pair in zip(heads, hidden, strict=True)]
    rows = [take(out, cut) for cut in cuts(Rowwise(parts=FUSED), "weight", (4, 30), size, numbers)]
    whole = out @ torch.cat([attention, mlp])
    assert torch.allclose(sum(b @ a for a, b in zip(columns, rows, strict=True)), whole, atol=1e-5)
    assert not torch.allclose(sum(b @ a for a, b in zip(columns[::-1], rows, strict=True)), whole, atol=1e-5)


def test_the_bias_of_rows_is_on_one_rank() -> None:
    bias = torch.randn(6)
    for style in (Rowwise(PLAIN), Rowwise(parts=FUSED)):
        parts = [take(bias, cut) for cut in cuts(style, "bias", (6,), 3, config(5))]
        assert [part.shape for part in parts] == [bias.shape] * 3
        assert torch.equal(sum(parts), bias)


def test_embeddings_are_cut_by_feature() -> None:
    table = torch.randn(5, 10)
    parts = [take(table, cut) for cut in cuts(EmbeddingColumns(), "weight", (5, 10), 4, {})]
    assert [part.shape for part in parts] == [(5, 3)] * 4
    assert torch.equal(torch.cat(parts, 1)[:, :10], table)


@pytest.mark.parametrize("size", [2, 3, 4, 7])
def test_biases_and_norms_go_with_their_heads(size: int) -> None:
    """The columns of a rank are those of the heads that `Colwise` gives it; heads of zeros have none."""
    table, weight, numbers = torch.randn(8, 5), torch.randn(20), config(5)
    columns = cuts(HeadBias(PLAIN), "weight", (8, 5), size, numbers)
    parts = cuts(NormAcross(PLAIN), "weight", (20,), size, numbers)
    for rank, (column, part) in enumerate(zip(columns, parts, strict=True)):
        mine = head_layout(PLAIN, numbers, size, rank)[0]
        wanted = [torch.zeros(8) if head is None else table[:, head] for head in mine]
        assert torch.equal(take(table, column), torch.stack(wanted, 1))
        features = [torch.zeros(4) if head is None else weight[4 * head : 4 * head + 4] for head in mine]
        assert torch.equal(take(weight, part), torch.cat(features))


def test_what_is_not_cut_has_no_cut() -> None:
    assert cut_parameter(None, "weight", (4, 4), {}, 2, 0) is None
    assert cut_parameter(Colwise(), "weight", (4, 4), {}, 1, 0) is None
    for style in (KeyValueGroups(GROUPED, "groups"), LocalHeads(PLAIN, "heads"), LocalWidth("width")):
        assert cut_parameter(style, "weight", (4, 4), {}, 2, 0) is None


def test_features_that_are_no_heads_are_refused() -> None:
    with pytest.raises(ConfigError, match="a layer of 12 features cannot be cut into 5 heads"):
        cut_parameter(Colwise(PLAIN), "weight", (12, 3), config(5), 2, 0)


def test_features_that_are_no_such_parts_are_refused() -> None:
    with pytest.raises(ConfigError, match="a layer of 31 features cannot be parts of 1:2"):
        cut_parameter(Colwise(parts=FUSED), "weight", (31, 3), config(5), 2, 0)
    with pytest.raises(ConfigError, match="a layer of 11 features cannot be cut into 5 heads"):
        cut_parameter(Rowwise(parts=FUSED), "weight", (3, 33), config(5), 2, 0)


def test_what_is_not_in_order_cannot_be_gathered() -> None:
    with pytest.raises(ValueError, match="not in order"):
        Colwise(GROUPED, gather=True)
    with pytest.raises(ValueError, match="cannot be gathered"):
        Colwise(parts=GATED, gather=True)


@pytest.mark.parametrize("style", [Colwise, Rowwise])
def test_heads_beside_parts_are_refused(style: Any) -> None:
    with pytest.raises(ValueError, match="parts have heads of their own"):
        style(PLAIN, parts=FUSED)


# ---- heads -----------------------------------------------------------------------------------------------------------

Layout = tuple[tuple[int | None, ...], tuple[int | None, ...]]

HEADS = [(28, 4), (28, 28), (24, 24), (5, 5), (1, 1), (12, 2), (6, 2), (8, 1), (9, 3), (30, 6)]


def check_layouts(layouts: list[Layout], queries: int, groups: int) -> None:
    """Every query head is on one rank, and attends with its own key/value head."""
    assert len({(len(q), len(kv)) for q, kv in layouts}) == 1  # all ranks' tensors have one shape
    assert sorted(head for q, _ in layouts for head in q if head is not None) == list(range(queries))
    for mine, key_values in layouts:
        assert len(mine) % len(key_values) == 0
        per_group = len(mine) // len(key_values)  # what KeyValueGroups sets
        for place, head in enumerate(mine):
            if head is not None:
                assert key_values[place // per_group] == head // (queries // groups)


@pytest.mark.parametrize(("queries", "groups"), HEADS)
@pytest.mark.parametrize("size", range(1, 17))
def test_every_query_head_is_once_beside_its_key_and_value(queries: int, groups: int, size: int) -> None:
    numbers = config(queries, groups)
    check_layouts([head_layout(GROUPED, numbers, size, rank) for rank in range(size)], queries, groups)
    if groups == queries:
        plain = [head_layout(PLAIN, numbers, size, rank) for rank in range(size)]
        assert plain == [head_layout(GROUPED, numbers, size, rank) for rank in range(size)]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (2, (tuple(range(14, 28)), (2, 3))),  # the ranks divide the groups
        (8, ((4, 5, 6, None), (0,))),  # two ranks share a group of seven, filled up to eight
        (16, ((2, 3), (0,))),
        (3, (tuple(range(10, 20)), (1, 1, 1, 1, 2, 2, 2, 2, 2, 2))),  # neither: every query head brings its own
    ],
)
def test_the_three_ways_to_spread_28_heads_in_4_groups(size: int, expected: Layout) -> None:
    assert head_layout(GROUPED, config(28, 4), size, 1) == expected


def test_a_layout_with_a_fault_is_seen() -> None:
    layouts = [head_layout(GROUPED, config(28, 4), 8, rank) for rank in range(8)]
    swapped = [(layouts[i][0], layouts[(i + 2) % 8][1]) for i in range(8)]
    lost = [layouts[0], *layouts[:7]]
    for wrong in (swapped, lost):
        with pytest.raises(AssertionError):
            check_layouts(wrong, 28, 4)


def test_heads_in_uneven_groups_are_refused() -> None:
    with pytest.raises(ConfigError, match="28 query heads cannot share 3 key/value heads evenly"):
        head_layout(GROUPED, config(28, 3), 2, 0)


def test_no_rank_of_two_keeps_much_more_than_half() -> None:
    """Of a block's layers, as the plan of a large model cuts them; 28 heads in 4 groups are even."""
    width, of = 28 * 16, config(28, 4)
    layers = [(Colwise(GROUPED), width), (Colwise(GROUPED, is_kv=True), 4 * 16), (Colwise(), 1000)]
    for style, features in layers:
        shape = (features, width)
        kept = [cut.stored(shape) for cut in cuts(style, "weight", shape, 2, of) if cut]
        assert kept == [math.prod(shape) // 2] * 2
