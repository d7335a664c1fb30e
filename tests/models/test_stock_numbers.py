"""Expressions of diffusers' sources come to what its imported classes make of the same configs."""

from __future__ import annotations

import ast
from typing import Any

import pytest
from diffusers import AutoencoderKLHunyuanVideo, AutoencoderKLLTXVideo

from darkroom.models.stock import Source, find_class
from darkroom.models.stock_numbers import Instance, Unknown

RATIOS = ("spatial_compression_ratio", "temporal_compression_ratio")


@pytest.mark.parametrize(
    ("cls", "config"),
    [
        (AutoencoderKLLTXVideo, {"patch_size": 2, "patch_size_t": 2}),
        (AutoencoderKLLTXVideo, {"spatial_compression_ratio": 16, "temporal_compression_ratio": 2}),
        (AutoencoderKLHunyuanVideo, {}),
    ],
)
def test_a_vae_says_what_the_imported_class_does(cls: Any, config: dict[str, Any]) -> None:
    source = find_class(cls.__name__, "models")
    assert source is not None
    small: dict[str, Any] = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4}
    if cls is AutoencoderKLLTXVideo:
        small = {"block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    real = cls(**small, **config)
    assert [Instance(source, config).attribute(name) for name in RATIOS] == [getattr(real, name) for name in RATIOS]


TEXT = """
class A:
    def __init__(self, vae, widths=(1, 2, 3), depth=2, factor=None):
        self.scale = 2 ** (len(self.vae.config.stages) - 1) if getattr(self, "vae", None) else 8
        self.missing = self.vae.config.nothing
        if isinstance(self.vae, (B, C)):
            self.kind = "many"
        elif isinstance(self.vae, A):
            self.kind = "one"
        else:
            self.kind = "none"
        self.last = widths[::-1][0]
        self.factor = depth * sum(widths) if factor is None else factor
        self.made = make(depth)
        self.other = -depth
        self.sum = widths + depth
        self.either = factor or depth and 5
        self.has = hasattr(self, "text_encoder")

    def __call__(self, height=None, width=7, length=None, none=None):
        height = height or self.vae.depth * self.scale
        length = 3
"""


def instance(vae: dict[str, Any], **config: Any) -> Instance:
    node = ast.parse(TEXT).body[0]
    assert isinstance(node, ast.ClassDef)
    source = Source(node, TEXT)
    return Instance(source, config, {"vae": Instance(source, {"depth": 3, **vae})})


def test_expressions_are_evaluated() -> None:
    found = instance({"stages": [8, 8, 8]}, depth=5)
    names = ("scale", "kind", "last", "factor", "either", "has")
    assert [found.attribute(name) for name in names] == [4, "one", 3, 30, 5, False]
    assert instance({}, factor=9).attribute("factor") == 9
    assert found.parts["vae"].attribute("factor") == 18


@pytest.mark.parametrize("name", ["missing", "made", "other", "sum", "nothing"])
def test_what_is_not_known_is_no_number(name: str) -> None:
    with pytest.raises(Unknown):
        instance({"stages": [8]}).attribute(name)


def test_defaults_of_a_call() -> None:
    source = instance({"stages": [8, 8]}).source
    found = Instance(source, {}, {"vae": Instance(source, {"stages": [8, 8], "depth": 3})})
    assert [found.default(name) for name in ("width", "length", "none")] == [7, None, None]
    with pytest.raises(Unknown):
        found.default("height")  # a VAE has no attribute of this name
