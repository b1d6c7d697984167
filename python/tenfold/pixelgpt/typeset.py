# SPDX-License-Identifier: Apache-2.0
"""Lines of text as columns of pixels.

Text is cut at its spaces. What stands between two spaces is a word, set once and kept; a line from left to right is
its words' columns joined by those of a space, which is one call of ``bytes.join``; so is one that is all from right
to left. Mixed directions, colours and very long words take the general way through ``line``, whose result is the
same where both apply.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from tenfold.pixelgpt.bidi import embedding_levels, paragraph_level, visual_order
from tenfold.pixelgpt.bidi_classes import all_right, turns
from tenfold.pixelgpt.cells import Cell, CellMaker, Kept, Span
from tenfold.pixelgpt.fonts import FontChain
from tenfold.pixelgpt.settings import RenderSettings
from tenfold.pixelgpt.shaping import joins

LONGEST = 64  # characters that are shaped together; longer words are cut
_BLOCK = 512  # words that are joined before the width is looked at
_WORDS = 1 << 14
_PIECES = re.compile(" +|[^ ]+")
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_LINE_SPACES = "\t\n\v\f\r\x1c\x1d\x1e\x1f\x85\u2028\u2029"
# Every character keeps its place, so that offsets are those of the text given.
_CLEAN = {c: "\u200b" for c in (*range(0x20), *range(0x7F, 0xA0))} | {
    ord(c): " " for c in _LINE_SPACES
}


def clean(text: str) -> str:
    """Text of the same length on one line: tabs and line breaks are spaces, other controls are not drawn."""
    if text.isascii() and text.isprintable():
        return text
    return text.translate(_CLEAN) if _CONTROLS.search(text) else text


def cuts(word: str) -> Iterator[tuple[int, int]]:
    """Ends of what is shaped together: no cut before a mark or after a joining sign, if it can be helped."""
    start = 0
    while len(word) - start > LONGEST:
        end = start + LONGEST
        while end > start and (
            joins(word[end], word[end - 1]) or unicodedata.combining(word[end - 1]) == 9
        ):
            end -= 1
        if end == start:
            end = start + LONGEST
        yield start, end
        start = end
    yield start, len(word)


@dataclass(frozen=True)
class Line:
    """Cells from left to right, each with the position of its first character.

    ``skip`` pixels are cut off at the left, and what is right of ``width`` more.
    """

    parts: tuple[tuple[int, Cell], ...]
    rows: int
    skip: int
    width: int

    def columns(self) -> bytes:
        """``width`` columns of ``rows`` bytes."""
        joined = b"".join([cell.columns for _, cell in self.parts])
        return joined[self.skip * self.rows : (self.skip + self.width) * self.rows]

    def _placed(self) -> Iterator[tuple[int, int, Cell]]:
        x = -self.skip
        for start, cell in self.parts:
            yield x, start, cell
            x += cell.width

    def colors(self) -> list[tuple[int, np.ndarray]]:
        """Columns and pixels [3, rows, w] of the cells with colours of their own."""
        found = []
        for x, _, cell in self._placed():
            if cell.color is not None:
                low, high = max(x, 0), min(x + cell.width, self.width)
                if low < high:
                    found.append((low, cell.color[..., low - x : high - x]))
        return found

    def spans(self, maker: CellMaker) -> Iterator[Span]:
        """Which characters are on which pixels."""
        for x, start, cell in self._placed():
            for first, last, left, right in maker.spans(cell):
                low, high = max(x + left, 0), min(x + right, self.width)
                if low < high:
                    yield start + first, start + last, low, high


class Typesetter:
    """Sets text in the fonts of a chain. Threads may share one."""

    def __init__(self, settings: RenderSettings, chain: FontChain) -> None:
        self.settings, self.maker = settings, CellMaker(settings, chain)
        self.rows = settings.patch_size
        self.space = self.maker.space
        self._space = self.maker.blank(1, self.space).columns
        self._parts: Kept = Kept(self._set_piece, _WORDS)
        self._words: Kept = Kept(lambda word: self._set_word(word, False), _WORDS)
        self._right: Kept = Kept(lambda word: self._set_word(word, True), _WORDS)

    def _set_piece(self, key: tuple[str, bool]) -> tuple[tuple[int, Cell], ...]:
        text, right_to_left = key
        if text[0] == " ":
            return ((0, self.maker.blank(len(text), len(text) * self.space)),)
        return tuple(self.maker.cells(text, right_to_left))

    def _set_word(self, word: str, right_to_left: bool) -> bytes | None:
        """Columns of a word of at most LONGEST characters; None if it has colours."""
        cells = [cell for _, cell in self._parts[word, right_to_left]] if word else []
        if any(cell.color is not None for cell in cells):
            return None
        return b"".join([cell.columns for cell in cells])

    def base(self, text: str) -> int:
        """Level of the paragraph: 0 from left to right, 1 from right to left."""
        if self.settings.direction != "auto":
            return int(self.settings.direction == "rtl")
        return paragraph_level(text) if turns(text) else 0

    def columns(self, text: str, limit: int) -> bytes | None:
        """The first ``limit`` columns of clean text, in the order of reading; None where only ``line`` can set it."""
        right = turns(text)
        if (right and not all_right(text)) or self.base(text) != right:
            return None
        words_of = self._right if right else self._words
        done: list[bytes] = []
        size = 0
        rest: str | None = text
        while rest is not None and size < limit * self.rows:
            words = rest.split(" ", _BLOCK)
            rest = words.pop() if len(words) > _BLOCK else None
            if max(map(len, words)) > LONGEST:
                return None
            if right:
                words.reverse()
            try:
                done.append(self._space.join(map(words_of.__getitem__, words)))
            except TypeError:  # a word with colours is None
                return None
            size += len(done[-1]) + len(self._space)
        if right:
            done.reverse()
            return self._space.join(done)[-limit * self.rows :]
        return self._space.join(done)[: limit * self.rows]

    def line(self, text: str, limit: int | None = None, base: int | None = None) -> Line:
        """Clean text, set; what is over ``limit`` pixels is cut off where the reading ends."""
        base = self.base(text) if base is None else base
        if base or turns(text):
            parts, width = self._bidirectional(text, limit, base)
        else:
            parts, width = [], 0
            for match in _PIECES.finditer(text):
                for at, piece in self._chunks(match.start(), match.group()):
                    for first, cell in self._parts[piece, False]:
                        parts.append((at + first, cell))
                        width += cell.width
                if limit is not None and width >= limit:
                    break
        shown = width if limit is None else min(width, limit)
        return Line(tuple(parts), self.rows, width - shown if base else 0, shown)

    @staticmethod
    def _chunks(start: int, text: str) -> Iterator[tuple[int, str]]:
        if text[0] == " " or len(text) <= LONGEST:
            yield start, text
            return
        for a, b in cuts(text):
            yield start + a, text[a:b]

    def _bidirectional(
        self, text: str, limit: int | None, base: int
    ) -> tuple[list[tuple[int, Cell]], int]:
        """Cells in visual order, of so many of the first words that ``limit`` is reached."""
        end = len(text) if limit is None else min(len(text), limit // 4 + LONGEST)
        while True:
            levels = embedding_levels(text[:end], base)
            pieces: list[tuple[int, tuple[tuple[int, Cell], ...]]] = []
            order: list[int] = []
            width = 0
            for at, piece, level in self._level_pieces(text[:end], levels):
                cells = self._parts[piece, bool(level & 1)]
                pieces.append((at, cells))
                order.append(level)
                width += sum(cell.width for _, cell in cells)
                if limit is not None and width >= limit:
                    break
            if end == len(text) or (limit is not None and width >= limit):
                break
            end = min(len(text), 4 * end)
        parts = [
            (pieces[i][0] + first, cell)
            for i in visual_order(order)
            for first, cell in pieces[i][1]
        ]
        return parts, width

    def _level_pieces(self, text: str, levels: list[int]) -> Iterator[tuple[int, str, int]]:
        """Words and spaces, cut where the level changes."""
        for match in _PIECES.finditer(text):
            start, end = match.span()
            while start < end:
                stop = start + 1
                while stop < end and levels[stop] == levels[start]:
                    stop += 1
                for at, piece in self._chunks(start, text[start:stop]):
                    yield at, piece, levels[start]
                start = stop

    def measure(self, text: str) -> int:
        """Pixels of clean text."""
        found: Any = None
        if " " not in text and len(text) <= LONGEST and text and not turns(text):
            found = self._words[text]
        return len(found) // self.rows if found is not None else self.line(text).width
