"""One VAE decode over 2, 3 and 4 ranks: by rows within 1e-5 of one device, by tiles bit-identical to stock tiling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from diffusers import AutoencoderKL, AutoencoderKLQwenImage, AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch import Tensor, nn

from darkroom.parallel import spatial
from darkroom.parallel.mesh import Axis
from darkroom.parallel.plan import Plan, chunk_sizes
from darkroom.parallel.spatial import PatchDecoder, Tiling, map_tiles, share_out
from tests.ranks import run_ranks

PLAN = Plan(spatial="decoder", whole_rows=("decoder.mid_block.attentions.*",))
SIZES = (2, 3, 4)

# ---- tiny real VAEs ----------------------------------------------------------------------------------------------

_CAUSAL: dict[str, Any] = {
    "base_dim": 8,
    "z_dim": 4,
    "dim_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True],
    "latents_mean": [0.0] * 4,
    "latents_std": [1.0] * 4,
}


def qwen_image() -> nn.Module:
    return AutoencoderKLQwenImage(**_CAUSAL)


def wan() -> nn.Module:
    return AutoencoderKLWan(**_CAUSAL, scale_factor_spatial=4)


def wan_2_2() -> nn.Module:
    """Residual upsampling, and every output position a patch of 2 x 2 pixels."""
    patches = {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 8}
    return AutoencoderKLWan(**_CAUSAL, **patches)


def kl() -> nn.Module:
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=[16, 32, 32],
        norm_num_groups=8,
        sample_size=32,
    )


class Wide(nn.Module):
    """Not a VAE: wide kernels, other padding modes, a norm far from zero mean and without weights, in 3D."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Sequential(
            nn.Conv3d(4, 8, (1, 7, 3), padding=(0, 3, 1), padding_mode="reflect", groups=2),
            nn.GroupNorm(4, 8, affine=False),
            nn.Upsample(scale_factor=(1, 3, 2), mode="nearest"),
            nn.Conv3d(8, 3, (3, 5, 1), padding="same", padding_mode="replicate", bias=False),
        )
        nn.init.constant_(self.decoder[0].bias, 10.0)

    def decode(self, z: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        return (self.decoder(z),)


def make(build: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return nn.Module.to(build().eval(), dtype)  # diffusers' own `to` warns


def noise(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def decode(vae: Any, z: Tensor) -> Tensor:
    picture: Tensor = vae.decode(z, return_dict=False)[0]
    return picture


def world(rank: int, size: int) -> Axis:
    return Axis("vae", size, rank, None, tuple(range(size)))


# ---- by rows -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    tolerance: float = 1e-5
    least_rows: int = 1
    plan: Plan = PLAN

    def rows(self, size: int) -> list[int]:
        """The latent rows that every rank should decode."""
        height = self.shape[-2]
        return chunk_sizes(height, size) if height >= size * self.least_rows else [height] + [0] * (size - 1)


ROWS = {
    "qwen-image": Rows(qwen_image, (1, 4, 1, 9, 5)),
    "qwen-image, batch": Rows(qwen_image, (2, 4, 1, 4, 6)),
    "qwen-image, one row": Rows(qwen_image, (1, 4, 1, 1, 6)),
    "wan, 3 frames": Rows(wan, (1, 4, 3, 7, 6)),
    "wan 2.2, 3 frames, batch": Rows(wan_2_2, (2, 4, 3, 5, 4)),
    "wan, 3 rows": Rows(wan, (2, 4, 2, 3, 4)),
    "kl": Rows(kl, (1, 4, 13, 10)),
    "kl, batch": Rows(kl, (2, 4, 6, 7)),
    "kl, 2 rows": Rows(kl, (1, 4, 2, 8)),
    "kl, bfloat16": Rows(kl, (1, 4, 9, 8), torch.bfloat16, tolerance=0.05),
    "wide": Rows(Wide, (2, 4, 3, 13, 5), least_rows=3, plan=Plan(spatial="decoder")),
    "wide, 8 rows": Rows(Wide, (1, 4, 3, 8, 5), least_rows=3, plan=Plan(spatial="decoder")),
}


REAL_EXCHANGE = Axis.start_exchange


def alone(self: PatchDecoder, forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    return forward(*args, **kwargs)


def swapped(axis: Axis, sends: list[tuple[Tensor, int]], receives: list[tuple[Tensor, int]]) -> list[dist.Work]:
    """A rank in the middle takes the rows from above for those from below, and the other way round."""
    works = REAL_EXCHANGE(axis, sends, receives)
    for work in works:
        work.wait()
    if len(sends) == 2:
        (above, _), (below, _) = receives
        above[:], below[:] = below.clone(), above.clone()
    return []


ROW_FAULTS = {
    "no halo": ("wan, 3 frames", PatchDecoder, "_convolve", lambda self, forward, halo, *args: forward(*args)),
    "halos swapped": ("qwen-image", Axis, "start_exchange", swapped),
    "own statistics": ("kl", Axis, "all_reduce", lambda self, x: x),
    "own attention": ("qwen-image", PatchDecoder, "_on_all_rows", alone),
}


@dataclass(frozen=True)
class Outcome:
    error: float
    """Between one device and the ranks: the greatest absolute difference. Zero on all ranks but the first."""
    rows: int
    """What this rank's decoder was given."""
    same_alone: bool
    """Whether the VAE still decodes by itself as before."""


def by_rows(axis: Axis, case: Rows) -> Outcome:
    vae, z = make(case.build, case.dtype), noise(case.shape, case.dtype)
    stock = decode(vae, z)
    patches = PatchDecoder(vae, case.plan, axis)
    seen = [0]
    watch = vae.decoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[-2]))
    picture = patches.decode(z, partial(decode, vae))
    watch.remove()
    assert (picture is None) == (axis.rank > 0)
    if picture is not None:
        assert picture.dtype == stock.dtype and picture.shape == stock.shape
    error = 0.0 if picture is None else (picture - stock).abs().max().item()
    return Outcome(error, seen[-1], torch.equal(decode(vae, z), stock))


@torch.inference_mode()
def all_by_rows(rank: int, size: int) -> dict[str, Outcome]:
    outcomes = {name: by_rows(world(rank, size), case) for name, case in ROWS.items()}
    if size == 3:
        for name, (case, owner, attribute, fault) in ROW_FAULTS.items():
            with patch.object(owner, attribute, fault):
                outcomes[name] = by_rows(world(rank, size), ROWS[case])
        group = dist.new_group([1, 2])
        if rank > 0:
            outcomes["ranks 1 and 2"] = by_rows(Axis("vae", 2, rank - 1, group, (1, 2)), ROWS["kl"])
    return outcomes


@cache
def rows_outcomes(size: int) -> list[dict[str, Outcome]]:
    return run_ranks(all_by_rows, size)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ROWS)
def test_rows_equal_one_device(name: str, size: int) -> None:
    case = ROWS[name]
    outcomes = [outcome[name] for outcome in rows_outcomes(size)]
    assert outcomes[0].error <= case.tolerance
    assert [outcome.rows for outcome in outcomes] == case.rows(size)
    assert all(outcome.same_alone for outcome in outcomes)


@pytest.mark.parametrize("fault", ROW_FAULTS)
def test_rows_fault_is_seen(fault: str) -> None:
    assert rows_outcomes(3)[0][fault].error > 1e-3


def test_rows_on_a_part_of_the_ranks() -> None:
    assert rows_outcomes(3)[1]["ranks 1 and 2"].error <= 1e-5


def test_one_rank_leaves_the_vae_as_it_is() -> None:
    vae, z = make(kl), noise((1, 4, 4, 4))
    patches = PatchDecoder(vae, Plan(), Axis("vae"))
    assert not any("forward" in vars(module) for module in vae.modules())
    with torch.inference_mode():
        assert torch.equal(patches.decode(z, partial(decode, vae)), decode(vae, z))


@pytest.mark.parametrize(
    ("plan", "text"),
    [
        (Plan(), "AutoencoderKL has no spatial plan"),
        (Plan(spatial="decode"), "'decode' names no module of AutoencoderKL, which has encoder, decoder"),
        (Plan(spatial="decoder", whole_rows=("decoder.attn",)), "'decoder.attn' matches no module"),
        (Plan(spatial="decoder", whole_rows=("encoder",)), "'encoder' matches no module"),
        (Plan(spatial="decoder"), r"'decoder.mid_block.attentions.0' \(Attention\) cannot run on some of the rows"),
        (Plan(spatial="encoder", whole_rows=("encoder.mid_block",)), r"'encoder.down_blocks.0.* stride and dilation 1"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(plan: Plan, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        PatchDecoder(make(kl), plan, Axis("vae", 2))


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(4, 4, 3, stride=2, padding=1),
        nn.Conv2d(4, 4, 3),
        nn.Conv2d(4, 4, (3, 1), padding=(2, 0), dilation=(2, 1)),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(4, 4, 4, padding=2),
        nn.Conv3d(4, 4, 1, stride=2),
        nn.Conv1d(4, 4, 1),
        nn.ConvTranspose2d(4, 4, 2, stride=2),
        nn.InstanceNorm2d(4),
        nn.BatchNorm2d(4),
        nn.LayerNorm([4, 8, 8]),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.AdaptiveAvgPool2d(1),
        nn.ZeroPad2d(1),
    ],
    ids=str,
)
def test_a_module_that_mixes_rows_is_refused(module: nn.Module) -> None:
    vae = nn.ModuleDict({"decoder": nn.Sequential(nn.SiLU(), module)})
    with pytest.raises(ValueError, match=r"'decoder.1' .* in Plan.whole_rows"):
        PatchDecoder(vae, Plan(spatial="decoder"), Axis("vae", 2))
    PatchDecoder(vae, Plan(spatial="decoder", whole_rows=("decoder.1",)), Axis("vae", 2))


def test_rows_that_do_not_come_of_the_latents_are_refused() -> None:
    patches = PatchDecoder(make(kl), PLAN, Axis("vae", 2))
    with pytest.raises(RuntimeError, match=r"a tensor \(1, 3, 7, 4\) of 2 latent rows"):
        patches.decode(noise((1, 4, 4, 4)), lambda z: noise((1, 3, 7, 4)))


# ---- by tiles ----------------------------------------------------------------------------------------------------


def decode_tile(vae: Any, z: Tensor) -> Tensor:
    """What stock `tiled_decode` does for one tile."""
    if isinstance(vae, AutoencoderKL):
        return vae.decoder(vae.post_quant_conv(z))
    vae.clear_cache()
    frames = []
    for k in range(z.shape[2]):
        vae._conv_idx = [0]
        first = {"first_chunk": k == 0} if isinstance(vae, AutoencoderKLWan) else {}
        x = vae.post_quant_conv(z[:, :, k : k + 1])
        frames.append(vae.decoder(x, feat_cache=vae._feat_map, feat_idx=vae._conv_idx, **first))
    return torch.cat(frames, 2)


def switch_tiling_on(vae: Any) -> Tiling:
    """Switch stock tiling on, and say the same in our words.

    Twelve lines overlap, so that the weights are no round numbers in any type.
    """
    vae.enable_tiling()
    if isinstance(vae, AutoencoderKL):
        vae.tile_overlap_factor = 0.375
        return Tiling(tile=(32, 32), stride=(20, 20), scale=4)
    if vae.spatial_compression_ratio == 8:  # of which the decoder does 4 and unpatchify 2
        vae.enable_tiling(64, 56, 40, 32)
    else:
        vae.enable_tiling(32, 28, 20, 16)
    return Tiling(tile=(32, 28), stride=(20, 16), scale=4)


def finish(vae: Any, picture: Tensor) -> Tensor:
    """What is left to do behind the tiles."""
    if isinstance(vae, AutoencoderKLWan):
        if vae.config.patch_size is not None:
            picture = unpatchify(picture, vae.config.patch_size)
        picture = picture.clamp(-1, 1)
    return picture


@dataclass(frozen=True)
class Tiles:
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    count: int
    """How many tiles stock makes of it."""
    dtype: torch.dtype = torch.float32


TILES = {
    "qwen-image": Tiles(qwen_image, (1, 4, 1, 13, 11), 9),
    "qwen-image, bfloat16, batch": Tiles(qwen_image, (2, 4, 1, 13, 11), 9, torch.bfloat16),
    "qwen-image, 2 tiles": Tiles(qwen_image, (1, 4, 1, 9, 4), 2),
    "wan, 3 frames": Tiles(wan, (1, 4, 3, 8, 11), 6),
    "wan, 2 frames, batch, bfloat16": Tiles(wan, (2, 4, 2, 13, 7), 6, torch.bfloat16),
    "wan 2.2, 2 frames": Tiles(wan_2_2, (1, 4, 2, 9, 7), 4),
    "kl, batch": Tiles(kl, (2, 4, 15, 13), 9),
    "kl, bfloat16": Tiles(kl, (1, 4, 15, 13), 9, torch.bfloat16),
}


REAL_BLEND, REAL_FADE = spatial.blend, spatial._fade


def columns_first(tiles: list[list[Tensor]], tiling: Tiling) -> Tensor:
    turned = Tiling(tile=tiling.tile[::-1], stride=tiling.stride[::-1], scale=tiling.scale)
    return REAL_BLEND([[tile.mT for tile in column] for column in zip(*tiles, strict=True)], turned).mT


def rounded_once(before: Tensor, after: Tensor, extent: int, dim: int) -> None:
    precise = after.float()
    REAL_FADE(before.float(), precise, extent, dim)
    after.copy_(precise)


TILE_FAULTS = {
    "columns first": ("qwen-image", spatial, "blend", columns_first),
    "rounded once": ("kl, bfloat16", spatial, "_fade", rounded_once),
    "rounded weights": ("kl, bfloat16", torch, "promote_types", lambda dtype, _: dtype),
    "no fade": ("wan, 3 frames", spatial, "_fade", lambda before, after, extent, dim: None),
}


def by_tiles(axis: Axis, case: Tiles) -> tuple[bool, int]:
    """Whether the picture equals stock's, and how many tiles this rank decoded."""
    vae, z = make(case.build, case.dtype), noise(case.shape, case.dtype)
    tiling = switch_tiling_on(vae)
    assert tiling.applies(*z.shape[-2:])
    stock, decoded = decode(vae, z), []

    def decode_and_count(z: Tensor) -> Tensor:
        decoded.append(z)
        return decode_tile(vae, z)

    picture = map_tiles(z, decode_and_count, tiling, axis)
    assert (picture is None) == (axis.rank > 0)
    return picture is None or torch.equal(finish(vae, picture), stock), len(decoded)


@torch.inference_mode()
def all_by_tiles(rank: int, size: int) -> dict[str, tuple[bool, int]]:
    outcomes = {name: by_tiles(world(rank, size), case) for name, case in TILES.items()}
    if size == 3:
        for name, (case, owner, attribute, fault) in TILE_FAULTS.items():
            with patch.object(owner, attribute, fault):
                outcomes[name] = by_tiles(world(rank, size), TILES[case])
    return outcomes


@cache
def tiles_outcomes(size: int) -> list[dict[str, tuple[bool, int]]]:
    return run_ranks(all_by_tiles, size)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", TILES)
def test_tiles_equal_stock_tiling(name: str, size: int) -> None:
    outcomes = [outcome[name] for outcome in tiles_outcomes(size)]
    assert outcomes[0][0]
    assert sum(count for _, count in outcomes) == TILES[name].count


@pytest.mark.parametrize("fault", TILE_FAULTS)
def test_tiles_fault_is_seen(fault: str) -> None:
    same, _ = tiles_outcomes(3)[0][fault]
    assert not same


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [200, 64, 50])
def test_a_fade_is_rounded_as_stock_does(size: int, dtype: torch.dtype) -> None:
    above, below = noise((2, 3, 2, 256, 40), dtype), noise((2, 3, 2, size, 40), dtype) - 3
    for line, dim, before, after in (
        (AutoencoderKLWan.blend_v, -2, above, below),
        (AutoencoderKLWan.blend_h, -1, above.mT, below.mT),
    ):
        stock = line(None, before, after.clone(), 64)
        spatial._fade(before, faded := after.clone(), 64, dim)
        assert torch.equal(faded, stock)


@pytest.mark.parametrize(("height", "width"), [(8, 7), (8, 8), (9, 7), (3, 3)])
def test_tiling_applies_where_stock_tiles(height: int, width: int) -> None:
    vae = make(qwen_image)
    tiling = switch_tiling_on(vae)
    with patch.object(vae, "tiled_decode") as tiled_decode, torch.inference_mode():
        decode(vae, noise((1, 4, 1, height, width)))
    assert tiling.applies(height, width) == tiled_decode.called


def test_tiling_applies_above_what_it_names() -> None:
    tiling = Tiling(tile=(64, 64), stride=(48, 48), scale=8, encodes=True, above=(32, 40))
    assert [tiling.applies(*size) for size in ((32, 40), (40, 40), (32, 48))] == [False, True, True]
    assert tiling.boxes(32, 56) == [[(0, 0, 32, 56), (0, 48, 32, 8)]]


def test_tiles_are_shared_out_by_area() -> None:
    assert share_out([4, 4, 4, 4, 2, 2, 2, 2, 1], 1) == [0] * 9
    assert share_out([1], 3) == [0]
    assert share_out([5, 5, 5, 5], 3) == [0, 2, 1, 2]  # rank 0 blends, so it has less to decode
    areas = [16, 16, 8, 16, 16, 8, 4, 4, 2]
    load = [0] * 4
    for area, owner in zip(areas, share_out(areas, 4), strict=True):
        load[owner] += area
    assert max(load) - min(load) <= 4


@pytest.mark.parametrize(("tile", "stride"), [((30, 32), (24, 24)), ((32, 32), (24, 22)), ((32, 32), (40, 24))])
def test_tiles_that_do_not_fit_are_refused(tile: tuple[int, int], stride: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="must be multiples of 4 pixels"):
        Tiling(tile=tile, stride=stride, scale=4)


def test_a_tile_of_another_scale_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a tile of 8 x 8 became \(1, 3, 16, 16\), not \(32, 32\)"):
        map_tiles(
            noise((1, 4, 9, 9)),
            lambda z: noise((1, 3, 16, 16)),
            Tiling(tile=(32, 32), stride=(24, 24), scale=4),
            Axis("vae"),
        )
