# SPDX-License-Identifier: Apache-2.0
"""Cells: runs of text as columns of pixels, drawn once and kept.

A strip is as high as a patch, so text is a sequence of columns of ``rows`` bytes, and setting a line is joining
byte strings. A cell is what is joined: a run of one font, on a whole pixel, as wide as its advance (rounded)
and its ink.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tenfold.pixelgpt.fonts import FontChain
from tenfold.pixelgpt.glyphs import PHASES, GlyphImage, GlyphPainter
from tenfold.pixelgpt.settings import RenderSettings
from tenfold.pixelgpt.shaping import Run, Shaper

Span = tuple[int, int, int, int]  # characters [start, end) on the pixels [left, right)
Key = tuple[str, int, str, bool]


@dataclass(frozen=True)
class Cell:
    """Columns of pixels, ``rows`` bytes each, first column first.

    ``key`` says what is drawn: text, font, script, right to left; or, for spaces, their number. The pen starts ``left``
    pixels from the first column. ``color`` [3, rows, width] uint8 is there if the cell has colours of its own.
    """

    columns: bytes
    width: int
    key: Key | int
    left: int = 0
    color: np.ndarray | None = None


class Kept(dict):
    """A dict that makes what it lacks, and forgets all when it holds too much.

    Threads may share it: what it holds is a function of the key, so at worst something is made twice.
    """

    def __init__(self, make: Callable[[Any], Any], most: int) -> None:
        super().__init__()
        self._make, self._most = make, most

    def __missing__(self, key: Any) -> Any:
        made = self._make(key)
        if len(self) >= self._most:
            self.clear()
        self[key] = made
        return made


def _round(value: int, up: int, down: int) -> int:
    """``value * up / down`` to nearest, halves up."""
    return (2 * value * up + down) // (2 * down)


class CellMaker:
    """Draws cells.

    ``baseline`` is the row under which descenders hang: ascender and descender of the first font are centred. A cell
    whose ink would be cut at the top or bottom is moved by the fewest pixels that avoid it; one that is
    higher than the strip is centred.
    """

    def __init__(self, settings: RenderSettings, chain: FontChain) -> None:
        self.settings, self.chain = settings, chain
        self.rows, self.em = settings.patch_size, settings.em
        self.shaper = Shaper(chain, settings.on_missing, settings.features)
        self.painter = GlyphPainter(self.em)
        self._shades = np.frombuffer(settings.shades(), np.uint8)
        self.paper = int(self._shades[0])
        self._scales: Kept = Kept(self._scale, len(chain.fonts) + 1)
        first, (up, down) = chain.fonts[0], self._scales[0]
        extents = first.font.get_font_extents("ltr")
        self.baseline = (self.rows * down + (extents.ascender + extents.descender) * up + down) // (
            2 * down
        )
        self.space = _round(
            first.font.get_glyph_h_advance(first.font.get_nominal_glyph(0x20) or 0), up, down
        )
        self._glyphs: Kept = Kept(self._draw_glyph, 1 << 14)
        self._cells: Kept = Kept(self._draw_run, 1 << 14)

    def _scale(self, font: int) -> tuple[int, int]:
        """Pixels per unit of a font, as a ratio of integers."""
        scale = self.em / self.chain.fonts[font].face.upem
        return scale.numerator, scale.denominator

    def cells(self, text: str, right_to_left: bool = False) -> list[tuple[int, Cell]]:
        """Cells of a piece from left to right, each with the position of its first character."""
        runs = self.shaper.runs(text)
        if right_to_left:
            runs.reverse()
        return [
            (r.start, self._cells[text[r.start : r.end], r.font, r.script, right_to_left])
            for r in runs
        ]

    def blank(self, characters: int, width: int) -> Cell:
        """A cell of paper."""
        return Cell(bytes([self.paper]) * (width * self.rows), width, characters)

    def _draw_glyph(self, key: tuple[int, int, int, int]) -> GlyphImage:
        font, index, x, y = key
        return self.painter.draw(self.chain.fonts[font], index, x, y)

    def _draw_run(self, key: Key) -> Cell:
        text, font, script, right_to_left = key
        if font < 0:
            return Cell(b"", 0, key)
        glyphs, advance = self.shaper.shape(text, Run(0, len(text), font, script), right_to_left)
        up, down = self._scales[font]
        placed: list[
            tuple[int, int, GlyphImage]
        ] = []  # left column, row under the baseline, pixels
        left, right = 0, max(_round(advance, up, down), 0)
        top, bottom = self.rows, -self.rows
        for glyph in glyphs:
            x, y = _round(glyph.x, PHASES * up, down), _round(glyph.y, PHASES * up, down)
            image = self._glyphs[font, glyph.glyph, x % PHASES, y % PHASES]
            if image.ink.size:
                x, y = x // PHASES + image.left, -(y // PHASES) - image.top
                placed.append((x, y, image))
                w, h = image.ink.shape
                left, right, top, bottom = (
                    min(left, x),
                    max(right, x + w),
                    min(top, y),
                    max(bottom, y + h),
                )
        base = self._fit(top, bottom)
        width = right - left
        if any(g.color is not None for _, _, g in placed):
            pixels = np.zeros((width, self.rows, 4), np.int32)  # premultiplied
            for x, y, image in placed:
                self._blend(pixels, x - left, y + base, image)
            return self._colored(pixels, Cell(b"", width, key, -left))
        ink = np.zeros((width, self.rows), np.uint16)
        for x, y, image in placed:
            y += base
            low, high = max(y, 0), min(y + image.ink.shape[1], self.rows)
            if low < high:  # outlines of one word rarely overlap: their coverages add up
                ink[x - left : x - left + len(image.ink), low:high] += image.ink[
                    :, low - y : high - y
                ]
        return Cell(self._shades[np.minimum(ink, 255)].tobytes(), width, key, -left)

    def _fit(self, top: int, bottom: int) -> int:
        """Row of the baseline for ink between two rows relative to it."""
        if bottom - top > self.rows:
            return (self.rows - bottom - top) // 2
        return min(max(self.baseline, -top), self.rows - bottom)

    def _blend(self, pixels: np.ndarray, x: int, y: int, image: GlyphImage) -> None:
        """Lays a glyph over what is there; ink without colours has that of the text."""
        w, h = image.ink.shape
        low, high = max(y, 0), min(y + h, self.rows)
        if low >= high:
            return
        over = image.color
        if over is None:
            text = np.array([*self.settings.foreground, 255], np.int32)
            over = (image.ink.astype(np.int32)[..., None] * text + 127) // 255
        over = over[:, low - y : high - y]
        under = pixels[x : x + w, low:high]
        under[...] = over + (under * (255 - over[..., 3:]) + 127) // 255

    def _colored(self, pixels: np.ndarray, cell: Cell) -> Cell:
        """The cell with colours on paper: as they are, or as the shades of the mode."""
        paper = np.array(self.settings.background, np.int32)
        shown = pixels[..., :3] + (paper * (255 - pixels[..., 3:]) + 127) // 255
        shown = np.minimum(shown, 255)
        if self.settings.mode == "rgb":
            color = np.ascontiguousarray(shown.astype(np.uint8).transpose(2, 1, 0))
            return replace(
                cell, columns=bytes([self.paper]) * (cell.width * self.rows), color=color
            )
        gray = (shown @ np.array([299, 587, 114]) + 500) // 1000
        if self.settings.mode == "binary":
            gray = np.where(gray > 127, 255, 0)
        return replace(cell, columns=gray.astype(np.uint8).tobytes())

    def spans(self, cell: Cell) -> list[Span]:
        """Characters and pixels of each cluster of a cell, left to right."""
        if isinstance(cell.key, int):
            return [(0, cell.key, 0, cell.width)]
        text, font, script, right_to_left = cell.key
        if font < 0:
            return []
        glyphs, _ = self.shaper.shape(text, Run(0, len(text), font, script), right_to_left)
        up, down = self._scales[font]
        starts = sorted({g.cluster for g in glyphs})
        ends = dict(zip(starts, [*starts[1:], len(text)]))
        extents: dict[int, tuple[int, int]] = {}
        for g in glyphs:
            a, b = extents.get(g.cluster, (g.pen, g.pen))
            extents[g.cluster] = (min(a, g.pen, g.pen + g.advance), max(b, g.pen + g.advance))
        made = []
        for start, (a, b) in extents.items():
            low = min(max(a * up // down + cell.left, 0), cell.width)
            high = min(max(-(-b * up // down) + cell.left, low), cell.width)
            made.append((start, ends[start], low, high))
        return made
