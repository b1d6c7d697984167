# SPDX-License-Identifier: Apache-2.0
"""The best weights of a run on the way: kept in its work folder, else in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tenfold.training.store import WorkFolder


class BestWeights:
    """Keeps the trained weights of the best moment so far, and what was found then.

    Args:
        model: its parameters that train are kept. folder: of the run; None: weights stay in memory, and a run that is
            killed begins anew. name: of the result in the folder.

    Attributes:
        found: of the best moment; empty before the first.
    """

    def __init__(self, model: Any, folder: WorkFolder | None, name: str = "best") -> None:
        self.model, self.folder, self.name = model, folder, name
        self.found: dict[str, float] = (folder.load(name) if folder else None) or {}
        self._weights: dict[str, Tensor] = {}

    def keep(self, found: dict[str, float]) -> None:
        """This moment is the best: its numbers, and the weights as they are."""
        self.found = found
        trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        if self.folder:
            self.folder.save(self.name, found, trained)
        else:
            self._weights = {n: p.detach().clone() for n, p in trained.items()}

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the best weights into the model; nothing happens where none were kept."""
        if not self.found:
            return
        weights = self.folder.load_tensors(self.name) if self.folder else self._weights
        own = dict(self.model.named_parameters())
        for name, value in weights.items():
            own[name].copy_(value)
