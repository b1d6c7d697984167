# SPDX-License-Identifier: Apache-2.0
"""Where macro actions begin (section 3.3 of the method): rows of valid tokens cut into segments.

Valid tokens of a row are numbered q = 0, 1, ... across holes of the mask. ``seg`` [B, R] int32 is the
segment of every valid token, from 0, and -1 elsewhere; ``nseg`` [B] int32 counts them. With ``cu_seqlens``
rows are packed: what is [B, R] is [N] (:mod:`tenfold.reference.rl.packed`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tenfold.reference.rl.packed import pack_rows, pad_rows

HOLES = ("bridge", "split", "error")
TAILS = ("one_segment", "recycle")
PPL_MODES = ("macro_prefix", "response_prefix", "token_rise", "token_rise_ref")


def _check_holes(mask: Tensor, holes: str) -> None:
    if holes not in HOLES:
        raise ValueError(f"holes must be one of {', '.join(HOLES)}, got {holes!r}")
    if holes != "error" or mask.shape[1] == 0:
        return
    inside = mask.int().diff(dim=1) == 1  # a valid token after an invalid one
    first = mask.int().argmax(1, keepdim=True)
    later = torch.arange(1, mask.shape[1], device=mask.device) > first
    if bool((inside & later).any()):
        rows = (inside & later).any(1).nonzero()[:, 0].tolist()
        raise ValueError(f"mask has holes in rows {rows}; holes must be bridge or split for these")


def number_starts(starts: Tensor, mask: Tensor, holes: str = "bridge") -> tuple[Tensor, Tensor]:
    """(seg, nseg) of a mask of starts; the first valid token always is one."""
    mask = mask.bool()
    _check_holes(mask, holes)
    first = mask & (mask.int().cumsum(1) == 1)
    starts = (starts.bool() & mask) | first
    if holes == "split":
        before = torch.zeros_like(mask)
        before[:, 1:] = mask[:, :-1]
        starts |= mask & ~before
    count = starts.int().cumsum(1)
    seg = torch.where(mask, count - 1, -1).int()
    return seg, starts.sum(1).int()


def _rank(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Number of every valid token in its row, and of valid tokens per row [B, 1]."""
    mask = mask.bool()
    return mask.int().cumsum(1) - 1, mask.sum(1, keepdim=True)


def _packed(seg: Tensor, nseg: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    return pack_rows(seg, cu_seqlens), nseg


def macro_segment_fixed(
    mask: Tensor, n: int, isolate_last: bool = False, *, holes: str = "bridge",
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Segments of ``n`` tokens: ``q // n``; with ``isolate_last`` the last token is one of its own."""
    if cu_seqlens is not None:
        made = macro_segment_fixed(pad_rows(mask, cu_seqlens), n, isolate_last, holes=holes)
        return _packed(*made, cu_seqlens)
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    q, count = _rank(mask)
    starts = q % n == 0
    if isolate_last:
        starts = (starts & (q < count - 1)) | (q == count - 1)
    return number_starts(starts, mask, holes)


def macro_segment_lengths(
    mask: Tensor, lengths: Tensor, tail: str = "one_segment", *, isolate_last: bool = False,
    holes: str = "bridge", cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Segments of the given ``lengths`` [B, K], one after the other.

    ``tail``: tokens beyond their sum are one segment, or (``"recycle"``) the lengths begin anew.
    """
    if cu_seqlens is not None:
        made = macro_segment_lengths(pad_rows(mask, cu_seqlens), lengths, tail,
                                     isolate_last=isolate_last, holes=holes)  # fmt: skip
        return _packed(*made, cu_seqlens)
    if tail not in TAILS:
        raise ValueError(f"tail must be one of {', '.join(TAILS)}, got {tail!r}")
    if lengths.numel() and int(lengths.min()) < 1:
        raise ValueError(f"lengths must be at least 1, got {int(lengths.min())}")
    q, count = _rank(mask)
    starts = torch.zeros_like(mask, dtype=torch.bool)
    for b in range(mask.shape[0]):
        row, at, cuts = lengths[b].tolist(), 0, {0}
        while row and at < int(count[b]):
            for n in row:
                at += n
                cuts.add(at)
            if tail == "one_segment":
                break
        here = torch.tensor([int(x) in cuts for x in q[b]], dtype=torch.bool, device=mask.device)
        if isolate_last:
            here = (here & (q[b] < count[b] - 1)) | (q[b] == count[b] - 1)
        starts[b] = here
    return number_starts(starts, mask, holes)


def macro_segment_ppl(
    nll: Tensor, mask: Tensor, mode: str = "macro_prefix", *, holes: str = "bridge",
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Segments from token NLLs ``u`` under the reference model; which token j begins one:

    - ``macro_prefix``: ``u_j`` is above the mean of the running segment;
    - ``response_prefix``: the mean of ``u_0..u_j`` is above that of ``u_0..u_{j-1}``;
    - ``token_rise``: ``u_j > u_{j-1}``;
    - ``token_rise_ref``: the one before such a token, and the last one (the reference code).
    """
    if mode not in PPL_MODES:
        raise ValueError(f"mode must be one of {', '.join(PPL_MODES)}, got {mode!r}")
    if cu_seqlens is not None:
        u, on = (pad_rows(x, cu_seqlens) for x in (nll, mask))
        return _packed(*macro_segment_ppl(u, on, mode, holes=holes), cu_seqlens)
    mask = mask.bool()
    starts = torch.zeros_like(mask)
    for b in range(mask.shape[0]):
        places = mask[b].nonzero()[:, 0].tolist()
        cut = [holes == "split" and j > 0 and places[j - 1] < x - 1 for j, x in enumerate(places)]
        u = nll[b, mask[b]].float().tolist()
        begins = [False] * len(u)
        total, count = 0.0, 0
        for j, x in enumerate(u):
            if mode == "token_rise":
                begins[j] = j > 0 and x > u[j - 1]
            elif mode == "token_rise_ref":
                begins[j] = j == len(u) - 1 or u[j + 1] > x
            elif mode == "response_prefix":  # mean of j + 1 above mean of j
                begins[j] = j > 0 and x * j > total
                total += x
            else:
                begins[j] = cut[j] or (count > 0 and x * count > total)
                total, count = (x, 1) if begins[j] or count == 0 else (total + x, count + 1)
        for place, begin in zip(places, begins):
            starts[b, place] = begin
    return number_starts(starts, mask, holes)


def macro_segment_starts(
    starts: Tensor, mask: Tensor, *, holes: str = "bridge", cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Segments that begin where ``starts`` [B, R] says; the first valid token always begins one."""
    if cu_seqlens is not None:
        begins, on = (pad_rows(x, cu_seqlens) for x in (starts, mask))
        return _packed(*number_starts(begins, on, holes), cu_seqlens)
    return number_starts(starts, mask, holes)
