# SPDX-License-Identifier: Apache-2.0
"""What a method's demo gives besides its section of the page: tables for the terminal, and its line in the last."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TextTable:
    """A table for the terminal; ``prose``: its last column is text, which wraps."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    prose: bool = False


@dataclass(frozen=True)
class Speedup:
    """How many times as fast ``op`` was as ``against``, measured in this run."""

    op: str
    against: str
    ratio: float

    @property
    def times(self) -> str:
        """The ratio, as it is shown."""
        return f"{self.ratio:.3g}×"

    @property
    def cells(self) -> list[str]:
        """For a row of a table: what, against what, how many times as fast."""
        return [self.op, self.against, self.times]

    def __str__(self) -> str:
        return f"{self.op} {self.times} {self.against}"


@dataclass(frozen=True)
class Headline:
    """A method's line: what ran and on what, what came of it, and how fast its kernel was."""

    ran: str
    result: str
    speed: Speedup


def speedup(
    op: str,
    against: str,
    ours: Callable[[], Any],
    theirs: Callable[[], Any],
    rounds: int = 9,
    seconds: float = 3.0,
) -> Speedup:
    """Times two functions in turns, after one call of each that does not count; the ratio of their medians.

    Ends after ``rounds``, or with the first that began ``seconds`` or more after the start.
    """
    theirs(), ours()
    times: tuple[list[float], list[float]] = ([], [])
    begin = time.perf_counter()
    while len(times[0]) < rounds and (not times[0] or time.perf_counter() - begin < seconds):
        for call, taken in zip((theirs, ours), times):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    return Speedup(op, against, statistics.median(times[0]) / statistics.median(times[1]))
