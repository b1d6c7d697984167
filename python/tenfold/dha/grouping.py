# SPDX-License-Identifier: Apache-2.0
"""Which heads share, and how many each layer gets: groups and budgets (paper sections 3.2-3.3).

A *component* is the key heads or the value heads of one layer; component 2 * layer is keys, 2 * layer
+ 1 values. Its *base heads* are those that are grouped: all H at first, or those that a GQA
checkpoint or an earlier round left. Groups of a component have equal sizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tenfold import ops
from tenfold.dha.config import DhaConfig


@dataclass
class Plan:
    """What grouping and allocation decided; ``groups[c]`` is [N, g] int64 of component c's base heads."""

    groups: list[Tensor]
    sizes: list[list[int]]
    costs: list[list[float]]
    layer_loss: list[float]
    budget: int

    @property
    def heads(self) -> list[int]:
        """Number of groups of every component."""
        return [len(g) for g in self.groups]

    def to_json(self) -> dict[str, Any]:
        """All fields, as JSON can hold them."""
        return {
            "groups": [g.tolist() for g in self.groups], "sizes": self.sizes, "costs": self.costs,
            "layer_loss": self.layer_loss, "budget": self.budget,
        }  # fmt: skip

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Plan:
        """The inverse of :meth:`to_json`."""
        return cls(**(values | {"groups": [torch.tensor(g) for g in values["groups"]]}))


def divisors(n: int) -> list[int]:
    """All divisors of ``n``, ascending."""
    return [d for d in range(1, n + 1) if n % d == 0]


def _chain(n: int) -> list[int]:
    """Divisors of ``n`` each of which divides the next: what nested groups can be made of."""
    chain = [n]
    while chain[0] > 1:
        chain.insert(0, chain[0] // next(d for d in divisors(chain[0]) if d > 1))
    return chain


def allowed_sizes(heads: int, config: DhaConfig) -> list[int]:
    """Head counts that a component of ``heads`` base heads may get, ascending.

    Raises ValueError if ``sizes``, ``min_heads`` and ``tp_size`` leave none, naming what is possible.
    """
    if heads % config.tp_size:
        raise ValueError(
            f"tp_size must divide the heads that are grouped, so that every rank has as many; got "
            f"tp_size {config.tp_size} and {heads} heads: possible are {divisors(heads)}"
        )
    possible = [n for n in (_chain(heads) if config.nested else divisors(heads))
                if n % config.tp_size == 0]  # fmt: skip
    if config.sizes is not None:
        wrong = [n for n in config.sizes if n not in divisors(heads)]
        # A later round has fewer base heads than the sizes were written for: they select, then.
        if wrong and not config.progressive:
            raise ValueError(
                f"sizes must divide the {heads} heads that are grouped: {wrong} do not; possible "
                f"are {possible}"
            )
        possible = [n for n in possible if n in config.sizes or (config.progressive and n == heads)]
    chosen = [n for n in possible if n >= min(config.min_heads, heads)]
    if not chosen:
        raise ValueError(
            f"no head count is left for {heads} heads by sizes {config.sizes}, min_heads "
            f"{config.min_heads}, tp_size {config.tp_size} and nested {config.nested}"
        )
    return chosen


def head_budget(config: DhaConfig, layers: int, heads: int, sizes: Sequence[Sequence[int]]) -> int:
    """The budget in key + value heads of the whole model, at most what there is.

    Raises ValueError if it is below the smallest conversion possible, naming the range.
    """
    total = 2 * layers * heads
    wanted = math.floor(config.budget * total + 1e-9)
    least = sum(min(s) for s in sizes)
    if config.allocation == "uniform" or config.method in ("gqa_mean", "cka_mean"):
        common = set.intersection(*(set(s) for s in sizes))
        if not common:
            raise ValueError(
                "the same head count everywhere needs one that all components allow, but these have "
                f"none in common: {sorted(set(map(tuple, sizes)))}; use allocation dp, or other sizes"
            )
        least = len(sizes) * min(common)
    if wanted < least:
        raise ValueError(
            f"budget {config.budget} is {wanted} of {total} key + value heads, but at least {least} "
            f"are needed ({len(sizes)} components, head counts {sorted(set(map(tuple, sizes)))[0]}): "
            f"budget must be in [{least / total:.4g}, 1]"
        )
    return min(wanted, sum(max(s) for s in sizes))


def group_component(dist: Tensor, n: int, config: DhaConfig) -> Tensor:
    """``n`` equal groups [n, g] int64 of the heads of ``dist`` [H, H], inside ``tp_size`` blocks."""
    heads, blocks = dist.shape[0], config.tp_size
    width = heads // blocks
    solver = "contiguous" if config.grouping == "contiguous" else config.solver
    parts = []
    for b in range(blocks):
        at = slice(b * width, (b + 1) * width)
        block = dist[at, at].float().contiguous()
        made = ops.group_heads(block, n // blocks, solver, config.restarts, config.seed)
        parts.append(made.long() + b * width)
    return torch.cat(parts)


def inside_cost(dist: Tensor, groups: Tensor) -> float:
    """Sum of the distances of all pairs of heads that share a group."""
    inside = dist.double()[groups[:, :, None], groups[:, None, :]]
    return float(inside.triu(1).sum())


def pair_sum(dist: Tensor) -> float:
    """Sum of the distances of all pairs: a component's loss."""
    return float(dist.double().triu(1).sum())


def _nested(fine: Tensor, dist: Tensor, n: int, config: DhaConfig) -> Tensor:
    """``n`` groups that are unions of the groups ``fine`` [N, g], closest by ``dist``."""
    picked = dist.double()[fine.flatten()][:, fine.flatten()]
    count, size = fine.shape
    between = picked.view(count, size, count, size).sum((1, 3)).float()
    between.fill_diagonal_(0)
    unions = group_component(between, n, config)
    return fine[unions].reshape(n, -1)


def _next_up(sizes: Sequence[int], n: int) -> int | None:
    larger = [s for s in sizes if s > n]
    return min(larger) if larger else None


def _greedy(loss: Sequence[float], sizes: Sequence[Sequence[int]], budget: int) -> list[int]:
    """The appendix's rule: a minimum for all, 16s to the highest losses, the rest by loss per head."""
    for least in (4, 2, 1):
        heads = [min([s for s in have if s >= least] or [max(have)]) for have in sizes]
        if sum(heads) <= budget:
            break
    else:
        heads = [min(have) for have in sizes]
    left = budget - sum(heads)
    for c in sorted(range(len(sizes)), key=lambda c: (-loss[c], c)):
        if 16 in sizes[c] and heads[c] < 16 <= heads[c] + left:
            left -= 16 - heads[c]
            heads[c] = 16
    while True:
        steps = [
            (loss[c] / heads[c], -c, up)
            for c in range(len(sizes))
            if (up := _next_up(sizes[c], heads[c])) is not None and up - heads[c] <= left
        ]
        if not steps:
            return heads
        _, c, up = max(steps)
        left -= up - heads[-c]
        heads[-c] = up


def _uniform(sizes: Sequence[Sequence[int]], budget: int) -> list[int]:
    common = set.intersection(*(set(s) for s in sizes))
    return [max(n for n in common if n * len(sizes) <= budget)] * len(sizes)


def allocate(
    costs: Sequence[Sequence[float]],
    sizes: Sequence[Sequence[int]],
    loss: Sequence[float],
    budget: int,
    config: DhaConfig,
) -> list[int]:
    """Heads of every component, at most ``budget`` in all, by ``config.allocation``.

    ``"dp"``: the least sum of costs (exact). ``"loss_weighted"``: the least sum of loss / heads
    (exact). ``"greedy"``: the appendix's rule. ``"uniform"``: the same everywhere.
    """
    if config.allocation == "uniform":
        return _uniform(sizes, budget)
    if config.allocation == "greedy":
        return _greedy(loss, sizes, budget)
    width = max(map(len, sizes))
    table = torch.zeros(len(sizes), width)
    options = torch.zeros(len(sizes), width, dtype=torch.int64)
    for c, have in enumerate(sizes):
        cost = list(costs[c])
        if config.allocation == "loss_weighted":
            cost = [loss[c] / n for n in have]
        # Rows are padded with their last entry, which changes nothing.
        pad = width - len(have)
        table[c] = torch.tensor(cost + cost[-1:] * pad)
        options[c] = torch.tensor(list(have) + list(have[-1:]) * pad)
    return ops.allocate_heads(table, options, budget).tolist()


def make_plan(distances: Sequence[Tensor], query_heads: int, config: DhaConfig) -> Plan:
    """Groups and budgets from the distances [Hb, Hb] of every component's base heads.

    Raises ValueError for a budget or sizes that cannot be met.
    """
    sizes = [allowed_sizes(d.shape[0], config) for d in distances]
    budget = head_budget(config, len(distances) // 2, query_heads, sizes)
    tables = [{n: group_component(d, n, config) for n in s} for d, s in zip(distances, sizes)]
    costs = [
        [0.0 if n == d.shape[0] else inside_cost(d, table[n]) for n in s]
        for d, s, table in zip(distances, sizes, tables)
    ]
    loss = [pair_sum(d) for d in distances]
    heads = allocate(costs, sizes, loss, budget, config)
    groups = [table[n] for table, n in zip(tables, heads)]
    if config.nested:
        for c in range(0, len(groups), 2):
            fine, coarse = sorted((c, c + 1), key=lambda i: -heads[i])
            groups[coarse] = _nested(groups[fine], distances[coarse], heads[coarse], config)
    # A head that is alone keeps its place, so that a budget of all heads changes nothing.
    groups = [g[g.min(1).values.argsort()].sort(1).values for g in groups]
    return Plan(groups, sizes, costs, loss, budget)


def maps(groups: Tensor, query_map: Tensor) -> Tensor:
    """Group of every query head [H] int64, through the base head it used before."""
    of_base = torch.empty(groups.numel(), dtype=torch.int64)
    of_base[groups.flatten()] = torch.arange(len(groups)).repeat_interleave(groups.shape[1])
    return of_base[query_map]
