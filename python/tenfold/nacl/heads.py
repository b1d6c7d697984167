"""Per-head budgets: one layer budget shared over its KV heads by score (as AdaKV allocates it)."""

from __future__ import annotations

import torch
from torch import Tensor


def adaptive_counts(
    scores: Tensor, counts: Tensor, start: Tensor, lens: Tensor, floor: float
) -> Tensor:
    """Own (sink, recent, topk, random) counts for every head.

    The ``H * C`` tokens of a layer go to the candidates with the highest scores over all heads
    together; no head gets less than ``floor * C``. Sinks and recents stay; top-k and random share
    what a head got in their original proportion.

    Args:
        scores: [B, H, L] float32. counts: [B, 4] int32, the uniform counts.
        start, lens: [B] valid slots. floor: share of C in [0, 1].

    Returns:
        int32 [B, H, 4]; each sequence's counts sum to H * C.
    """
    batch, heads, _ = scores.shape
    out = torch.empty((batch, heads, 4), dtype=torch.int32)
    for b in range(batch):
        sink, recent, topk, random = (int(x) for x in counts[b])
        ends, free = sink + recent, topk + random
        first, last = int(start[b]) + sink, int(start[b] + lens[b]) - recent
        room = max(last - first, 0)
        least = min(max(int(floor * (ends + free)) - ends, 0), free)
        extra = (free - least) * heads
        share = torch.zeros(heads, dtype=torch.int64)
        if extra > 0 and room > 0:
            best = scores[b, :, first:last].reshape(-1).topk(min(extra, heads * room)).indices
            share = torch.bincount((best // room).cpu(), minlength=heads)
        mine = _fit(share + least, room, free * heads)
        for h in range(heads):
            n_top = round(int(mine[h]) * topk / free) if free else 0
            out[b, h] = torch.tensor([sink, recent, n_top, int(mine[h]) - n_top])
    return out


def _fit(want: Tensor, room: int, total: int) -> Tensor:
    """Caps every head at ``room`` and hands what is left over to the heads with most space."""
    got = want.clamp(max=room)
    left = min(total, room * got.numel()) - int(got.sum())
    while left > 0:
        space = room - got
        head = int(space.argmax())
        step = min(left, int(space[head]))
        got[head] += step
        left -= step
    return got
