# SPDX-License-Identifier: Apache-2.0
"""Packed batches of the family ``rl``: rows one after the other as [N], row b from ``cu_seqlens[b]`` on.

By definition a packed op is the padded one between :func:`pad_rows` and :func:`pack_rows`.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def lengths_of(cu_seqlens: Tensor, total: int) -> list[int]:
    """Widths of the rows; ValueError unless the offsets rise from 0 to ``total``."""
    at = cu_seqlens.tolist()
    if at[0] != 0 or at[-1] != total or sorted(at) != at:
        raise ValueError(
            f"cu_seqlens must begin with 0, not fall, and end with the number of tokens, {total}, got {at}"
        )
    return [b - a for a, b in itertools.pairwise(at)]


def pad_rows(x: Tensor, cu_seqlens: Tensor, fill: float = 0) -> Tensor:
    """[N] as [B, R], R the longest row, filled up at the right."""
    lengths = lengths_of(cu_seqlens, x.shape[0])
    width = max(lengths, default=0)
    rows = [
        torch.nn.functional.pad(row, (0, width - row.shape[0]), value=fill)
        for row in x.split(lengths)
    ]
    return torch.stack(rows) if rows else x.reshape(0, 0)


def pack_rows(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The inverse: [B, R] as [N]."""
    lengths = lengths_of(cu_seqlens, int(cu_seqlens[-1]))
    return torch.cat([row[:n] for row, n in zip(x, lengths)]) if lengths else x.reshape(-1)
