# SPDX-License-Identifier: Apache-2.0
"""DHA's part of the training loop: its optimiser's groups and its learning rates."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tenfold.dha.config import ConversionError, DhaConfig
from tenfold.dha.fusion import FusionModel, projections
from tenfold.training.loop import Trainer as Loop
from tenfold.training.loop import warm_cosine


def rate_factor(step: int, steps: int, config: DhaConfig) -> float:
    """Learning rate as a share of its peak: linear warm-up, then a cosine down to ``final_lr``."""
    return warm_cosine(step, steps, config.warmup, config.final_lr)


def parameter_groups(module: nn.Module, config: DhaConfig) -> list[dict[str, Any]]:
    """AdamW's groups: matrices decay, vectors do not; operators and the multiplier have own rates.

    ``clipped`` tells the model's own weights, whose gradients are clipped.
    """
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    omega = [p for n, p in named if n.endswith(".omega")]
    multiplier = [p for n, p in named if n.endswith("multiplier")]
    special = {id(p) for p in omega + multiplier}
    rest = [p for _, p in named if id(p) not in special]
    groups = [
        {"params": [p for p in rest if p.ndim > 1], "lr": config.learning_rate,
         "weight_decay": config.weight_decay, "clipped": True},
        {"params": [p for p in rest if p.ndim <= 1], "lr": config.learning_rate, "clipped": True},
        {"params": omega, "lr": config.omega_lr},
        # Ascent: the multiplier grows while a hinge is violated.
        {"params": multiplier, "lr": config.lambda_lr, "maximize": True},
    ]  # fmt: skip
    return [
        {"weight_decay": 0.0, "clipped": False} | g | {"peak": g["lr"]}
        for g in groups
        if g["params"]
    ]


class Trainer(Loop):
    """Runs a conversion's stages."""

    error = ConversionError
    config: DhaConfig

    def apart(self, module: nn.Module) -> list[nn.Module]:
        """The penalty reads the operators of projections beside what these compute."""
        return list(projections(module.model)) if isinstance(module, FusionModel) else []

    def make_optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        """AdamW over :func:`parameter_groups`."""
        fused = {"fused": True} if self.accelerator.device.type in ("cpu", "cuda") else {}
        groups = parameter_groups(module, self.config)
        return torch.optim.AdamW(groups, betas=self.config.betas, **fused)

    def rate(self, step: int, steps: int) -> float:
        """The schedule, the same for all groups."""
        return rate_factor(step, steps, self.config)

    def clip(self, optimizer: Any) -> None:
        """Clips the gradients of the model's own weights."""
        weights = [p for g in optimizer.param_groups if g["clipped"] for p in g["params"]]
        self.accelerator.clip_grad_norm_(weights, self.config.clip)
