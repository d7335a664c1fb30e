"""Figures to a table. Imports nothing: `gpu.py` must run on a machine that has neither psutil nor a server's needs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

Row = tuple[str, str, str]
"""(what was measured, the figure, the target or a remark)"""


def print_table(rows: Sequence[Row]) -> None:
    """The last thing a benchmark prints."""
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    print()
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def p99(values: Sequence[float]) -> float:
    """The smallest value that 99 % of all are not above."""
    return sorted(values)[-(-99 * len(values) // 100) - 1]


def verdict(target: str, is_met: bool) -> str:
    return f"target {target}: {'met' if is_met else 'MISSED'}"
