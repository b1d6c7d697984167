# SPDX-License-Identifier: Apache-2.0
"""``DhaStaticCache``: transformers' static cache with its own number of value heads in every layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticCache, StaticLayer

from tenfold.dha.layout import HeadLayout


class DhaStaticLayer(StaticLayer):
    """A ``StaticLayer`` whose keys are [B, HK, max_cache_len, D] and values [B, HV, max_cache_len, DV]."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates both tensors; the stock layer gives values the head count of keys."""
        super().lazy_initialization(key_states, value_states)
        if value_states.shape[1] == key_states.shape[1]:
            return
        shape = (*value_states.shape[:2], self.max_cache_len, value_states.shape[-1])
        self.values = torch.zeros(shape, dtype=value_states.dtype, device=value_states.device)
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.values)


class DhaStaticCache(StaticCache):
    """A static cache for models with decoupled heads: fixed size, in place, ``torch.compile`` friendly.

        cache = DhaStaticCache(model.config, max_cache_len=4096)
        model.generate(**prompt, past_key_values=cache)

    Args:
        config: of a DHA model, or of any model whose layers are all full attention.
        max_cache_len: tokens that it holds.
        offloading, offload_only_non_sliding: as in ``StaticCache``.
    """

    def __init__(
        self,
        config: Any,
        max_cache_len: int,
        offloading: bool = False,
        offload_only_non_sliding: bool = True,
        **kwargs: Any,
    ) -> None:
        self.layout = HeadLayout.from_config(config)
        layers = [DhaStaticLayer(max_cache_len=max_cache_len) for _ in self.layout.key_heads]
        super(StaticCache, self).__init__(
            layers=layers, offloading=offloading, offload_only_non_sliding=offload_only_non_sliding
        )

    def early_initialization(
        self,
        batch_size: int,
        num_heads: Any = None,
        head_dim: int | list[int] = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """Allocates all layers now, with the head counts of the layout (``num_heads`` is not read)."""
        dims = [head_dim] * len(self.layers) if isinstance(head_dim, int) else head_dim
        for layer, keys, values, dim in zip(
            self.layers, self.layout.key_heads, self.layout.value_heads, dims
        ):
            if not layer.is_initialized:
                new = [
                    torch.zeros((batch_size, heads, 0, dim), dtype=dtype, device=device)
                    for heads in (keys, values)
                ]
                layer.lazy_initialization(*new)
