# SPDX-License-Identifier: Apache-2.0
"""Fitting a row into a number of tokens: context and observations are cut, never the answer, never the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"


def caps(lengths: Sequence[int], excess: int) -> list[int] | None:
    """How much of each piece to keep so that ``excess`` tokens go; the longest pieces lose theirs first.

    None if all pieces together have fewer. All that are cut keep equally many, but for one token.
    """
    if excess <= 0:
        return list(lengths)
    if sum(lengths) < excess:
        return None
    left = sum(lengths) - excess
    kept = [0] * len(lengths)
    for done, index in enumerate(sorted(range(len(lengths)), key=lambda i: (lengths[i], i))):
        kept[index] = min(lengths[index], left // (len(lengths) - done))
        left -= kept[index]
    return kept


def head(ids: list[int], count: int, decode: Callable[[Sequence[int]], str]) -> list[int]:
    """The first ``count`` tokens, or up to three fewer where these would end inside a character."""
    if count >= len(ids):
        return ids
    for fewer in range(min(4, count + 1)):
        kept = ids[: count - fewer]
        if not decode(kept[-8:]).endswith(REPLACEMENT):
            return kept
    return ids[:count]
