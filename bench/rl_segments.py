# SPDX-License-Identifier: Apache-2.0
"""Cases of the four ``macro_segment`` ops: part of the family ``rl``.

Rows are padded on the right. A mask costs a byte per token, ``seg`` four.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tenfold import ops, reference

from .case import Case, Inputs, Provider, Shape, compiled, provider
from .rl_batch import SIZES, N, mask_of, randn

Segments = tuple[Tensor, Tensor]
BASE = (2, 3, 5, 10)  # the paper's lengths, each three times
REPEAT = 3
K = REPEAT * len(BASE)


def _inputs(s: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    made = torch.Generator().manual_seed(1)
    drawn = torch.stack([torch.randperm(K, generator=made) for _ in range(s["b"])])
    starts = torch.rand(s["b"], s["r"], generator=made) < 1 / N
    nll = randn(s["b"], s["r"], seed=2).abs().to(dtype if dtype.is_floating_point else None)
    return Inputs(
        mask=mask_of(s).to(device), starts=starts.to(device), nll=nll.to(device),
        lengths=torch.tensor(BASE * REPEAT, dtype=torch.int32)[drawn].to(device),
    )  # fmt: skip


def _counted(seg: Tensor) -> Segments:
    return seg, seg.amax(1) + 1


def _rank(mask: Tensor) -> Tensor:
    return mask.cumsum(1, dtype=torch.int32) - 1


def fixed_eager(i: Inputs) -> Segments:
    """Numbers of the valid tokens, divided."""
    q = _rank(i.mask)
    return _counted(torch.where(i.mask, q.div_(N, rounding_mode="floor"), -1))


def lengths_eager(i: Inputs) -> Segments:
    """How many of the lengths' ends a token has passed."""
    ends = i.lengths.cumsum(1, dtype=torch.int32)
    passed = torch.searchsorted(ends, _rank(i.mask), right=True, out_int32=True)
    return _counted(torch.where(i.mask, passed, -1))


def starts_eager(i: Inputs) -> Segments:
    """Starts so far; the first valid token is one."""
    begins = i.starts & i.mask
    first = i.mask.byte().argmax(1, keepdim=True)
    begins.scatter_(1, first, i.mask.gather(1, first))
    return _counted(torch.where(i.mask, begins.cumsum(1, dtype=torch.int32) - 1, -1))


def response_prefix_eager(i: Inputs) -> Segments:
    """A token begins one where it is above the mean of all before it: one running sum."""
    q, u = _rank(i.mask), torch.where(i.mask, i.nll, 0.0).double()
    before = u.cumsum(1) - u
    begins = i.mask & ((u * q > before) | (q == 0))
    return _counted(torch.where(i.mask, begins.cumsum(1, dtype=torch.int32) - 1, -1))


def macro_prefix_eager(i: Inputs) -> Segments:
    """Column by column: where a segment begins depends on where the one before it did."""
    rows = i.mask.shape[0]
    total = torch.zeros(rows, dtype=torch.float64, device=i.mask.device)
    count, segments = torch.zeros_like(total), torch.full_like(total, -1, dtype=torch.int32)
    columns = []
    for u, on in zip(i.nll.double().unbind(1), i.mask.unbind(1)):
        begins = on & ((count == 0) | (u * count > total))
        going = on & ~begins
        total = torch.where(begins, u, torch.where(going, total + u, total))
        count = torch.where(begins, 1.0, count + going)
        segments = segments + begins
        columns.append(torch.where(on, segments, -1))
    return _counted(torch.stack(columns, 1))


# -- Python loops, as methods are first written ------------------------------------------------------


def _filled(mask: Tensor, cuts_of: Callable[[int, int], list[int]]) -> Segments:
    """Rows one by one, and slices of a row macro action by macro action."""
    seg = torch.full(mask.shape, -1, dtype=torch.int32, device=mask.device)
    nseg = []
    for row, length in enumerate(mask.sum(1).tolist()):
        cuts = cuts_of(row, length)
        for number, (begin, end) in enumerate(itertools.pairwise(cuts)):
            seg[row, begin:end] = number
        nseg.append(len(cuts) - 1)
    return seg, torch.tensor(nseg, dtype=torch.int32, device=mask.device)


def fixed_loop(i: Inputs) -> Segments:
    return _filled(i.mask, lambda _, length: [*range(0, length, N), length])


def lengths_loop(i: Inputs) -> Segments:
    def cuts(row: int, length: int) -> list[int]:
        ends = itertools.accumulate(i.lengths[row].tolist(), initial=0)
        return [*itertools.takewhile(lambda end: end < length, ends), length]

    return _filled(i.mask, cuts)


def starts_loop(i: Inputs) -> Segments:
    def cuts(row: int, length: int) -> list[int]:
        found = i.starts[row, :length].nonzero()[:, 0].tolist()
        return [*([] if found and found[0] == 0 else [0]), *found, length]

    return _filled(i.mask, cuts)


def perplexity_loop(mode: str) -> Callable[[Inputs], Segments]:
    def run(i: Inputs) -> Segments:
        def cuts(row: int, length: int) -> list[int]:
            total, count, found = 0.0, 0, []
            for at, u in enumerate(i.nll[row, :length].tolist()):
                if count == 0 or u * count > total:
                    found.append(at)
                    if mode == "macro_prefix":
                        total, count = 0.0, 0
                total, count = total + u, count + 1
            return [*found, length]

        return _filled(i.mask, cuts)

    return run


# -- cases -------------------------------------------------------------------------------------------


def _case(op: str, shape: Shape, tokens: int, ours: Callable[[Inputs], Any],
          defined: Callable[[Inputs], Any], others: list[Provider], **about: Any) -> Case:  # fmt: skip
    """``tokens``: bytes per token, of the mask, what else is read, and ``seg``."""
    rows = 4 * (1 + (K if op.endswith("lengths") else 0))
    settings = {"dtype": torch.bool} | about
    return Case(
        op=op, shape=shape, inputs=_inputs, reference=defined, tolerance=0.0,
        bytes=lambda s, size: s["b"] * (s["r"] * tokens + rows),
        providers=[provider("tenfold", ours), *others], quick=shape == SIZES[0], **settings,
    )  # fmt: skip


def _others(first: bool, eager: Callable[[Inputs], Segments], loop: Callable[[Inputs], Segments],
            compiles: bool = True) -> list[Provider]:  # fmt: skip
    """The loop and the compiler take part in the first size only."""
    found = [provider("eager", eager)]
    if first:
        found.append(provider("peer:loop", loop, graph=False))
    return found + ([compiled(eager)] if first and compiles else [])


def cases() -> Iterator[Case]:
    """All cases of the group, in the order of the table."""
    for shape in SIZES:
        first = shape == SIZES[0]
        yield _case(
            "macro_segment_fixed", shape, 5, lambda i: ops.macro_segment_fixed(i.mask, N),
            lambda i: reference.macro_segment_fixed(i.mask, N),
            _others(first, fixed_eager, fixed_loop),
        )  # fmt: skip
        yield _case(
            "macro_segment_lengths", shape, 5,
            lambda i: ops.macro_segment_lengths(i.mask, i.lengths),
            lambda i: reference.macro_segment_lengths(i.mask, i.lengths),
            _others(first, lengths_eager, lengths_loop),
        )  # fmt: skip
        yield _case(
            "macro_segment_starts", shape, 6, lambda i: ops.macro_segment_starts(i.starts, i.mask),
            lambda i: reference.macro_segment_starts(i.starts, i.mask),
            _others(first, starts_eager, starts_loop),
        )  # fmt: skip
        for mode, eager in (
            ("macro_prefix", macro_prefix_eager), ("response_prefix", response_prefix_eager),
        ):  # fmt: skip
            yield _case(
                "macro_segment_ppl", shape, 9,
                lambda i, m=mode: ops.macro_segment_ppl(i.nll, i.mask, m),
                lambda i, m=mode: reference.macro_segment_ppl(i.nll, i.mask, m),
                # A loop over a thousand columns does not compile in a minute.
                _others(first, eager, perplexity_loop(mode), mode != "macro_prefix"),
                dtype=torch.float32, variant=mode,
            )  # fmt: skip
