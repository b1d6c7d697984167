# SPDX-License-Identifier: Apache-2.0
"""Definitions of the head operations of DHA (arXiv 2406.06567): plain PyTorch, obviously right.

Computations run in float64 when the inputs are float64, else in float32. Notation: H heads, d head
dim, m model width, N groups of g heads each; a head's projection is ``w[h]`` [d, m] (nn.Linear layout).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tenfold.reference.numbers import work
from tenfold.reference.random import philox4x32_10

__all__ = [
    "allocate_heads",
    "collapse_heads",
    "fuse_heads",
    "fuse_states",
    "fusion_mse",
    "group_heads",
    "head_cka",
]

SA_START, SA_END, SA_FACTOR = 100.0, 0.001, 0.9  # temperatures of the paper's annealing


def fuse_heads(w: Tensor, omega: Tensor, groups: Tensor) -> Tensor:
    """``out[n, h, i] = sum_j omega[n, h, j, i] * w[groups[n, j], i]``: each head its own mixture."""
    x = work(w)[groups.long()]  # [N, g, d, m]
    return torch.einsum("nhji,njim->nhim", omega.to(x.dtype), x).to(w.dtype)


def fuse_states(states: Tensor, omega: Tensor) -> Tensor:
    """The same mixture of keys or values [B, N, g, S, d] before rotation.

    ``out[b, n, h, s, i] = sum_j omega[n, h, j, i] * states[b, n, j, s, i]``. Projections are linear, so
    this equals projecting with the fused weights; after RoPE it does not, unless ``omega`` is tied over
    each rotary pair (i, i + d / 2).
    """
    x = work(states)
    return torch.einsum("nhji,bnjsi->bnhsi", omega.to(x.dtype), x).to(states.dtype)


def collapse_heads(w: Tensor, omega: Tensor, groups: Tensor) -> Tensor:
    """``out[n, i] = sum_j mean_h(omega[n, h, j, i]) * w[groups[n, j], i]``: one head per group."""
    x = work(w)[groups.long()]
    mean = omega.to(x.dtype).mean(1)
    return torch.einsum("nji,njim->nim", mean, x).to(w.dtype)


def fusion_mse(omega: Tensor) -> Tensor:
    """``mean over pairs h < h', j and i of (omega[n, h, j, i] - omega[n, h', j, i])^2``, by the pair loop.

    A group of one head has no pair: 0.
    """
    _, g, _, d = omega.shape
    total = omega.sum((1, 2, 3)) * 0  # keeps the graph where there is no pair
    for a in range(g):
        for b in range(a + 1, g):
            total = total + (omega[:, a] - omega[:, b]).square().sum((1, 2))
    return total / max(g * (g - 1) // 2 * g * d, 1)


def head_cka(w: Tensor, *, center: bool = False) -> Tensor:
    """Linear-kernel similarity of every two heads' projections ``X = w[h]^T`` [m, d].

    ``CKA(X, Y) = ||X^T Y||_F^2 / (||X^T X||_F * ||Y^T Y||_F)``; ``center`` subtracts each column's mean.
    """
    x = work(w)
    if center:
        x = x - x.mean(-1, keepdim=True)
    squares = torch.einsum("aim,bjm->abij", x, x).square().sum((2, 3))
    norm = squares.diagonal().sqrt()
    cka = squares / (norm[:, None] * norm[None, :])
    return cka if cka.dtype == torch.float64 else cka.float()


class _Random:
    """Philox words in order: counter (draw, run, 0, 0) under the seed."""

    def __init__(self, seed: int, run: int) -> None:
        self.seed, self.run, self.draw = seed, run, 0

    def word(self) -> int:
        counter = tuple(torch.tensor(c) for c in (self.draw, self.run, 0, 0))
        self.draw += 1
        return int(philox4x32_10(counter, self.seed)[0])

    def below(self, n: int) -> int:
        return self.word() * n >> 32

    def uniform(self) -> float:
        return (self.word() + 0.5) * 2.0**-32

    def shuffled(self, n: int) -> list[int]:
        order = list(range(n))
        for i in range(n - 1, 0, -1):
            j = self.below(i + 1)
            order[i], order[j] = order[j], order[i]
        return order


class _Grouping:
    """A partition into equal groups, with every head's distance to every group kept up to date."""

    def __init__(self, dist: list[list[float]], order: list[int], size: int) -> None:
        self.dist, self.size, h = dist, size, len(order)
        self.group = [0] * h
        for at, head in enumerate(order):
            self.group[head] = at // size
        self.to = [[0.0] * (h // size) for _ in range(h)]
        for a in range(h):
            for b in range(h):
                self.to[a][self.group[b]] += dist[a][b]

    def delta(self, a: int, b: int) -> float:
        """Change of the inside distance if ``a`` and ``b`` change places."""
        x, y = self.group[a], self.group[b]
        gain = (self.to[a][y] - self.to[a][x]) + (self.to[b][x] - self.to[b][y])
        return gain - 2.0 * self.dist[a][b]

    def swap(self, a: int, b: int) -> None:
        x, y = self.group[a], self.group[b]
        for h, row in enumerate(self.dist):
            move = row[b] - row[a]
            self.to[h][x] += move
            self.to[h][y] -= move
        self.group[a], self.group[b] = y, x

    def cost(self) -> float:
        """Distance over the pairs inside groups, from scratch."""
        h = len(self.group)
        pairs = ((a, b) for a in range(h) for b in range(a + 1, h))
        return sum(self.dist[a][b] for a, b in pairs if self.group[a] == self.group[b])

    def members(self) -> list[list[int]]:
        """Heads of each group ascending, groups by their first head."""
        out: dict[int, list[int]] = {}
        for head, n in enumerate(self.group):
            out.setdefault(n, []).append(head)
        return sorted(out.values())


def _descend(groups: _Grouping, least: float) -> None:
    """Best-improvement swap descent; ``least`` is the smallest gain that counts."""
    h = len(groups.group)
    while True:
        best, pair = -least, None
        for a in range(h):
            for b in range(a + 1, h):
                if groups.group[a] != groups.group[b] and groups.delta(a, b) < best:
                    best, pair = groups.delta(a, b), (a, b)
        if pair is None:
            return
        groups.swap(*pair)


def _anneal(groups: _Grouping, random: _Random) -> None:
    """The paper's schedule with score = -distance: 110 proposals of two heads in different groups."""
    h, temperature = len(groups.group), SA_START
    if h == groups.size:
        return
    while temperature > SA_END:
        a = random.below(h)
        others = [b for b in range(h) if groups.group[b] != groups.group[a]]
        b = others[random.below(len(others))]
        rise = -groups.delta(a, b)
        draw = random.uniform()
        if rise > 0 or draw < math.exp(rise / temperature):
            groups.swap(a, b)
        temperature *= SA_FACTOR


def group_heads(
    dist: Tensor, n_groups: int, solver: str = "swap", restarts: int = 20, seed: int = 0
) -> Tensor:
    """Partition into ``n_groups`` equal groups with a small sum of distances inside groups.

    ``swap``: descent by the best swap of two heads, from the contiguous partition and from
    ``restarts - 1`` random ones; the lowest cost wins, the earlier start on a tie.
    """
    h = dist.shape[0]
    both = ((dist.double() + dist.double().T) * 0.5).cpu()
    both.fill_diagonal_(0.0)
    table, size = both.tolist(), h // n_groups
    best = _Grouping(table, list(range(h)), size)
    if solver == "paper_sa":
        random = _Random(seed, 0)
        best = _Grouping(table, random.shuffled(h), size)
        _anneal(best, random)
    elif solver == "swap":
        least = 1e-12 * h * float(both.abs().max()) if h else 0.0
        _descend(best, least)
        for run in range(1, restarts):
            other = _Grouping(table, _Random(seed, run).shuffled(h), size)
            _descend(other, least)
            best = other if other.cost() < best.cost() else best
    return torch.tensor(best.members(), dtype=torch.int32, device=dist.device).view(n_groups, size)


def allocate_heads(cost: Tensor, sizes: Tensor, budget: int) -> Tensor:
    """Heads of each component, ``sum_c cost[c, k_c]`` least under ``sum_c sizes[c, k_c] <= budget``.

    Equal costs: the most heads in all, then the earlier size of the later components.
    """
    table = cost.double().tolist()
    options = sizes.expand(cost.shape).tolist()
    states: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}  # by heads spent
    for costs, heads in zip(table, options):
        after: dict[int, tuple[float, tuple[int, ...]]] = {}
        for k, n in enumerate(heads):
            for spent, (total, choice) in states.items():
                to = spent + n
                if to <= budget and (to not in after or total + costs[k] < after[to][0]):
                    after[to] = (total + costs[k], (*choice, n))
        states = after
    least = min(total for total, _ in states.values())
    most = max(spent for spent, (total, _) in states.items() if total == least)
    return torch.tensor(states[most][1], dtype=torch.int32, device=cost.device)
