# SPDX-License-Identifier: Apache-2.0
"""What fine-tuning recipes have in common: learning rates, steps, decay, rows that count equally."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.training.loop import Pieces, Settings, Trainer, warm_cosine

SCHEDULES = ("linear", "cosine", "constant")


def scheduled(step: int, steps: int, schedule: str, warmup: float) -> float:
    """Learning rate of a step as a share of its peak, after a linear ``warmup`` (share of the steps)."""
    if schedule == "cosine":
        return warm_cosine(step, steps, warmup, 0.0)
    warm = round(warmup * steps)
    if step < warm:
        return (step + 1) / warm
    return 1.0 if schedule == "constant" else 1 - (step - warm) / max(1, steps - warm)


def steps_of(config: Settings, rows: int | None) -> int:
    """``config.steps``, else those of ``config.epochs`` over so many rows (None: a function's, not counted)."""
    if config.steps is not None:
        return config.steps
    if rows is None:
        raise ValueError("data given as a function has no epochs; say how many steps")
    return max(1, math.ceil(config.epochs * rows / config.batch_size))


def decay_groups(
    parameters: Iterable[nn.Parameter], rate: float, weight_decay: float
) -> list[dict[str, Any]]:
    """AdamW's groups: matrices decay, vectors do not; ``peak`` is the schedule's largest rate."""
    named = list(parameters)
    groups = [
        {"params": [p for p in named if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in named if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [g | {"lr": rate, "peak": rate} for g in groups if g["params"]]


def even_pieces(batch: dict[str, Tensor], rows: int | None) -> Pieces:
    """A batch in parts of ``rows`` rows, each with its share of the rows: rows count equally."""
    size = len(next(iter(batch.values())))
    if rows is None or rows >= size:
        return [(batch, 1.0)]
    parts = [{k: v[at : at + rows] for k, v in batch.items()} for at in range(0, size, rows)]
    return [(p, len(next(iter(p.values()))) / size) for p in parts]


class AdamWTrainer(Trainer):
    """The loop with AdamW on everything that trains, and rows that count equally.

    Its settings have ``learning_rate``, ``betas``, ``eps``, ``weight_decay``, ``max_grad_norm``, ``schedule`` and
    ``warmup`` beside those of every loop.
    """

    def pieces(self, batch: dict[str, Tensor], rows: int | None) -> Pieces:
        """Rows count equally, however many tokens they have."""
        return even_pieces(batch, rows)

    def make_optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        """AdamW over everything that trains."""
        config = self.config
        trained = [p for p in module.parameters() if p.requires_grad]
        groups = decay_groups(trained, config.learning_rate, config.weight_decay)
        return torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, fused=True)

    def rate(self, step: int, steps: int) -> float:
        """The schedule."""
        return scheduled(step, steps, self.config.schedule, self.config.warmup)

    def clip(self, optimizer: Any) -> None:
        """Clips the norm of all gradients."""
        trained = [p for g in optimizer.param_groups for p in g["params"]]
        self.accelerator.clip_grad_norm_(trained, self.config.max_grad_norm)
