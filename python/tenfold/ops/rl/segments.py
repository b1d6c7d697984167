"""Where macro actions begin: rows of valid tokens cut into segments.

All four take a ``mask`` [B, R] (bool, int8 or uint8; other dtypes: nonzero is valid) and give
``seg`` [B, R] int32, the segment of every valid token from 0 and -1 elsewhere, and ``nseg`` [B] int32. Valid
tokens are numbered across holes of the mask; ``holes="split"`` ends a segment there, ``"error"`` refuses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tenfold.ops._register import call_inference, inference_only

_ops = torch.ops.tenfold
_BYTES = (torch.bool, torch.uint8, torch.int8)
NO_LIMIT = 1 << 31

for _name in ("fixed", "lengths", "ppl", "starts"):
    inference_only(f"macro_segment_{_name}")


def _like(mask: Tensor) -> tuple[Tensor, Tensor]:
    return mask.new_empty(mask.shape, dtype=torch.int32), mask.new_empty(
        mask.shape[:1], dtype=torch.int32
    )


@torch.library.register_fake("tenfold::macro_segment_fixed")
def _(mask, n, isolate_last=False, *, holes="bridge"):
    return _like(mask)


@torch.library.register_fake("tenfold::macro_segment_lengths")
def _(mask, lengths, tail="one_segment", *, isolate_last=False, holes="bridge"):
    return _like(mask)


@torch.library.register_fake("tenfold::macro_segment_ppl")
def _(nll, mask, mode="macro_prefix", *, holes="bridge"):
    return _like(mask)


@torch.library.register_fake("tenfold::macro_segment_starts")
def _(starts, mask, *, holes="bridge"):
    return _like(mask)


def _bytes(x: Tensor) -> Tensor:
    return x if x.dtype in _BYTES else x != 0


def _checked(mask: Tensor, holes: str) -> tuple[Tensor, str]:
    if holes != "error":
        return _bytes(mask), holes
    on = mask != 0
    ends = (on[:, :-1] & ~on[:, 1:]).int().cumsum(1) > 0
    rows = (on[:, 1:] & ends).any(1).nonzero()[:, 0].tolist()
    if rows:
        raise ValueError(f"mask has holes in rows {rows}; holes must be bridge or split for these")
    return _bytes(mask), "bridge"


def macro_segment_fixed(
    mask: Tensor, n: int | None, isolate_last: bool = False, *, holes: str = "bridge"
) -> tuple[Tensor, Tensor]:
    """Segments of ``n`` tokens, the last one shorter; None: one segment per row.

    Args:
        isolate_last: the last valid token is a segment of its own (the reference code).

    Raises:
        ValueError: n < 1, an unknown ``holes``, a mask that is not [B, R]. TypeError: its dtype.

    Source:
        MA-RLHF (arXiv 2410.02743), fixed n-gram termination.
    """
    mask, holes = _checked(mask, holes)
    n = NO_LIMIT if n is None else n
    return call_inference(_ops.macro_segment_fixed, mask, n, isolate_last, holes=holes)


def macro_segment_lengths(
    mask: Tensor, lengths: Tensor, tail: str = "one_segment", *, isolate_last: bool = False,
    holes: str = "bridge",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Segments of the given lengths, one after the other: randomised n-grams, drawn outside.

    Args:
        lengths: int32 [B, K], at least 1 (values are checked on the CPU).
        tail: what is beyond the sum of a row's lengths is one segment (``"one_segment"``), or the
            lengths begin anew (``"recycle"``).

    Source:
        MA-RLHF, randomised n-gram termination.
    """
    mask, holes = _checked(mask, holes)
    return call_inference(_ops.macro_segment_lengths, mask, lengths, tail,
                          isolate_last=isolate_last, holes=holes)  # fmt: skip


def macro_segment_ppl(
    nll: Tensor, mask: Tensor, mode: str = "macro_prefix", *, holes: str = "bridge"
) -> tuple[Tensor, Tensor]:
    """Segments from the tokens' NLLs ``u`` [B, R] under the reference model. A token begins one where

    - ``macro_prefix``: u is above the mean of the running segment;
    - ``response_prefix``: the mean of the response so far rises;
    - ``token_rise``: u is above that of the token before it;
    - ``token_rise_ref``: the next token's u is above its own, and at the last token (reference code).

    Source:
        MA-RLHF, perplexity-based termination; the comparison of means is in float64.
    """
    mask, holes = _checked(mask, holes)
    return call_inference(_ops.macro_segment_ppl, nll.detach().float(), mask, mode, holes=holes)


def macro_segment_starts(
    starts: Tensor, mask: Tensor, *, holes: str = "bridge"
) -> tuple[Tensor, Tensor]:
    """Segments that begin where ``starts`` [B, R] says: sentences, statements, turns.

    The first valid token always begins one; starts at masked tokens mean nothing.
    """
    mask, holes = _checked(mask, holes)
    return call_inference(_ops.macro_segment_starts, _bytes(starts), mask, holes=holes)
