# SPDX-License-Identifier: Apache-2.0
"""The tasks' metrics: accuracy, F1, Matthews and Spearman correlation, in plain numpy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

Numbers = Sequence[float] | np.ndarray


def _both(predicted: Numbers, gold: Numbers) -> tuple[np.ndarray, np.ndarray]:
    p, g = np.asarray(predicted), np.asarray(gold)
    if p.shape != g.shape or p.ndim != 1 or not len(p):
        raise ValueError(
            f"metrics compare two lists of the same length >= 1, got {p.shape} and {g.shape}"
        )
    return p, g


def accuracy(predicted: Numbers, gold: Numbers) -> float:
    """Share of equal labels."""
    p, g = _both(predicted, gold)
    return float((p == g).mean())


def f1(predicted: Numbers, gold: Numbers) -> float:
    """F1 of label 1; 0 where it is neither predicted nor there."""
    p, g = _both(predicted, gold)
    right = int(((p == 1) & (g == 1)).sum())
    total = int((p == 1).sum() + (g == 1).sum())
    return 2 * right / total if total else 0.0


def matthews(predicted: Numbers, gold: Numbers) -> float:
    """Matthews correlation of any number of labels; 0 where one side is constant."""
    p, g = _both(predicted, gold)
    labels = np.unique(np.concatenate([p, g]))
    counts = np.zeros((len(labels), len(labels)))
    np.add.at(counts, (np.searchsorted(labels, g), np.searchsorted(labels, p)), 1)
    n, right, of_gold, of_pred = counts.sum(), np.trace(counts), counts.sum(1), counts.sum(0)
    over = (n**2 - (of_pred**2).sum()) * (n**2 - (of_gold**2).sum())
    return float((right * n - of_gold @ of_pred) / np.sqrt(over)) if over else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def spearman(predicted: Numbers, gold: Numbers) -> float:
    """Spearman's rank correlation; 0 where one side is constant."""
    p, g = (_ranks(x) for x in _both(predicted, gold))
    p, g = p - p.mean(), g - g.mean()
    over = np.sqrt((p @ p) * (g @ g))
    return float(p @ g / over) if over else 0.0


METRICS: dict[str, Callable[[Numbers, Numbers], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "spearman": spearman,
}
