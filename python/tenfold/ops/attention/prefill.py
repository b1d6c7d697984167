# SPDX-License-Identifier: Apache-2.0
"""Faces of ``dha_attention``: attention with separate query -> key-head and -> value-head maps.

Notation: B batch, H query heads, HK key heads, HV value heads, D head dim of queries and keys, DV of
values, Sq queries, Sk keys. Source: DHA (arXiv 2406.06567), section 2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tenfold._load import call
from tenfold.ops._register import autocast_floats, differentiable, inference_only

_ops = torch.ops.tenfold


def like_rows(like: Tensor, dim: int) -> Tensor:
    """Fresh tensor in the memory order of ``like``; the C++ side is ``new_like_rows``."""
    if like.dim() == 3:
        return like.new_empty((*like.shape[:2], dim))
    b, h, s, _ = like.shape
    if h > 1 and s > 1 and like.stride(2) > like.stride(1):
        return like.new_empty((b, s, h, dim)).transpose(1, 2)
    return like.new_empty((b, h, s, dim))


@torch.library.register_fake("tenfold::dha_attention")
def _(
    q, k, v, kmap, vmap, *, scale=None, causal=True, window_left=-1, cu_seqlens_q=None,
    cu_seqlens_k=None, max_q=0, max_k=0, attn_bias=None, softcap=0.0, window_right=-1,
):  # fmt: skip
    rows = (q.shape[1], q.shape[0]) if q.dim() == 3 else q.shape[:3]
    return like_rows(q, v.shape[-1]), q.new_empty(rows, dtype=torch.float32)


@torch.library.register_fake("tenfold::dha_attention_backward")
def _(
    dout, q, k, v, out, lse, kmap, vmap, *, scale=None, causal=True, window_left=-1,
    cu_seqlens_q=None, cu_seqlens_k=None, max_q=0, max_k=0, attn_bias=None, softcap=0.0,
    window_right=-1, dlse=None, deterministic=True,
):  # fmt: skip
    return tuple(like_rows(x, x.shape[-1]) for x in (q, k, v))


_TENSOR_OPTIONS = ("cu_seqlens_q", "cu_seqlens_k", "attn_bias")


def _save(ctx: Any, args: tuple[Any, ...], options: dict[str, Any], result: Any) -> None:
    q, k, v, kmap, vmap = args
    bias = options.get("attn_bias")
    if bias is not None and bias.requires_grad:
        raise RuntimeError(
            "tenfold::dha_attention: attn_bias requires grad, but its gradient is not computed; "
            "pass attn_bias.detach()"
        )
    ctx.options = {n: x for n, x in options.items() if n not in _TENSOR_OPTIONS}
    ctx.save_for_backward(q, k, v, *result, kmap, vmap, *(options.get(n) for n in _TENSOR_OPTIONS))


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, kmap, vmap, *tensors = ctx.saved_tensors
    dq, dk, dv = _ops.dha_attention_backward(
        torch.zeros_like(out) if dout is None else dout,
        q, k, v, out, lse, kmap, vmap, dlse=dlse, **ctx.options,
        **dict(zip(_TENSOR_OPTIONS, tensors)),
    )  # fmt: skip
    return dq, dk, dv, None, None


differentiable("dha_attention", _save, _backward)
autocast_floats("dha_attention")
inference_only("dha_attention_backward")


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
    """Attention in which query head h reads key head ``kmap[h]`` and value head ``vmap[h]``.

    ``out_h = softmax(scale * q_h k_{kmap[h]}^T + mask) v_{vmap[h]}``. Grouped maps ``h // (H / HK)``
    are GQA, identity maps plain attention. No [Sq, Sk] matrix is stored. Differentiable in q, k, v
    (through ``out`` and ``lse``); gradients of shared heads are sums over their query heads.

    Args:
        q: queries [B, H, Sq, D], or [Tq, H, D] with ``cu_seqlens``; float32, bfloat16 or float16.
            Any strides with contiguous rows are read in place, so ``x.view(B, S, H, D).transpose(1, 2)``
            costs nothing.
        k: keys [B, HK, Sk, D] or [Tk, HK, D], dtype of ``q``. D and DV: 1 to 256.
        v: values [B, HV, Sk, DV] or [Tk, HV, DV].
        kmap, vmap: key and value head of each query head [H], int32 or int64. Heads that nobody
            uses are allowed; their gradient is 0.
        scale: logit scale; default ``1 / sqrt(D)``.
        causal: query i sees keys ``j <= i + Sk - Sq`` (bottom-right aligned).
        window_left, window_right: query i sees ``j >= i + Sk - Sq - window_left`` and
            ``j <= i + Sk - Sq + window_right``; -1 for no limit. With ``causal`` the right side is 0.
        cu_seqlens_q, cu_seqlens_k: first rows of the sequences of a packed batch [B + 1] int32.
        max_q, max_k: longest sequences of a packed batch, if known without looking (0: unknown).
        attn_bias: broadcastable to [B, H, Sq, Sk]: bool (True: the key is seen) or float (added to
            the logits). Dense batches only; not differentiable.
        softcap: c > 0 turns a logit x into ``c * tanh(x / c)``, before bias and mask.

    Returns:
        out, shape of ``q`` with DV for D, in the memory order of ``q``; lse [B, H, Sq] (packed:
        [H, Tq]) float32, the natural log of the sum of exponentials. A row that sees no key has
        out 0 and lse -inf.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, values out of range; on the CPU also
            map entries and ``cu_seqlens``, which CUDA kernels clamp to what exists. TypeError:
            unsupported dtype. RuntimeError: ``attn_bias`` requires grad.

    Example:
        >>> q, k, v = torch.randn(1, 8, 64, 32), torch.randn(1, 4, 64, 32), torch.randn(1, 2, 64, 32)
        >>> kmap, vmap = torch.arange(8) // 2, torch.arange(8) // 4
        >>> out, lse = tenfold.ops.dha_attention(q, k, v, kmap, vmap)
    """
    return call(
        _ops.dha_attention, q, k, v, kmap, vmap, scale=scale, causal=causal,
        window_left=window_left, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_q=max_q,
        max_k=max_k, attn_bias=attn_bias, softcap=softcap, window_right=window_right,
    )  # fmt: skip


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
    """Gradients of :func:`dha_attention`; autograd calls it, other code may.

    Args:
        dout: gradient of ``out``, its shape and dtype. dlse: gradient of ``lse``, or None.
        q, k, v, kmap, vmap, options: as given to the forward. out, lse: what it returned.
        deterministic: equal bits from run to run; all kernels always are, on CPU and CUDA.

    Returns:
        dq, dk, dv in the shapes, dtypes and memory order of q, k, v. ``dk[n]`` is the sum over the
        query heads with ``kmap[h] == n``, ``dv`` likewise over ``vmap``. Stores no probabilities.

    Raises:
        ValueError, TypeError: as :func:`dha_attention`, and where ``dout``, ``out``, ``lse`` or ``dlse`` do
            not fit the forward. RuntimeError: an input requires grad under grad mode (there is no
            second derivative).
    """
    return call(
        _ops.dha_attention_backward, dout, q, k, v, out, lse, kmap, vmap, dlse=dlse,
        deterministic=deterministic, **options,
    )  # fmt: skip
