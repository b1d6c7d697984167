# SPDX-License-Identifier: Apache-2.0
"""Muon in float32, for the small models that are trained here from scratch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from tenfold.optim.closure import evaluated

_QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalized(matrix: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """About the nearest semi-orthogonal matrix [m, n], in float32, by Newton and Schulz's iteration (Jordan 2024)."""
    a, b, c = _QUINTIC
    wide = matrix.float() if matrix.shape[0] <= matrix.shape[1] else matrix.float().mT
    x = wide / wide.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if matrix.shape[0] <= matrix.shape[1] else x.mT


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov's momentum, as ``torch.optim.Muon``, which orthogonalises in bfloat16 instead.

    That takes a CPU without instructions for bfloat16 a hundred times as long as float32 does, and gives every kind of
    CPU other models.

    Args:
        params: matrices. lr: of an update whose singular values are about 1, times ``sqrt(max(1, rows / columns))``.
        weight_decay: share of ``lr``. momentum: of the gradients' mean.

    Raises:
        ValueError: a parameter that is no matrix.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, weight_decay: float = 0.1, momentum: float = 0.95
    ) -> None:  # fmt: skip
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim != 2:
                    raise ValueError(
                        f"Muon takes matrices, got a parameter of shape {list(p.shape)}"
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; ``closure`` evaluates the model again, with gradients."""
        loss = evaluated(closure)
        for group in self.param_groups:
            momentum = group["momentum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                mean.lerp_(p.grad, 1 - momentum)
                update = orthogonalized(p.grad.lerp(mean, momentum))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                size = math.sqrt(max(1, p.shape[0] / p.shape[1]))
                p.add_(update.to(p), alpha=-group["lr"] * size)
        return loss
