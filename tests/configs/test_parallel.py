from __future__ import annotations

import pytest
from pydantic import ValidationError

from darkroom.configs import ParallelConfig


def test_one_rank_by_default() -> None:
    config = ParallelConfig()
    assert (config.world_size, config.sequence_parallel_size, config.vae_size) == (1, 1, 1)
    assert set(config.axes.values()) == {1}


def test_the_axes_are_laid_out_cfg_outermost_and_tp_innermost() -> None:
    config = ParallelConfig(
        cfg_parallel_size=2, ring_degree=3, ulysses_degree=5, tensor_parallel_size=7, vae_patch_parallel_size=11
    )
    assert list(config.axes.items()) == [("cfg", 2), ("ring", 3), ("ulysses", 5), ("tp", 7)]
    assert config.sequence_parallel_size == 15
    assert config.world_size == 2 * 3 * 5 * 7


@pytest.mark.parametrize(("asked", "world", "used"), [(1, 4, 1), (2, 4, 2), (4, 4, 4), (8, 4, 4), (8, 1, 1)])
def test_the_vae_takes_at_most_the_dit_group(asked: int, world: int, used: int) -> None:
    assert ParallelConfig(vae_patch_parallel_size=asked, tensor_parallel_size=world).vae_size == used


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ("usp", "ulysses_degree"),
        ("ring", "ring_degree"),
        ("tp", "tensor_parallel_size"),
        ("cfg", "cfg_parallel_size"),
        ("vae-pp", "vae_patch_parallel_size"),
    ],
)
def test_every_degree_has_two_names(short: str, long: str) -> None:
    assert ParallelConfig.model_validate({short: 2}) == ParallelConfig.model_validate({long: 2})


@pytest.mark.parametrize("values", [{"usp": 0}, {"tp": -1}, {"ring": 1.5}, {"sp": 2}])
def test_nonsense_is_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        ParallelConfig.model_validate(values)


def test_it_is_frozen() -> None:
    with pytest.raises(ValidationError):
        ParallelConfig().ring_degree = 2
