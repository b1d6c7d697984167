# SPDX-License-Identifier: Apache-2.0
"""Fitting factors to recorded runs: teacher forced or free running, with early stopping on simulated runs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tenfold import ops
from tenfold.gptfluence.config import SimulatorConfig
from tenfold.gptfluence.factors import ProductFactors
from tenfold.gptfluence.recurrence import Transitions, Tuples, batches_of, simulate, transitions
from tenfold.gptfluence.runs import RunSet
from tenfold.training.best import BestWeights
from tenfold.training.errors import TrainingError
from tenfold.training.loop import progress_bar
from tenfold.training.recipe import scheduled

Callback = Callable[[int, dict[str, float]], None]


@dataclass
class FitRecord:
    """What a fit was: losses and simulated validation errors by epoch, the epoch that was kept, seconds, sizes."""

    losses: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    best: int | None = None
    seconds: float = 0.0
    steps: int = 0
    trained_parameters: int = 0

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return asdict(self)


def all_steps_mse(factors: Tensor, runs: RunSet, settings: Any) -> float:
    """Mean squared error of simulated runs over all predicted steps (section 3.6)."""
    made = simulate(
        factors, batches_of(runs, settings.sparse), runs.y[:, 0].nan_to_num(), settings
    )[:, 1:]
    known = runs.y[:, 1:].isfinite() & runs.y[:, :1].isfinite()
    return float((made - runs.y[:, 1:])[known].square().mean())


class Fit:
    """One fit of a network that makes factors.

    Args:
        network: called with features it gives factors [n + 1, M, Q]; its parameters train, in place.
        features: (training, test) features, what the network is called with; () for a table.
        config: how. runs, validation: recorded runs; without the latter there is no early stopping.
        callback: told (epoch, numbers) after every epoch.
    """

    def __init__(
        self, network: nn.Module, features: tuple[Tensor, ...], config: SimulatorConfig, runs: RunSet,
        validation: RunSet | None = None, callback: Callback | None = None, quiet: bool = True,
    ) -> None:  # fmt: skip
        self.network, self.features, self.config, self.callback = (
            network,
            features,
            config,
            callback,
        )
        self.runs, self.validation, self.quiet = runs, validation, quiet
        self.data: Transitions = transitions(runs, config.order, config.history, config.sparse)
        self.tuples: Tuples | None = self.data.tuples() if config.batch_size else None
        kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
        self.trained = [p for p in network.parameters() if p.requires_grad]
        self.optimizer = kind(self.trained, lr=config.learning_rate, betas=config.betas, eps=config.eps,
                              weight_decay=config.weight_decay, foreach=True)  # fmt: skip
        each = (
            math.ceil(len(self.tuples) / config.batch_size)
            if self.tuples and config.batch_size
            else 1
        )
        self.steps, self.done = each * config.epochs, 0
        self.record = FitRecord(trained_parameters=sum(p.numel() for p in self.trained))

    def run(self) -> FitRecord:
        """Fits; the network ends with the weights of the best validation. TrainingError if the loss is not a number."""
        start, config = time.perf_counter(), self.config
        best, rises, last = BestWeights(self.network, None), 0, math.inf
        draws = torch.Generator().manual_seed(config.seed)
        with progress_bar("fit", config.epochs, 0, not self.quiet) as advance:
            for epoch in range(1, config.epochs + 1):
                loss = self._epoch(draws)
                if not math.isfinite(loss):
                    raise TrainingError(
                        f"the fit's loss became {loss} in epoch {epoch}; lower the learning rate, or look at the runs"
                    )
                self.record.losses.append(loss)
                told = {"loss": loss}
                if self.validation is not None and (
                    epoch % config.validate_every == 0 or epoch == config.epochs
                ):
                    found = self._validate()
                    self.record.validation.append((epoch, found))
                    told["mse"] = found
                    rises = rises + 1 if found > last else 0
                    last = found
                    if not best.found or found < best.found["mse"]:
                        best.keep({"mse": found, "epoch": epoch})
                advance(told)
                if self.callback:
                    self.callback(epoch, told)
                if config.patience and rises >= config.patience:
                    break
        best.restore()
        self.record.best = int(best.found["epoch"]) if best.found else None
        self.record.steps, self.record.seconds = self.done, time.perf_counter() - start
        return self.record

    @torch.no_grad()
    def _validate(self) -> float:
        assert self.validation is not None
        found = all_steps_mse(self.network(*self.features), self.validation, self.config)
        return found if math.isfinite(found) else math.inf

    def _epoch(self, draws: torch.Generator) -> float:
        if self.tuples is None:
            return self._step(self._whole)
        size, total = self.config.batch_size, 0.0
        assert size is not None  # there are no tuples without
        parts = torch.randperm(len(self.tuples), generator=draws).split(size)
        for rows in parts:
            total += self._step(partial(self._some, rows)) * len(rows)
        return total / len(self.tuples)

    def _whole(self) -> Tensor:
        c = self.config
        free = c.mode == "free_running"
        made = self.data.predict(self.network(*self.features), c.residual, c.reduction, free)
        return self.data.loss(made, free)

    def _some(self, rows: Tensor) -> Tensor:
        assert self.tuples is not None
        batches, tests, history, target = self.tuples.take(rows)
        c = self.config
        if isinstance(self.network, ProductFactors):
            H, G = self.network.project(*self.features)
            made = ops.markov_onestep_tuples(
                H, G, batches, tests, history, residual=c.residual, reduction=c.reduction
            )
            return (made - target).square().mean()
        # Without projections: one step of a run of its own per tuple, for the tests that the mini-batch has.
        factors = self.network(*self.features)
        asked, column = tests.unique(return_inverse=True)
        made = ops.markov_scan(
            factors[:, :, asked], batches[:, None], history[..., None].expand(-1, -1, len(asked)).contiguous(),
            c.residual, reduction=c.reduction,
        )  # fmt: skip
        return (made[torch.arange(len(rows)), 0, column] - target).square().mean()

    def _step(self, loss_of: Callable[[], Tensor]) -> float:
        c = self.config
        rate = c.learning_rate * scheduled(
            self.done, self.steps, "linear", c.warmup_steps / self.steps
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of()
        found = loss.detach()
        if c.l2:
            loss = loss + c.l2 * torch.stack([p.square().sum() for p in self.trained]).sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.done += 1
        return float(found)
