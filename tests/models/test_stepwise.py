"""A call on its own thread: it works only while it is resumed, and leaves nothing behind."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from darkroom.models.stepwise import EndOfCall, StepwiseCall

CPU = torch.device("cpu")


def test_a_call_runs_from_pause_to_pause() -> None:
    seen: list[int] = []

    def function(pause: Callable[[], None]) -> str:
        for i in range(2):
            seen.append(i)
            pause()
        return "done"

    call = StepwiseCall(function, CPU)
    assert seen == [] and call.resume() and seen == [0] and call.resume() and seen == [0, 1]
    assert not call.resume() and call.ended and call.result == "done"
    with pytest.raises(RuntimeError, match="ended already"):
        call.resume()


def test_every_call_is_in_inference_mode_of_its_own() -> None:
    def function(pause: Callable[[], None]) -> list[bool]:
        seen = [torch.is_inference_mode_enabled()]
        with torch.inference_mode(False):
            pause()
            seen.append(torch.is_inference_mode_enabled())
        return seen

    first, second = StepwiseCall(function, CPU), StepwiseCall(function, CPU)
    for call in (first, second, first, second):
        call.resume()
    assert first.result == second.result == [True, False]
    assert not torch.is_inference_mode_enabled()


def test_an_error_is_raised_where_the_call_was_resumed() -> None:
    def function(pause: Callable[[], None]) -> None:
        pause()
        raise KeyError("x")

    call = StepwiseCall(function, CPU)
    call.resume()
    with pytest.raises(KeyError, match="x"):
        call.resume()
    assert call.ended
    call.end()  # nothing is left to end


@pytest.mark.parametrize("steps", [0, 1])
def test_a_call_that_is_ended_unwinds(steps: int) -> None:
    unwound: list[bool] = []

    def function(pause: Callable[[], None]) -> None:
        try:
            pause()
        except Exception:  # what a pipeline may catch
            raise AssertionError from None
        finally:
            unwound.append(True)

    before = threading.active_count()
    call = StepwiseCall(function, CPU)
    for _ in range(steps):
        call.resume()
    call.end()
    assert call.ended and call.result is None and unwound == [True] * steps
    assert threading.active_count() == before


def test_a_call_may_end_itself_early() -> None:
    def function(pause: Callable[[], None]) -> None:
        raise EndOfCall

    call = StepwiseCall(function, CPU)
    assert not call.resume() and call.result is None
