# SPDX-License-Identifier: Apache-2.0
"""Which two experts are merged next: similarities from the Gram matrix of their task vectors, and the pair."""

from __future__ import annotations

import math
import random
from collections.abc import Collection

from torch import Tensor

from tenfold.training.checks import one_of
from tenfold.upit.config import POLICIES, SIMILARITIES

Pair = tuple[int, int]


def _cosine(gram: list[list[float]], j: int, k: int) -> float:
    norms = gram[j][j], gram[k][k]
    if 0.0 in norms:
        return 1.0 if norms == (0.0, 0.0) else 0.0
    return gram[j][k] / math.sqrt(norms[0]) / math.sqrt(norms[1])


def similarities(gram: Tensor, kind: str = "cosine") -> list[list[float]]:
    """How alike experts are, [m][m], of the Gram matrix of their task vectors (float64 [m, m]).

    ``"cosine"`` and ``"weight_cosine"`` (of the Gram matrix of the weights): a zero vector has cosine 0 with others
    and 1 with another zero vector. ``"l2"``: the negative squared distance.
    """
    one_of("similarity", kind, SIMILARITIES[:3])
    g, every = gram.double().tolist(), range(len(gram))
    if kind == "l2":
        return [[-(g[j][j] + g[k][k] - 2 * g[j][k]) for k in every] for j in every]
    return [[_cosine(g, j, k) for k in every] for j in every]


def choose_pair(
    gram: Tensor | None,
    *,
    similarity: str = "cosine",
    policy: str = "global",
    originals: int,
    used: Collection[Pair] = (),
    count: int | None = None,
    seed: int = 0,
) -> Pair:
    """The two least similar experts (j < k); equal ones: the smallest (j, k).

    Args:
        gram: of the pool, float64 [m, m]; None for ``similarity="none"``, a random pair of ``count`` experts, which
            the seed and the number of used pairs decide.
        policy: ``"global"``: any two; ``"no_repeat"``: no pair of ``used``; ``"originals"``: two of the first
            ``originals``.

    Raises:
        ValueError: no pair is left; a Gram matrix that is not finite.
    """
    one_of("similarity", similarity, SIMILARITIES)
    one_of("policy", policy, POLICIES)
    size = len(gram) if gram is not None else (count or 0)
    most = min(size, originals) if policy == "originals" else size
    taken = set(used) if policy == "no_repeat" else set()
    pairs = [(j, k) for j in range(most) for k in range(j + 1, most) if (j, k) not in taken]
    if not pairs:
        raise ValueError(
            f"no pair of experts is left to merge: {most} may be parents, {len(taken)} pairs are used"
        )
    if similarity == "none" or gram is None:
        return random.Random(f"{seed}:pair:{size}:{len(used)}").choice(pairs)
    if not bool(gram.isfinite().all()):
        raise ValueError(
            "the experts' weights are not all finite: their Gram matrix has NaN or Inf"
        )
    found = similarities(gram, similarity)
    return min(pairs, key=lambda p: (found[p[0]][p[1]], p))


def crossover(child: int, seed: int, alpha: float | None = None) -> float:
    """Share of the first parent in the child of this number: ``alpha``, else a draw of U(0, 1)."""
    return random.Random(f"{seed}:alpha:{child}").random() if alpha is None else alpha


def child_seed(child: int, seed: int) -> int:
    """Seed of a child's random drops, which its number and the run's seed decide."""
    return random.Random(f"{seed}:drop:{child}").getrandbits(62)


def extended(gram: Tensor, row: Tensor) -> Tensor:
    """A Gram matrix [m, m] with the row [m + 1] of one more expert."""
    grown = gram.new_empty(len(gram) + 1, len(gram) + 1)
    grown[:-1, :-1] = gram
    grown[-1] = row
    grown[:, -1] = row
    return grown
