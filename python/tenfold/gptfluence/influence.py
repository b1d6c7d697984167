# SPDX-License-Identifier: Apache-2.0
"""From a simulator to influence: what a training example does to a test example (section 3.8).

Signs: scores are changes of the metric. Where the metric is a loss, a positive ``delta`` or ``counterfactual``
means that
the example raises the loss: it is harmful.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tenfold.gptfluence.ids import Id
from tenfold.gptfluence.recurrence import simulate
from tenfold.training.checks import one_of

if TYPE_CHECKING:
    from tenfold.gptfluence.simulator import Simulator

KINDS = ("alpha", "beta", "delta", "counterfactual")
_RUNS = 64  # simulated at a time


@dataclass(frozen=True)
class Counterfactual:
    """A curriculum with and without some examples: ``full`` and ``without`` [S, Q], simulated."""

    full: Tensor
    without: Tensor

    @property
    def change(self) -> Tensor:
        """[Q]: what the examples do to the last values; positive: they raise them."""
        return self.full[-1] - self.without[-1]


def attribute(
    simulator: Simulator, train: Iterable[Id] | None = None, test: Iterable[Id] | None = None, *, kind: str = "delta",
    level: Any = None, curriculum: Any = None, first: Any = None, replace: Id | None = None,
) -> Tensor:  # fmt: skip
    """Scores float32 [len(train), len(test)].

    Args:
        train, test: ids; default: all.
        kind: ``"alpha"``: the multiplicative factor of lag 1; ``"beta"``: the additive one; ``"delta"``: what one
            more example in a batch
            changes at ``level``: ``(sum_j A_j - [1/B without residual]) level + B``; ``"counterfactual"``: the last
            value of ``curriculum``
            minus that of the same without the example.
        level: of ``delta``, a number or [len(test)]; default: the mean of what was fitted.
        curriculum, first: of ``counterfactual``: ids batch after batch [T][B], and the values [len(test)] before them.
        replace: an example that takes the place of the one that is left out; default: its place is empty.

    Raises ValueError for another kind and what is missing, UnknownId for ids without features.
    """
    one_of("kind", kind, KINDS)
    names = simulator.test.ids if test is None else tuple(test)
    if kind == "counterfactual":
        if curriculum is None or first is None:
            raise ValueError("counterfactual scores need a curriculum and the first values")
        chosen = simulator.train.ids if train is None else tuple(train)
        return _leave_one_out(simulator, chosen, names, curriculum, first, replace)
    factors = simulator.factors(names, train)
    if kind == "alpha":
        return factors[0]
    if kind == "beta":
        return factors[-1]
    if level is None:
        level = simulator.level
    at = torch.as_tensor(level, dtype=factors.dtype)
    if at.ndim and at.shape != (len(names),):
        raise ValueError(f"level must be a number or [{len(names)}], got shape {list(at.shape)}")
    mean = simulator.config.reduction == "mean"
    rest = 0.0 if simulator.config.residual else 1.0 if mean else 1 / max(1, simulator.batch)
    made = (factors[:-1].sum(0) - rest) * at + factors[-1]
    return made / max(1, simulator.batch) if mean else made


def self_influence(
    simulator: Simulator, ids: Iterable[Id] | None = None, kind: str = "alpha"
) -> Tensor:
    """[N]: ``"alpha"`` or ``"beta"`` of training examples on themselves; ranked from the top to find mislabelled ones.

    Training features stand in for test features, so both tables must be of one encoder. Weak evidence: the
    publication finds
    about as many mislabelled examples as a random order does.
    """
    one_of("kind", kind, KINDS[:2])
    if (simulator.train.width, simulator.train.encoder) != (
        simulator.test.width,
        simulator.test.encoder,
    ):
        raise ValueError("self-influence needs training and test features of one encoder")
    table = simulator.train.table
    if ids is not None:
        table = table[simulator.train.index.rows(ids)]
    made = []
    with torch.no_grad():
        for part in table.split(256):
            made.append(
                simulator.network(part, part).diagonal(dim1=1, dim2=2)[0 if kind == "alpha" else -1]
            )
    return torch.cat(made) if made else table.new_empty(0)


def without(
    simulator: Simulator, remove: Iterable[Id], curriculum: Any, first: Any, test: Iterable[Id] | None = None,
    replace: Id | None = None,
) -> Counterfactual:  # fmt: skip
    """A curriculum [T][B] of ids with and without all of ``remove``, from the values ``first`` [Q]."""
    names = simulator.test.ids if test is None else tuple(test)
    order, start, factors = _prepared(simulator, names, curriculum, first)
    rows = simulator.train.index.rows(remove).to(torch.int32)
    other = -1 if replace is None else simulator.train.index.row(replace)
    bare = order.masked_fill(torch.isin(order, rows), other)
    with torch.no_grad():
        made = simulate(factors, torch.cat([order, bare]), start.expand(2, -1), simulator.config)
    return Counterfactual(made[0], made[1])


def _prepared(
    simulator: Simulator, names: tuple[Id, ...], curriculum: Any, first: Any
) -> tuple[Tensor, Tensor, Tensor]:
    order = simulator.order_of(curriculum)
    if len(order) != 1:
        raise ValueError(f"counterfactuals are of one curriculum [T][B], got {len(order)}")
    start = torch.as_tensor(first, dtype=simulator.train.table.dtype)
    if start.shape != (len(names),):
        raise ValueError(f"first must be [{len(names)}], got shape {list(start.shape)}")
    return order, start[None], simulator.factors(names)


def _leave_one_out(
    simulator: Simulator, chosen: tuple[Id, ...], names: tuple[Id, ...], curriculum: Any, first: Any,
    replace: Id | None,
) -> Tensor:  # fmt: skip
    order, start, factors = _prepared(simulator, names, curriculum, first)
    rows = simulator.train.index.rows(chosen).to(torch.int32)
    other = -1 if replace is None else simulator.train.index.row(replace)
    made = torch.zeros(len(rows), len(names), dtype=factors.dtype)
    with torch.no_grad():
        full = simulate(factors, order, start, simulator.config)[0, -1]
        # An example that the curriculum does not have changes nothing.
        there = torch.isin(rows, order).nonzero().flatten()
        for at in there.split(_RUNS):
            bare = torch.where(order == rows[at][:, None, None], other, order).to(torch.int32)
            ends = simulate(
                factors, bare.contiguous(), start.expand(len(at), -1), simulator.config
            )[:, -1]
            made[at] = full - ends
    return made
