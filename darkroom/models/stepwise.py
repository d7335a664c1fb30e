"""A stock pipeline's call, done one denoising step at a time.

The call runs on a thread of its own, which works only while `resume` waits for it: two threads never compute at the
same time. A thread, and not a coroutine in C, since what torch keeps per thread (inference mode, the current device)
then belongs to the call, however calls take turns.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from darkroom.parallel.guidance import BranchCalls

    from .any_diffusers import CallSample


class EndOfCall(BaseException):
    """Raised inside the call to end it early. Not an `Exception`: the pipeline must not catch it."""


class StepwiseCall:
    """`function(pause)`, which runs until it calls `pause`, each time that it is resumed."""

    def __init__(self, function: Callable[[Callable[[], None]], Any], device: torch.device) -> None:
        self.result: Any = None
        """What the function returned; None if it was ended early."""
        self.ended = False
        self._function, self._device = function, device
        self._error: BaseException | None = None
        self._is_dropped = False
        self._turn, self._answer = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, name="call", daemon=True)  # a worker that ends waits for none
        self._thread.start()

    def resume(self) -> bool:
        """Let the call run until it pauses: True; or until it ends: False. Raises what the call raised."""
        if self.ended:
            raise RuntimeError("the call has ended already")
        self._turn.release()
        self._answer.acquire()
        if self.ended:
            self._thread.join()
        if self._error is not None:
            raise self._error
        return not self.ended

    def end(self) -> None:
        """Unwind a call that is paused. Afterwards there is no thread."""
        if not self.ended:
            self._is_dropped = True
            self.resume()

    def _pause(self) -> None:
        self._answer.release()
        self._turn.acquire()
        if self._is_dropped:
            raise EndOfCall

    def _run(self) -> None:
        self._turn.acquire()
        try:
            if not self._is_dropped:
                self._compute()
        except EndOfCall:
            pass
        except BaseException as e:
            self._error = e
        self.ended = True
        self._answer.release()

    def _compute(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        with torch.inference_mode():
            self.result = self._function(self._pause)


class Steps:
    """Stands for the pipeline's progress bar, whose loop pauses when it begins, and after every step.

    `parameters` are those of the pipeline's call. If `callback` is one of them, the older hook, a step is over with it:
    it comes after the bar moves, and the newer one before.
    """

    def __init__(
        self, sample: CallSample, pause: Callable[[], None], branches: BranchCalls | None, parameters: Collection[str]
    ) -> None:
        self._sample, self._pause, self._branches = sample, pause, branches
        self._parameters = parameters

    def of(self, total: int) -> Steps:
        """Stands for the method that makes the bar."""
        self._sample.steps = total
        return self

    def __enter__(self) -> Steps:
        self._pause()
        return self

    def __exit__(self, *_error: object) -> None:
        return

    def update(self, _steps: int = 1) -> None:
        if "callback" not in self._parameters:
            self._end()

    def hooks(self) -> dict[str, Any]:
        """What is told the latents after each step, under the name that the pipeline has for it."""

        def keep(latents: torch.Tensor) -> dict[str, Any]:
            self._sample.latents = latents
            return {}

        def end(latents: torch.Tensor) -> None:
            keep(latents)
            self._end()

        hooks = {
            "callback_on_step_end": lambda _pipe, _step, _time, values: keep(values["latents"]),
            "callback": lambda _step, _time, latents: end(latents),
        }
        return {name: hook for name, hook in hooks.items() if name in self._parameters}

    def _end(self) -> None:
        if self._branches:
            self._branches.end_step(self._sample.latents)
        self._pause()
