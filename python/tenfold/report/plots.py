# SPDX-License-Identifier: Apache-2.0
"""Plots for the pages: drawn with matplotlib, without its global state, returned as PNG bytes."""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Sequence
from typing import Any

# Okabe and Ito's colours, distinct for colour-blind readers.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6B6B6B")


def figure(width: float = 6.4, height: float = 3.6) -> tuple[Any, Any]:
    """A new (figure, axes) of so many inches, without pyplot.

    Raises ModuleNotFoundError with the command that installs matplotlib where it is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError(
            "plots need matplotlib; install it with `pip install 'tenfold[report]'`"
        )
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    axes = made.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return made, axes


def png_bytes(made: Any, dpi: int = 150) -> bytes:
    """A figure as a PNG file's bytes."""
    buffer = io.BytesIO()
    made.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def heat_map(
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    row_label: str,
    column_label: str,
    low: float = 0.0,
    high: float = 1.0,
) -> Any:
    """A labelled matrix, every cell with its number; NaN cells stay empty."""
    made, axes = figure(1.6 + 0.62 * len(columns), 1.5 + 0.32 * len(rows))
    axes.imshow(values, cmap="viridis", vmin=low, vmax=high, aspect="auto")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel(column_label)
    axes.set_ylabel(row_label)
    axes.set_title(title, fontsize=10)
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            if value == value:
                dark = value < (low + high) / 2
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8,
                          color="white" if dark else "black")  # fmt: skip
    return made


def shares_strip(
    shares: Sequence[Sequence[float]], length: int, title: str, bar_label: str, row_label: str
) -> Any:
    """Rows of shares in [0, 1] over ``length`` positions, as one picture with a colour bar."""
    made, axes = figure(7.2, 3.4)
    picture = axes.imshow(
        shares, cmap="magma_r", vmin=0, vmax=1, aspect="auto", interpolation="nearest",
        extent=(0, length, len(shares) - 0.5, -0.5),
    )  # fmt: skip
    axes.set_xlabel("position in the prompt (tokens)")
    axes.set_ylabel(row_label)
    axes.set_title(title, fontsize=10)
    made.colorbar(picture, ax=axes, label=bar_label)
    return made


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Running mean over up to ``window`` values before and at each, without those that are missing."""
    made = []
    for i in range(len(values)):
        part = [v for v in values[max(0, i - window + 1) : i + 1] if not math.isnan(v)]
        made.append(math.fsum(part) / len(part) if part else math.nan)
    return made
