# SPDX-License-Identifier: Apache-2.0
"""Definition of ``dha_attention``, one sequence at a time, in plain PyTorch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tenfold.reference.numbers import work


def visible(num_queries: int, num_keys: int, causal: bool, left: int, right: int) -> Tensor:
    """[Sq, Sk]: which keys each query sees; causal and windows are bottom-right aligned."""
    at = torch.arange(num_queries)[:, None] + num_keys - num_queries
    key = torch.arange(num_keys)[None, :]
    seen = torch.ones(num_queries, num_keys, dtype=torch.bool)
    right = 0 if causal else right
    if right >= 0:
        seen &= key <= at + right
    if left >= 0:
        seen &= key >= at - left
    return seen


def _one(
    q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float, seen: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """q [H, Sq, D], k [H, Sk, D], v [H, Sk, DV] -> out [H, Sq, DV], lse [H, Sq]."""
    logits = work(q) @ work(k).transpose(-1, -2) * scale
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None and bias.dtype == torch.bool:
        seen = seen & bias
    elif bias is not None:
        seen = seen & (bias != -math.inf)
        logits = logits + work(bias)
    logits = logits.masked_fill(~seen, -math.inf)
    lse = torch.logsumexp(logits, -1)
    # exp(-inf - -inf) of a row that sees nothing is 0 by definition, also in the gradient.
    nothing = lse == -math.inf
    weights = torch.exp(logits - lse.masked_fill(nothing, 0.0)[..., None])
    return weighted(weights, work(v), seen), lse


def weighted(weights: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Weights times values, where a hidden value never reaches a row: 0 * inf would be NaN."""
    broken = ~torch.isfinite(v.detach()).all(-1)
    out = weights @ v.masked_fill(broken[..., None], 0.0)
    for j in broken.flatten(0, -2).any(0).nonzero().flatten().tolist():
        sees = (seen.broadcast_to(weights.shape)[..., j] & broken[..., j, None])[..., None]
        out = out + torch.where(sees, weights[..., j, None] * v[..., j, None, :], 0.0)
    return out


def dha_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kmap: Tensor,
    vmap: Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    window_left: int = -1,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_q: int = 0,
    max_k: int = 0,
    attn_bias: Tensor | None = None,
    softcap: float = 0.0,
    window_right: int = -1,
) -> tuple[Tensor, Tensor]:
    """Query head h attends with key head ``kmap[h]`` and value head ``vmap[h]``.

    Shapes as in :func:`tenfold.ops.dha_attention`. Differentiable by autograd; float64 stays float64.
    """
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    kmap, vmap = kmap.long(), vmap.long()
    if cu_seqlens_q is None or cu_seqlens_k is None:
        seen = visible(q.shape[2], k.shape[2], causal, window_left, window_right).to(q.device)
        bias = attn_bias
        if bias is not None:
            bias = bias.broadcast_to(*q.shape[:3], k.shape[2])
        out, lse = _one(q, k[:, kmap], v[:, vmap], scale, softcap, seen, bias)
        return out.to(q.dtype), lse
    outs, lses = [], []
    for b in range(cu_seqlens_q.numel() - 1):
        queries = slice(int(cu_seqlens_q[b]), int(cu_seqlens_q[b + 1]))
        keys = slice(int(cu_seqlens_k[b]), int(cu_seqlens_k[b + 1]))
        qb, kb, vb = (x.transpose(0, 1) for x in (q[queries], k[keys], v[keys]))
        seen = visible(qb.shape[1], kb.shape[1], causal, window_left, window_right).to(q.device)
        out, lse = _one(qb, kb[kmap], vb[vmap], scale, softcap, seen, None)
        outs.append(out.transpose(0, 1))
        lses.append(lse)
    out = torch.cat(outs) if outs else work(q).new_zeros(q.shape[0], q.shape[1], v.shape[2])
    lse = torch.cat(lses, 1) if lses else work(q).new_zeros(q.shape[1], q.shape[0])
    return out.to(q.dtype), lse


def dha_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    kmap: Tensor,
    vmap: Tensor,
    *,
    dlse: Tensor | None = None,
    deterministic: bool = True,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`dha_attention` by autograd: dK and dV sum over the heads that share."""
    leaves = q1, k1, v1 = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    with torch.enable_grad():
        again, again_lse = dha_attention(q1, k1, v1, kmap, vmap, **options)
        grads = [dout, torch.zeros_like(again_lse) if dlse is None else dlse.to(again_lse.dtype)]
        found = torch.autograd.grad([again, again_lse], leaves, grads, allow_unused=True)
    dq, dk, dv = (torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found))
    return dq, dk, dv
