"""The vocabulary of plans: how one component class is cut. Plain frozen data, without torch.

A plan is applied from outside to an unmodified module. Keys are module paths; `*` stands for one name of the path
(every element of a ModuleList), and `""` is the module itself. A key that matches nothing is an error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from darkroom.configs.errors import ConfigError

# ---- tensor parallelism ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heads:
    """A dimension made of attention heads, which are never cut apart.

    `count` is the config key of the number of (query) heads. Heads that the ranks do not divide are filled up with
    heads of zeros, which add exactly nothing. With grouped-query attention, `kv_count` is the key of the number of
    key/value heads; they are repeated on as many ranks as need them. Dots in a key descend into the config.
    """

    count: str
    kv_count: str | None = None


@dataclass(frozen=True, kw_only=True)
class Part:
    """One of the tensors that lie side by side in a fused projection. It is cut as a layer of its own would be."""

    width: int = 1
    """How wide it is, beside the other parts."""
    heads: Heads | None = None


@dataclass(frozen=True)
class Colwise:
    """Cut a linear layer's output features. `gather` puts them together again behind the layer."""

    heads: Heads | None = None
    is_kv: bool = False
    gather: bool = False
    parts: tuple[Part, ...] = ()
    """What the outputs are made of, where they are several tensors, such as values and their gates."""

    def __post_init__(self) -> None:
        if self.parts and (self.heads or self.gather):
            raise ValueError("parts have heads of their own, and cannot be gathered: a rank's are not side by side")
        if self.gather and self.heads and self.heads.kv_count:  # zeros may stand between heads, heads may be repeated
            raise ValueError("grouped heads cannot be gathered behind the layer: the ranks' parts are not in order")


@dataclass(frozen=True)
class Rowwise:
    """Cut a linear layer's input features; the ranks' partial outputs are summed. The bias is added once."""

    heads: Heads | None = None
    parts: tuple[Part, ...] = ()
    """What the inputs are made of, where they are several tensors, such as attention's outputs and an MLP's."""

    def __post_init__(self) -> None:
        if self.parts and self.heads:
            raise ValueError("parts have heads of their own")


@dataclass(frozen=True)
class EmbeddingColumns:
    """Cut an embedding table's features; the looked-up rows are gathered."""


@dataclass(frozen=True)
class HeadBias:
    """Cut an embedding whose columns are one per head; nothing is gathered."""

    heads: Heads


@dataclass(frozen=True)
class NormAcross:
    """Cut an RMS norm over the features of all heads together; the ranks' sums of squares are added."""

    heads: Heads


@dataclass(frozen=True)
class KeyValueGroups:
    """Set the module's attribute `name` to the query heads per key/value head that this rank holds."""

    heads: Heads
    name: str


@dataclass(frozen=True)
class LocalHeads:
    """Set the module's attribute `name` to the number of heads that this rank holds.

    Only for attention that reshapes by that number; some derive the head dim from it, and need it as it was.
    """

    heads: Heads
    name: str


@dataclass(frozen=True)
class LocalWidth:
    """Set the module's attribute `name`, the width of a layer that is cut, to what this rank holds of it."""

    name: str


AttributeStyle = KeyValueGroups | LocalHeads | LocalWidth
TensorStyle = Colwise | Rowwise | EmbeddingColumns | HeadBias | NormAcross | AttributeStyle

# ---- sequence parallelism --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SequenceParallelInput:
    """Keep this rank's part of a tensor along `split_dim`.

    Under a string key: the module's input of that name. Under an integer key, with `split_output`: that element of
    the module's output. Tensors of another rank than `expected_dims`, and None, pass as they are.
    """

    split_dim: int
    expected_dims: int | None = None
    split_output: bool = False
    auto_pad: bool = True
    """Allow a length that the ranks do not divide. Sizes are a function of the length alone, so the first ranks
    simply get one token more: no padding, no mask. False makes such a length an error."""
    stream: bool = False
    """These tokens are attended over: the joint sequence of attention is all streams, one behind the other."""


@dataclass(frozen=True, kw_only=True)
class SequenceParallelOutput:
    """Put a module's output together again along `gather_dim`."""

    gather_dim: int
    expected_dims: int | None = None
    stream: str | None = None
    """The stream whose length the output has: an input's name, or `pos_embed.0` for element 0 of that module's
    output. By default the first in the plan."""


SequenceRule = Mapping[str | int, SequenceParallelInput] | SequenceParallelOutput

# ---- the plan --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How one component is cut. An empty part means that the component has no such plan."""

    tensor: Mapping[str, TensorStyle] = field(default_factory=dict)
    even_heads: bool = False
    """Tensor parallelism: the class cannot do with heads of zeros, so the ranks must divide the heads."""
    sequence: Mapping[str, SequenceRule] = field(default_factory=dict)
    attention: Sequence[str] = ()
    """Sequence parallelism: the modules that attend over all ranks' tokens; by default every one with a processor."""
    streams: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Sequence parallelism: the streams that an attention module joins, where they are not all."""
    whole_rows: Sequence[str] = ()
    """Spatial parallelism: modules that need all rows of the picture at once, such as attention."""
    optional: Sequence[str] = ()
    """Modules that not every checkpoint has: in one without, what the plan says of them and of what is in them may
    match nothing."""
    spatial: str | None = None
    """Spatial parallelism: the submodule whose convolutions exchange rows; None where there is no such plan."""


def may_lack(plan: Plan, pattern: str, paths: Iterable[str]) -> bool:
    """Whether the plan's key stands for a module, or for what is in one, that is optional and not among `paths`."""
    inside = [module for module in plan.optional if f"{pattern}.".startswith(f"{module}.")]
    return any(not any(matches(module, path) for path in paths) for module in inside)


def matches(pattern: str, path: str) -> bool:
    """Whether a plan's key names the module at `path`."""
    return _regex(pattern).fullmatch(path) is not None


@cache
def _regex(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\*", r"[^.]+"))


# ---- which part of a tensor a rank keeps -----------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """A rank's part of a tensor: some of the `count` equal units of dimension `dim`, in order. None is zeros."""

    dim: int
    units: tuple[int | None, ...]
    count: int

    def runs(self, length: int) -> Iterator[tuple[int, int] | int]:
        """The part as (start, stop) ranges of a dimension of `length` elements; a bare number is that many zeros."""
        size = length // self.count
        start: int | None = None
        for i, unit in enumerate(self.units):
            following = self.units[i + 1] if i + 1 < len(self.units) else None
            if unit is None:
                yield size
                continue
            start = unit if start is None else start
            if following != unit + 1:
                yield start * size, (unit + 1) * size
                start = None

    def shape(self, whole: Sequence[int]) -> tuple[int, ...]:
        local = list(whole)
        local[self.dim] = local[self.dim] // self.count * len(self.units)
        return tuple(local)

    def stored(self, whole: Sequence[int]) -> int:
        """How many elements of the stored tensor are read."""
        return math.prod(whole) // self.count * sum(unit is not None for unit in self.units)


def chunk_sizes(length: int, parts: int) -> list[int]:
    """Sizes of `length` tokens, rows or features over `parts` ranks: a function of the numbers alone."""
    base, more = divmod(length, parts)
    return [base + (i < more) for i in range(parts)]


def style_of(plan: Plan, path: str) -> TensorStyle | None:
    """How the linear layer or embedding at `path` is cut; None: every rank holds it whole."""
    for pattern, style in plan.tensor.items():
        if not isinstance(style, AttributeStyle) and matches(pattern, path):
            return style
    return None


def cut_parameter(
    style: TensorStyle | None, name: str, shape: Sequence[int], config: Mapping[str, Any], size: int, rank: int
) -> Cut | None:
    """The part of parameter `name` (`weight` or `bias`) that `rank` of `size` keeps; None for all of it."""
    if style is None or size == 1:
        return None
    match style:
        case Rowwise() if name == "bias":
            return None if rank == 0 else Cut(0, (None,), 1)  # the sum over the ranks holds it once
        case Colwise(parts=parts) if parts:
            return _cut_parts(0, shape, parts, config, size, rank)
        case Colwise(heads=heads, is_kv=is_kv):
            return _cut(0, shape, heads, is_kv, config, size, rank)
        case Rowwise(parts=parts) if parts:
            return _cut_parts(1, shape, parts, config, size, rank)
        case Rowwise(heads=heads):
            return _cut(1, shape, heads, False, config, size, rank)
        case EmbeddingColumns():
            return _cut(1, shape, None, False, config, size, rank)
        case HeadBias(heads=heads):
            return _cut(1, shape, heads, False, config, size, rank)
        case NormAcross(heads=heads):
            return _cut(0, shape, heads, False, config, size, rank)
    return None


def _cut(
    dim: int, shape: Sequence[int], heads: Heads | None, is_kv: bool, config: Mapping[str, Any], size: int, rank: int
) -> Cut:
    if heads is None:
        return Cut(dim, _padded_chunk(shape[dim], size, rank), shape[dim])
    queries, key_values = head_layout(heads, config, size, rank)
    count = lookup(config, (heads.kv_count or heads.count) if is_kv else heads.count)
    if shape[dim] % count:
        raise ConfigError(f"a layer of {shape[dim]} features cannot be cut into {count} heads")
    return Cut(dim, key_values if is_kv else queries, count)


def _cut_parts(
    dim: int, shape: Sequence[int], parts: Sequence[Part], config: Mapping[str, Any], size: int, rank: int
) -> Cut:
    """The cut of each part, one behind the other, in units of single features."""
    features, widths = shape[dim], [part.width for part in parts]
    if features % sum(widths):
        raise ConfigError(f"a layer of {features} features cannot be parts of {':'.join(map(str, widths))}")
    units: list[int | None] = []
    first = 0
    for part in parts:
        width = features // sum(widths) * part.width
        cut = _cut(0, (width,), part.heads, False, config, size, rank)
        each = range(width // cut.count)
        units += [None if unit is None else first + unit * len(each) + i for unit in cut.units for i in each]
        first += width
    return Cut(dim, tuple(units), features)


def head_layout(
    heads: Heads, config: Mapping[str, Any], size: int, rank: int
) -> tuple[tuple[int | None, ...], tuple[int | None, ...]]:
    """The query heads and the key/value heads of one rank.

    Every rank gets the same number of query heads per key/value head. Where the ranks outnumber the key/value heads
    evenly, each group of query heads is filled up and shared by several ranks; where they fit neither way, every
    query head brings a copy of its key/value head.
    """
    queries = lookup(config, heads.count)
    groups = lookup(config, heads.kv_count) if heads.kv_count else queries
    if queries % groups:
        raise ConfigError(f"{queries} query heads cannot share {groups} key/value heads evenly")
    per_group = queries // groups
    if heads.kv_count is None or groups == queries:
        mine = _padded_chunk(queries, size, rank)
        return mine, mine
    if groups % size == 0:
        kept = groups // size
        first = rank * kept
        return tuple(range(first * per_group, (first + kept) * per_group)), tuple(range(first, first + kept))
    if size % groups == 0:
        group, part = divmod(rank, size // groups)
        inside = _padded_chunk(per_group, size // groups, part)
        return tuple(None if head is None else group * per_group + head for head in inside), (group,)
    mine = _padded_chunk(queries, size, rank)
    return mine, tuple(None if head is None else head // per_group for head in mine)


def local_width(width: int, size: int) -> int:
    """How many of `width` features, or heads, each of `size` ranks holds: some of them may be zeros."""
    return -(-width // size)


def head_counts(plan: Plan) -> Iterator[str]:
    """The keys of config.json that the plan reads."""
    for style in plan.tensor.values():
        for cut in (style, *getattr(style, "parts", ())):
            if heads := getattr(cut, "heads", None):
                yield from filter(None, (heads.count, heads.kv_count))


def _padded_chunk(count: int, size: int, rank: int) -> tuple[int | None, ...]:
    width = local_width(count, size)
    return tuple(i if i < count else None for i in range(rank * width, (rank + 1) * width))


def lookup(config: Mapping[str, Any], key: str) -> int:
    """A number of the component's config; dots descend."""
    value: Any = config
    for name in key.split("."):
        value = value[name]
    return int(value)
