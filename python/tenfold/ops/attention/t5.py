# SPDX-License-Identifier: Apache-2.0
"""Faces of ``t5_attention``: attention with T5's relative position bias computed inside.

Notation: B batch, H heads, D head dim of queries and keys, DV of values, Lq queries, Lk keys.
Source: T5 v1.1 / mT5 as in ERNIE-Code (arXiv 2212.06742), section 3.1 of the method.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tenfold._load import call
from tenfold.ops._register import autocast_floats, differentiable, inference_only
from tenfold.ops.attention.prefill import like_rows

_ops = torch.ops.tenfold


@torch.library.register_fake("tenfold::t5_attention")
def _(q, k, v, bias_table=None, kv_len=None, **_options):
    return like_rows(q, v.shape[-1]), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.register_fake("tenfold::t5_attention_backward")
def _(dout, q, k, v, bias_table, kv_len, out, lse, **_options):
    table = q.new_empty((0, q.shape[1]), dtype=torch.float32)
    if bias_table is not None:
        table = bias_table.new_empty(bias_table.shape)
    return *(like_rows(x, x.shape[-1]) for x in (q, k, v)), table


_INPUTS = 5  # q, k, v, bias_table, kv_len


def _save(ctx: Any, args: tuple[Any, ...], options: dict[str, Any], result: Any) -> None:
    ctx.options = options
    ctx.save_for_backward(*args, *(None,) * (_INPUTS - len(args)), *result)
    ctx.given = len(args)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, bias_table, kv_len, out, lse = ctx.saved_tensors
    dq, dk, dv, dtable = _ops.t5_attention_backward(
        torch.zeros_like(out) if dout is None else dout, q, k, v, bias_table, kv_len, out, lse,
        dlse=dlse, **ctx.options,
    )  # fmt: skip
    return (dq, dk, dv, None if bias_table is None else dtable, None)[: ctx.given]


differentiable("t5_attention", _save, _backward)
autocast_floats("t5_attention", keep=(3,))
inference_only("t5_attention_backward")


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
    """``softmax(scale * q k^T + bias) v`` with ``bias_ij = bias_table[bucket(j - q_offset - i)]``.

    No [Lq, Lk] matrix is stored, neither of scores nor of the bias, forward or backward. Differentiable
    in q, k, v and bias_table, through ``out`` and ``lse``; there is no second derivative. Results are
    independent of the number of threads, and equal from run to run on CPU and CUDA.

    An encoder calls it as it is, a decoder with ``bidirectional=False, causal=True``, cross-attention
    without a table.

    Args:
        q: queries [B, H, Lq, D]; float32, bfloat16 or float16. Any strides with contiguous rows are read
            in place, so ``x.view(B, L, H, D).transpose(1, 2)`` costs nothing.
        k: keys [B, H, Lk, D], dtype of ``q``. D and DV: 1 to 256.
        v: values [B, H, Lk, DV].
        bias_table: [num_buckets, H], float32 or the dtype of ``q``; at most 256 buckets, an even number of
            them if ``bidirectional``. None: no bias. Autocast leaves it as it is.
        kv_len: keys of each sequence [B], int32 or int64 in [0, Lk]; keys at and beyond it are not seen.
        bidirectional: half of the buckets are for keys behind the query, half for those before it; else
            all are for keys behind it and later ones count as distance 0.
        causal: query i sees keys ``j <= q_offset + i``. Excludes ``bidirectional``.
        max_distance: distances from here on share the last bucket of their direction.
        q_offset: place of query 0 among the keys: the number of cached keys in decoding.
        dropout_p: share of probabilities that are dropped, in [0, 1); the others are divided by
            ``1 - dropout_p``. ``lse`` knows nothing of it.
        seed, offset: of the draws. Probability (b, h, i, j) has word ``j % 4`` of the Philox4x32-10 counter
            (j // 4, i, b H + h, offset) under the key ``seed``: the same on every device. Offset: [0, 2^32).
        scale: factor of ``q k^T``; T5 has none.

    Returns:
        out, shape of ``q`` with DV for D, in the memory order of ``q``; lse [B, H, Lq] float32, the natural
        log of the sum of exponentials. A row that sees no key has out 0 and lse -inf.

    Raises:
        ValueError: shapes, devices or dtypes that do not fit, values out of range, ``bidirectional`` with
            ``causal``; on the CPU also ``kv_len``, which CUDA kernels clamp to [0, Lk]. TypeError: unsupported
            dtype.

    Example:
        >>> q = k = v = torch.randn(2, 12, 37, 64)
        >>> table = torch.randn(32, 12, requires_grad=True)
        >>> out, lse = tenfold.ops.t5_attention(q, k, v, table, torch.tensor([37, 20]))
    """
    return call(
        _ops.t5_attention, q, k, v, bias_table, kv_len, bidirectional=bidirectional, causal=causal,
        max_distance=max_distance, q_offset=q_offset, dropout_p=dropout_p, seed=seed, offset=offset,
        scale=scale,
    )  # fmt: skip


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
    dlse: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`t5_attention`; autograd calls it, other code may.

    Args:
        dout: gradient of ``out``, its shape and dtype. dlse: gradient of ``lse``, or None.
        q, k, v, bias_table, kv_len, options: as given to the forward. out, lse: what it returned.

    Returns:
        dq, dk, dv in the shapes, dtypes and memory order of q, k, v, and dtable, shape and dtype of
        ``bias_table`` ([0, H] float32 without one). The score gradients are summed in float32, first over
        each diagonal, then over the diagonals of a bucket, in a fixed order.

    Raises:
        ValueError, TypeError: as :func:`t5_attention`, and where ``dout``, ``out``, ``lse`` or ``dlse`` do not
            fit the forward. RuntimeError: an input requires grad under grad mode (there is no second
            derivative).
    """
    return call(
        _ops.t5_attention_backward, dout, q, k, v, bias_table, kv_len, out, lse, dlse=dlse,
        **options,
    )  # fmt: skip
