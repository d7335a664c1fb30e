"""A stock pipeline's call, done one denoising step at a time.

The call runs on a thread of its own, which works only while `resume` waits for it: two threads never compute at the
same time. A thread, and not a coroutine in C, since what torch keeps per thread (inference mode, the current device)
then belongs to the call, however calls take turns.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch


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
