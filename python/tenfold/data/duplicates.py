# SPDX-License-Identifier: Apache-2.0
"""Near-duplicates among texts: MinHash finds candidates, the Jaccard similarity of their shingles decides."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import numpy as np

_TOKEN = re.compile(r"\w+|[^\w\s]")
_BANDS, _ROWS = 20, 4  # of 80 hashes: a pair of similarity 0.8 is missed once in 30,000 times
_PRIME = (1 << 61) - 1


def shingles(text: str, size: int = 5) -> frozenset[int]:
    """Hashes of all runs of ``size`` words or signs; of the whole text where it is shorter. Layout does not count."""
    tokens = _TOKEN.findall(text)
    count = max(1, len(tokens) - size + 1)
    return frozenset(
        zlib.crc32(" ".join(tokens[i : i + size]).encode("utf-8", "surrogatepass"))
        for i in range(count)
    )


def jaccard(a: frozenset[int], b: frozenset[int]) -> float:
    """Share of the elements of both sets that are in each of them; 1 for two empty sets."""
    union = len(a | b)
    return len(a & b) / union if union else 1.0


def near_duplicates(
    texts: Sequence[str], threshold: float = 0.8, size: int = 5
) -> list[int | None]:
    """For each text the number of the first kept one that it repeats, or None: such a text is kept itself.

    Args:
        texts: in order of preference. threshold: least Jaccard similarity of the sets of ``shingles``, in (0, 1].

    Raises ValueError for a threshold out of range.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be in (0, 1], got {threshold}")
    draw = np.random.default_rng(0)
    # (a x + b) mod 2^61 - 1 in Python's integers would be slow; odd multipliers modulo 2^64 do as well here.
    scale = draw.integers(1, _PRIME, _BANDS * _ROWS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    shift = draw.integers(0, _PRIME, _BANDS * _ROWS, dtype=np.uint64)
    sets = [shingles(t, size) for t in texts]
    buckets: dict[tuple[int, bytes], list[int]] = {}
    made: list[int | None] = []
    for number, own in enumerate(sets):
        x = np.fromiter(own, np.uint64, len(own))
        with np.errstate(over="ignore"):
            hashes = x[:, None] * scale + shift
        low = (hashes >> np.uint64(20)).min(0).reshape(_BANDS, _ROWS)
        keys = [(band, low[band].tobytes()) for band in range(_BANDS)]
        candidates = sorted({c for key in keys for c in buckets.get(key, ())})
        found = next((c for c in candidates if jaccard(sets[c], own) >= threshold), None)
        made.append(found)
        if found is None:
            for key in keys:
                buckets.setdefault(key, []).append(number)
    return made
