# SPDX-License-Identifier: Apache-2.0
"""Strips: text, its separators and its padding on a row of patches (spec: PixelGPT sections 3.1 and 3.2)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from tenfold.pixelgpt.settings import RenderSettings
from tenfold.pixelgpt.typeset import Typesetter, clean

MARGIN = 2  # pixels left of a text, and between it and its separator


def next_patch(x: int, patch: int, width: int) -> int:
    """The first patch boundary at or after ``x``, but not after the last patch; pixels."""
    return min(-(-x // patch) * patch, width - patch)


@dataclass
class Strip:
    """What is drawn on a strip.

    ``num_patches`` is the patch of the last separator (the end of the sequence), ``separators`` are all of
    them; ``starts`` the first patch of each word of a word list. ``spans``: (text or word, first character,
    end, left pixel, right pixel), where they were asked for.
    """

    inks: list[tuple[int, bytes]] = field(default_factory=list)
    colors: list[tuple[int, np.ndarray]] = field(default_factory=list)
    separators: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    spans: list[tuple[int, int, int, int, int]] = field(default_factory=list)
    drawn: int = 0  # pixels of text

    @property
    def num_patches(self) -> int:
        """Content patches: the index of the patch that ends the sequence."""
        return self.separators[-1]


class StripMaker:
    """Lays texts on strips.

    With ``spans``, strips say where their characters are, which costs time.
    """

    def __init__(
        self, settings: RenderSettings, typesetter: Typesetter, spans: bool = False
    ) -> None:
        self.settings, self.typesetter, self.spans = settings, typesetter, spans
        self.patch, self.width = settings.patch_size, settings.width

    def _next(self, x: int) -> int:
        return next_patch(x, self.patch, self.width)

    def _write(self, strip: Strip, text: str, x: int, part: int = 0) -> int:
        """Draws clean text from pixel ``x`` on; returns its width, cut at the strip's end."""
        limit = self.width - x
        if limit <= 0:
            return 0
        columns = None if self.spans else self.typesetter.columns(text, limit)
        if columns is None:
            line = self.typesetter.line(text, limit)
            columns = line.columns()
            strip.colors += [(x + at, color) for at, color in line.colors()]
            if self.spans:
                found = line.spans(self.typesetter.maker)
                strip.spans += [(part, a, b, x + low, x + high) for a, b, low, high in found]
        strip.inks.append((x, columns))
        width = len(columns) // self.patch
        strip.drawn += width
        return width

    def single(self, text: str) -> Strip:
        """A text and the black patch that ends it."""
        strip = Strip()
        end = self._next(MARGIN + self._write(strip, clean(text), MARGIN) + MARGIN)
        strip.separators.append(end // self.patch)
        return strip

    def second_start(self, text: str) -> int:
        """Pixel from which the second text of a pair is drawn."""
        width = self.typesetter.line(clean(text), self.width - MARGIN).width
        return self._next(MARGIN + width + MARGIN) + self.patch + MARGIN

    def pair(self, first: str, second: str) -> Strip:
        """Two texts, each ended by a black patch."""
        strip = Strip()
        middle = self._next(MARGIN + self._write(strip, clean(first), MARGIN) + MARGIN)
        start = middle + self.patch + MARGIN
        end = self._next(start + self._write(strip, clean(second), start, 1) + MARGIN)
        strip.separators += [middle // self.patch, end // self.patch]
        return strip

    def words(self, words: Sequence[str]) -> Strip:
        """Words that start on patches of their own; those for which there is no room are left out."""
        strip = Strip()
        x, last = MARGIN, len(words) - 1
        for i, word in enumerate(words):
            if x >= self.width - self.patch:
                break
            strip.starts.append(x // self.patch)
            text = clean(word) + ("" if i == last else " ")
            x = self._next(x + self._write(strip, text, x, i) + (MARGIN if i == last else 0))
        end = x if strip.starts else self._next(2 * MARGIN)
        if len(strip.starts) < len(words):
            end = self.width - self.patch
        strip.separators.append(end // self.patch)
        return strip

    def blank(self, out: np.ndarray) -> None:
        """Fills [..., C, patch, W] uint8 with paper."""
        if not self.settings.tinted:
            out.fill(self.typesetter.maker.paper)
            return
        for channel, value in enumerate(self.settings.background):
            out[..., channel, :, :] = value

    def draw(self, strip: Strip, out: np.ndarray) -> None:
        """Writes the strip on blank [C, patch, W] uint8."""
        rows, width = self.patch, out.shape[-1]
        for x, columns in strip.inks:
            ink = np.frombuffer(columns, np.uint8).reshape(-1, rows)[: max(width - x, 0)]
            self._ink(out[..., x : x + len(ink)], ink)
        for x, color in strip.colors:
            out[..., x : x + color.shape[-1]] = color[..., : max(width - x, 0)]
        for patch in strip.separators:
            out[..., patch * rows : (patch + 1) * rows] = 0

    def _ink(self, out: np.ndarray, ink: np.ndarray) -> None:
        """Columns [w, rows] on [C, rows, w]."""
        if not self.settings.tinted:
            out[0] = ink.T
            out[1:] = out[0]
            return
        share = np.arange(256)
        for channel, text, paper in zip(out, self.settings.foreground, self.settings.background):
            shade = ((text * (255 - share) + paper * share + 127) // 255).astype(np.uint8)
            channel[...] = shade[ink.T]


def patch_spans(strip: Strip, patches: int, patch: int) -> tuple[np.ndarray, np.ndarray]:
    """Characters of each patch, [L, 2] int64 (first, end), and the text or word they are of, [L] int64.

    A patch without text has (0, 0) and -1; one that two texts or words share belongs to the first.
    """
    offsets = np.zeros((patches, 2), np.int64)
    parts = np.full(patches, -1, np.int64)
    for part, first, end, left, right in strip.spans:
        for at in range(left // patch, min((right - 1) // patch + 1, patches)):
            if parts[at] < 0:
                parts[at] = part
                offsets[at] = first, end
            elif parts[at] == part:
                offsets[at] = min(first, offsets[at, 0]), max(end, offsets[at, 1])
    for at in strip.separators:
        if at < patches:
            offsets[at], parts[at] = 0, -1
    return offsets, parts


def patch_mask(num_patches: Iterable[int], patches: int) -> np.ndarray:
    """[B, L] bool: what is attended, the patches of the text and the one that ends it (spec section 3.2).

    Raises ValueError for a negative number.
    """
    counts = np.fromiter(num_patches, np.int64)
    if (counts < 0).any():
        raise ValueError(f"num_patches must be >= 0, got {counts.min()}")
    return np.arange(patches)[None] < np.minimum(counts + 1, patches)[:, None]
