# SPDX-License-Identifier: Apache-2.0
"""What a router is trained with besides the model's loss."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus


def load_balance_loss(
    logits: Tensor, counts: Tensor, token_mask: Tensor | None, k: int, norm: str = "slots"
) -> Tensor:
    """``n sum_e F_e mean_t P_te`` over the tokens of logits [..., n] that count; F has no gradient.

    F_e is ``counts[e]`` of these tokens over T k (``"slots"``: 1 when balanced) or T (``"tokens"``: k). Without
    a token 0.
    """
    n = logits.shape[-1]
    p = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1).view(-1, n)
    if token_mask is not None:
        p = p[token_mask.reshape(-1) != 0]
    if p.shape[0] == 0:
        return p.sum()
    share = counts.to(p.dtype) / (p.shape[0] * (k if norm == "slots" else 1))
    return n * (share * p.mean(0)).sum()


def router_seed_loss(
    h: Tensor, r: Tensor, token_mask: Tensor | None = None, target: Tensor | None = None
) -> Tensor:
    """Mean over tokens that count (and layers) of ``t softplus(-z) + (1 - t) softplus(z)``, z = h r.

    h [..., d] with r [d], or [L, ..., d] with r [L, d]; token_mask and target (1 if None) [...]. Without a token 0.
    """
    real = torch.promote_types(h.dtype, torch.float32)
    h, r = h.to(real), r.to(real)
    if r.dim() == 1:
        h, r = h[None], r[None]
    h = h.reshape(h.shape[0], -1, h.shape[-1])
    t = h.new_ones(h.shape[1]) if target is None else target.reshape(-1).to(real)
    if token_mask is not None:
        there = token_mask.reshape(-1) != 0
        h, t = h[:, there], t[there]
    z = (h * r[:, None]).sum(-1)
    each = t * softplus(-z) + (1 - t) * softplus(z)
    return each.mean() if each.numel() else each.sum()
