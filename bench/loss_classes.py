# SPDX-License-Identifier: Apache-2.0
"""Cases of ``trace_token_class``, ``lm_weight``, ``first_stop`` and ``segment_mean``: part of the family ``loss``.

Batches of traces, half to all of their width, with eight special tokens each. Ids are read once, 8 bytes a token;
what is written is a byte, a float or a number per row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tenfold import ops

from .case import Case, Inputs, Shape, compiled, provider
from .gradients import autograd, compiled_gradients, with_gradients

FP32, INT64, INT8 = torch.float32, torch.int64, torch.int8
SIZES = ({"n": 64, "s": 512}, {"n": 128, "s": 2048})
SPECIAL = (32000, 32001, 32002, 2)  # tool, observation, work, end
BETA, OMEGA, PARTS, MOST = 0.5, 0.25, 7, 16


def _inputs(s: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    made = torch.Generator().manual_seed(0)
    n, width = s["n"], s["s"]
    ids = torch.randint(3, 32000, (n, width), generator=made)
    length = torch.randint(width // 2, width + 1, (n,), generator=made)
    trace = length // 3
    order = [0, 1, 0, 1, 0, 1, 2]  # three steps, then the rationale
    for k, which in enumerate(order):
        at = trace + 2 + (length - trace - 3) * k // len(order)
        ids[torch.arange(n), at] = SPECIAL[which]
    ids[torch.arange(n), length - 1] = SPECIAL[3]
    mask = torch.arange(width) < length[:, None]
    begin = torch.full((n,), 2)
    cls = ops.trace_token_class(ids, mask, trace, begin, *SPECIAL)
    step = (ids == SPECIAL[0]).cumsum(1)
    part = torch.where(cls == 4, PARTS - 1, 2 * (step - 1).clamp_min(0) + (cls == 3).long())
    found = {"ids": ids, "mask": mask, "asst": trace, "answer": begin, "cls": cls, "length": length,
             "positive": torch.arange(n) < n // 2, "seg": torch.where(cls >= 2, part, -1),
             "nll": torch.rand(n, width, generator=made),
             "stops": torch.tensor([SPECIAL[3], SPECIAL[1]])}  # fmt: skip
    return Inputs(**{name: x.to(device) for name, x in found.items()})


# -- trace_token_class -------------------------------------------------------------------------------


def _kinds(i: Inputs) -> tuple[Tensor, Tensor]:
    """Which special token every token of a trace is, from 1 on, or 0; and where traces are."""
    inside = (torch.arange(i.ids.shape[1], device=i.ids.device) >= i.asst[:, None]) & i.mask
    kind = torch.zeros_like(i.ids, dtype=INT8)
    for number, special in enumerate(SPECIAL, 1):
        kind.masked_fill_((i.ids == special) & inside, number)
    return kind, inside


def _finish(i: Inputs, kind: Tensor, inside: Tensor, before: Tensor) -> Tensor:
    """``before``: the last special token before a token; 4 where an end of sequence is."""
    plain = torch.tensor([2, 2, 3, 4, 0], dtype=INT8, device=kind.device)[before]
    special = torch.where(kind == 4, 5, 2)
    cls = torch.where((kind > 0) & (before != 4), special, plain)
    column = torch.arange(kind.shape[1], device=kind.device)
    answer = i.mask & (column >= i.answer[:, None])
    return torch.where(inside, cls, answer.to(INT8)).to(INT8)


def by_rank(i: Inputs) -> Tensor:
    """The special tokens of a row in a short table, by how many come before."""
    kind, inside = _kinds(i)
    there = kind > 0
    rank = there.cumsum(1)
    at = torch.where(there, rank.clamp(max=MOST), 0)
    table = kind.new_zeros(kind.shape[0], MOST + 1).scatter_(1, at, kind)
    table[:, 0] = 0
    ended = (table == 4).cumsum(1) > 0
    table = torch.where(ended, 4, table)
    before = table.gather(1, (rank - there.long()).clamp(max=MOST))
    return _finish(i, kind, inside, before.long())


def by_place(i: Inputs) -> Tensor:
    """The place of the last special token, as a running maximum."""
    kind, inside = _kinds(i)
    column = torch.arange(kind.shape[1], device=kind.device)
    last = torch.where(kind > 0, column, -1).cummax(1).values
    last = torch.cat([last.new_full((len(last), 1), -1), last[:, :-1]], 1)
    before = torch.where(last >= 0, kind.gather(1, last.clamp_min(0)), 0)
    ended = (kind == 4).cumsum(1) - (kind == 4).long() > 0
    return _finish(i, kind, inside, torch.where(ended, 4, before).long())


def _class_case(s: Shape) -> Case:
    return Case(
        op="trace_token_class", shape=s, dtype=INT64, inputs=_inputs,
        bytes=lambda s, size: s["n"] * s["s"] * (size + 2), traffic="read",
        providers=[
            provider("tenfold", lambda i: ops.trace_token_class(i.ids, i.mask, i.asst, i.answer, *SPECIAL)),
            provider("eager:rank", by_rank), provider("eager:place", by_place),
            *([compiled(by_rank)] if s == SIZES[0] else []),
        ],
        reference=by_place, quick=s == SIZES[0],
    )  # fmt: skip


# -- lm_weight ---------------------------------------------------------------------------------------


def _table(i: Inputs) -> Tensor:
    return torch.tensor([0.0, 0.0, 1.0, BETA, OMEGA, 1.0], device=i.cls.device)


def weights_by_select(i: Inputs) -> Tensor:
    """A table's rows, then the answers of preferred rows."""
    w = _table(i).index_select(0, i.cls.flatten().int()).view(i.cls.shape)
    return w.masked_fill_((i.cls == 1) & i.positive[:, None], 1.0)


def weights_by_index(i: Inputs) -> Tensor:
    """One table of both kinds of rows."""
    both = torch.stack(
        [_table(i), _table(i).index_fill(0, torch.tensor([1], device=i.cls.device), 1.0)]
    )
    return both.flatten()[i.cls + 6 * i.positive[:, None].int()]


def _weight_case(s: Shape) -> Case:
    return Case(
        op="lm_weight", shape=s, dtype=INT8, inputs=_inputs, bytes=lambda s, size: s["n"] * s["s"] * (size + 4),
        providers=[
            provider("tenfold", lambda i: ops.lm_weight(i.cls, i.positive, BETA, OMEGA, True)),
            provider("eager:select", weights_by_select), provider("eager:index", weights_by_index),
            *([compiled(weights_by_index)] if s == SIZES[0] else []),
        ],
        reference=weights_by_index, quick=s == SIZES[0],
    )  # fmt: skip


# -- first_stop --------------------------------------------------------------------------------------


def first_hit(i: Inputs) -> tuple[Tensor, Tensor]:
    """One comparison per stop, then the first place."""
    width = i.ids.shape[1]
    hit = (i.ids == i.stops[0]) | (i.ids == i.stops[1])
    hit &= torch.arange(width, device=i.ids.device) < i.length[:, None]
    found, at = hit.max(1)
    which = (i.ids.gather(1, at[:, None]) != i.stops[0])[:, 0].long()
    return torch.where(found, at, i.length), torch.where(found, which, -1)


def _stop_case(s: Shape) -> Case:
    return Case(
        op="first_stop", shape=s, dtype=INT64, inputs=_inputs, traffic="read",
        bytes=lambda s, size: s["n"] * s["s"] * size // 3,  # as far as the first observation, about
        providers=[
            provider("tenfold", lambda i: ops.first_stop(i.ids, i.length, i.stops)),
            provider("eager:max", first_hit), *([compiled(first_hit)] if s == SIZES[0] else []),
        ],
        reference=first_hit, quick=s == SIZES[0],
    )  # fmt: skip


# -- segment_mean ------------------------------------------------------------------------------------


def means_by_scatter(i: Inputs) -> Tensor:
    """Sums and counts, with a bin for what does not count."""
    n = i.seg.shape[0]
    at = torch.where(i.seg >= 0, i.seg, PARTS)
    sums = i.nll.new_zeros(n, PARTS + 1).scatter_add(1, at, i.nll)
    ones = i.nll.new_ones(()).expand(i.nll.shape)
    counts = i.nll.new_zeros(n, PARTS + 1).scatter_add(1, at, ones)
    return (sums / counts.clamp_min(1))[:, :PARTS]


def means_by_product(i: Inputs) -> Tensor:
    """One-hot numbers as a batch of small matrices."""
    parts = torch.arange(PARTS, device=i.seg.device)
    hot = (i.seg[:, None] == parts[:, None]).to(i.nll.dtype)
    return torch.bmm(hot, i.nll[..., None])[..., 0] / hot.sum(2).clamp_min(1)


def _mean_case(s: Shape, gradient: bool) -> Case:
    def ours(i: Inputs) -> Tensor:
        return ops.segment_mean(i.nll, i.seg, PARTS)

    def summed(form: Any) -> Any:
        return lambda i: form(i).sum()

    forms = {"eager:scatter": means_by_scatter, "eager:product": means_by_product}
    first = s == SIZES[0]
    if gradient:
        providers = [autograd("tenfold", summed(ours), "nll"),
                     *(autograd(name, summed(form), "nll") for name, form in forms.items()),
                     *([compiled_gradients(summed(means_by_product), "nll")] if first else [])]  # fmt: skip
    else:
        providers = [provider("tenfold", ours), *(provider(n, form) for n, form in forms.items()),
                     *([compiled(means_by_product)] if first else [])]  # fmt: skip
    return Case(
        op="segment_mean", variant="gradient" if gradient else "", shape=s, dtype=FP32, inputs=_inputs,
        traffic="copy" if gradient else "read",
        bytes=lambda s, size: s["n"] * s["s"] * (24 if gradient else 12), providers=providers,
        reference=with_gradients(summed(means_by_scatter), "nll") if gradient else means_by_scatter,
        quick=first and not gradient,
    )  # fmt: skip


def cases() -> Iterator[Case]:
    """All cases of the group, in the order of the table."""
    for s in SIZES:
        yield _class_case(s)
        yield _weight_case(s)
        yield _stop_case(s)
        yield _mean_case(s, False)
        yield _mean_case(s, True)
