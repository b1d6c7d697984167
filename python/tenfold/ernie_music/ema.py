# SPDX-License-Identifier: Apache-2.0
"""The exponential moving average of the weights that samples are drawn from."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.training.sharding import gathered


class EMA:
    """Averaged copy of a model: ``p <- d p + (1 - d) p_model`` after every step; buffers are copied.

    Args:
        model: what is averaged. decay: d. early_decay, early_epochs: d of the first epochs.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float = 0.995,
        early_decay: float = 0.95,
        early_epochs: int = 25,
    ) -> None:
        for name, value in (("decay", decay), ("early_decay", early_decay)):
            if not 0 <= value < 1:
                raise ValueError(f"{name} must be in [0, 1), got {value}")
        self.decay, self.early_decay, self.early_epochs = decay, early_decay, early_epochs
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    def decay_at(self, epoch: int) -> float:
        """d in an epoch, the first of which is 0."""
        return self.early_decay if epoch < self.early_epochs else self.decay

    @torch.no_grad()
    def update(self, model: nn.Module, epoch: int) -> None:
        """Takes the weights of a step of that epoch in; of FSDP2's shards the whole (all ranks must call)."""
        own = [p for p in self.model.parameters()]
        new = [gathered(p.detach()) for p in model.parameters()]
        torch._foreach_lerp_(own, new, 1 - self.decay_at(epoch))
        for mine, its in zip(self.model.buffers(), model.buffers()):
            mine.copy_(its)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights."""
        return self.model.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts averaged weights in."""
        self.model.load_state_dict(state)
