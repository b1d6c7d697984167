# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of chosen tokens, from logits."""

from __future__ import annotations

import torch
from torch import Tensor


def selective_logprob(
    logits: Tensor, ids: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """logp, lse and entropy [N] of rows of ``logits / temperature`` [N, V]; logp 0 where the id is none."""
    x = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    lse = torch.logsumexp(x, -1)
    p = (x - lse[:, None]).exp()
    entropy = lse - torch.where(p == 0, 0.0, p * x).sum(-1)
    there = (ids >= 0) & (ids < logits.shape[1])
    chosen = x.gather(1, torch.where(there, ids, 0).long()[:, None])[:, 0]
    return torch.where(there, chosen - lse, 0.0), lse, entropy
