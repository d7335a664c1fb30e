"""Runs a function as a group of ranks: real processes, real collectives (gloo), one thread each. For golden tests.

    def rank_sum(rank: int, size: int, start: int) -> int:  # at a module's top level, so that it can be pickled
        x = torch.tensor(start + rank)
        dist.all_reduce(x)
        return int(x)

    assert run_ranks(rank_sum, 2, 10) == [21, 21]

Ranks are forked from one server process, made at the first call, that has in memory already what they import: a
group starts in a tenth of a second instead of seven. Still, put the cases that share a group into one call.
"""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

PRELOAD = ["tests.subjects"]  # brings pytest, torch, diffusers and all of darkroom's models with it

Result = TypeVar("Result")


class RankError(Exception):
    """A rank raised, died or did not answer in time. Its text holds the rank's own traceback."""


def run_ranks(function: Callable[..., Result], size: int, *args: Any, timeout: float = 120) -> list[Result]:
    """The results, in order of rank, of `function(rank, size, *args)` in `size` processes with a default group.

    Arguments and results travel pickled, tensors by value. If a rank fails, or `timeout` seconds pass, every process
    of the group is killed and `RankError` is raised: this never hangs.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    call = pickle.dumps((function, args))
    processes: list[ForkServerProcess] = []
    answers: list[Connection] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(size):
                answer, rank_end = context.Pipe(duplex=False)
                process = context.Process(target=_run_rank, args=(rank, size, folder, call, timeout, rank_end))
                process.start()
                rank_end.close()  # so that a rank's death ends its pipe
                processes.append(process)
                answers.append(answer)
            return _results(answers, timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _run_rank(rank: int, size: int, folder: str, call: bytes, timeout: float, answer: Connection) -> None:
    torch.set_num_threads(1)
    try:
        store = dist.FileStore(str(Path(folder) / "store"), size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout))
        function, args = pickle.loads(call)
        message = pickle.dumps((True, function(rank, size, *args)))
    except BaseException:  # pytest's failures too are told to the caller
        message = pickle.dumps((False, traceback.format_exc()))
    answer.send_bytes(message)  # before the group falls apart: the first failure told is the cause of the others
    if dist.is_initialized():
        dist.destroy_process_group()


def _results(answers: Sequence[Connection], timeout: float) -> list[Any]:
    deadline = time.monotonic() + timeout
    results: dict[int, Any] = {}
    while len(results) < len(answers):
        missing = {answer: rank for rank, answer in enumerate(answers) if rank not in results}
        ready = wait(list(missing), max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankError(f"ranks {sorted(missing.values())} of {len(answers)} gave no answer in {timeout:g} s")
        failures = []
        for answer in answers:
            if answer in ready:
                rank = missing[answer]
                succeeded, results[rank] = _receive(answer)
                if not succeeded:
                    failures.append(f"rank {rank} of {len(answers)} failed:\n{results[rank]}")
        if failures:
            raise RankError("\n".join(failures))
    return [results[rank] for rank in range(len(answers))]


def _receive(answer: Connection) -> tuple[bool, Any]:
    try:
        succeeded, result = pickle.loads(answer.recv_bytes())
        return succeeded, result
    except EOFError:
        return False, "it died without a word (its output may tell more)"
