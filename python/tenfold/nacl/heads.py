# SPDX-License-Identifier: Apache-2.0
"""Which heads share a set of kept tokens, and per-head budgets.

With decoupled heads (DHA) a query head reads its keys and its values in different groups, so tokens can
be evicted only from a connected component of the two maps at a time, usually the whole layer. Per-head
budgets: one layer budget shared over its KV heads by score (as AdaKV allocates it).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tenfold import ops


@dataclass(frozen=True)
class SharedSets:
    """The components of a layer with decoupled heads: N sets of kept tokens."""

    count: int
    key_set: Tensor  # [HK] int64, the set of each key head
    value_set: Tensor  # [HV] int64
    readers: Tensor  # [HK] float32, query heads of each key head

    @classmethod
    def of(cls, module: Any) -> SharedSets | None:
        """Those of an attention layer with ``key_map`` and ``value_map``, None for any other."""
        if getattr(module, "key_map", None) is None:
            return None
        from tenfold.dha.layout import HeadLayout

        maps = module.key_map.tolist(), module.value_map.tolist()
        layout = HeadLayout(len(maps[0]), (module.key_heads,), (module.value_heads,),
                            (tuple(maps[0]),), (tuple(maps[1]),))  # fmt: skip
        _, keys, values = layout.component_of_heads(0)
        readers = [maps[0].count(head) for head in range(module.key_heads)]
        device = module.key_map.device
        return cls(max(keys) + 1, torch.tensor(keys, device=device),
                   torch.tensor(values, device=device),
                   torch.tensor(readers, dtype=torch.float32, device=device))  # fmt: skip

    def pool(self, scores: Tensor, reduce: str) -> Tensor:
        """Scores [B, HK, L] of key heads, reduced over their query heads, to [B, N, L] of the sets."""
        index = self.key_set[None, :, None].expand_as(scores)
        out = scores.new_zeros((scores.shape[0], self.count, scores.shape[2]))
        if reduce == "max":
            return out.scatter_reduce(1, index, scores, "amax")
        if reduce == "sum":
            return out.scatter_add(1, index, scores)
        out = out.scatter_add(1, index, scores * self.readers[:, None])
        total = self.readers.new_zeros(self.count).index_add(0, self.key_set, self.readers)
        return out / total[:, None]

    def gather(
        self, keys: Tensor, values: Tensor, idx: Tensor, **rotation: Any
    ) -> tuple[Tensor, Tensor]:
        """The tokens ``idx`` [B, N, C] of every key and value head.

        Raises ValueError if ``idx`` holds sets of key heads, or anything but one set per component.
        """
        if idx.shape[1] != self.count:
            raise ValueError(
                f"a layer with {keys.shape[1]} key heads and {values.shape[1]} value heads must keep "
                f"one set of tokens per connected component of its maps ({self.count}), got idx for "
                f"{idx.shape[1]} heads: query heads that share keys do not share values"
            )
        if self.count == 1:
            return ops.kv_gather(keys, values, idx, **rotation)
        own_k, own_v = idx[:, self.key_set].contiguous(), idx[:, self.value_set].contiguous()
        if torch.equal(self.key_set, self.value_set):
            return ops.kv_gather(keys, values, own_k, **rotation)
        # kv_gather takes one set per head of both: each side goes with one column of itself.
        new_keys, _ = ops.kv_gather(keys, keys[..., :1], own_k, **rotation)
        _, new_values = ops.kv_gather(values[..., :1], values, own_v)
        return new_keys, new_values


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
