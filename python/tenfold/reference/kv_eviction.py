# SPDX-License-Identifier: Apache-2.0
"""Definitions of the ``kv_eviction`` ops (NACL, arXiv 2408.03675): plain PyTorch, obviously right.

Computations run in float64 when the inputs are float64, else in float32. Notation: B batch, Hq query
heads, Hkv key/value heads, L keys, W proxy queries, D head dim, C kept tokens per head.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tenfold.reference.numbers import work
from tenfold.reference.random import gumbel, philox4x32_10


def valid_range(
    batch: int, length: int, kv_start: Tensor | None, kv_lens: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """First valid slot and number of valid slots of each sequence, both int64 [B]."""
    start = (
        torch.zeros(batch, dtype=torch.int64, device=device)
        if kv_start is None
        else kv_start.to(torch.int64)
    )
    lens = length - start if kv_lens is None else kv_lens.to(torch.int64)
    return start, lens


def proxy_positions(
    batch: int, num_proxies: int, length: int, q_offset: int, q_positions: Tensor | None, device
) -> Tensor:
    """Slot of every proxy query on the key axis, int64 [B, W]."""
    if q_positions is None:
        first = length - num_proxies if q_offset == -1 else q_offset
        q_positions = torch.arange(first, first + num_proxies, device=device)
    return q_positions.to(torch.int64).expand(batch, num_proxies)


def visibility(
    pos: Tensor, start: Tensor, lens: Tensor, length: int, causal: bool, window: int
) -> Tensor:
    """Boolean [B, W, L]: does the proxy at ``pos`` see key j? Inactive proxies see nothing."""
    j = torch.arange(length, device=pos.device)
    end = start + lens
    active = (pos >= start[:, None]) & (pos < end[:, None])
    valid = (j >= start[:, None]) & (j < end[:, None])
    see = active[:, :, None] & valid[:, None, :]
    if causal:
        see &= j <= pos[:, :, None]
    if window >= 0:
        see &= pos[:, :, None] - j < window
    return see


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
    """``score_h[j] = sum_w softmax_j(scale * q_w . k_j)``, reduced over the query heads of each key head.

    Returns scores [B, Hkv, L] and the row log-sum-exp [B, Hq, W].
    """
    (b, hq, w, d), (_, hkv, length, _) = q.shape, k.shape
    scale = 1.0 / math.sqrt(d) if scale is None else scale
    heads = torch.arange(hq, device=q.device) // (hq // hkv) if kmap is None else kmap.long()
    start, lens = valid_range(b, length, kv_start, kv_lens, q.device)
    pos = proxy_positions(b, w, length, q_offset, q_positions, q.device)
    see = visibility(pos, start, lens, length, causal, window)[:, None]

    logits = work(q) @ work(k)[:, heads].transpose(-1, -2) * scale
    logits = logits.masked_fill(~see, -math.inf)
    if lse is None:
        lse = torch.logsumexp(logits, -1)
        p = torch.softmax(logits, -1)
    else:
        p = torch.exp(logits - lse[..., None])
    p = torch.where(see & ~torch.isneginf(lse)[..., None], p, 0.0)
    per_head = p.sum(2)  # [B, Hq, L]

    scores = per_head.new_zeros(b, hkv, length)
    for head in range(hkv):
        mine = per_head[:, heads == head]
        if mine.shape[1] > 0:
            scores[:, head] = {
                "mean": mine.mean(1),
                "sum": mine.sum(1),
                "max": mine.amax(1),
            }[reduce]
    return scores, lse


def _pool(scores: Tensor, kernel: int, mode: str) -> Tensor:
    """Score pooling over neighbouring candidates; positions outside count as -inf (max) or 0 (avg)."""
    if kernel == 1 or scores.numel() == 0:
        return scores
    half = kernel // 2
    x = scores[None, None]
    if mode == "max":
        return F.max_pool1d(x, kernel, 1, half)[0, 0]
    return F.avg_pool1d(x, kernel, 1, half, count_include_pad=True)[0, 0]


def _take_largest(keys: Tensor, n: int) -> Tensor:
    """Positions of the n largest keys; among equals the lower position wins."""
    return torch.sort(keys, descending=True, stable=True).indices[:n]


def _select_row(
    row: Tensor, counts: list[int], start: int, n: int, logits: str, tau: float, noise: Tensor
) -> Tensor:
    """Kept positions of one (sequence, head): ``row`` are its pooled scores over the candidates."""
    n_sink, n_recent, n_topk, n_random = counts
    row = row.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    top = _take_largest(row, n_topk)
    rest = torch.ones(row.shape[0], dtype=torch.bool, device=row.device)
    rest[top] = False
    rest = rest.nonzero()[:, 0]
    logit = (row.log() if logits == "log_score" else row) / tau
    keys = (logit + noise)[rest].nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    drawn = rest[_take_largest(keys, n_random)]
    first, last = start + n_sink, start + n - n_recent
    ends = [torch.arange(start, first), torch.arange(last, start + n)]
    ends = [e.to(row.device) for e in ends]
    return torch.cat([ends[0], top + first, drawn + first, ends[1]]).sort().values


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
    """Sinks + recents + top-k by score + a draw without replacement (Gumbel top-k), ascending.

    Returns idx int64 [B, H, C] (unused slots -1) and new_lens int32 [B] (or [B, H]).
    """
    b, h, length = scores.shape
    if check_nan and bool(scores.isnan().any()):
        raise ValueError("tenfold::nacl_select: scores contain NaN")
    width = n_sink + n_recent + n_topk + n_random
    per_head = counts is not None and counts.dim() == 3
    if counts is None:
        counts = torch.tensor([n_sink, n_recent, n_topk, n_random]).expand(b, h, 4)
    elif counts.dim() == 2:
        counts = counts[:, None].expand(b, h, 4)
    start, lens = valid_range(b, length, kv_start, kv_lens, scores.device)
    idx = torch.full((b, h, width), -1, dtype=torch.int64, device=scores.device)
    new_lens = torch.zeros(b, h, dtype=torch.int32, device=scores.device)
    for i in range(b):
        s, n = int(start[i]), int(lens[i])
        rid = 0 if row_id is None else int(row_id[i])
        for head in range(h):
            c = [int(x) for x in counts[i, head]]
            if n <= sum(c):
                kept = torch.arange(s, s + n, device=scores.device)
            else:
                lo, hi = s + c[0], s + n - c[1]
                token = torch.arange(lo - s, hi - s, device=scores.device)
                ctr = tuple(torch.tensor(x, device=scores.device) for x in (layer, head))
                word = philox4x32_10((*ctr, token, torch.tensor(rid, device=token.device)), seed)[0]
                row = _pool(work(scores[i, head, lo:hi]), pool_kernel, pool)
                kept = _select_row(row, c, s, n, logits, tau, gumbel(word))
            idx[i, head, : kept.shape[0]] = kept
            new_lens[i, head] = kept.shape[0]
    return idx, new_lens if per_head else new_lens.amax(1) if h else new_lens.new_zeros(b)


def _slot_valid(idx: Tensor, new_lens: Tensor | None) -> Tensor:
    """Boolean [B, Hi, C]: slots that hold a token."""
    ok = idx >= 0
    if new_lens is not None:
        n = new_lens.to(torch.int64)
        n = n[:, None] if n.dim() == 1 else n
        ok &= torch.arange(idx.shape[-1], device=idx.device) < n[..., None]
    return ok


def _rerotate(k: Tensor, angle: Tensor) -> Tensor:
    """Rotate halves of the last dim by ``angle`` [..., D/2] (rotate_half RoPE convention)."""
    x1, x2 = work(k).chunk(2, -1)
    cos, sin = angle.cos().to(x1.dtype), angle.sin().to(x1.dtype)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1).to(k.dtype)


def kv_gather(
    k: Tensor,
    v: Tensor,
    idx: Tensor,
    *,
    new_lens: Tensor | None = None,
    inv_freq: Tensor | None = None,
    kv_start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``k'[b,h,c] = k[b,h,idx[b,h,c]]`` (same for v); unused slots are 0; keys optionally re-rotated."""
    if bool((idx >= k.shape[2]).any()):
        raise IndexError("tenfold::kv_gather: idx out of range")
    ok = _slot_valid(idx, new_lens)
    safe = idx.to(torch.int64).clamp(min=0)

    def take(x: Tensor) -> Tensor:
        at = safe.expand(-1, x.shape[1], -1)[..., None].expand(-1, -1, -1, x.shape[3])
        return torch.gather(x, 2, at).masked_fill(~ok.expand(-1, x.shape[1], -1)[..., None], 0)

    k_new, v_new = take(k), take(v)
    if inv_freq is not None:
        start, _ = valid_range(k.shape[0], k.shape[2], kv_start, None, k.device)
        slot = torch.arange(idx.shape[-1], device=idx.device)
        shift = slot - (safe - start[:, None, None])
        rotated = _rerotate(k_new, shift[..., None].double() * inv_freq.double())
        k_new = torch.where(ok[..., None], rotated, k_new)
    return k_new, v_new


def kv_compact_(
    k: Tensor,
    v: Tensor,
    idx: Tensor,
    *,
    new_lens: Tensor | None = None,
    inv_freq: Tensor | None = None,
    kv_start: Tensor | None = None,
) -> None:
    """In-place ``kv_gather``: kept tokens move to the first slots, all other slots keep their content."""
    ok = _slot_valid(idx, new_lens)
    used = torch.where(ok, idx.to(torch.int64), torch.iinfo(torch.int64).max)
    both = ok[..., 1:] & ok[..., :-1]
    if bool((both & (used[..., 1:] <= used[..., :-1])).any()):
        raise ValueError("tenfold::kv_compact_: idx must be strictly increasing")
    c = idx.shape[-1]
    for x, new in zip(
        (k, v),
        kv_gather(k, v, idx, new_lens=new_lens, inv_freq=inv_freq, kv_start=kv_start),
        strict=True,
    ):
        x[:, :, :c] = torch.where(ok[..., None], new, x[:, :, :c])


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
    """``proxy_scores`` -> ``nacl_select`` -> ``kv_gather``; returns (k', v', idx, new_lens)."""
    scores, _ = proxy_scores(
        q, k, lse, scale=scale, causal=causal, q_offset=q_offset, q_positions=q_positions,
        kv_start=kv_start, kv_lens=kv_lens, window=window, reduce=reduce, kmap=kmap,
    )  # fmt: skip
    idx, new_lens = nacl_select(
        scores, n_sink, n_recent, n_topk, n_random, tau=tau, logits=logits, seed=seed, layer=layer,
        kv_start=kv_start, kv_lens=kv_lens, row_id=row_id, counts=counts, pool_kernel=pool_kernel,
        pool=pool,
    )  # fmt: skip
    k_new, v_new = kv_gather(k, v, idx, new_lens=new_lens, inv_freq=inv_freq, kv_start=kv_start)
    return k_new, v_new, idx, new_lens


def ragged_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    *,
    scale: float | None = None,
    lens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of the newest Sq tokens over per-(sequence, head) segments of a flat cache.

    Segment ``b * Hkv + h`` is rows ``[offsets[i], offsets[i] + lens[i])`` of ``k`` [N, D], ``v`` [N, DV].
    """
    one = q.dim() == 3
    q4 = q[:, :, None] if one else q
    b, hq, sq, d = q4.shape
    hkv = (offsets.numel() - 1) // max(b, 1)
    group = hq // max(hkv, 1)
    scale = 1.0 / math.sqrt(d) if scale is None else scale
    out = work(q4).new_zeros(b, hq, sq, v.shape[1])
    lse = work(q4).new_full((b, hq, sq), -math.inf)
    for i in range(b * hkv):
        lo = int(offsets[i])
        n = int(offsets[i + 1]) - lo if lens is None else int(lens[i])
        heads = slice((i % hkv) * group, (i % hkv + 1) * group)
        for s in range(sq):
            seen = n - (sq - 1 - s)
            if seen <= 0:
                continue
            logits = work(q4[i // hkv, heads, s]) @ work(k[lo : lo + seen]).T * scale
            lse[i // hkv, heads, s] = torch.logsumexp(logits, -1)
            out[i // hkv, heads, s] = torch.softmax(logits, -1) @ work(v[lo : lo + seen])
    out = out.to(q.dtype)
    return (out[:, :, 0], lse[:, :, 0]) if one else (out, lse)
