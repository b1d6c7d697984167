# SPDX-License-Identifier: Apache-2.0
"""PPO's policy and value losses over macro actions (sections 3.8 and 3.9)."""

from __future__ import annotations

import torch
from torch import Tensor

from tenfold.reference.rl.packed import pad_rows
from tenfold.reference.rl.returns import _one_of, macro_pool

RATIOS = ("token", "joint", "geo_mean")
AGGREGATIONS = ("token_mean", "seq_mean_token_mean")
UNITS = ("macro", "length")
LOG_RATIO_BOUND = 20.0
POLICY_STATS = ("clip_high", "clip_low", "ratio_mean", "ratio_max", "kl_old_new", "count")
VALUE_STATS = ("clip", "error", "count")


def _aggregate(terms: Tensor, weight: Tensor, agg: str, denom: float) -> Tensor:
    """Weighted mean of [B, N] terms; ``denom`` > 0 replaces the count that is divided by."""
    _one_of("agg", agg, AGGREGATIONS)
    total = (terms * weight).sum(1)
    rows = weight.sum(1)
    if agg == "token_mean":
        return total.sum() / (denom if denom > 0 else rows.sum().clamp_min(1))
    filled = (rows > 0).sum().clamp_min(1)
    return (total / rows.clamp_min(1e-30)).sum() / (denom if denom > 0 else filled)


def _where(valid: Tensor, x: Tensor) -> Tensor:
    return torch.where(valid, x.to(torch.promote_types(x.dtype, torch.float32)), 0.0)


def ma_ppo_policy_loss(
    logp_new: Tensor, logp_old: Tensor, adv: Tensor, seg: Tensor, eps_lo: float = 0.2,
    eps_hi: float = 0.2, ratio: str = "token", agg: str = "token_mean", denom: float = 0.0, *,
    weight: str = "macro", cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The clipped surrogate, and ``POLICY_STATS``.

    ``ratio``: of every token; of a macro action as the product of its tokens' (``"joint"``) or their
    geometric mean. The last two have a term per macro action, of weight 1 or its length (``weight``).
    ``denom``: what the sum is divided by (tokens or macro actions, or sequences), 0: what is here.
    """
    if cu_seqlens is not None:
        new, old, a = (pad_rows(x, cu_seqlens) for x in (logp_new, logp_old, adv))
        return ma_ppo_policy_loss(new, old, a, pad_rows(seg, cu_seqlens, -1), eps_lo, eps_hi, ratio, agg, denom,
                                  weight=weight)  # fmt: skip
    _one_of("ratio", ratio, RATIOS)
    _one_of("weight", weight, UNITS)
    seg = seg.long()
    valid, num = seg >= 0, seg.shape[1]
    d, a = _where(valid, logp_new) - _where(valid, logp_old), _where(valid, adv)
    token_d, w = d, valid.to(d.dtype)
    if ratio != "token":
        length = macro_pool(torch.ones_like(d), seg, num, "sum")
        d = macro_pool(d, seg, num, "sum" if ratio == "joint" else "equal")
        a = macro_pool(a, seg, num, "equal")
        w = length if weight == "length" else (length > 0).to(d.dtype)
    inside = d.abs() <= LOG_RATIO_BOUND
    q = torch.where(inside, d, d.detach().clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)).exp()
    plain, clipped = -a * q, -a * q.clamp(1 - eps_lo, 1 + eps_hi)
    loss = _aggregate(torch.maximum(plain, clipped), w, agg, denom)
    with torch.no_grad():
        there, n = w > 0, (w > 0).sum().clamp_min(1)
        stats = torch.stack([
            ((a > 0) & (q > 1 + eps_hi) & there).sum() / n,
            ((a < 0) & (q < 1 - eps_lo) & there).sum() / n,
            (q * there).sum() / n,
            torch.where(there, q, 0.0).max() if q.numel() else q.new_zeros(()),
            -(token_d * valid).sum() / valid.sum().clamp_min(1),
            (w > 0).sum().to(q.dtype),
        ]).float()  # fmt: skip
    return loss, stats


def ma_ppo_value_loss(
    v_new: Tensor, v_old: Tensor, ret: Tensor, mask: Tensor, clip: float = 0.2,
    agg: str = "token_mean", denom: float = 0.0, *, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Half the squared error to the returns, of the clipped or unclipped value, whichever is worse."""
    if cu_seqlens is not None:
        new, old, target, on = (pad_rows(x, cu_seqlens) for x in (v_new, v_old, ret, mask))
        return ma_ppo_value_loss(new, old, target, on, clip, agg, denom)
    valid = mask.bool()
    new, old, target = (_where(valid, x) for x in (v_new, v_old, ret))
    bounded = torch.minimum(torch.maximum(new, old - clip), old + clip)
    plain, other = (new - target) ** 2, (bounded - target) ** 2
    w = valid.to(new.dtype)
    loss = _aggregate(0.5 * torch.maximum(plain, other), w, agg, denom)
    with torch.no_grad():
        n = valid.sum().clamp_min(1)
        stats = torch.stack([
            ((other > plain) & valid).sum() / n, (plain * w).sum() / n, valid.sum().to(new.dtype),
        ]).float()  # fmt: skip
    return loss, stats
