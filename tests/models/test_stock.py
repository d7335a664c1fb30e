"""diffusers' sources read as text say what its imported classes say."""

from __future__ import annotations

import inspect

import diffusers
import pytest

from darkroom.models.stock import find_class


@pytest.mark.parametrize("name", ["FluxPipeline", "Flux2KleinPipeline", "AuraFlowPipeline", "PixArtSigmaPipeline"])
def test_parameters_are_those_of_the_imported_class(name: str) -> None:
    source = find_class(name, "pipelines")
    assert source is not None
    for method in ("__init__", "__call__"):
        signature = inspect.signature(getattr(getattr(diffusers, name), method)).parameters
        real = [x for x in signature if x not in ("self", "args", "kwargs")]
        assert list(source.parameters(method)) == real
        for parameter, default in source.parameters(method).items():
            assert default in (signature[parameter].default, None)


def test_what_is_not_there_is_none() -> None:
    assert find_class("NoPipeline", "pipelines") is None
    source = find_class("FluxPipeline", "pipelines")
    assert source is not None
    assert source.constant("default_sample_size") == 128
    assert source.constant("nothing") is source.attribute("nothing") is source.method("nothing") is None
    assert source.code("nothing") == "" and source.parameters("nothing") == {}
    assert source.is_optional("__call__", "width") and not source.is_optional("__call__", "max_sequence_length")
