# SPDX-License-Identifier: Apache-2.0
"""Cases of the ops on spans (masks, corruption, both, and back): part of the family ``corruption``.

Packed rows of ERNIE-Code's two lengths, 15 % in spans of 3: a micro-batch, and the 256 rows of the method's
specification. ``span_corruption`` is what a collator calls; its peers are collators in NumPy, which draw masks of their
own and are judged by whether their results can be restored. Bytes: tokens read, both sides written; the mask where
there is one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tenfold import ops, reference
from tenfold.ops.corruption import corrupted_sizes, span_counts

from .case import Case, Inputs, Shape, compiled, provider
from .corruption_collators import masks_at_once, masks_by_row, sides

FIRST, COUNT, EOS, PAD = 250099, 100, 1, 0
RULE = (0.15, 3.0)
SMALL, FULL = {"b": 8, "l": 568}, {"b": 256, "l": 1137}


def _inputs(s: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    made = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, 250000, (s["b"], s["l"]), generator=made).to(device, dtype)
    lengths = torch.full((s["b"],), s["l"], device=device)
    mask = ops.span_mask(lengths, s["l"], *RULE, 0)
    widths = corrupted_sizes(s["l"], *RULE)
    inputs, in_len, targets, tgt_len = ops.span_corrupt(
        tokens, lengths, mask, FIRST, COUNT, EOS, PAD, *widths
    )
    return Inputs(tokens=tokens, lengths=lengths, mask=mask, inputs=inputs, in_len=in_len, targets=targets,
                  tgt_len=tgt_len, widths=widths)  # fmt: skip


def _sizes(s: Shape) -> int:
    """Tokens of a row, of its inputs and of its targets."""
    return s["l"] + sum(corrupted_sizes(s["l"], *RULE))


def draw(i: Inputs) -> Tensor:
    """The masks of rows of one length in torch: the gaps with the smallest of random keys."""
    b, n = i.tokens.shape
    noise, spans = span_counts(n, *RULE)

    def cuts(items: int) -> Tensor:
        keys = torch.rand(b, items - 1, device=i.tokens.device)
        ends = (
            keys.topk(spans - 1, dim=1, largest=False, sorted=False).indices.sort(dim=1).values + 1
        )
        return torch.cat([ends, ends.new_full((b, 1), items)], 1)

    masked, kept = cuts(noise), cuts(n - noise)
    before = torch.nn.functional.pad(masked, (1, 0))[:, :-1]
    edges = torch.zeros(b, n + 1, dtype=torch.int8, device=i.tokens.device)
    edges.scatter_(1, kept + before, 1).scatter_(1, kept + masked, -1)
    return edges[:, :n].cumsum(1, dtype=torch.int8).bool()


def select(i: Inputs, mask: Tensor) -> tuple[Tensor, ...]:
    """Both sides in torch, of masks that begin with a kept token and end with a masked one."""

    def marked(gone: Tensor) -> Tensor:
        begins = gone.clone()
        begins[:, 1:] &= ~gone[:, :-1]
        ids = torch.where(begins, FIRST + 1 - begins.cumsum(1, dtype=i.tokens.dtype), i.tokens)
        made = ids[~gone | begins].view(len(ids), -1)
        return torch.nn.functional.pad(made, (0, 1), value=EOS)

    inputs, targets = marked(mask), marked(~mask)
    return inputs, i.in_len.clone(), targets, i.tgt_len.clone()


def scatter(i: Inputs, mask: Tensor) -> tuple[Tensor, ...]:
    """The same of any mask of such rows without a size that depends on values: what a compiler can fuse."""

    def marked(gone: Tensor, width: int) -> Tensor:
        begins = torch.cat([gone[:, :1], gone[:, 1:] & ~gone[:, :-1]], 1)
        keep = ~gone | begins
        ids = torch.where(begins, FIRST + 1 - begins.cumsum(1), i.tokens)
        at = torch.where(keep, keep.cumsum(1) - 1, width)
        made = torch.full((len(ids), width + 1), EOS, dtype=i.tokens.dtype, device=ids.device)
        return made.scatter(1, at, ids.to(i.tokens.dtype))[:, :width].contiguous()

    # The last column, which nothing was put into, is EOS.
    made = marked(mask, i.widths[0]), marked(~mask, i.widths[1])
    return made[0], i.in_len.clone(), made[1], i.tgt_len.clone()


def restored(got: Any, _: Any, i: Inputs) -> float:
    """Of results with another mask: whether the rows come back, and have the sizes and spans that they must."""
    inputs, in_len, targets, tgt_len = got
    tokens, lengths = ops.span_restore(inputs, in_len, targets, tgt_len, FIRST, COUNT, EOS)
    same = torch.equal(tokens[:, : i.tokens.shape[1]], i.tokens) and torch.equal(
        lengths, i.lengths.int()
    )
    counts = [(side > FIRST - COUNT).sum(1).tolist() for side in (inputs, targets)]
    spans = span_counts(i.tokens.shape[1], *RULE)[1]
    return 0.0 if same and counts == [[spans] * len(tokens)] * 2 else math.inf


def _numpy(i: Inputs, masks: Any, narrow: bool) -> tuple[Tensor, ...]:
    made = np.random.default_rng(0)
    tokens = i.tokens.numpy()
    mask = masks(made, *tokens.shape, *RULE)
    inputs, targets = (torch.from_numpy(x) for x in sides(tokens, mask, FIRST, EOS, narrow))
    sizes = [torch.full((len(tokens),), x.shape[1], dtype=torch.int32) for x in (inputs, targets)]
    return inputs, sizes[0], targets, sizes[1]


def _fused(s: Shape, dtype: torch.dtype, warm: bool = False) -> Case:
    def args(i: Inputs) -> tuple[Any, ...]:
        return i.tokens, i.lengths, *RULE, 1, 0, FIRST, COUNT, EOS, PAD, *i.widths

    def two_ops(i: Inputs) -> Any:
        mask = ops.span_mask(i.lengths, i.tokens.shape[1], *RULE, 1, 0)
        return ops.span_corrupt(i.tokens, i.lengths, mask, FIRST, COUNT, EOS, PAD, *i.widths)

    def copies(i: Inputs) -> None:
        i.inputs.clone(), i.targets.clone()

    return Case(
        op="span_corruption", shape=s, dtype=dtype, inputs=_inputs,
        bytes=lambda s, size: s["b"] * _sizes(s) * size,
        providers=[provider("tenfold", lambda i: ops.span_corruption(*args(i))),
                   provider("eager", lambda i: select(i, draw(i)), agree=restored),
                   compiled(lambda i: scatter(i, draw(i)), agree=restored),
                   provider("peer:numpy", lambda i: _numpy(i, masks_at_once, True), agree=restored),
                   provider("peer:numpy_where", lambda i: _numpy(i, masks_at_once, False), agree=restored),
                   provider("peer:numpy_by_row", lambda i: _numpy(i, masks_by_row, False), agree=restored),
                   provider("two ops", two_ops, "bound"), provider("clone", copies, "bound")],
        reference=lambda i: reference.span_corruption(*args(i)), tolerance=0.0, quick=s == SMALL, warm=warm,
    )  # fmt: skip


def _corrupt(s: Shape, dtype: torch.dtype) -> Case:
    def args(i: Inputs) -> tuple[Any, ...]:
        return i.tokens, i.lengths, i.mask, FIRST, COUNT, EOS, PAD, *i.widths

    return Case(
        op="span_corrupt", shape=s, dtype=dtype, inputs=_inputs,
        bytes=lambda s, size: s["b"] * (_sizes(s) * size + s["l"]),
        providers=[provider("tenfold", lambda i: ops.span_corrupt(*args(i))),
                   provider("eager", lambda i: select(i, i.mask)),
                   provider("eager:scatter", lambda i: scatter(i, i.mask)),
                   compiled(lambda i: scatter(i, i.mask))],
        reference=lambda i: reference.span_corrupt(*args(i)), tolerance=0.0, quick=s == SMALL,
    )  # fmt: skip


def same_counts(got: Any, want: Any, _: Inputs) -> float:
    """Of other masks: as many masked tokens in as many spans."""
    spans = [(m[:, 1:] & ~m[:, :-1]).sum(1) for m in (got, want)]
    return 0.0 if torch.equal(*spans) and torch.equal(got.sum(1), want.sum(1)) else math.inf


def _mask(s: Shape) -> Case:
    def ours(i: Inputs, f: Any = ops.span_mask) -> Any:
        return f(i.lengths, i.tokens.shape[1], *RULE, 1, 0)

    def at_once(i: Inputs) -> Any:
        return torch.from_numpy(
            masks_at_once(np.random.default_rng(0), *i.tokens.shape[:2], RULE[0], RULE[1])
        )

    return Case(
        op="span_mask", shape=s, dtype=torch.int64, inputs=_inputs, bytes=lambda s, size: s["b"] * (s["l"] + size),
        providers=[provider("tenfold", ours), provider("eager", draw, agree=same_counts),
                   compiled(draw, agree=same_counts), provider("peer:numpy", at_once, agree=same_counts)],
        reference=lambda i: ours(i, reference.span_mask), tolerance=0.0, quick=s == SMALL,
    )  # fmt: skip


def _restore(s: Shape, dtype: torch.dtype) -> Case:
    def args(i: Inputs) -> tuple[Any, ...]:
        return i.inputs, i.in_len, i.targets, i.tgt_len, FIRST, COUNT, EOS

    def plain(i: Inputs) -> Any:
        """Regular rows of one number of spans: where tokens go follows from running sums."""
        marks, texts = i.inputs > FIRST - COUNT, i.targets > FIRST - COUNT
        b, spans = len(marks), int(marks[0].sum())
        ends = torch.cat([texts.nonzero()[:, 1].view(b, spans), i.tgt_len[:, None] - 1], 1)
        size = ends.diff(dim=1) - 1
        width = i.inputs.shape[1] + i.targets.shape[1] - 2
        out = i.inputs.new_zeros(b, width + 1)
        extra = (
            torch.zeros_like(i.inputs)
            .masked_scatter_(marks, (size - 1).to(i.inputs.dtype))
            .cumsum(1)
        )
        at = torch.arange(i.inputs.shape[1], device=out.device) + extra
        out.scatter_(1, torch.where(marks | (i.inputs == EOS), width, at).long(), i.inputs)
        begin = at.masked_select(marks).view(b, spans) - size + 1
        where = begin - ends[:, :-1] - 1
        number = texts.cumsum(1) - 1
        to = torch.arange(i.targets.shape[1], device=out.device) + where.gather(1, number)
        out.scatter_(1, torch.where(texts | (i.targets == EOS), width, to).long(), i.targets)
        return out[:, :width], i.lengths.int()

    return Case(
        op="span_restore", shape=s, dtype=dtype, inputs=_inputs,
        bytes=lambda s, size: s["b"] * (2 * sum(corrupted_sizes(s["l"], *RULE)) - 2) * size,
        providers=[provider("tenfold", lambda i: ops.span_restore(*args(i))), provider("eager", plain, graph=False)],
        reference=lambda i: reference.span_restore(*args(i)), tolerance=0.0, quick=s == SMALL,
    )  # fmt: skip


def cases() -> Iterator[Case]:
    """All cases of the group, in the order of the table."""
    for s in (SMALL, FULL):
        yield _mask(s)
        for dtype in (torch.int64, torch.int32):
            yield _corrupt(s, dtype)
            yield _fused(s, dtype)
            yield _restore(s, dtype)
    for dtype in (torch.int64, torch.int32):
        # A collator's rows were put together just before; cold ones time page walks, which the copy shows.
        yield _fused(FULL, dtype, warm=True)
