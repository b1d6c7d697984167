# SPDX-License-Identifier: Apache-2.0
"""Span corruption in NumPy, as collators do it: what the ops are compared with.

``by_row`` has the structure of the collators of run_t5_mlm and nanoT5: a mask for each row, then all rows at once.
``at_once`` draws the masks of all rows together too (rows of one length), and finds masked tokens by running sums of
bytes: the fastest form that we could write.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tenfold.ops.corruption import span_counts

Array = np.ndarray[Any, Any]


def _segments(made: np.random.Generator, items: int, count: int) -> Array:
    first = np.arange(items - 1) < count - 1
    made.shuffle(first)
    return np.bincount(np.cumsum(np.pad(first, (1, 0))))


def _row_mask(made: np.random.Generator, n: int, density: float, mean_span: float) -> Array:
    noise, spans = span_counts(n, density, mean_span)
    both = np.stack([_segments(made, n - noise, spans), _segments(made, noise, spans)], axis=1)
    starts = np.zeros(n, np.int8)
    starts[np.cumsum(both.reshape(-1))[:-1]] = 1
    return np.cumsum(starts) % 2 == 1


def masks_by_row(
    made: np.random.Generator, b: int, n: int, density: float, mean_span: float
) -> Array:
    """[b, n], a row after the other."""
    return np.stack([_row_mask(made, n, density, mean_span) for _ in range(b)])


def _cuts(made: np.random.Generator, b: int, items: int, count: int) -> Array:
    """Where the parts of rows end, [b, count]: the gaps with the smallest of random keys."""
    keys = made.random((b, items - 1), dtype=np.float32)
    gaps = np.argpartition(keys, count - 1, axis=1)[:, : count - 1] if count > 1 else keys[:, :0]
    ends = np.sort(gaps, axis=1).astype(np.int64) + 1
    return np.concatenate([ends, np.full((b, 1), items)], axis=1)


def masks_at_once(
    made: np.random.Generator, b: int, n: int, density: float, mean_span: float
) -> Array:
    """[b, n], all rows together."""
    noise, spans = span_counts(n, density, mean_span)
    masked, kept = _cuts(made, b, noise, spans), _cuts(made, b, n - noise, spans)
    before = np.pad(masked, ((0, 0), (1, 0)))[:, :-1]
    edges = np.zeros((b, n + 1), np.int8)
    rows = np.arange(b)[:, None]
    edges[rows, kept + before] = 1
    edges[rows, kept + masked] = -1
    return np.cumsum(edges[:, :n], axis=1, dtype=np.int8).view(bool)


def _marked(tokens: Array, gone: Array, first_sentinel: int, eos: int, narrow: bool) -> Array:
    """Rows of one length: runs of what is gone as sentinels, EOS at the end."""
    begins = gone.copy()
    begins[:, 1:] &= ~gone[:, :-1]
    if narrow:
        keep = ~gone | begins
        made = tokens[keep].reshape(len(tokens), -1)
        runs = begins[keep].reshape(made.shape)
        made[runs] = np.broadcast_to(first_sentinel - np.arange(runs[0].sum()),
                                     (len(made), runs[0].sum())).reshape(-1)  # fmt: skip
    else:
        ids = np.where(begins, first_sentinel + 1 - np.cumsum(begins, axis=1), tokens)
        made = ids[~gone | begins].reshape(len(tokens), -1)
    return np.concatenate([made, np.full((len(made), 1), eos, made.dtype)], axis=1)


def sides(
    tokens: Array, mask: Array, first_sentinel: int, eos: int, narrow: bool
) -> tuple[Array, Array]:
    """(inputs, targets); ``narrow`` numbers the sentinels only where they are."""
    return (_marked(tokens, mask, first_sentinel, eos, narrow),
            _marked(tokens, ~mask, first_sentinel, eos, narrow))  # fmt: skip
