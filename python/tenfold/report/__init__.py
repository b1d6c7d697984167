# SPDX-License-Identifier: Apache-2.0
"""Self-contained HTML pages: text, tables, numbers and plots in one file without external assets."""

from tenfold.report.headline import Headline, Speedup, TextTable, speedup
from tenfold.report.page import Card, Page
from tenfold.report.plots import PALETTE, figure, heat_map, png_bytes, shares_strip

__all__ = [
    "PALETTE", "Card", "Headline", "Page", "Speedup", "TextTable", "figure", "heat_map", "png_bytes", "shares_strip",
    "speedup",
]  # fmt: skip
