# SPDX-License-Identifier: Apache-2.0
"""Scores of continual learning: overall performance and backward transfer (the form of TRACE)."""

from __future__ import annotations

from collections.abc import Sequence

Scores = Sequence[Sequence[float]]


def _checked(scores: Scores) -> int:
    tasks = len(scores)
    if tasks == 0 or any(len(row) != tasks for row in scores):
        raise ValueError(
            f"scores must be square, R[t][i] = score on task i after training task t; got rows of "
            f"{[len(row) for row in scores]}"
        )
    return tasks


def overall_performance(scores: Scores) -> float:
    """OP: the mean over tasks of the score after the last task."""
    tasks = _checked(scores)
    return sum(scores[-1]) / tasks


def backward_transfer(scores: Scores, form: str = "trace") -> float:
    """BWT: how far scores fell (negative: forgetting) between training a task and the end.

    ``form``: ``"trace"`` divides the sum of R[T][i] - R[i][i] by T, ``"classic"`` by T - 1 (the last
    task's term is 0).
    """
    tasks = _checked(scores)
    if form not in ("trace", "classic"):
        raise ValueError(f"form must be one of trace, classic, got {form!r}")
    if form == "classic" and tasks == 1:
        raise ValueError("the classic form of BWT needs two tasks or more")
    total = sum(scores[-1][i] - scores[i][i] for i in range(tasks))
    return total / (tasks if form == "trace" else tasks - 1)
