"""One VAE's work spread over the ranks of an axis, by rows, by tiles or by pictures. Knows no model by name.

`PatchDecoder` gives every rank some rows of the picture and is exact: it equals one device that does not tile.
`map_tiles` gives every rank some tiles and is bit-identical to one device that does, in stock `tiled_decode` and
`tiled_encode`. `SharedEncoder` gives every rank some pictures or tiles to encode, and all ranks what came of them.

    B batch   C channels   F frames   h w latent rows and columns   H W rows and columns of the picture

Latents are [B, C, h, w] or [B, C, F, h, w]; rows are always dimension -2. What a rank holds is a function of the
latents' size and the number of ranks, so ranks never tell each other sizes.

Sources: halo rows and shared norm statistics as in DistVAE's PatchConv and PatchGroupNorm (xDiT, arXiv:2411.01738);
combining variances: Chan, Golub, LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor, nn

from darkroom.parallel.mesh import Axis, Mesh
from darkroom.parallel.plan import Plan, chunk_sizes, matches

# ---- by rows -----------------------------------------------------------------------------------------------------


class PatchDecoder:
    """Makes a VAE's decoder able to run on this rank's rows of the latents. Made once, after loading.

    Inside `plan.spatial`, convolutions borrow rows from the neighbours, group norms share their statistics, and the
    modules named by `plan.whole_rows` see all rows. This is so only within `decode`: used directly, or with an axis
    of size one, the VAE does what it always did. Its own tiling must be off.
    """

    def __init__(self, vae: nn.Module, plan: Plan, axis: Axis) -> None:
        self.axis = axis
        self._latent_rows: list[int] = []  # of every rank, while a shared decode is under way; else empty
        self._least_rows = 1  # a rank with fewer could not lend its neighbours their halo
        if axis.size == 1:
            return
        for path, module, needs_all_rows in _region(vae, plan):
            if needs_all_rows:
                self._replace(module, partial(self._on_all_rows, module.forward))
            elif isinstance(module, nn.GroupNorm):
                self._replace(module, partial(self._normalise, module))
            elif isinstance(module, nn.Conv2d | nn.Conv3d):
                if halo := _halo_rows(path, module):
                    self._replace(module, partial(self._convolve, module.forward, halo))
                    self._least_rows = max(self._least_rows, halo)
            else:
                _check_row_by_row(path, module)

    def decode(self, latents: Tensor, decode: Callable[[Tensor], Tensor]) -> Tensor | None:
        """The whole picture on rank 0, None on the others. `latents` are whole on every rank.

        `decode` is the VAE's own path from latents to picture. Latents too small to share are decoded by rank 0.
        """
        rank, size = self.axis.rank, self.axis.size
        if size == 1 or latents.shape[-2] < size * self._least_rows:
            return decode(latents) if rank == 0 else None
        self._latent_rows = chunk_sizes(latents.shape[-2], size)
        try:
            return self._collect(decode(torch.split(latents, self._latent_rows, -2)[rank]))
        finally:
            self._latent_rows = []

    def _replace(self, module: nn.Module, shared: Callable[..., Tensor]) -> None:
        """Call `shared` in place of the module's forward while a shared decode is under way."""
        alone = module.forward
        module.forward = lambda *args, **kwargs: (shared if self._latent_rows else alone)(*args, **kwargs)

    def _rows(self, x: Tensor) -> list[int]:
        """Every rank's rows of the tensor of which `x` is this rank's part: latent rows times upsampling so far."""
        mine = self._latent_rows[self.axis.rank]
        scale, rest = divmod(x.shape[-2], mine)
        if rest:
            raise RuntimeError(f"a tensor {tuple(x.shape)} of {mine} latent rows: its rows are no multiple of these")
        return [rows * scale for rows in self._latent_rows]

    def _convolve(self, forward: Callable[..., Tensor], halo: int, *args: Any) -> Tensor:
        """Run a convolution on rows that reach into the neighbours', and crop the rows that are theirs.

        All its tensors (a causal convolution's cache too) are extended alike, so its class does not matter.
        """
        y = forward(*(self._extend(value, halo) for value in args))
        above = halo if self.axis.rank > 0 else 0
        below = halo if self.axis.rank < self.axis.size - 1 else 0
        return y[..., above : y.shape[-2] - below, :]

    def _extend(self, x: Any, halo: int) -> Any:
        """Put `halo` rows of either neighbour around this rank's rows: [..., H, W] -> [..., H + 1 or 2 x halo, W]"""
        if not isinstance(x, Tensor):
            return x
        edges = {self.axis.rank - 1: x[..., :halo, :], self.axis.rank + 1: x[..., -halo:, :]}
        sends = [(edge.contiguous(), rank) for rank, edge in edges.items() if 0 <= rank < self.axis.size]
        receives = [(torch.empty_like(edge), rank) for edge, rank in sends]
        _wait(self.axis.start_exchange(sends, receives))
        above = [edge for edge, rank in receives if rank < self.axis.rank]
        below = [edge for edge, rank in receives if rank > self.axis.rank]
        return torch.cat([*above, x, *below], -2)

    def _normalise(self, norm: nn.GroupNorm, x: Tensor) -> Tensor:
        """Group norm over all ranks' rows, by the sums of x, x^2 and 1. x: [B, C, ..., H, W]

        Each rank's mean and variance are taken in float32 as stock does; only their sums are formed in float64,
        where E[x^2] - E[x]^2 loses nothing. With known statistics it is a batch norm of B x C channels in one kernel.
        """
        batch, channels = x.shape[:2]
        x = x.contiguous()
        groups = x.float().view(batch * norm.num_groups, -1)
        var, mean = (part.double() for part in torch.var_mean(groups, 1, correction=0))
        moments = torch.stack([mean, var + mean.square(), torch.ones_like(mean)]) * groups.shape[1]
        total, squares, count = self.axis.all_reduce(moments)
        mean = total / count
        var = squares / count - mean.square()
        mean, var = (part.float().repeat_interleave(channels // norm.num_groups) for part in (mean, var))
        weight, bias = (part.float().repeat(batch) if norm.affine else None for part in (norm.weight, norm.bias))
        return F.batch_norm(x.view(1, batch * channels, -1), mean, var, weight, bias, eps=norm.eps).view(x.shape)

    def _on_all_rows(self, forward: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run a module on the rows of all ranks, and keep this rank's."""
        rows = self._rows(x)
        y = forward(self.axis.all_gather(x, -2, rows), *args, **kwargs)
        return torch.split(y, rows, -2)[self.axis.rank]

    def _collect(self, part: Tensor) -> Tensor | None:
        """Send every rank's rows of the picture to rank 0."""
        if self.axis.rank > 0:
            _wait(self.axis.start_exchange([(part.contiguous(), 0)], []))
            return None
        parts = [part.new_empty((*part.shape[:-2], rows, part.shape[-1])) for rows in self._rows(part)[1:]]
        _wait(self.axis.start_exchange([], [(other, rank) for rank, other in enumerate(parts, 1)]))
        return torch.cat([part, *parts], -2)


def _region(vae: nn.Module, plan: Plan) -> Iterator[tuple[str, nn.Module, bool]]:
    """The modules of the shared region, and whether they need all rows; without those inside of one that does."""
    name, root = type(vae).__name__, plan.spatial
    if root is None:
        raise ValueError(f"{name} has no spatial plan: set Plan.spatial, or let one rank decode, or share tiles")
    region = {path: module for path, module in vae.named_modules() if f"{path}.".startswith(f"{root}." if root else "")}
    if not region:
        known = ", ".join(path for path, _ in vae.named_children())
        raise ValueError(f"Plan.spatial {root!r} names no module of {name}, which has {known}")
    for pattern in plan.whole_rows:
        if not any(matches(pattern, path) for path in region):
            raise ValueError(f"Plan.whole_rows {pattern!r} matches no module of {name} in {root!r}")
    whole = [path for path in region if any(matches(pattern, path) for pattern in plan.whole_rows)]
    for path, module in region.items():
        if not any(path.startswith(f"{outer}.") for outer in whole):
            yield path, module, path in whole


def _halo_rows(path: str, conv: nn.Conv2d | nn.Conv3d) -> int:
    """How many rows a convolution needs from either neighbour, tried out on the convolution itself.

    Where it has stride 1 and returns as many rows as it gets, evenly padded, a first row of ones reaches itself and
    the k // 2 rows below, wherever the class keeps its padding. The trial has one channel per group, and is cheap.
    """
    *depth, kernel, width = conv.kernel_size
    rows = 4 * kernel
    halo: int = kernel // 2
    ones = {"weight": torch.ones(conv.groups, 1, *conv.kernel_size), "bias": torch.zeros(conv.groups)}
    x = torch.zeros(1, conv.groups, *depth, rows, width)
    x[..., 0, :] = 1
    y = torch.func.functional_call(conv, {name: ones[name] for name, _ in conv.named_parameters()}, x)
    if y.movedim(-2, 0).flatten(1).any(1).tolist() != [row <= halo for row in range(rows)]:
        raise ValueError(
            f"{path!r} ({conv}) cannot run on some of the rows: its kernel of {kernel} rows needs stride and dilation"
            f" 1 and {halo} rows of padding on either side; name it, or a module around it, in Plan.whole_rows"
        )
    return halo


def _check_row_by_row(path: str, module: nn.Module) -> None:
    """Refuse what is known to look further than one row. Golden tests hold the rest."""
    kinds = {base.__module__.removeprefix("torch.nn.modules.") for base in type(module).__mro__}
    mixes_rows = (
        "Attention" in type(module).__name__
        or bool(kinds & {"batchnorm", "conv", "fold", "instancenorm", "padding", "pooling"})
        or len(getattr(module, "normalized_shape", ())) > 1
        or (isinstance(module, nn.Upsample) and not module.mode.startswith("nearest"))
    )
    if mixes_rows:
        raise ValueError(
            f"{path!r} ({type(module).__name__}) cannot run on some of the rows; only Conv2d, Conv3d and GroupNorm"
            f" are known to share theirs: name it, or a module around it, in Plan.whole_rows"
        )


# ---- by tiles ----------------------------------------------------------------------------------------------------


class Box(NamedTuple):
    """A rectangle of the latents."""

    top: int
    left: int
    height: int
    width: int

    def of(self, latents: Tensor) -> Tensor:
        return latents[..., self.top : self.top + self.height, self.left : self.left + self.width]


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """Overlapping tiles, in rows and columns of the picture (for some VAEs before any unpatchify)."""

    tile: tuple[int, int]
    stride: tuple[int, int]
    """From one tile to the next; what is left of the tile overlaps."""
    scale: int
    """H / h, and W / w."""
    encodes: bool = False
    """From the picture to latents, and not from latents to the picture."""
    above: tuple[int, int] | None = None
    """The largest input that stock works on whole, where that is not a tile."""

    def __post_init__(self) -> None:
        for tile, stride in zip(self.tile, self.stride, strict=True):
            if not 0 < stride <= tile or tile % self.scale or stride % self.scale:
                raise ValueError(
                    f"tiles of {self.tile} with stride {self.stride}: both must be multiples of {self.scale} pixels,"
                    " and a stride at most its tile"
                )

    def applies(self, height: int, width: int) -> bool:
        """Whether stock works in tiles on an input of this size."""
        tall, wide = self.above or self._of_input()[0]
        return height > tall or width > wide

    def boxes(self, height: int, width: int) -> list[list[Box]]:
        """The tiles of an input of this size, row by row as stock does; those at the bottom and right are smaller."""
        (tall, wide), (down, right) = self._of_input()
        return [
            [Box(y, x, min(tall, height - y), min(wide, width - x)) for x in range(0, width, right)]
            for y in range(0, height, down)
        ]

    def output(self, box: Box) -> tuple[int, int]:
        """How many rows and columns become of a tile."""
        if self.encodes:
            return box.height // self.scale, box.width // self.scale
        return box.height * self.scale, box.width * self.scale

    @property
    def output_tile(self) -> tuple[int, int]:
        return self._scaled(self.tile) if self.encodes else self.tile

    @property
    def output_stride(self) -> tuple[int, int]:
        return self._scaled(self.stride) if self.encodes else self.stride

    def _of_input(self) -> tuple[tuple[int, int], tuple[int, int]]:
        if self.encodes:
            return self.tile, self.stride
        return self._scaled(self.tile), self._scaled(self.stride)

    def _scaled(self, lengths: tuple[int, int]) -> tuple[int, int]:
        return lengths[0] // self.scale, lengths[1] // self.scale


def map_tiles(x: Tensor, function: Callable[[Tensor], Tensor], tiling: Tiling, axis: Axis) -> Tensor | None:
    """The whole result, without a final clamp, on rank 0, and None on the others. `x` is whole on every rank.

    `function` decodes (or encodes) one tile, by itself and from scratch: [..., h, w] to [..., h x scale, w x scale]
    (or the other way).
    """
    grid = tiling.boxes(*x.shape[-2:])
    boxes = [box for row in grid for box in row]
    owners = dict(zip(boxes, share_out([box.height * box.width for box in boxes], axis.size), strict=True))
    tiles = {box: _one_tile(x, function, box, tiling) for box in boxes if owners[box] == axis.rank}
    if axis.rank > 0:
        _wait(axis.start_exchange([(tile.contiguous(), 0) for tile in tiles.values()], []))
        return None
    mine = next(iter(tiles.values()))  # the others' tiles have its batch, channels and frames
    for box in boxes:
        if owners[box] > 0:
            tiles[box] = mine.new_empty((*mine.shape[:-2], *tiling.output(box)))
    _wait(axis.start_exchange([], [(tiles[box], owners[box]) for box in boxes if owners[box] > 0]))
    return blend([[tiles[box] for box in row] for row in grid], tiling)


def _one_tile(x: Tensor, function: Callable[[Tensor], Tensor], box: Box, tiling: Tiling) -> Tensor:
    tile = function(box.of(x))
    if tile.shape[-2:] != tiling.output(box):
        raise ValueError(f"a tile of {box.height} x {box.width} became {tuple(tile.shape)}, not {tiling.output(box)}")
    return tile


def share_out(areas: Sequence[int], size: int) -> list[int]:
    """Which rank decodes which tile: the largest tile first, to the rank with the least to do.

    Rank 0 gets the first, since it must know what a tile looks like, and is the last to get one more than others:
    it blends.
    """
    load = [0] * size
    owners = [0] * len(areas)
    for turn, tile in enumerate(sorted(range(len(areas)), key=lambda tile: -areas[tile])):
        owner = min(range(size), key=lambda rank: (load[rank], -rank)) if turn else 0
        owners[tile] = owner
        load[owner] += areas[tile]
    return owners


def blend(tiles: Sequence[Sequence[Tensor]], tiling: Tiling) -> Tensor:
    """Put the tiles together. Changes them: as in stock, a tile fades in from finished tiles above and to the left."""
    down, right = (tile - stride for tile, stride in zip(tiling.output_tile, tiling.output_stride, strict=True))
    for i, row in enumerate(tiles):
        for j, tile in enumerate(row):
            if i > 0:
                _fade(tiles[i - 1][j], tile, down, -2)
            if j > 0:
                _fade(row[j - 1], tile, right, -1)
    height, width = tiling.output_stride
    return torch.cat([torch.cat([tile[..., :height, :width] for tile in row], -1) for row in tiles], -2)


def _fade(before: Tensor, after: Tensor, extent: int, dim: int) -> None:
    """Fade from the last `extent` rows (dim -2) or columns (-1) of `before` to the first of `after`, in place.

    All lines at once, rounded as in stock's loop over single lines: weights are doubles, cast to the precision of the
    arithmetic (float32 for bfloat16 too); then each product is rounded to the tensors' type, then the sum.
    """
    extent = min(before.shape[dim], after.shape[dim], extent)
    weight = torch.arange(extent, dtype=torch.float64, device=after.device) / extent
    weight = weight[:, None] if dim == -2 else weight
    precise = torch.promote_types(after.dtype, torch.float32)
    old = before.narrow(dim, before.shape[dim] - extent, extent) * (1 - weight).to(precise)
    new = after.narrow(dim, 0, extent)
    new.copy_(old.to(after.dtype) + (new * weight.to(precise)).to(after.dtype))


def _wait(works: Sequence[dist.Work]) -> None:
    for work in works:
        work.wait()


# ---- by pictures -------------------------------------------------------------------------------------------------


class SharedEncoder(nn.Module):  # type: ignore[misc]
    """What stands for the VAE in the pipelines' helpers, on every rank: its config, and an `encode` shared by all.

    The ranks that hold the VAE encode, each some of the pictures that `ahead` announces, or some tiles of a picture;
    every rank then gets the parameters of the latents' distribution, and so draws the same sample from it.
    """

    def __init__(
        self, vae: nn.Module, mesh: Mesh, device: torch.device, dtype: torch.dtype, tiling: Tiling | None = None
    ) -> None:
        """`vae` may be on the meta device on ranks without a part in `mesh.vae`. Without `tiling`: pictures whole."""
        super().__init__()
        self._vae: list[Any] = [vae]  # in a list it is no child: what moves or counts modules must not find it twice
        self.mesh = mesh
        self.device, self.dtype = device, dtype
        self.tiling = replace(tiling, encodes=True) if tiling else None
        self._encoded: list[Tensor] = []

    @property
    def config(self) -> Any:
        return self._vae[0].config

    def encode(self, x: Tensor) -> AutoencoderKLOutput:
        """The stock VAE's `encode`. x: [B, C, (F,) H, W], the same on all ranks."""
        moments = self._encoded.pop(0) if self._encoded else self._share([x])[0]
        return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(moments))

    @contextmanager
    def ahead(self, pictures: Sequence[Tensor]) -> Iterator[None]:
        """Encode `pictures` at once, one per rank: inside, `encode` gives them in their order, one by one."""
        self._encoded = self._share(pictures)
        try:
            yield
            assert not self._encoded, "fewer pictures were asked for than were announced"
        finally:
            self._encoded = []

    def _share(self, pictures: Sequence[Tensor]) -> list[Tensor]:
        pictures = [x.to(self.device, self.dtype) for x in pictures]
        if any(self._in_tiles(x) for x in pictures):
            return [self._give(self._tiles(x) if self._in_tiles(x) else self._whole(x, 0), 0) for x in pictures]
        size = min(self.mesh.vae_size, len(pictures))
        mine = [self._whole(x, i % size) for i, x in enumerate(pictures)]
        return [self._give(moments, i % size) for i, moments in enumerate(mine)]

    def _in_tiles(self, x: Tensor) -> bool:
        return self.tiling is not None and self.tiling.applies(*x.shape[-2:])

    def _tiles(self, x: Tensor) -> Tensor | None:
        assert self.tiling is not None
        return map_tiles(x, self._vae[0]._encode, self.tiling, self.mesh.vae) if self.mesh.vae else None

    def _whole(self, x: Tensor, owner: int) -> Tensor | None:
        return self._vae[0]._encode(x) if self.mesh.rank == owner else None

    def _give(self, moments: Tensor | None, owner: int) -> Tensor:
        return self.mesh.world.broadcast(moments, owner, self.device, self.dtype)
