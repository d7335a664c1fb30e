"""What the engine itself costs: commands to the workers and back, and the scheduler's decisions.

`python -m bench.engine [--ranks 4] [--rounds 2000]`

* Command: `Drop` of an unknown id costs a worker nothing, so what is left is the wire: encode, send to every rank over
  the WorkerGroup's own sockets, each rank decodes, obeys and answers, collect all answers. Real worker processes with
  the demo loaded, polled as the engine polls them.
* Scheduler: `next` and `finish` of steps in turn, with as many requests running as are allowed, and 100 waiting.
"""

from __future__ import annotations

import argparse
import os
import time

from darkroom.configs import Request
from darkroom.engine.messages import Drop, Generate, Prepared
from darkroom.engine.scheduler import Scheduler

from .processes import Workers
from .tables import Row, median, p99, print_table, verdict

TARGET_MS = 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description="commands to workers and back; the scheduler")
    parser.add_argument("--ranks", type=int, default=4, help="worker processes (default 4)")
    parser.add_argument("--rounds", type=int, default=2000, help="commands measured (default 2000)")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    print_table([*command_rows(args.ranks, args.rounds), *scheduler_rows()])


def command_rows(ranks: int, rounds: int) -> list[Row]:
    command = Drop(ids=("nobody",))
    with Workers(ring=ranks) as group:
        for _ in range(50):
            group.run(command)
        milliseconds = [1000 * group.run(command) for _ in range(rounds)]
    middle, worst = median(milliseconds), p99(milliseconds)
    what = f"a command to {ranks} workers and back"
    return [
        (f"{what}, median of {rounds}", f"{middle:.3f} ms", verdict(f"< {TARGET_MS} ms", middle < TARGET_MS)),
        (f"{what}, p99", f"{worst:.3f} ms", ""),
    ]


def scheduler_rows(rounds: int = 20_000) -> list[Row]:
    scheduler = Scheduler()
    for i in range(104):
        scheduler.add(Generate(id=str(i), request=_request()), 0.0)
    facts = Prepared(num_steps=10**9, text_tokens=10, image_tokens=64)
    for _ in range(scheduler.max_running):
        _turn(scheduler, (facts,))
    start = time.perf_counter()
    for _ in range(rounds):
        _turn(scheduler, ())
    microseconds = 1e6 * (time.perf_counter() - start) / rounds
    return [(f"Scheduler.next + finish, mean of {rounds}", f"{microseconds:.2f} us", "")]


def _turn(scheduler: Scheduler, prepared: tuple[Prepared, ...]) -> None:
    command = scheduler.next(0.0)
    assert command is not None
    scheduler.finish(command, prepared, 0.0, 0.0)


def _request() -> Request:
    return Request(
        prompt="a red circle",
        negative_prompt=" ",
        width=128,
        height=128,
        num_inference_steps=20,
        guidance_scale=2.5,
        max_sequence_length=512,
        seed=0,
    )


if __name__ == "__main__":
    main()
