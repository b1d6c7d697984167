# SPDX-License-Identifier: Apache-2.0
"""Limits of how often a tool is called: a token bucket that gives out turns in advance."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from tenfold.training.checks import integers, positive


@dataclass(frozen=True)
class Rate:
    """``calls`` per ``seconds`` on average, and at most ``calls`` at once."""

    calls: int
    seconds: float = 1.0

    def __post_init__(self) -> None:
        integers(self, {"calls": 1})
        positive("seconds", self.seconds)


class Bucket:
    """Holds ``rate.calls`` tokens at most and gets them back evenly; promises ``most`` turns in advance at most.

    Times are of one monotonic clock.
    """

    def __init__(self, rate: Rate, now: float, *, most: int) -> None:
        self._most = most
        self._full, self._per_second = float(rate.calls), rate.calls / rate.seconds
        self._tokens, self._at = self._full, now  # negative: so many turns are promised
        self._lock = threading.Lock()

    def reserve(self, now: float, latest: float | None = None) -> float | None:
        """Takes a token; the time from which it counts. None, and nothing taken: after ``latest``, or too many wait."""
        with self._lock:
            later = max(now, self._at)
            self._tokens = min(self._full, self._tokens + (later - self._at) * self._per_second)
            self._at = later
            wait = max(0.0, (1.0 - self._tokens) / self._per_second)
            full = self._tokens <= -self._most
            if full or (latest is not None and later + wait > latest):
                return None
            self._tokens -= 1.0
            return later + wait
