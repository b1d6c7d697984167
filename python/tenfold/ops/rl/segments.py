# SPDX-License-Identifier: Apache-2.0
"""Where macro actions begin: rows of valid tokens cut into segments.

All four take a ``mask`` [B, R] (bool, int8 or uint8; other dtypes: nonzero is valid) and give
``seg`` [B, R] int32, the segment of every valid token from 0 and -1 elsewhere, and ``nseg`` [B] int32. Valid
tokens are numbered across holes of the mask; ``holes="split"`` ends a segment there, ``"error"`` refuses.

With ``cu_seqlens`` (int32 or int64 [B + 1], where rows begin, and N) rows are packed one after the other: what is
[B, R] above and below is [N]. Its values are checked, on a GPU only with ``validate``, since that waits for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tenfold.ops._masks import as_bytes
from tenfold.ops._register import call_inference, inference_only

_ops = torch.ops.tenfold
_INTS = (torch.int32, torch.int64)
NO_LIMIT = 1 << 31

for _name in ("fixed", "lengths", "ppl", "starts"):
    inference_only(f"macro_segment_{_name}")


def _like(mask: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    rows = mask.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    seg = mask.new_empty(mask.shape, dtype=torch.int32)
    return seg, mask.new_empty((rows,), dtype=torch.int32)


@torch.library.register_fake("tenfold::macro_segment_fixed")
def _(mask, n, isolate_last=False, *, holes="bridge", cu_seqlens=None):
    return _like(mask, cu_seqlens)


@torch.library.register_fake("tenfold::macro_segment_lengths")
def _(mask, lengths, tail="one_segment", *, isolate_last=False, holes="bridge", cu_seqlens=None):
    return _like(mask, cu_seqlens)


@torch.library.register_fake("tenfold::macro_segment_ppl")
def _(nll, mask, mode="macro_prefix", *, holes="bridge", cu_seqlens=None):
    return _like(mask, cu_seqlens)


@torch.library.register_fake("tenfold::macro_segment_starts")
def _(starts, mask, *, holes="bridge", cu_seqlens=None):
    return _like(mask, cu_seqlens)


def check_offsets(cu_seqlens: Tensor | None, total: int) -> None:
    """ValueError unless ``cu_seqlens`` of a GPU rises from 0 to ``total``; waits for it.

    The CPU kernels check their own.
    """
    if cu_seqlens is None or cu_seqlens.is_cpu or torch.compiler.is_compiling():
        return
    if cu_seqlens.dim() != 1 or not len(cu_seqlens) or cu_seqlens.dtype not in _INTS:
        return  # refused by the op
    good = (cu_seqlens.diff() >= 0).all() & (cu_seqlens[0] == 0) & (cu_seqlens[-1] == total)
    if not bool(good):
        raise ValueError(
            f"cu_seqlens must begin with 0, not fall, and end with the number of tokens, {total}, got "
            f"{cu_seqlens.tolist()}"
        )


def _refuse_holes(mask: Tensor, cu_seqlens: Tensor | None) -> None:
    rows = mask.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    widths = mask.shape[1] if cu_seqlens is None else cu_seqlens.diff()
    row = torch.arange(rows, device=mask.device).repeat_interleave(widths)
    at = (mask != 0).flatten().nonzero()[:, 0]
    row = row[at]
    count = row.bincount(minlength=rows)
    first = torch.full_like(count, mask.numel()).scatter_reduce(0, row, at, "amin")
    last = torch.full_like(count, -1).scatter_reduce(0, row, at, "amax")
    wrong = ((count > 0) & (last - first + 1 != count)).nonzero()[:, 0].tolist()
    if wrong:
        raise ValueError(f"mask has holes in rows {wrong}; holes must be bridge or split for these")


def _checked(
    mask: Tensor, holes: str, cu_seqlens: Tensor | None, validate: bool
) -> tuple[Tensor, str]:
    if validate:
        check_offsets(cu_seqlens, mask.shape[0])
    if holes != "error":
        return as_bytes(mask), holes
    _refuse_holes(mask, cu_seqlens)
    return as_bytes(mask), "bridge"


def macro_segment_fixed(
    mask: Tensor, n: int | None, isolate_last: bool = False, *, holes: str = "bridge",
    cu_seqlens: Tensor | None = None, validate: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Segments of ``n`` tokens, the last one shorter; None: one segment per row.

    Args:
        isolate_last: the last valid token is a segment of its own (the reference code).

    Raises:
        ValueError: n < 1, an unknown ``holes``, a mask that is not [B, R]. TypeError: its dtype.

    Source:
        MA-RLHF (arXiv 2410.02743), fixed n-gram termination.
    """
    mask, holes = _checked(mask, holes, cu_seqlens, validate)
    n = NO_LIMIT if n is None else n
    return call_inference(_ops.macro_segment_fixed, mask, n, isolate_last, holes=holes,
                          cu_seqlens=cu_seqlens)  # fmt: skip


def macro_segment_lengths(
    mask: Tensor, lengths: Tensor, tail: str = "one_segment", *, isolate_last: bool = False,
    holes: str = "bridge", cu_seqlens: Tensor | None = None, validate: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Segments of the given lengths, one after the other: randomised n-grams, drawn outside.

    Args:
        lengths: int32 [B, K], at least 1 (checked, on a GPU only with ``validate``; there less counts as 1).
        tail: what is beyond the sum of a row's lengths is one segment (``"one_segment"``), or the
            lengths begin anew (``"recycle"``).

    Source:
        MA-RLHF, randomised n-gram termination.
    """
    mask, holes = _checked(mask, holes, cu_seqlens, validate)
    checked = validate and lengths.is_cuda and not torch.compiler.is_compiling()
    if checked and lengths.numel() and int(lengths.min()) < 1:
        raise ValueError(f"lengths must be at least 1, got {int(lengths.min())}")
    return call_inference(_ops.macro_segment_lengths, mask, lengths, tail,
                          isolate_last=isolate_last, holes=holes, cu_seqlens=cu_seqlens)  # fmt: skip


def macro_segment_ppl(
    nll: Tensor, mask: Tensor, mode: str = "macro_prefix", *, holes: str = "bridge",
    cu_seqlens: Tensor | None = None, validate: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Segments from the tokens' NLLs ``u`` [B, R] under the reference model. A token begins one where

    - ``macro_prefix``: u is above the mean of the running segment;
    - ``response_prefix``: the mean of the response so far rises;
    - ``token_rise``: u is above that of the token before it;
    - ``token_rise_ref``: the next token's u is above its own, and at the last token (reference code).

    Source:
        MA-RLHF, perplexity-based termination; the comparison of means is in float64.
    """
    mask, holes = _checked(mask, holes, cu_seqlens, validate)
    return call_inference(_ops.macro_segment_ppl, nll.detach().float(), mask, mode, holes=holes,
                          cu_seqlens=cu_seqlens)  # fmt: skip


def macro_segment_starts(
    starts: Tensor, mask: Tensor, *, holes: str = "bridge", cu_seqlens: Tensor | None = None,
    validate: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Segments that begin where ``starts`` [B, R] says: sentences, statements, turns.

    The first valid token always begins one; starts at masked tokens mean nothing.
    """
    mask, holes = _checked(mask, holes, cu_seqlens, validate)
    return call_inference(_ops.macro_segment_starts, as_bytes(starts), mask, holes=holes,
                          cu_seqlens=cu_seqlens)  # fmt: skip
