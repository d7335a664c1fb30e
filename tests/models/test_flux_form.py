"""What the families of FLUX's form share, beyond what each one's golden test runs: texts of several lengths."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from darkroom.configs import ParallelConfig
from tests.golden import TOLERANCE, difference, generate, request, worker

NAMES = ("longcat_image_4_heads", "ovis_image_4_heads")


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_unequal_windows_is_each_alone(name: str, checkpoints: dict[str, Path]) -> None:
    """The text is padded to the window, and the padding attended over: another window is another picture."""
    prompt = "three tiny yellow stars"
    several = [request(prompt, max_sequence_length=length) for length in (8, 64, 8)]
    with worker(checkpoints[name], ParallelConfig()) as one:
        alone = generate(one, several)
        assert difference(generate(one, several, batched=True), alone) <= TOLERANCE
        assert difference({"0": alone["0"]}, {"0": alone["1"]}) > 10 * TOLERANCE
        assert difference({"0": alone["0"]}, {"0": alone["2"]}) == 0


@pytest.mark.parametrize("name", NAMES)
def test_samples_of_one_window_share_a_forward_pass(name: str, checkpoints: dict[str, Path]) -> None:
    both = [request("a cat", guidance_scale=1.0), request("a very large orange house", guidance_scale=1.0)]
    with worker(checkpoints[name], ParallelConfig()) as one:
        transformer = one.model.pipe.transformer
        with patch.object(transformer, "forward", wraps=transformer.forward) as forward:
            generate(one, both, batched=True)
        assert [call.kwargs["hidden_states"].shape[0] for call in forward.call_args_list] == [2] * 3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("values", "tokens"),
    [({"prompt": "a cat"}, 2), ({"prompt": "a very large orange house", "max_sequence_length": 3}, 3)],
)
def test_padding_is_not_counted(name: str, values: dict[str, Any], tokens: int, checkpoints: dict[str, Path]) -> None:
    with worker(checkpoints[name], ParallelConfig()) as one:
        assert one.model.prepare(request(**values)).text_tokens == tokens
