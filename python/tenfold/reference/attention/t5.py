# SPDX-License-Identifier: Apache-2.0
"""Definition of ``t5_attention`` (ERNIE-Code, arXiv 2212.06742; T5): one explicit softmax in plain PyTorch.

Notation: B batch, H heads, D head dim, Lq queries, Lk keys. Query i stands at ``q_offset + i``, key j at j.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tenfold.reference.attention.prefill import weighted
from tenfold.reference.numbers import work
from tenfold.reference.random import philox4x32_10


def t5_buckets(
    relative: Tensor, *, bidirectional: bool, num_buckets: int = 32, max_distance: int = 128
) -> Tensor:
    """Bucket of each relative position ``key - query``: exact near 0, logarithmic to ``max_distance``.

    The logarithm is taken in float32, as when the models were trained: it decides where a bucket begins.
    """
    half = num_buckets // 2 if bidirectional else num_buckets
    exact = half // 2
    n = relative.abs() if bidirectional else (-relative).clamp(min=0)
    grown = torch.log(n.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    large = (exact + (grown * (half - exact)).long()).clamp(max=half - 1)
    bucket = torch.where(n < exact, n, large)
    return bucket + half * (relative > 0) if bidirectional else bucket


def t5_dropout(shape: torch.Size, dropout_p: float, seed: int, offset: int) -> Tensor:
    """What the probabilities [B, H, Lq, Lk] are multiplied by: 0 or ``1 / (1 - dropout_p)``.

    Probability (b, h, i, j) has word ``j % 4`` of the Philox counter (j // 4, i, b H + h, offset) under the
    key ``seed``; it is dropped where the word is below ``round(2**32 dropout_p)``.
    """
    b, h, lq, lk = shape
    fours = torch.arange((lk + 3) // 4)
    counter = (fours, torch.arange(lq)[:, None], torch.arange(b * h)[:, None, None])
    words = torch.stack(philox4x32_10((*counter, torch.tensor(offset)), seed), -1)
    kept = words.reshape(b, h, lq, 4 * len(fours))[..., :lk] >= round(dropout_p * 2.0**32)
    return kept.double() / (1.0 - dropout_p)


def t5_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias_table: Tensor | None = None,
    kv_len: Tensor | None = None,
    *,
    bidirectional: bool = True,
    causal: bool = False,
    max_distance: int = 128,
    q_offset: int = 0,
    dropout_p: float = 0.0,
    seed: int = 0,
    offset: int = 0,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """``softmax(scale * q k^T + bias_table[bucket(j - q_offset - i)]) v`` over the keys that a row sees.

    Shapes as in :func:`tenfold.ops.t5_attention`. Differentiable by autograd; float64 stays float64.
    """
    key = torch.arange(k.shape[2], device=q.device)
    relative = key - (torch.arange(q.shape[2], device=q.device) + q_offset)[:, None]
    seen = torch.ones(q.shape[0], 1, *relative.shape, dtype=torch.bool, device=q.device)
    if causal:
        seen = seen & (relative <= 0)
    if kv_len is not None:
        seen = seen & (key < kv_len.to(q.device)[:, None, None, None])
    logits = work(q) @ work(k).transpose(-1, -2) * scale
    if bias_table is not None:
        bucket = t5_buckets(
            relative, bidirectional=bidirectional, num_buckets=bias_table.shape[0],
            max_distance=max_distance,
        )  # fmt: skip
        logits = logits + bias_table.to(logits.dtype)[bucket].permute(2, 0, 1)
    logits = logits.masked_fill(~seen, -math.inf)
    lse = torch.logsumexp(logits, -1)
    nothing = lse == -math.inf
    weights = torch.exp(logits - lse.masked_fill(nothing, 0.0)[..., None])
    if dropout_p > 0:
        weights = weights * t5_dropout(weights.shape, dropout_p, seed, offset).to(weights)
    return weighted(weights, work(v), seen).to(q.dtype), lse


def t5_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias_table: Tensor | None,
    kv_len: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *,
    bidirectional: bool = True,
    causal: bool = False,
    max_distance: int = 128,
    q_offset: int = 0,
    dropout_p: float = 0.0,
    seed: int = 0,
    offset: int = 0,
    scale: float = 1.0,
    dlse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`t5_attention` by autograd; of the table [0, H] where there is none."""
    table = work(q).new_zeros(0, q.shape[1]) if bias_table is None else bias_table
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v, table)]
    q1, k1, v1, table1 = leaves
    with torch.enable_grad():
        again, again_lse = t5_attention(
            q1, k1, v1, None if bias_table is None else table1, kv_len,
            bidirectional=bidirectional, causal=causal, max_distance=max_distance, q_offset=q_offset,
            dropout_p=dropout_p, seed=seed, offset=offset, scale=scale,
        )  # fmt: skip
        grads = [dout, torch.zeros_like(again_lse) if dlse is None else dlse.to(again_lse.dtype)]
        found = torch.autograd.grad([again, again_lse], leaves, grads, allow_unused=True)
    dq, dk, dv, dtable = (torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found))
    return dq, dk, dv, dtable
