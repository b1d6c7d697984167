# SPDX-License-Identifier: Apache-2.0
"""The rollouts that the cases of ``rl`` share: rows of tokens, padded on the right."""

from __future__ import annotations

import torch
from torch import Tensor

from .case import Shape

N = 5  # tokens of a macro action
SIZES = ({"b": 64, "r": 1024}, {"b": 256, "r": 1024})
GAMMA, LAM, BETA, CLIP, SCORE_CLIP = 1.0, 0.95, 0.05, 0.2, 2.5


def lengths(rows: int, width: int, seed: int = 0) -> Tensor:
    """Between half of the width and all of it; the first row is full."""
    made = torch.Generator().manual_seed(seed)
    found = torch.randint(width // 2, width + 1, (rows,), generator=made)
    found[0] = width
    return found


def mask_of(s: Shape) -> Tensor:
    """Bool [B, R]."""
    return torch.arange(s["r"]) < lengths(s["b"], s["r"])[:, None]


def segments_of(s: Shape) -> tuple[Tensor, Tensor]:
    """(seg, nseg) of macro actions of N tokens."""
    mask = mask_of(s)
    seg = torch.where(mask, torch.arange(s["r"]) // N, -1).int()
    return seg, (seg.amax(1) + 1).int()


def num_segments(s: Shape) -> int:
    """Of the longest row."""
    return -(-s["r"] // N)


def randn(*sizes: int, seed: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))
