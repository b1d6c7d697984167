# SPDX-License-Identifier: Apache-2.0
"""Which corpus a step is of, and which of its rows: a function of (seed, step) and nothing else (spec 3.5).

Corpora are drawn with ``q_i ~ p_i^alpha``, one per step; each corpus is read in a new random order per epoch, no row
twice in it. A step can be asked for at any time and in any process, so resuming needs the step's number alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tenfold.training.checks import integers

ALPHA = 0.3
_BLOCK = 4096  # steps whose corpora are drawn at a time

Key = tuple[str, int, int, int]  # corpus, number of its row, step, place in the step's batch


def mixture_weights(counts: Sequence[float], alpha: float = ALPHA) -> np.ndarray:
    """``q_i = p_i^alpha / sum_j p_j^alpha`` (float64) with ``p_i = counts_i / sum(counts)``.

    alpha 1 keeps the shares, 0 makes all equal (of corpora that have rows).

    Raises ValueError for no counts, negative ones or zeros only; alpha not finite or below 0.
    """
    p = np.asarray(counts, dtype=np.float64)
    if p.ndim != 1 or not len(p) or not np.isfinite(p).all() or (p < 0).any() or not p.any():
        raise ValueError(f"counts must be numbers >= 0, some of them positive, got {list(counts)}")
    if not 0 <= alpha < np.inf:
        raise ValueError(f"alpha must be a number >= 0, got {alpha}")
    q = np.where(p > 0, (p / p.sum()) ** alpha, 0.0)
    return q / q.sum()


def grouped_weights(
    sizes: Mapping[str, int], groups: Mapping[str, str], shares: Mapping[str, float], alpha: float = ALPHA
) -> dict[str, float]:  # fmt: skip
    """Weights of corpora where groups (tasks, say) have fixed shares, and corpora of a group share by ``alpha``.

    Args:
        sizes: rows by corpus. groups: group by corpus. shares: weight by group; they need not sum to 1.

    Raises ValueError for a corpus whose group has no share; shares that are not numbers >= 0, or all 0.
    """
    lost = [c for c in sizes if groups.get(c) not in shares]
    if lost:
        raise ValueError(f"the group of {lost[0]!r} has no share; shares: {', '.join(shares)}")
    given = np.array([shares[groups[c]] for c in sizes], dtype=np.float64)
    if not np.isfinite(given).all() or (given < 0).any() or not given.any():
        raise ValueError(
            f"shares must be numbers >= 0, one of a group with corpora positive, got {dict(shares)}"
        )
    made: dict[str, float] = {}
    for group, share in shares.items():
        names = [c for c in sizes if groups[c] == group]
        if names:
            q = mixture_weights([sizes[c] for c in names], alpha)
            made |= {c: share * float(w) for c, w in zip(names, q)}
    total = sum(made.values())
    return {c: made[c] / total for c in sizes}


def _generator(*key: object) -> np.random.Generator:
    digest = hashlib.blake2b(" ".join(map(str, key)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


@dataclass(frozen=True)
class Draw:
    """A step's batch: ``rows`` int64 [batch_size] are numbers of rows of ``corpus``, in the order of the batch."""

    corpus: str
    step: int
    rows: np.ndarray

    def keys(self, start: int = 0, stop: int | None = None) -> list[Key]:
        """(corpus, row, step, place) of the places ``start`` to ``stop`` of the batch."""
        return [
            (self.corpus, int(self.rows[place]), self.step, place)
            for place in range(*slice(start, stop).indices(len(self.rows)))
        ]


class Mixture:
    """Draws a corpus and rows of it for every step.

    Args:
        sizes: rows by corpus. batch_size: rows of a step, over all ranks and micro-batches of it.
        alpha: see ``mixture_weights``. weights: by corpus, instead (``grouped_weights`` makes some).

    Raises:
        ValueError: no corpus with rows; a weight for a corpus without rows, or for one that is not there.
    """

    def __init__(
        self, sizes: Mapping[str, int], batch_size: int, *, alpha: float = ALPHA, seed: int = 0,
        weights: Mapping[str, float] | None = None,
    ) -> None:  # fmt: skip
        self.batch_size, self.seed = batch_size, seed
        integers(self, {"batch_size": 1, "seed": 0})
        self.names, self.sizes = tuple(sizes), dict(sizes)
        if weights is None:
            found = mixture_weights(list(sizes.values()), alpha) if sizes else np.empty(0)
        else:
            unknown = [n for n in weights if n not in sizes]
            if unknown:
                raise ValueError(
                    f"weights: there is no corpus {unknown[0]!r}; corpora: {', '.join(sizes)}"
                )
            found = np.array([weights.get(n, 0.0) for n in sizes], dtype=np.float64)
        if not len(found) or not np.isfinite(found).all() or (found < 0).any() or not found.any():
            raise ValueError(
                f"weights must be numbers >= 0, some positive, got {dict(zip(sizes, found))}"
            )
        empty = [n for n, w in zip(sizes, found) if w > 0 and sizes[n] < 1]
        if empty:
            raise ValueError(f"the corpus {empty[0]!r} has no rows")
        self.weights = dict(zip(sizes, (found / found.sum()).tolist()))
        self._bounds = np.cumsum(found / found.sum())
        # Sums that round to less than 1 leave nothing to corpora of no weight behind the last one that has some.
        self._bounds[np.flatnonzero(found)[-1] :] = 1.0
        self._blocks: list[np.ndarray] = []  # corpus of each step
        self._before: list[np.ndarray] = [np.zeros(len(found), np.int64)]  # steps of each before it
        self._orders: dict[str, tuple[int, np.ndarray]] = {}

    def _block(self, number: int) -> np.ndarray:
        while len(self._blocks) <= number:
            u = _generator(self.seed, "corpus", len(self._blocks)).random(_BLOCK)
            block = np.searchsorted(self._bounds, u, side="right").astype(np.int32)
            self._blocks.append(block)
            self._before.append(self._before[-1] + np.bincount(block, minlength=len(self._bounds)))
        return self._blocks[number]

    def _order(self, name: str, epoch: int) -> np.ndarray:
        kept = self._orders.get(name)
        if kept is None or kept[0] != epoch:
            order = _generator(self.seed, "order", epoch, name).permutation(self.sizes[name])
            kept = self._orders[name] = (epoch, order)
        return kept[1]

    def corpus(self, step: int) -> str:
        """The corpus that a step is of."""
        if step < 0:
            raise ValueError(f"step must be >= 0, got {step}")
        return self.names[self._block(step // _BLOCK)[step % _BLOCK]]

    def draw(self, step: int) -> Draw:
        """The batch of a step (from 0 on). Raises ValueError for a negative one."""
        name = self.corpus(step)
        number, at = divmod(step, _BLOCK)
        own = self.names.index(name)
        earlier = int(self._before[number][own]) + int((self._blocks[number][:at] == own).sum())
        size = self.sizes[name]
        places = np.arange(earlier * self.batch_size, (earlier + 1) * self.batch_size)
        rows = np.empty(self.batch_size, np.int64)
        for epoch in range(int(places[0]) // size, int(places[-1]) // size + 1):
            inside = places // size == epoch
            rows[inside] = self._order(name, epoch)[places[inside] % size]
        return Draw(name, step, rows)

    def digest(self) -> str:
        """Identifies what decides the draws: corpora, sizes, weights, batch size and seed."""
        text = repr((self.sizes, self.weights, self.batch_size, self.seed))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def state_dict(self, step: int) -> dict[str, Any]:
        """What to keep of a run that has done ``step`` steps."""
        return {"step": step, "digest": self.digest()}

    def load_state_dict(self, state: Mapping[str, Any]) -> int:
        """The number of the next step. Raises ValueError if the state is of another mixture."""
        if state["digest"] != self.digest():
            raise ValueError(
                "the state is of a mixture with other corpora, sizes, weights, batch size or seed "
                f"({state['digest']}, and this one is {self.digest()})"
            )
        return int(state["step"])


class MixtureDataset:
    """Rows of several corpora by ``Key``, as a map-style dataset: the row's fields with ``corpus``, ``step``, ``row``.

    ``row`` is the place in the step's batch, which with (seed, step) decides all random numbers of a row.

    Args:
        corpora: by name, anything with a length whose items are dicts.
    """

    def __init__(self, corpora: Mapping[str, Any]) -> None:
        self.corpora = dict(corpora)

    @property
    def sizes(self) -> dict[str, int]:
        """Rows by corpus, as ``Mixture`` takes them."""
        return {name: len(rows) for name, rows in self.corpora.items()}

    def __len__(self) -> int:
        return sum(self.sizes.values())

    def __getitem__(self, key: Key) -> dict[str, Any]:
        corpus, number, step, place = key
        return {**self.corpora[corpus][number], "corpus": corpus, "step": step, "row": place}

    def batch(self, draw: Draw, start: int = 0, stop: int | None = None) -> list[dict[str, Any]]:
        """The examples of some places of a step's batch."""
        return [self[key] for key in draw.keys(start, stop)]


class MixtureBatchSampler:
    """Batches of keys for ``DataLoader(MixtureDataset(...), batch_sampler=...)``, one corpus in each.

    Args:
        mixture: of all ranks' rows. steps: where to stop. start: the step to begin with (a resumed run's).
        rank, world_size: this process's part of each step's batch is contiguous.

    Raises ValueError if the batch cannot be divided among the ranks.
    """

    def __init__(
        self, mixture: Mixture, steps: int, *, start: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(
                f"rank must be in [0, world_size), got {rank} and world_size {world_size}"
            )
        if mixture.batch_size % world_size:
            raise ValueError(
                f"batch_size {mixture.batch_size} cannot be divided among {world_size} ranks"
            )
        self.mixture, self.steps, self.start = mixture, steps, start
        part = mixture.batch_size // world_size
        self._places = (rank * part, (rank + 1) * part)

    def __len__(self) -> int:
        return max(0, self.steps - self.start)

    def __iter__(self) -> Iterator[list[Key]]:
        for step in range(self.start, self.steps):
            yield self.mixture.draw(step).keys(*self._places)
