# SPDX-License-Identifier: Apache-2.0
"""Baselines without gradients: constants, means, tables per example (Simfluence), similarities (section 3.7)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tenfold.gptfluence.config import SimulatorConfig
from tenfold.gptfluence.features import Features
from tenfold.gptfluence.fitting import Fit, FitRecord, all_steps_mse
from tenfold.gptfluence.gradients import fit_scale, gradient_curve
from tenfold.gptfluence.recurrence import batches_of, simulate, transitions
from tenfold.gptfluence.runs import RunSet
from tenfold.training.checks import not_negative, one_of

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
_TABLE: dict[str, Any] = {
    "learning_rate": 1e-3,
    "epochs": 3000,
    "weight_decay": 0.0,
    "warmup_steps": 50,
}


class Baseline(Protocol):
    """Fitted to runs; predicts [R, S, Q] from curricula and first measurements alone."""

    def fit(self, runs: RunSet, validation: RunSet | None = None) -> Any:
        """Reads recorded runs."""

    def predict(self, runs: RunSet) -> Tensor:
        """[R, S, Q]."""


class Constant:
    """Every step is as the first measurement."""

    def fit(self, runs: RunSet, validation: RunSet | None = None) -> None:
        """Nothing to fit."""

    def predict(self, runs: RunSet) -> Tensor:
        """[R, S, Q]."""
        return runs.y[:, :1].expand_as(runs.y).clone()


class MeanTrajectory:
    """Every run is the mean of the training runs, per test example: hard to beat where curricula are alike."""

    curve: Tensor | None = None

    def fit(self, runs: RunSet, validation: RunSet | None = None) -> None:
        """Takes the mean of what was measured."""
        self.curve = runs.y.nanmean(0)

    def predict(self, runs: RunSet) -> Tensor:
        """[R, S, Q], with the first measurement in its place."""
        if self.curve is None:
            raise ValueError("the mean trajectory was not fitted")
        made = self.curve.expand_as(runs.y).clone()
        made[:, 0] = runs.y[:, 0]
        return made


class _Tables:
    """What both forms of Simfluence are: factors [2, M, Q], one pair of numbers per training and test example."""

    factors: Tensor | None = None

    def __init__(self, config: SimulatorConfig) -> None:
        self.config = config

    def predict(self, runs: RunSet) -> Tensor:
        """[R, S, Q]. ValueError before the fit, or for runs over other examples."""
        if self.factors is None or self.factors.shape[1:] != (
            len(runs.train_ids),
            len(runs.test_ids),
        ):
            raise ValueError(
                "Simfluence predicts runs over the examples and tests that it was fitted to"
            )
        factors = self.factors.to(runs.y.dtype)
        return simulate(factors, batches_of(runs, self.config.sparse), runs.y[:, 0], self.config)


class SimfluenceRidge(_Tables):
    """Simfluence (linear) in closed form: ridge regression of every test's changes on what the batches were.

    Per test: rows are steps, columns ``[count_i y_{t-1}, count_i]``, the target is ``y_t - y_{t-1}`` (the residual
    form).

    Args:
        ridge: weight of the squared factors; 0: plain least squares; None: the best of six on validation runs, else
            0.01.
    """

    def __init__(self, ridge: float | None = None) -> None:
        super().__init__(SimulatorConfig(residual=True))
        if ridge is not None:
            not_negative("ridge", ridge)
        self.ridge = ridge

    def fit(self, runs: RunSet, validation: RunSet | None = None) -> None:
        """Solves for all tests; with ``validation`` runs and no ``ridge`` given, six times."""
        if self.ridge is not None or validation is None or not len(validation):
            self.factors = self._solve(runs, 1e-2 if self.ridge is None else self.ridge)
            return
        best = math.inf
        for ridge in RIDGES:
            factors = self._solve(runs, ridge)
            found = all_steps_mse(factors.to(runs.y.dtype), validation, self.config)
            if self.factors is None or found < best:
                best, self.factors = found, factors

    def _solve(self, runs: RunSet, ridge: float) -> Tensor:
        data = transitions(runs, 1, "zeros", "block")
        batches = data.order.flatten(0, 1).long()
        count, tests = len(runs.train_ids), len(runs.test_ids)
        counts = torch.zeros(len(batches), count + 1, dtype=torch.float64)
        counts.scatter_add_(
            1, batches.where(batches >= 0, count), torch.ones_like(batches, dtype=torch.float64)
        )
        counts = counts[:, :count]
        before = torch.cat([data.past, data.after[:, :-1]], 1).flatten(0, 1).double()
        after, valid = data.after.flatten(0, 1).double(), data.valid.flatten(0, 1)
        factors = torch.zeros(2, count, tests, dtype=torch.float64)
        for q in range(tests):
            rows = valid[:, q]
            c, y = counts[rows], before[rows, q]
            made = _ridge(torch.cat([c * y[:, None], c], 1), after[rows, q] - y, ridge)
            factors[:, :, q] = made.view(2, count)
        return factors


def _ridge(columns: Tensor, target: Tensor, ridge: float) -> Tensor:
    if ridge == 0:
        # The shortest solution where an example was never seen, or two always came together.
        return torch.linalg.lstsq(columns, target[:, None], driver="gelsd").solution[:, 0]
    # In whichever space is smaller.
    if len(columns) < columns.shape[1]:
        gram = columns @ columns.T
        gram.diagonal().add_(ridge)
        return columns.T @ torch.linalg.solve(gram, target)
    gram = columns.T @ columns
    gram.diagonal().add_(ridge)
    return torch.linalg.solve(gram, columns.T @ target)


class _Table(nn.Module):
    def __init__(self, count: int, tests: int, init: str, seed: int) -> None:
        super().__init__()
        made = torch.Generator().manual_seed(seed)
        shape = (2, count, tests)
        self.values = nn.Parameter(
            torch.zeros(shape) if init == "zero" else torch.randn(shape, generator=made)
        )

    def forward(self) -> Tensor:
        """Factors [2, M, Q]."""
        return self.values


class SimfluenceTable(_Tables):
    """Simfluence (linear) trained by Adam.

    Args:
        init: ``"zero"``: a residual table from 0 on; ``"normal"``: N(0, 1), without the residual, as published.
            changes: of the settings.
    """

    def __init__(self, init: str = "zero", **changes: Any) -> None:
        one_of("init", init, ("zero", "normal"))
        super().__init__(SimulatorConfig(**(_TABLE | {"residual": init == "zero"} | changes)))
        self.init = init
        self.record: FitRecord | None = None

    def fit(self, runs: RunSet, validation: RunSet | None = None) -> None:
        """Trains the table; with ``validation`` runs, keeps the best one."""
        table = _Table(len(runs.train_ids), len(runs.test_ids), self.init, self.config.seed)
        held = validation if validation is not None and len(validation) else None
        self.record = Fit(table, (), self.config, runs, held).run()
        self.factors = table.values.detach()


class Similarity:
    """Without gradients: an example lowers a loss as its features are like the test's, times one number.

    Args:
        train, test: features of one encoder; rows are looked up by id.
    """

    def __init__(self, train: Features, test: Features) -> None:
        if (train.width, train.encoder) != (test.width, test.encoder):
            raise ValueError("similarities need training and test features of one encoder")
        self.train, self.test, self.factor = train, test, 0.0

    def scores(self, train_ids: Sequence[Any], test_ids: Sequence[Any]) -> Tensor:
        """Cosines [M, Q]."""
        rows, asked = self.train.take(train_ids).table, self.test.take(test_ids).table
        return (
            nn.functional.normalize(rows.float(), dim=1)
            @ nn.functional.normalize(asked.float(), dim=1).T
        )

    def _curves(self, runs: RunSet) -> Tensor:
        scores, order = self.scores(runs.train_ids, runs.test_ids), batches_of(runs, "block")
        rates = torch.ones(order.shape[1])
        return torch.stack([gradient_curve(o, y[0], rates, scores) for o, y in zip(order, runs.y)])

    def fit(self, runs: RunSet, validation: RunSet | None = None) -> None:
        """Fits the one number by least squares."""
        self.factor = fit_scale(self._curves(runs), runs.y)

    def predict(self, runs: RunSet) -> Tensor:
        """[R, S, Q]."""
        first = runs.y[:, :1]
        return first + self.factor * (self._curves(runs) - first)
