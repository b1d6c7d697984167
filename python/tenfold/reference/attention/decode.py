# SPDX-License-Identifier: Apache-2.0
"""Definitions of the decode ops of decoupled-head attention (DHA, arXiv 2406.06567, section 6 of the
method): plain PyTorch, obviously right.

Computations run in float64 when the inputs are float64, else in float32. Notation: B batch, H query
heads, HK key heads, HV value heads, D head dim of queries and keys, DV of values, Sq new tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tenfold.reference.numbers import work


def _rows_of(
    cache: Tensor,
    b: int,
    length: int,
    start: int,
    block_table: Tensor | None,
    offsets: Tensor | None,
) -> Tensor:
    """The ``length`` tokens of sequence ``b`` as [heads, length, D], whatever the cache's layout."""
    slots = torch.arange(start, start + length, device=cache.device)
    if offsets is not None:  # [N, heads, D]
        return cache[slots + int(offsets[b])].transpose(0, 1)
    if block_table is not None:  # [blocks, block, heads, D]
        block = cache.shape[1]
        return cache[block_table[b].long()[slots // block], slots % block].transpose(0, 1)
    return cache[b, :, slots]


def dha_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    kmap: Tensor,
    vmap: Tensor,
    kv_lens: Tensor,
    *,
    block_table: Tensor | None = None,
    block_size: int = 0,
    scale: float | None = None,
    window_left: int = -1,
    num_splits: int = 0,
    kv_start: Tensor | None = None,
    offsets: Tensor | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """``out[b, h, s] = softmax_j(scale * q[b, h, s] . K[b, kmap[h], j]) V[b, vmap[h], j]``.

    The new tokens are the last Sq of the ``kv_lens[b]`` in the cache: row s sees the keys up to its own
    position, and at most ``window_left`` before it. ``num_splits`` is a matter of speed only.
    """
    one = q.dim() == 3
    q4 = work(q[:, :, None] if one else q)
    b, h, sq, d = q4.shape
    scale = 1.0 / math.sqrt(d) if scale is None else scale
    out = q4.new_zeros(b, h, sq, v_cache.shape[-1])
    lse = q4.new_full((b, h, sq), -math.inf)
    for i in range(b):
        n = int(kv_lens[i])
        start = 0 if kv_start is None else int(kv_start[i])
        keys = work(_rows_of(k_cache, i, n, start, block_table, offsets))[kmap.long()]
        values = work(_rows_of(v_cache, i, n, start, block_table, offsets))[vmap.long()]
        for s in range(sq):
            last = n - sq + s  # position of the row's own token
            first = 0 if window_left < 0 else max(0, last - window_left)
            if last < first:
                continue
            seen = slice(first, last + 1)
            logits = (q4[i, :, s, None] @ keys[:, seen].transpose(1, 2))[:, 0] * scale
            if softcap > 0:
                logits = softcap * torch.tanh(logits / softcap)
            lse[i, :, s] = torch.logsumexp(logits, -1)
            out[i, :, s] = (torch.softmax(logits, -1)[:, None] @ values[:, seen])[:, 0]
    out = out.to(q.dtype)
    return (out[:, :, 0], lse[:, :, 0]) if one else (out, lse)


def _rotate(k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``k * cos + rotate_half(k) * sin`` for k [B, HK, S, D] and cos, sin [B or 1, S, D]."""
    x = work(k)
    x1, x2 = x.chunk(2, -1)
    turned = torch.cat([-x2, x1], -1)
    return (x * cos[:, None].to(x.dtype) + turned * sin[:, None].to(x.dtype)).to(k.dtype)


def dha_cache_append_(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    *,
    paged: bool = False,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> None:
    """Writes token s of sequence b into slot ``slots[b, s]`` of the caches; slot -1 skips the token.

    With ``cos`` and ``sin`` the keys are rotated (RoPE, rotate-half) while they are written.
    """
    if cos is not None and sin is not None:
        k = _rotate(k, cos, sin)
    for b, s in ((slots >= 0).nonzero()).tolist():
        slot = int(slots[b, s])
        for cache, new in ((k_cache, k), (v_cache, v)):
            if paged:
                cache[slot // cache.shape[1], slot % cache.shape[1]] = new[b, :, s]
            elif cache.dim() == 3:
                cache[slot] = new[b, :, s]
            else:
                cache[b, :, slot] = new[b, :, s]
