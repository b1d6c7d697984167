# SPDX-License-Identifier: Apache-2.0
"""Long texts over several strips: at spaces, with an overlap if wanted, and lines packed into full strips."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator

from tenfold.pixelgpt.shaping import clusters
from tenfold.pixelgpt.typeset import Typesetter, clean, cuts

_WORD = re.compile("[^ ]+")


class Wrapper:
    """Cuts text for lines of ``budget`` pixels."""

    def __init__(self, typesetter: Typesetter, budget: int) -> None:
        if budget <= 0:
            raise ValueError(f"a strip leaves no room for text: {budget} pixels")
        self.typesetter, self.budget = typesetter, budget

    def ranges(self, text: str, overlap: int = 0) -> Iterator[tuple[int, int]]:
        """Characters [start, end) of each line: whole words, of which up to ``overlap`` pixels come again.

        A word wider than a line is cut between clusters. Text without a word is one empty line.
        """
        text = clean(text)
        line: deque[tuple[int, int, int]] = deque()  # start, end, width
        used = 0
        for start, end, width in self._words(text):
            gap = (start - line[-1][1]) * self.typesetter.space if line else 0
            if line and used + gap + width > self.budget:
                yield line[0][0], line[-1][1]
                while line and (used > overlap or used + gap + width > self.budget):
                    used -= self._drop(line)
                gap = gap if line else 0
            line.append((start, end, width))
            used += gap + width
        yield (line[0][0], line[-1][1]) if line else (0, 0)

    def _drop(self, line: deque[tuple[int, int, int]]) -> int:
        """Takes the first word away; returns its pixels and those of the space after it."""
        _, end, width = line.popleft()
        return width + ((line[0][0] - end) * self.typesetter.space if line else 0)

    def _words(self, text: str) -> Iterator[tuple[int, int, int]]:
        """Start, end and width of each word, and of the parts of those that are too wide."""
        for match in _WORD.finditer(text):
            start, end = match.span()
            while start < end:
                size, width = self._fitting(text[start:end])
                yield start, start + size, width
                start += size

    def _fitting(self, word: str) -> tuple[int, int]:
        """How many characters of a word fit on a line, at least one cluster, and their width."""
        used = 0
        for a, b in cuts(word):
            width = self.typesetter.measure(word[a:b])
            if used + width <= self.budget:
                used += width
                continue
            ends = [end for _, end in clusters(word[a:b])]
            low, best = 0, 0  # ends[:low] fit
            high = len(ends)
            while low < high:
                middle = (low + high) // 2
                width = self.typesetter.measure(word[a : a + ends[middle]])
                if used + width <= self.budget:
                    low, best = middle + 1, width
                else:
                    high = middle
            if low:
                return a + ends[low - 1], used + best
            if a:
                return a, used
            return ends[0], self.typesetter.measure(word[: ends[0]])
        return len(word), used

    def pack(self, lines: Iterable[str]) -> Iterator[str]:
        """Whole lines joined by a space while they fit; longer ones are cut. Lines without a word are left out."""
        held: list[str] = []
        used = 0
        for given in lines:
            for start, end in self.ranges(given):
                if start == end:
                    continue
                line = clean(given[start:end])
                width = self.typesetter.measure(line)
                if held and used + self.typesetter.space + width > self.budget:
                    yield " ".join(held)
                    held, used = [], 0
                used += width + (self.typesetter.space if held else 0)
                held.append(line)
        if held:
            yield " ".join(held)
