# SPDX-License-Identifier: Apache-2.0
"""Which examples a run sees, in which order: a function of the seed and the run's number alone."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tenfold.gptfluence.config import RecordConfig


@dataclass(frozen=True)
class Curriculum:
    """A run's batches.

    Attributes:
        run: its number. order: int64 [T, B], numbers of examples, -1 in places that are empty.
    """

    run: int
    order: Tensor

    @property
    def examples(self) -> Tensor:
        """The numbers of all examples in it, sorted."""
        return self.order[self.order >= 0].unique()

    @property
    def steps(self) -> list[int]:
        """The steps that have an example; the others are not made."""
        return (self.order >= 0).any(1).nonzero().flatten().tolist()

    def without(self, examples: Iterable[int]) -> Curriculum:
        """The same with these examples' places empty."""
        gone = torch.isin(self.order, torch.tensor(list(examples), dtype=torch.int64))
        return Curriculum(self.run, self.order.masked_fill(gone, -1))


def make_curricula(config: RecordConfig, groups: Sequence[Hashable] | int) -> list[Curriculum]:
    """The curricula of all runs.

    Args:
        groups: of every example, what it is of (a task); or just how many examples there are.

    Raises ValueError where there are fewer examples than a run takes.
    """
    labels: Sequence[Hashable] = [0] * groups if isinstance(groups, int) else groups
    if len(labels) < config.examples:
        raise ValueError(f"a run takes {config.examples} examples, there are only {len(labels)}")
    return [Curriculum(run, _order(config, labels, run)) for run in range(config.runs)]


def _order(config: RecordConfig, labels: Sequence[Hashable], run: int) -> Tensor:
    text = f"gptfluence {config.seed} {run}".encode()
    draw = np.random.default_rng(int.from_bytes(hashlib.sha256(text).digest()[:8], "big"))
    chosen = draw.choice(
        len(labels), config.examples, replace=False, p=_weights(config, labels, draw)
    )
    steps = max(1, math.ceil(config.epochs * config.examples / config.batch_size))
    parts: list[np.ndarray] = []
    while sum(map(len, parts)) < steps * config.batch_size and len(parts) < math.ceil(
        config.epochs
    ):
        parts.append(draw.permutation(chosen))
    flat = np.concatenate(parts)[: math.ceil(config.epochs * config.examples)]
    rows = np.full(steps * config.batch_size, -1)
    rows[: len(flat)] = flat
    return torch.from_numpy(rows.reshape(steps, config.batch_size))


def _weights(
    config: RecordConfig, labels: Sequence[Hashable], draw: np.random.Generator
) -> np.ndarray | None:
    if config.concentration is None:
        return None
    names = list(dict.fromkeys(labels))
    numbers = np.array([names.index(x) for x in labels])
    counts = np.bincount(numbers, minlength=len(names))
    # A floor, so that a run always finds enough examples of some group.
    shares = np.maximum(draw.dirichlet([config.concentration] * len(names)), 1e-3)
    weights = (shares / counts)[numbers]
    return weights / weights.sum()
