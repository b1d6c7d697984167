# SPDX-License-Identifier: Apache-2.0
"""Cases of ``linear_merge``, ``slerp_merge`` and ``delta_gram``: part of the family ``merge``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tenfold import ops, reference

from .case import Case, Function, Inputs, NotAvailable, Shape, provider
from .merge_tensors import (
    BIG,
    SMALL,
    Definition,
    Form,
    elements,
    inputs_of,
    merge_cases,
    pieces,
)
from .moe_batch import DTYPES

WEIGHTS = [0.6, 0.4]
T = 0.3
EXPERTS = (2, 8)


# -- linear ------------------------------------------------------------------------------------------


def linear(i: Inputs) -> Tensor:
    """Whole tensors: products and sums in float32, rounded at the end."""
    a, b = i.experts
    return torch.add(a.float() * WEIGHTS[0], b.float(), alpha=WEIGHTS[1]).to(a.dtype)


def linear_lerp(i: Inputs, out: Tensor) -> None:
    """Two tensors whose weights add up to 1: torch has it as one op, in one pass."""
    torch.lerp(i.experts[0], i.experts[1], WEIGHTS[1], out=out)


def _linear() -> Iterator[Case]:
    def defined(_: Inputs) -> Definition:
        return lambda base, experts, _: reference.linear_merge(experts, WEIGHTS)

    def forms(s: Shape) -> list[Form]:
        return [Form("eager:lerp", lambda _: linear_lerp, fills=True), Form("eager:add", lambda _: linear)]  # fmt: skip

    ours = (
        lambda i: ops.linear_merge_(i.out, i.experts, WEIGHTS),
        lambda i: ops.linear_merge(i.experts, WEIGHTS),
    )
    return merge_cases("linear_merge", ours, defined, forms, inputs=2)


# -- slerp -------------------------------------------------------------------------------------------


def _weights(cosine: float) -> tuple[float, float]:
    angle = math.acos(cosine)
    return math.sin((1 - T) * angle) / math.sin(angle), math.sin(T * angle) / math.sin(angle)


def _cosine(i: Inputs) -> float:
    """Of the whole tensors, a piece at a time."""
    sums = torch.zeros(3, dtype=torch.float64)
    for _, a, b in pieces(i):
        x, y = a.float(), b.float()
        sums += torch.stack([torch.dot(x, x), torch.dot(x, y), torch.dot(y, y)])
    xx, xy, yy = sums.tolist()
    return xy / math.sqrt(xx * yy)


def slerp_pieces(i: Inputs, out: Tensor) -> None:
    s0, s1 = _weights(_cosine(i))
    for _, to, a, b in pieces(i, out):
        to.copy_((a.float() * s0).add_(b.float(), alpha=s1))


def _slerp_of_mergekit(_: Inputs) -> Function:
    try:
        from mergekit.merge_methods.slerp import slerp
    except ImportError as error:
        raise NotAvailable(f"mergekit cannot be imported: {error}") from None
    t = torch.tensor([T])
    return lambda i: slerp(t, i.experts[0][None], i.experts[1][None])[0]


def _slerp() -> Iterator[Case]:
    def defined(i: Inputs) -> Definition:
        s0, s1 = _weights(_cosine(i))
        return lambda base, experts, _: (experts[0].float() * s0 + experts[1].float() * s1).to(base.dtype)  # fmt: skip

    def forms(s: Shape) -> list[Form]:
        return [Form("eager:pieces", lambda _: slerp_pieces, fills=True),
                Form("peer:mergekit", _slerp_of_mergekit)]  # fmt: skip

    ours = (
        lambda i: ops.slerp_merge_(i.out, *i.experts, T, dot_threshold=1.0),
        lambda i: ops.slerp_merge(*i.experts, T, dot_threshold=1.0),
    )
    return merge_cases("slerp_merge", ours, defined, forms, inputs=4)


# -- delta_gram --------------------------------------------------------------------------------------


def gram_pieces(work: torch.dtype) -> Callable[[Inputs], Tensor]:
    """Products of a few thousand elements at a time, summed in float64."""

    def run(i: Inputs) -> Tensor:
        total = torch.zeros(len(i.experts), len(i.experts), dtype=torch.float64)
        for base, *experts in pieces(i):
            deltas = torch.stack([x.to(work) for x in experts]).sub_(base.to(work))
            total += deltas @ deltas.T
        return total

    return run


def gram(i: Inputs) -> Tensor:
    """As it is first written: all task vectors in memory."""
    deltas = torch.stack(i.experts).float().sub_(i.base).flatten(1)
    return (deltas @ deltas.T).double()


def _gram_case(s: Shape, dtype: torch.dtype, experts: int, into: bool) -> Case:
    def inputs(s: Shape, t: torch.dtype, device: torch.device) -> Inputs:
        made = inputs_of(experts)(s, t, device)
        made.out = torch.zeros(experts, experts, dtype=torch.float64, device=device)
        return made

    def form(made: Callable[[Inputs], Tensor]) -> Function:
        return (lambda i: i.out.add_(made(i))) if into else made

    if into:
        about = {"mode": "inplace", "mutates": ("out",)}
    else:
        about = {}

    def ours(i: Inputs) -> Tensor | None:
        return (
            ops.delta_gram_(i.out, i.base, i.experts) if into else ops.delta_gram(i.base, i.experts)
        )

    whole = {"eager:float32": gram} if experts == EXPERTS[0] else {}
    forms = {"eager:pieces_float32": gram_pieces(torch.float32),
             "eager:pieces_float64": gram_pieces(torch.float64), **whole}  # fmt: skip
    return Case(
        op="delta_gram" + "_" * into, shape={**s, "m": experts}, dtype=dtype, inputs=inputs,
        traffic="read", bytes=lambda s, size: (s["m"] + 1) * elements(s) * size,
        providers=[provider("tenfold", ours), *(provider(n, form(f)) for n, f in forms.items())],
        reference=form(gram_pieces(torch.float64)),
        # Those in float32 are the less exact ones.
        tolerance=2e-3, quick=s == SMALL, **about,
    )  # fmt: skip


def cases() -> Iterator[Case]:
    """All cases of the group, in the order of the table."""
    yield from _linear()
    yield from _slerp()
    for dtype in DTYPES:
        for experts in EXPERTS:
            yield _gram_case(BIG, dtype, experts, into=False)
    yield _gram_case(BIG, torch.bfloat16, EXPERTS[0], into=True)
    for into in (False, True):
        yield _gram_case(SMALL, torch.bfloat16, EXPERTS[0], into)
