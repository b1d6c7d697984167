# SPDX-License-Identifier: Apache-2.0
"""Rewards on a scale that PPO can take: divided by a running deviation, clipped (Themis, spec section 9).

Published examples of the method's rewards range from -25 to +38.8; +-5 is DeepSpeed-Chat's clip.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

from tenfold.training.checks import positive


class Normalizer:
    """``clip((x - mean) / sqrt(variance + eps), -clip, clip)``; mean and variance of all that was seen.

    Safe to use from several threads. What is not a number stays NaN and is not counted; an infinite reward is
    clipped and not counted.

    Args:
        clip: largest absolute value, None: no limit. running: without it rewards are clipped only, which does not
            depend on the order in which they come. eps: added to the variance.

    Raises:
        ValueError: clip or eps not positive.
    """

    def __init__(self, clip: float | None = 5.0, running: bool = False, eps: float = 1e-8) -> None:
        if clip is not None:
            positive("clip", clip)
        positive("eps", eps)
        self.clip, self.running, self.eps = clip, running, eps
        self.count, self.mean, self.square = 0, 0.0, 0.0
        self._lock = threading.Lock()

    @property
    def variance(self) -> float:
        """Of what was seen, divided by the count; 1 before two values were."""
        return self.square / self.count if self.count > 1 else 1.0

    def update(self, values: Sequence[float]) -> None:
        """Counts a batch (Chan's merge, so that the order within a batch does not matter)."""
        found = [v for v in values if math.isfinite(v)]
        if not found:
            return
        with self._lock:
            mean = math.fsum(found) / len(found)
            square = math.fsum((v - mean) ** 2 for v in found)
            total = self.count + len(found)
            gap = mean - self.mean
            self.square += square + gap * gap * self.count * len(found) / total
            self.mean += gap * len(found) / total
            self.count = total

    def scale(self, value: float) -> float:
        """One reward on the scale as it is now; nothing is counted."""
        if math.isnan(value):
            return value
        if self.running and self.count and math.isfinite(value):
            value = (value - self.mean) / math.sqrt(self.variance + self.eps)
        return value if self.clip is None else min(max(value, -self.clip), self.clip)

    def __call__(self, values: Sequence[float]) -> list[float]:
        """A batch, counted first if the scale is a running one."""
        if self.running:
            self.update(values)
        return [self.scale(v) for v in values]

    def state_dict(self) -> dict[str, Any]:
        """What was seen, to go on after a restart."""
        return {"count": self.count, "mean": self.mean, "square": self.square}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave."""
        with self._lock:
            self.count, self.mean, self.square = (
                int(state["count"]), float(state["mean"]), float(state["square"])
            )  # fmt: skip
