# SPDX-License-Identifier: Apache-2.0
"""Losses of a linear layer over a vocabulary: definitions that do hold all logits."""

from __future__ import annotations

import torch
from torch import Tensor


def _logits(hidden: Tensor, weight: Tensor, softcap: float, temperature: float) -> Tensor:
    real = torch.promote_types(hidden.dtype, torch.float32)
    x = hidden.to(real) @ weight.to(real).t()
    if softcap > 0:
        x = softcap * torch.tanh(x / softcap)
    return x / temperature


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, *, row_weight: Tensor | None = None,
    ignore_index: int = -100, reduction: str = "mean", softcap: float = 0.0, z_loss: float = 0.0,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``w (lse - x[target] + z_loss lse^2)`` of rows x = softcapped ``hidden @ weight.T``, over temperature.

    hidden [..., H], weight [V, H], target and row_weight [...]. Rows with ``ignore_index`` or row weight 0
    are never read. Returns (loss, lse [...]); the mean is over the sum of the weights of the rows that count.
    """
    shape, flat = target.shape, target.reshape(-1).long()
    rows = hidden.reshape(-1, hidden.shape[-1])
    real = torch.promote_types(hidden.dtype, torch.float32)
    w = torch.ones(flat.shape, device=hidden.device) if row_weight is None else row_weight.detach()
    w = w.reshape(-1).to(real)
    at = ((flat != ignore_index) & (w != 0)).nonzero()[:, 0]
    there, w = flat[at], w[at]
    if ((there < 0) | (there >= weight.shape[0])).any():
        raise IndexError(f"target must be ignore_index or in [0, {weight.shape[0]})")
    x = _logits(rows[at], weight, softcap, temperature)
    some = x.logsumexp(-1)
    each = w * (some - x.gather(1, there[:, None])[:, 0] + z_loss * some**2)
    none = rows.new_zeros(flat.shape, dtype=real)
    lse = none.index_put((at,), some).view(shape)
    if reduction == "none":
        return none.index_put((at,), each).view(shape), lse
    total = each.sum()
    return (total / w.sum() if reduction == "mean" and len(at) else total), lse


def linear_logprob(
    hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """logp of one token per row and entropy [...]; both 0, and the row never read, where the id is none."""
    flat = ids.reshape(-1).long()
    rows = hidden.reshape(-1, hidden.shape[-1])
    at = ((flat >= 0) & (flat < weight.shape[0])).nonzero()[:, 0]
    x = _logits(rows[at], weight, 0.0, temperature)
    lse = x.logsumexp(-1)
    p = (x - lse[:, None]).exp()
    entropy = lse - torch.where(p == 0, 0.0, p * x).sum(-1)
    logp = x.gather(1, flat[at, None])[:, 0] - lse
    none = rows.new_zeros(flat.shape, dtype=x.dtype)
    return tuple(none.index_put((at,), y).view(ids.shape) for y in (logp, entropy))  # type: ignore[return-value]


def weighted_linear_ce(
    hidden: Tensor, weight: Tensor, targets: Tensor, w: Tensor, chunk: int = 0, *,
    ignore_index: int = -100, grad_of: str = "loss_sum",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``sum w nll``, ``sum w`` and nll [...] of the rows that count: w is not 0, nor the target ``ignore_index``.

    hidden [..., H], weight [V, H], targets and w [...]; nll is ``-log softmax(hidden @ weight.T)[target]``, 0 of the
    other rows, which are never read. ``chunk`` and ``grad_of`` say how a kernel works, not what it gives.
    """
    w = w.detach()
    nll, _ = linear_cross_entropy(hidden, weight, targets, row_weight=(w != 0).to(w.dtype),
                                  ignore_index=ignore_index, reduction="none")  # fmt: skip
    w = torch.where(targets != ignore_index, w, 0).to(nll.dtype)
    return (w * nll).sum(), w.sum(), nll
