# SPDX-License-Identifier: Apache-2.0
"""How far the difference of two rewards can be read as a probability: P(first is preferred) = sigmoid(difference)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Bin:
    """Pairs whose confidence is in [low, high): how many, their mean confidence, and the share that is right."""

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Calibration:
    """Confidence against what was right.

    Attributes:
        bins: of equal width over [0.5, 1]; those without a pair are left out.
        ece: mean distance of accuracy and confidence over the bins, weighted by pairs (expected calibration error).
        brier: mean of (P - 1)^2, where P is the probability of what is preferred. nll: mean of -log P, which is the
            ranking loss. temperature: T that minimises the mean of -log sigmoid(difference / T); inf where no
            difference helps, 0 where all are right.
    """

    bins: tuple[Bin, ...]
    ece: float
    brier: float
    nll: float
    temperature: float
    count: int

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def calibration(differences: Sequence[float], bins: int = 10) -> Calibration:
    """Of differences reward(preferred) - reward(other); NaN (a missing reward) is left out.

    A pair's confidence is sigmoid(|difference|), and it is right if the difference is positive; a tie is half right,
    as its confidence of 0.5 says.

    Raises:
        ValueError: no differences, bins.
    """
    if bins < 1:
        raise ValueError(f"bins must be >= 1, got {bins}")
    found = [d for d in differences if not math.isnan(d)]
    if not found:
        raise ValueError("differences holds no numbers")
    parts: list[list[tuple[float, float]]] = [[] for _ in range(bins)]
    for d in found:
        confidence = _sigmoid(abs(d))
        right = 0.5 if d == 0 else float(d > 0)
        parts[min(bins - 1, int((confidence - 0.5) * 2 * bins))].append((confidence, right))
    made, ece = [], 0.0
    for i, part in enumerate(parts):
        if part:
            mean, right = (math.fsum(x) / len(part) for x in zip(*part))
            made.append(
                Bin(0.5 + i / (2 * bins), 0.5 + (i + 1) / (2 * bins), len(part), mean, right)
            )
            ece += len(part) / len(found) * abs(right - mean)
    brier = math.fsum(_sigmoid(-d) ** 2 for d in found) / len(found)
    nll = math.fsum(_softplus(-d) for d in found) / len(found)
    return Calibration(tuple(made), ece, brier, nll, _temperature(found), len(found))


def _temperature(found: Sequence[float]) -> float:
    """By bisection: the loss is convex in 1 / T, its slope at s = 1 / T is -sum d sigmoid(-s d)."""

    def slope(s: float) -> float:
        return -math.fsum(d * _sigmoid(-s * d) for d in found)

    if slope(0.0) >= 0:
        return math.inf
    if min(found) >= 0:
        return 0.0
    low, high = 0.0, 1.0
    while slope(high) < 0:
        low, high = high, 2 * high
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 1 / high
