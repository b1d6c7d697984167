"""Cells: runs of text as columns of pixels, drawn once and kept.

A strip is as high as a patch, so text is a sequence of columns of ``rows`` bytes, and setting a line is joining
byte strings. A cell is what is joined: a run of one font, on a whole pixel, as wide as its advance (rounded)
and its ink.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from tenfold.pixelgpt.fonts import FontChain
from tenfold.pixelgpt.glyphs import PHASES, GlyphImage, GlyphPainter
from tenfold.pixelgpt.settings import RenderSettings
from tenfold.pixelgpt.shaping import Glyph, Run, Shaper

Span = tuple[int, int, int, int]  # characters [start, end) on the pixels [left, right)


@dataclass(frozen=True)
class Cell:
    """Columns of pixels, ``rows`` bytes each, first column first.

    ``color`` [3, rows, width] uint8 is there if the cell has colours of its own; ``spans`` say which characters
    are where.
    """

    columns: bytes
    width: int
    spans: tuple[Span, ...]
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


def _round(value: int, scale: Fraction) -> int:
    """``value * scale`` to nearest, halves up."""
    return (2 * value * scale.numerator + scale.denominator) // (2 * scale.denominator)


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
        first = chain.fonts[0]
        extents = first.font.get_font_extents("ltr")
        scale = self.em / first.face.upem
        rows = self.rows * first.face.upem / self.em  # of the strip, in units
        self.baseline = _round(1, (rows + extents.ascender + extents.descender) * scale / 2)
        self.space = _round(first.font.get_glyph_h_advance(first.font.get_nominal_glyph(0x20) or 0), scale)
        self._glyphs: Kept = Kept(self._draw_glyph, 1 << 14)
        self._cells: Kept = Kept(self._draw_run, 1 << 14)

    def cells(self, text: str, right_to_left: bool = False) -> list[tuple[int, Cell]]:
        """Cells of a piece from left to right, each with the position of its first character."""
        runs = self.shaper.runs(text)
        if right_to_left:
            runs.reverse()
        return [(r.start, self._cells[text[r.start : r.end], r.font, r.script, right_to_left]) for r in runs]

    def blank(self, characters: int, width: int) -> Cell:
        """A cell of paper."""
        return Cell(bytes([self.paper]) * (width * self.rows), width, ((0, characters, 0, width),))

    def _draw_glyph(self, key: tuple[int, int, int, int]) -> GlyphImage:
        font, index, x, y = key
        return self.painter.draw(self.chain.fonts[font], index, x, y)

    def _draw_run(self, key: tuple[str, int, str, bool]) -> Cell:
        text, font, script, right_to_left = key
        if font < 0:
            return Cell(b"", 0, ())
        glyphs, advance = self.shaper.shape(text, Run(0, len(text), font, script), right_to_left)
        scale = self.em / self.chain.fonts[font].face.upem
        phases = scale * PHASES
        placed: list[tuple[int, int, GlyphImage]] = []  # left column, row under the baseline, pixels
        for glyph in glyphs:
            x, y = _round(glyph.x, phases), _round(glyph.y, phases)
            image = self._glyphs[font, glyph.index, x % PHASES, y % PHASES]
            if image.ink.size:
                placed.append((x // PHASES + image.left, -(y // PHASES) - image.top, image))
        left = min((x for x, _, _ in placed), default=0)
        right = max((x + len(g.ink) for x, _, g in placed), default=0)
        left, right = min(left, 0), max(right, _round(advance, scale), 0)
        top = min((y for _, y, _ in placed), default=0)
        bottom = max((y + g.ink.shape[1] for _, y, g in placed), default=0)
        base = self._fit(top, bottom)
        width = right - left
        spans = tuple(self._spans(text, glyphs, scale, left, width))
        if any(g.color is not None for _, _, g in placed):
            pixels = np.zeros((width, self.rows, 4), np.int32)  # premultiplied
            for x, y, image in placed:
                self._blend(pixels, x - left, y + base, image)
            return self._colored(pixels, width, spans)
        ink = np.zeros((width, self.rows), np.uint16)
        for x, y, image in placed:
            low, high = max(y + base, 0), min(y + base + image.ink.shape[1], self.rows)
            if low < high:  # outlines of one word rarely overlap: their coverages add up
                ink[x - left : x - left + len(image.ink), low:high] += image.ink[:, low - y - base : high - y - base]
        return Cell(self._shades[np.minimum(ink, 255)].tobytes(), width, spans)

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

    def _colored(self, pixels: np.ndarray, width: int, spans: tuple[Span, ...]) -> Cell:
        """A cell of colours on paper: as they are, and as the shades of the mode."""
        paper = np.array(self.settings.background, np.int32)
        shown = pixels[..., :3] + (paper * (255 - pixels[..., 3:]) + 127) // 255
        shown = np.minimum(shown, 255)
        if self.settings.mode == "rgb":
            color = np.ascontiguousarray(shown.astype(np.uint8).transpose(2, 1, 0))
            return Cell(bytes([self.paper]) * (width * self.rows), width, spans, color)
        gray = (shown @ np.array([299, 587, 114]) + 500) // 1000
        if self.settings.mode == "binary":
            gray = np.where(gray > 127, 255, 0)
        return Cell(gray.astype(np.uint8).tobytes(), width, spans)

    def _spans(self, text: str, glyphs: list[Glyph], scale: Fraction, left: int, width: int) -> list[Span]:
        """Characters and pixels of each cluster, left to right."""
        starts = sorted({g.cluster for g in glyphs})
        ends = dict(zip(starts, [*starts[1:], len(text)]))
        extents: dict[int, tuple[int, int]] = {}
        for g in glyphs:
            a, b = extents.get(g.cluster, (g.pen, g.pen))
            extents[g.cluster] = (min(a, g.pen, g.pen + g.advance), max(b, g.pen + g.advance))
        made = []
        up, down = scale.numerator, scale.denominator
        for start, (a, b) in extents.items():
            low = min(max(a * up // down - left, 0), width)
            high = min(max(-(-b * up // down) - left, low), width)
            made.append((start, ends[start], low, high))
        return made


