# SPDX-License-Identifier: Apache-2.0
"""Faces of the ``kv_eviction`` family: KV-cache eviction (NACL, arXiv 2408.03675) and ragged decode.

All ops are inference only: inputs that require grad under grad mode raise RuntimeError.
Notation: B batch, Hq query heads, Hkv key/value heads, L slots of the cache, W proxy queries,
D head dim, C kept tokens. Keys and queries are post-RoPE; the ops cannot detect others.
Float tensors are float32, bfloat16 or float16; index tensors int32 or int64.
Valid slots of sequence b are ``[kv_start[b], kv_start[b] + kv_lens[b])`` (default: all L).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tenfold.ops._register import call_inference, inference_only

_ops = torch.ops.tenfold


@torch.library.register_fake("tenfold::proxy_scores")
def _(
    q, k, lse=None, *, scale, causal=True, q_offset=-1, q_positions=None, kv_start=None,
    kv_lens=None, window=-1, reduce="mean", kmap=None,
):  # fmt: skip
    b, hq, w, _ = q.shape
    scores = q.new_empty((b, k.shape[1], k.shape[2]), dtype=torch.float32)
    return scores, q.new_empty((b, hq, w), dtype=torch.float32)


def _select_fake(scores, width, counts):
    b, h, _ = scores.shape
    per_head = counts is not None and counts.dim() == 3
    idx = scores.new_empty((b, h, width), dtype=torch.int64)
    return idx, scores.new_empty((b, h) if per_head else (b,), dtype=torch.int32)


@torch.library.register_fake("tenfold::nacl_select")
def _(
    scores, n_sink, n_recent, n_topk, n_random, *, tau=1.0, logits="score", seed=0, layer=0,
    kv_start=None, kv_lens=None, row_id=None, counts=None, pool_kernel=1, pool="max",
    check_nan=False,
):  # fmt: skip
    return _select_fake(scores, n_sink + n_recent + n_topk + n_random, counts)


def _gather_fake(k, v, width):
    return (
        k.new_empty((k.shape[0], k.shape[1], width, k.shape[3])),
        v.new_empty((v.shape[0], v.shape[1], width, v.shape[3])),
    )


@torch.library.register_fake("tenfold::kv_gather")
def _(k, v, idx, *, new_lens=None, inv_freq=None, kv_start=None):
    return _gather_fake(k, v, idx.shape[2])


@torch.library.register_fake("tenfold::kv_compact_")
def _(k, v, idx, *, new_lens=None, inv_freq=None, kv_start=None) -> None:
    return None


@torch.library.register_fake("tenfold::nacl_evict")
def _(
    q, k, v, lse=None, *, scale, causal=True, q_offset=-1, q_positions=None, kv_start=None,
    kv_lens=None, window=-1, reduce="mean", kmap=None, n_sink, n_recent, n_topk, n_random,
    tau=1.0, logits="score", seed=0, layer=0, row_id=None, counts=None, pool_kernel=1, pool="max",
    inv_freq=None,
):  # fmt: skip
    width = n_sink + n_recent + n_topk + n_random
    scores = k.new_empty(k.shape[:3])
    return (*_gather_fake(k, v, width), *_select_fake(scores, width, counts))


@torch.library.register_fake("tenfold::ragged_decode")
def _(q, k, v, offsets, *, scale, lens=None):
    out = q.new_empty((*q.shape[:-1], v.shape[1]))
    return out, q.new_empty(q.shape[:-1], dtype=torch.float32)


for _name in ("proxy_scores", "nacl_select", "kv_gather", "nacl_evict", "ragged_decode"):
    inference_only(_name)
inference_only("kv_compact_", mutates=(0, 1))


def _scale(q: Tensor, scale: float | None) -> float:
    return 1.0 / math.sqrt(q.shape[-1]) if scale is None and q.dim() > 0 else float(scale or 0.0)


def proxy_scores(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = True,
    q_offset: int = -1,
    q_positions: Tensor | None = None,
    kv_start: Tensor | None = None,
    kv_lens: Tensor | None = None,
    window: int = -1,
    reduce: str = "mean",
    kmap: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention mass that each key receives from a few proxy queries (NACL section 3.3).

    ``score_h[j] = sum_w softmax_j(scale * q_w . k_j)``, reduced over the query heads of each key head.
    The [W, L] probabilities are never stored.

    Args:
        q: proxy queries [B, Hq, W, D]; any strides with contiguous rows are read in place.
        k: keys [B, Hkv, L, D], dtype of ``q``.
        lse: row log-sum-exp (natural log, scaled logits) [B, Hq, W] float32, as an attention forward
            gives it; saves the normalisation pass.
        scale: logit scale; default ``1 / sqrt(D)``.
        causal: a proxy at slot p sees keys j <= p only.
        q_offset: slot of proxy 0; -1 puts the proxies on the last W slots.
        q_positions: slots of the proxies, [W] or [B, W]; overrides ``q_offset``. A proxy whose slot
            is not valid (-1, padding) is inactive: it adds nothing and has lse -inf.
        kv_start, kv_lens: [B], the valid slots of each sequence.
        window: sliding window, sees p - j < window only; -1 for none.
        reduce: ``"mean"``, ``"sum"`` or ``"max"`` over the query heads of a key head.
        kmap: key head of each query head [Hq] (decoupled heads); default ``h // (Hq / Hkv)``. A key
            head without query heads scores 0.

    Returns:
        scores [B, Hkv, L] float32 and lse [B, Hq, W] float32.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, values out of range.
        TypeError: unsupported dtype. IndexError: ``kmap`` out of range.
    """
    return call_inference(
        _ops.proxy_scores, q, k, lse, scale=_scale(q, scale), causal=causal, q_offset=q_offset,
        q_positions=q_positions, kv_start=kv_start, kv_lens=kv_lens, window=window, reduce=reduce,
        kmap=kmap,
    )  # fmt: skip


def nacl_select(
    scores: Tensor,
    n_sink: int,
    n_recent: int,
    n_topk: int,
    n_random: int,
    *,
    tau: float = 1.0,
    logits: str = "score",
    seed: int = 0,
    layer: int = 0,
    kv_start: Tensor | None = None,
    kv_lens: Tensor | None = None,
    row_id: Tensor | None = None,
    counts: Tensor | None = None,
    pool_kernel: int = 1,
    pool: str = "max",
    check_nan: bool = False,
) -> tuple[Tensor, Tensor]:
    """Which tokens stay: sinks, recents, top-k by score, and a random draw (NACL section 3.4).

    The draw is without replacement with ``p proportional to exp(score / tau)`` (Gumbel top-k; noise from Philox at
    (layer, head, token, row_id) under ``seed``), so it does not depend on device, threads, padding or
    batch order. Ties go to the lower slot; NaN counts as -inf.

    Args:
        scores: [B, H, L] float32.
        n_sink, n_recent: tokens always kept at the start and end of the valid slots.
        n_topk: highest-scoring candidates kept. n_random: candidates drawn from the rest.
        tau: temperature of the draw, > 0.
        logits: ``"score"`` or ``"log_score"`` (then ``p proportional to score ** (1 / tau)``).
        seed, layer: key of the random numbers.
        kv_start, kv_lens: [B], the valid slots.
        row_id: [B] identity of each sequence in the random numbers; default 0.
        counts: [B, 4] or [B, H, 4] own (sink, recent, topk, random) per sequence or head; the integer
            arguments then only give the output width C (their sum).
        pool_kernel, pool: odd window and ``"max"`` | ``"avg"`` over neighbouring candidates.
        check_nan: raise on NaN scores (costs a pass; synchronises on CUDA).

    Returns:
        idx [B, H, C] int64, ascending, unused slots -1; new_lens int32 [B] (or [B, H] with per-head
        counts): how many slots are used.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is allowed.
    """
    return call_inference(
        _ops.nacl_select, scores, n_sink, n_recent, n_topk, n_random, tau=tau, logits=logits,
        seed=seed, layer=layer, kv_start=kv_start, kv_lens=kv_lens, row_id=row_id, counts=counts,
        pool_kernel=pool_kernel, pool=pool, check_nan=check_nan,
    )  # fmt: skip


def kv_gather(
    k: Tensor,
    v: Tensor,
    idx: Tensor,
    *,
    new_lens: Tensor | None = None,
    inv_freq: Tensor | None = None,
    kv_start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Copies the chosen tokens of a KV cache into new tensors, both sides in one call.

    Args:
        k: [B, HK, L, D]. v: [B, HV, L, DV], dtype of ``k``.
        idx: [B, H, C] with H = HK = HV, or H = 1 shared by all heads (then HK may differ from HV).
        new_lens: [B] or [B, H]; slots from there on, and slots with idx < 0, become 0.
        inv_freq: [D / 2] float32; keys are re-rotated from position ``idx - kv_start`` to their slot
            (half-split RoPE), so that positions continue from C.
        kv_start: [B], first valid slot; used by the re-rotation only.

    Returns:
        k' [B, HK, C, D] and v' [B, HV, C, DV], contiguous.

    Raises:
        ValueError, TypeError; IndexError if an idx is >= L (CPU; CUDA writes zeros there).
    """
    return call_inference(
        _ops.kv_gather, k, v, idx, new_lens=new_lens, inv_freq=inv_freq, kv_start=kv_start
    )


def kv_compact_(
    k: Tensor,
    v: Tensor,
    idx: Tensor,
    *,
    new_lens: Tensor | None = None,
    inv_freq: Tensor | None = None,
    kv_start: Tensor | None = None,
) -> None:
    """``kv_gather`` in place: the chosen tokens move to the first slots of ``k`` and ``v``.

    Arguments as in :func:`kv_gather`; ``idx`` must be strictly increasing over the used slots, and
    ``k`` and ``v`` must have contiguous rows. All other slots keep their content.

    Raises:
        ValueError, TypeError, IndexError: and then nothing was written. CUDA does not read idx
            beforehand: it leaves a slot alone whose idx is out of range or below the slot.
    """
    call_inference(
        _ops.kv_compact_,
        k,
        v,
        idx,
        mutates=(k, v),
        new_lens=new_lens,
        inv_freq=inv_freq,
        kv_start=kv_start,
    )


def nacl_evict(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor | None = None,
    *,
    n_sink: int,
    n_recent: int,
    n_topk: int,
    n_random: int,
    scale: float | None = None,
    causal: bool = True,
    q_offset: int = -1,
    q_positions: Tensor | None = None,
    kv_start: Tensor | None = None,
    kv_lens: Tensor | None = None,
    window: int = -1,
    reduce: str = "mean",
    kmap: Tensor | None = None,
    tau: float = 1.0,
    logits: str = "score",
    seed: int = 0,
    layer: int = 0,
    row_id: Tensor | None = None,
    counts: Tensor | None = None,
    pool_kernel: int = 1,
    pool: str = "max",
    inv_freq: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`proxy_scores`, :func:`nacl_select` and :func:`kv_gather` in one call (NACL section 3).

    Arguments and errors are those of the three ops. Returns (k', v', idx, new_lens).
    """
    return call_inference(
        _ops.nacl_evict, q, k, v, lse, scale=_scale(q, scale), causal=causal, q_offset=q_offset,
        q_positions=q_positions, kv_start=kv_start, kv_lens=kv_lens, window=window, reduce=reduce,
        kmap=kmap, n_sink=n_sink, n_recent=n_recent, n_topk=n_topk, n_random=n_random, tau=tau,
        logits=logits, seed=seed, layer=layer, row_id=row_id, counts=counts,
        pool_kernel=pool_kernel, pool=pool, inv_freq=inv_freq,
    )  # fmt: skip


def ragged_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    *,
    scale: float | None = None,
    lens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of the newest tokens over a flat cache with its own length per sequence and head.

    Args:
        q: [B, Hq, D], or [B, Hq, Sq, D] with Sq <= 16 (causal, bottom-right aligned).
        k: [N, D]. v: [N, DV], dtype of ``q``.
        offsets: [B * Hkv + 1] ascending; segment ``b * Hkv + h`` starts at its offset.
        scale: logit scale; default ``1 / sqrt(D)``.
        lens: [B * Hkv] used rows of each segment (the rest is spare room); default all.

    Returns:
        out, like ``q`` with DV, and lse float32 (natural log). An empty segment gives 0 and -inf.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is allowed.
    """
    return call_inference(_ops.ragged_decode, q, k, v, offsets, scale=_scale(q, scale), lens=lens)
