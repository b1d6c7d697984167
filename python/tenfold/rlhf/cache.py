# SPDX-License-Identifier: Apache-2.0
"""A cache for sampling whose full-attention layers grow in place."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):
    """Writes into buffers made once, where the stock layer copies all that it has for every token."""

    keys: Tensor
    values: Tensor

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends; returns views of all there is, [B, H, n, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        if self._buffers is None:
            self._buffers = (self._roomy(key_states, self.keys, start),
                             self._roomy(value_states, self.values, start))  # fmt: skip
        keys, values = self._buffers
        keys[:, :, start:end], values[:, :, start:end] = key_states, value_states
        self.keys, self.values = keys[:, :, :end], values[:, :, :end]
        return self.keys, self.values

    def _roomy(self, new: Tensor, kept: Tensor, start: int) -> Tensor:
        made = new.new_empty(*new.shape[:2], self.room, new.shape[3])
        if start:
            made[:, :, :start] = kept
        return made

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some rows."""
        super().batch_select_indices(indices)
        self._buffers = None


def roomy_cache(model: Any, room: int) -> DynamicCache:
    """transformers' cache for a model, with room for so many tokens."""
    cache = DynamicCache(config=model.config)
    cache.layers = [RoomyLayer(room) if type(x) is DynamicLayer else x for x in cache.layers]
    return cache
