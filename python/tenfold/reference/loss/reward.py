# SPDX-License-Identifier: Apache-2.0
"""Rewards of sequences, and the loss of pairs of them."""

from __future__ import annotations

import torch
from torch import Tensor


def _real(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def last_token_reward(hidden: Tensor, mask: Tensor, w_v: Tensor, pool: str = "last") -> Tensor:
    """Pooled hidden states times a head: [N], or [N, C] where ``w_v`` is [C, H] and not [H].

    hidden [N, S, H], mask [N, S]: the last real token, or the mean over real tokens; others are not read.
    """
    if pool not in ("last", "mean"):
        raise ValueError(f"pool must be last or mean, got {pool!r}")
    there = mask != 0
    if not there.any(1).all():
        raise ValueError("every row of mask must have a real token")
    rows = []
    for i in range(hidden.shape[0]):
        tokens = _real(hidden[i][there[i]])
        rows.append(tokens[-1] if pool == "last" else tokens.mean(0))
    pooled = torch.stack(rows) if rows else _real(hidden[:, 0])
    return pooled @ _real(w_v).t()


def pairwise_logsigmoid(
    r_pos: Tensor, r_neg: Tensor, margin: Tensor | None = None, center: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Mean of ``-log sigmoid(delta - margin) + center (r_pos + r_neg)^2`` and delta = r_pos - r_neg, all [B]."""
    if r_pos.shape != r_neg.shape or r_pos.numel() == 0:
        raise ValueError("r_pos and r_neg must be of one size, and not empty")
    pos, neg = _real(r_pos), _real(r_neg)
    delta = pos - neg
    x = delta if margin is None else delta - margin.detach().to(delta.dtype)
    loss = -torch.nn.functional.logsigmoid(x)
    if center != 0.0:
        loss = loss + center * (pos + neg) ** 2
    return loss.mean(), delta
