# SPDX-License-Identifier: Apache-2.0
"""Two panels of dots as SVG: share of the ceiling, and ratio to the best other provider, a row per op.

Written by hand instead of by a plotting library, whose bytes change with its version: these files are
committed, and checked like the tables beside them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

COLOURS = {"float32": "#1f6fb4", "bfloat16": "#d1690e", "float16": "#3a9a4b"}
OTHER = "#6b5b95"  # integers, bytes
WIDTH, ROW, TOP, BOTTOM = 900, 22, 58, 34
LEFT, SHARES, GAP, RATIOS = 210, 320, 50, 290  # widths: names, first panel, between, second panel


@dataclass(frozen=True)
class Row:
    """An op: of each case the share of the ceiling, the ratio to the best other provider, the dtype."""

    name: str
    cases: list[tuple[float, float | None, str]]


def _text(
    x: float, y: float, words: str, anchor: str = "start", size: int = 12, fill: str = "#222"
) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{fill}">{words}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1.0) -> str:
    return (f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" '
            f'stroke-width="{width}"/>')  # fmt: skip


def _dot(x: float, y: float, colour: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.6" fill="{colour}" fill-opacity="0.65"/>'


def _ticks(most: float) -> list[float]:
    """0.5, 1, 3, 10, 30, ... up to ``most``."""
    steps = [m * 10.0**e for e in range(4) for m in (1, 3)]
    return [0.5, *(t for t in steps if t <= most)]


def picture(title: str, rows: Sequence[Row]) -> str:
    """The SVG text."""
    ratios = [r for row in rows for _, r, _ in row.cases if r]
    most_share = max(1.1, *(s for row in rows for s, _, _ in row.cases))
    low, high = math.log(min([0.5, *ratios])), math.log(max([2.0, *ratios]))
    height = TOP + ROW * len(rows) + BOTTOM
    base, second = height - BOTTOM + 4, LEFT + SHARES + GAP

    def at_share(share: float) -> float:
        return LEFT + SHARES * share / most_share

    def at_ratio(ratio: float) -> float:
        return second + RATIOS * (math.log(ratio) - low) / (high - low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" role="img">',
        f"<title>{title}: share of the ceiling, and ratio to the best other provider</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        _text(LEFT, 18, "share of the measured ceiling (%)", size=13),
        _text(second, 18, "times as fast as the best other", size=13),
    ]
    used = dict.fromkeys(d for row in rows for _, _, d in row.cases)
    kinds = {d if d in COLOURS else "other": COLOURS.get(d, OTHER) for d in used}
    for i, (kind, colour) in enumerate(kinds.items()):
        parts += [_dot(LEFT + 4 + 90 * i, 35, colour), _text(LEFT + 12 + 90 * i, 39, kind, size=11)]
    for percent in range(0, int(100 * most_share) + 1, 20):
        x = at_share(percent / 100)
        parts += [_line(x, TOP - 8, x, base, "#999" if percent == 100 else "#e4e4e4"),
                  _text(x, base + 14, str(percent), "middle", 11, "#555")]  # fmt: skip
    for tick in _ticks(math.exp(high)):
        x = at_ratio(tick)
        parts += [_line(x, TOP - 8, x, base, "#999" if tick == 1 else "#e4e4e4"),
                  _text(x, base + 14, f"{tick:g}", "middle", 11, "#555")]  # fmt: skip
    for i, row in enumerate(rows):
        y = TOP + ROW * i + 4
        parts.append(_text(LEFT - 10, y + 4, row.name, "end"))
        shares = [s for s, _, _ in row.cases]
        others = [r for _, r, _ in row.cases if r]
        for values, place in ((shares, at_share), (others, at_ratio)):
            if values:
                parts.append(_line(place(min(values)), y, place(max(values)), y, "#b8b8b8", 2))
        for share, ratio, dtype in row.cases:
            colour = COLOURS.get(dtype, OTHER)
            parts.append(_dot(at_share(share), y, colour))
            if ratio:
                parts.append(_dot(at_ratio(ratio), y, colour))
        for values, place in ((shares, at_share), (others, at_ratio)):
            if values:
                x = place(median(values))
                parts.append(_line(x, y - 7, x, y + 7, "#222", 2))
    return "\n".join([*parts, "</svg>", ""])
