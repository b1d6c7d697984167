# SPDX-License-Identifier: Apache-2.0
"""An attention block whose cache is trimmed after the prompt, on ``torch.ops.tenfold``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import tenfold  # noqa: F401  registers torch.ops.tenfold.*

ops = torch.ops.tenfold


class TrimmingAttention(nn.Module):
    """Grouped-query attention over a prompt, which then forgets most of its keys and values.

    ``forward(x)`` takes the prompt [B, L, hidden] and returns the block's output for it, the
    trimmed cache (keys and values [B, kv_heads, keep, head_dim]) and the slots that were kept.
    ``decode(x, k, v)`` attends one more token to that cache.
    """

    def __init__(
        self, hidden: int = 256, heads: int = 8, kv_heads: int = 2, keep: int = 48
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, hidden // heads
        self.scale = self.head_dim**-0.5
        self.budget = {"n_sink": 4, "n_recent": 12, "n_topk": keep - 24, "n_random": 8}
        self.proxies = 8
        self.q = nn.Linear(hidden, heads * self.head_dim, bias=False)
        self.k = nn.Linear(hidden, kv_heads * self.head_dim, bias=False)
        self.v = nn.Linear(hidden, kv_heads * self.head_dim, bias=False)
        self.out = nn.Linear(heads * self.head_dim, hidden, bias=False)

    def _heads(self, x: Tensor, count: int) -> Tensor:
        return x.unflatten(-1, (count, self.head_dim)).transpose(1, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q, k = self._heads(self.q(x), self.heads), self._heads(self.k(x), self.kv_heads)
        v = self._heads(self.v(x), self.kv_heads)
        attended = nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.scale, enable_gqa=True
        )
        # The last queries vote for the keys. The best stay, the first, the latest, and a few drawn
        # by lot.
        scores, _ = ops.proxy_scores(q[:, :, -self.proxies :], k, scale=self.scale)
        kept, _ = ops.nacl_select(scores, **self.budget, seed=1)
        k, v = ops.kv_gather(k, v, kept)
        return self.out(attended.transpose(1, 2).flatten(2)), k, v, kept

    def decode(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Output [B, 1, hidden] of one more token [B, 1, hidden] over a trimmed cache."""
        batch, kv_heads, keep, dim = k.shape
        offsets = torch.arange(batch * kv_heads + 1, device=k.device) * keep
        q = self._heads(self.q(x), self.heads)[:, :, 0]
        attended, _ = ops.ragged_decode(
            q, k.reshape(-1, dim), v.reshape(-1, dim), offsets, scale=self.scale
        )
        return self.out(attended.flatten(1).unsqueeze(1))
