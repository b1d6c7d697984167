# SPDX-License-Identifier: Apache-2.0
"""Cases of ``dare_merge`` and ``ties_merge``: part of the family ``merge``.

Two experts. Eager forms work in float32, in pieces that stay in the second cache; peers are PEFT's functions for
task vectors and mergekit's, with what is around them there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tenfold import ops, reference

from .case import Case, Function, Inputs, NotAvailable, Shape
from .merge_tensors import SMALL, Definition, Form, deltas_agree, merge_cases, middle, pieces

DROP, FINE_DROP, DENSITY, SEED = 0.5, 0.3, 0.2, 1
WEIGHTS = [0.6, 0.4]
ALIKE = [1.0, 1.0]  # where signs are elected: PEFT's mean is over the number of experts


# -- plain torch -------------------------------------------------------------------------------------


def _elected(deltas: list[Tensor]) -> Tensor:
    """The mean of those deltas whose sign has more mass; weights are alike."""
    stacked = torch.stack(deltas)
    agree = torch.where(stacked.sum(0) >= 0, stacked > 0, stacked < 0).float()
    return stacked.mul_(agree).sum(0).div_(agree.sum(0).clamp_(min=1.0))


def dare_pieces(drop: float, elect: bool) -> Callable[[Inputs, Tensor], None]:
    def run(i: Inputs, out: Tensor) -> None:
        for base, to, *experts in pieces(i, out):
            b = base.float() if base.dtype != torch.float32 else base.clone()
            keep = torch.empty_like(b)
            kept = [(x - b).mul_(keep.bernoulli_(1 - drop)).div_(1 - drop) for x in experts]
            if elect:
                b.add_(_elected(kept))
            else:
                for d, w in zip(kept, WEIGHTS):
                    b.add_(d, alpha=w)
            to.copy_(b)

    return run


def _cut(base: Tensor, expert: Tensor) -> Tensor:
    """The magnitude of the smallest delta that is kept."""
    magnitudes = (expert.float() - base.float()).abs_().view(-1)
    count = int(DENSITY * magnitudes.numel())
    return magnitudes.kthvalue(magnitudes.numel() - count + 1).values


def ties_pieces(i: Inputs, out: Tensor) -> None:
    """The cuts of whole tensors, then piece by piece; several deltas may equal the cut."""
    cuts = [_cut(i.base, x) for x in i.experts]
    for base, to, *experts in pieces(i, out):
        b = base.float() if base.dtype != torch.float32 else base.clone()
        deltas = [x - b for x in experts]
        to.copy_(b.add_(_elected([d.mul_(d.abs() >= cut) for d, cut in zip(deltas, cuts)])))


# -- peers -------------------------------------------------------------------------------------------


def _peft(name: str, density: float, weights: list[float]) -> Callable[[Inputs], Function]:
    def build(_: Inputs) -> Function:
        try:
            from peft.utils import merge_utils
        except ImportError:
            raise NotAvailable("peft is not installed") from None
        merge, factors = getattr(merge_utils, name), torch.tensor(weights)

        def run(i: Inputs) -> Tensor:
            deltas = [x - i.base for x in i.experts]
            return (i.base + merge(deltas, factors, density)).to(i.base.dtype)

        return run

    return build


def _mergekit(method: str, density: float, elect: bool) -> Callable[[Inputs], Function]:
    def build(_: Inputs) -> Function:
        try:
            from mergekit.merge_methods.generalized_task_arithmetic import get_mask
            from mergekit.sparsify import RescaleNorm, SparsificationMethod, sparsify
        except ImportError as error:
            raise NotAvailable(f"mergekit cannot be imported: {error}") from None
        chosen = SparsificationMethod(method)
        norm = RescaleNorm.l1 if method == "random" else None

        def run(i: Inputs) -> Tensor:
            kept = [sparsify(x - i.base, density, chosen, rescale_norm=norm) for x in i.experts]
            weights = torch.tensor(ALIKE if elect else WEIGHTS, dtype=i.base.dtype)[:, None, None]
            deltas = torch.stack(kept).mul_(weights)
            if not elect:
                return i.base + deltas.sum(0)
            mask = get_mask(deltas, "sum", i.base.dtype)
            share = (weights * mask).sum(0)
            share[share == 0] = 1
            return i.base + (deltas * mask).sum(0) / share

        return run

    return build


# -- cases -------------------------------------------------------------------------------------------


def _dare(drop: float, elect: bool, variant: str, functional: bool) -> Iterator[Case]:
    options = {"elect_sign": elect, "normalize": elect}
    weights = ALIKE if elect else WEIGHTS

    def defined(_: Inputs) -> Definition:
        return lambda base, experts, offset: reference.dare_merge(
            base, experts, weights, drop, SEED, offset=offset, **options)  # fmt: skip

    def forms(s: Shape) -> list[Form]:
        return [
            Form("eager:pieces", lambda _: dare_pieces(drop, elect), fills=True, random=True),
            Form(
                "peer:peft",
                _peft("dare_ties" if elect else "dare_linear", 1 - drop, weights),
                random=True,
            ),
            Form("peer:mergekit", _mergekit("random", 1 - drop, elect), random=True),
        ]

    ours = (
        lambda i: ops.dare_merge_(i.out, i.base, i.experts, weights, drop, SEED, **options),
        lambda i: ops.dare_merge(i.base, i.experts, weights, drop, SEED, **options),
    )
    return merge_cases("dare_merge", ours, defined, forms, inputs=3, variant=variant,
                       functional=functional)  # fmt: skip


def _ties_defined(i: Inputs) -> Definition:
    cuts = [_cut(i.base, x) for x in i.experts]

    def define(base: Tensor, experts: list[Tensor], _: int) -> Tensor:
        deltas = [x.float() - base.float() for x in experts]
        kept = [torch.where(d.abs() >= cut, d, 0.0) for d, cut in zip(deltas, cuts)]
        return (base.float() + _elected(kept)).to(base.dtype)

    return define


def _ties_agree(got: Any, want: Any, i: Inputs) -> float:
    """But where a delta equals the cut: of those, everybody keeps others."""
    at = middle(i)
    clear = torch.ones(at.stop - at.start, dtype=torch.bool)
    for x in i.experts:
        magnitude = (x.view(-1)[at].float() - i.base.view(-1)[at].float()).abs()
        clear &= magnitude != _cut(i.base, x)
    return deltas_agree(got, want, i, clear)


def _ties() -> Iterator[Case]:
    def forms(s: Shape) -> list[Form]:
        # They sort the whole tensor: a big one takes half a minute.
        peers = [Form("peer:peft", _peft("ties", DENSITY, ALIKE)),
                 Form("peer:mergekit", _mergekit("magnitude", DENSITY, True))]  # fmt: skip
        return [Form("eager:pieces", lambda _: ties_pieces, fills=True),
                *(peers if s == SMALL else [])]  # fmt: skip

    ours = (
        lambda i: ops.ties_merge_(i.out, i.base, i.experts, ALIKE, DENSITY),
        lambda i: ops.ties_merge(i.base, i.experts, ALIKE, DENSITY),
    )
    return merge_cases("ties_merge", ours, _ties_defined, forms, inputs=6, agree=_ties_agree)


def cases() -> Iterator[Case]:
    """All cases of the group, in the order of the table."""
    yield from _dare(DROP, False, "", True)
    yield from _dare(FINE_DROP, False, "fine", False)
    yield from _dare(DROP, True, "elected", False)
    yield from _ties()
