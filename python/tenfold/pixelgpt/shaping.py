# SPDX-License-Identifier: Apache-2.0
"""From a piece of text to glyphs in places: clusters, fonts, scripts, HarfBuzz.

A *piece* has no line break and runs in one direction. It is cut into *runs* of one font and one script, and each
run is shaped for itself, in integer units of the em.
"""

from __future__ import annotations

import functools
import unicodedata
import warnings
from typing import Any, NamedTuple

from tenfold.pixelgpt.fonts import FontChain, backend, code_points, ignorable

# Scripts of ideographs and syllables: no character changes its neighbour, so each is a run of its own.
SINGLE = ("Hani", "Hira", "Kana", "Bopo", "Yiii")
COMMON = "Zyyy"


class MissingGlyphWarning(UserWarning):
    """Characters that no font of the renderer has."""


class Run(NamedTuple):
    """``text[start:end]`` of a piece in one font and script. ``font``: position in the chain, -1: not drawn."""

    start: int
    end: int
    font: int
    script: str


class Glyph(NamedTuple):
    """A glyph in its place: ``x`` and ``y`` from the start of the run's baseline, units of the em.

    ``pen`` and ``advance`` say which part of the line belongs to the characters from ``cluster`` on.
    """

    glyph: int
    cluster: int
    x: int
    y: int
    pen: int
    advance: int


@functools.lru_cache(1 << 16)
def script_of(char: str) -> str:
    """ISO 15924 code as HarfBuzz has it; ``Zyyy`` for what many scripts share."""
    buffer = backend()[0].Buffer()
    buffer.add_codepoints([ord(char)])
    buffer.guess_segment_properties()
    return buffer.script or COMMON


def joins(char: str, before: str) -> bool:
    """Does the character belong to the cluster that ends with ``before``?"""
    if before == "\u200d" or unicodedata.category(char) in ("Mn", "Mc", "Me") or ignorable(char):
        return True
    return "\U0001f3fb" <= char <= "\U0001f3ff"  # skin tones


def clusters(text: str) -> list[tuple[int, int]]:
    """Bases with the marks, joiners, selectors and tags that follow them; flags are pairs of letters."""
    made: list[tuple[int, int]] = []
    start, flag = 0, False
    for i in range(1, len(text)):
        letter = "\U0001f1e6" <= text[i] <= "\U0001f1ff"
        second = letter and not flag and "\U0001f1e6" <= text[i - 1] <= "\U0001f1ff"
        if second or joins(text[i], text[i - 1]):
            flag = flag or second
            continue
        made.append((start, i))
        start, flag = i, False
    if text:
        made.append((start, len(text)))
    return made


class Shaper:
    """Cuts pieces into runs and shapes runs, with the fonts of a chain.

    ``on_missing``: see ``RenderSettings``. Characters are warned of once, by ``warn``.
    """

    def __init__(self, chain: FontChain, on_missing: str, features: tuple[str, ...] = ()) -> None:
        self.chain, self.on_missing = chain, on_missing
        self.features = {f.lstrip("-"): not f.startswith("-") for f in features}
        self._told: set[str] = set()
        self._new: dict[str, None] = {}

    def runs(self, text: str) -> list[Run]:
        """Runs in logical order. Raises ValueError for missing glyphs with ``on_missing="error"``."""
        found: list[Run] = []
        missing: list[str] = []
        for start, end in clusters(text):
            cluster = text[start:end]
            font = self.chain.choose(cluster)
            if font is None:
                missing += [c for c in cluster if not ignorable(c)]
                font = -1 if self.on_missing == "skip" else 0
            script = script_of(cluster[0])
            last = found[-1] if found else None
            if last and last.font == font and script not in SINGLE and last.script not in SINGLE:
                shared = COMMON in (script, last.script)
                if shared or script == last.script:
                    kept = last.script if script == COMMON else script
                    found[-1] = Run(last.start, end, font, kept)
                    continue
            found.append(Run(start, end, font, script))
        if missing:
            self._report(missing)
        return found

    def _report(self, missing: list[str]) -> None:
        if self.on_missing == "error":
            raise ValueError(
                f"no font has {code_points(dict.fromkeys(missing))}; fonts: {self._names()}"
            )
        if self.on_missing == "warn":
            self._new.update(dict.fromkeys(c for c in missing if c not in self._told))

    def warn(self) -> None:
        """Warns of the missing characters met since the last warning."""
        new, self._new = list(self._new), {}
        if new:
            self._told.update(new)
            warnings.warn(
                f"no font has {code_points(new)}; a box is drawn instead (fonts: {self._names()}; "
                "on_missing= sets another rule)",
                MissingGlyphWarning,
                stacklevel=4,
            )

    def _names(self) -> str:
        names = [f.path.name for f in self.chain.fonts]
        return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")

    def shape(self, text: str, run: Run, right_to_left: bool) -> tuple[list[Glyph], int]:
        """Glyphs of a run from left to right, and its advance; clusters count from the run's start."""
        hb: Any = backend()[0]
        buffer = hb.Buffer()
        buffer.add_codepoints([ord(c) for c in text[run.start : run.end]])
        buffer.direction = "rtl" if right_to_left else "ltr"
        buffer.script = run.script
        buffer.language = "und"  # else HarfBuzz asks the locale
        hb.shape(self.chain.fonts[run.font].font, buffer, self.features)
        made, pen = [], 0
        for info, place in zip(buffer.glyph_infos, buffer.glyph_positions):
            x, y, advance, _ = place.position
            made.append(Glyph(info.codepoint, info.cluster, pen + x, y, pen, advance))
            pen += advance
        return made, pen
