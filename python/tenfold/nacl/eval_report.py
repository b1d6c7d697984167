# SPDX-License-Identifier: Apache-2.0
"""Tables, plots and the page of an evaluation."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tenfold.nacl.eval import Cell, summary
from tenfold.report import Card, Page, figure, heat_map, png_bytes
from tenfold.report.plots import PALETTE

COLUMNS = ("task", "length", "budget", "method", "correct", "± seeds", "log p", "perplexity",
           "evict ms", "cache MB")  # fmt: skip
NAMES = {"needle": "One fact in a long text", "perplexity": "Perplexity of the continuation"}


def task_name(task: str) -> str:
    """A heading for a task."""
    if task.startswith("multikey"):
        return f"{task.removeprefix('multikey')} facts in a long text, one asked for"
    return NAMES.get(task, task)


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def table_rows(rows: Iterable[dict[str, Any]]) -> list[list[str]]:
    """The rows of ``summary`` as text, for ``COLUMNS``."""
    return [
        [r["task"], str(r["length"]), f"{100 * r['budget']:g} %", r["method"], _share(r["accuracy"]),
         _share(r["accuracy_spread"]) if r["seeds"] > 1 else "–", f"{r['log_prob']:.3f}",
         _share(r["perplexity"]), f"{r['evict_ms']:.0f}", f"{r['cache_mb']:.1f}"]
        for r in rows
    ]  # fmt: skip


def depth_map(cells: list[Cell], task: str, method: str, budget: float) -> Any | None:
    """Share of right answers by prompt length and depth of the fact; None without cells."""
    mine = [c for c in cells if (c.task, c.method, c.budget) == (task, method, budget)]
    if not mine:
        return None
    lengths, depths = sorted({c.length for c in mine}), sorted({c.depth for c in mine})

    def mean(length: int, depth: float) -> float:
        hits = [c.correct for c in mine if (c.length, c.depth) == (length, depth)]
        return sum(hits) / len(hits) if hits else float("nan")

    return heat_map(
        [[mean(n, d) for d in depths] for n in lengths], [str(n) for n in lengths],
        [f"{d:.2f}" for d in depths], f"{method}, {100 * budget:g} % of the cache kept",
        "prompt tokens", "depth of the fact (0: start)",
    )  # fmt: skip


def budget_plot(rows: list[dict[str, Any]], task: str) -> Any | None:
    """Score by budget, a line per method, averaged over lengths; None with a single budget."""
    mine = [r for r in rows if r["task"] == task]
    budgets = sorted({r["budget"] for r in mine if r["method"] != "full"})
    if len(budgets) < 2:
        return None
    value = "perplexity" if task == "perplexity" else "accuracy"
    made, axes = figure(6.4, 3.6)
    methods = [m for m in dict.fromkeys(r["method"] for r in mine) if m != "full"]
    for i, method in enumerate(sorted(methods, key=lambda m: (m != "nacl", m))):
        points = []
        for budget in budgets:
            found = [r[value] for r in mine if (r["method"], r["budget"]) == (method, budget)]
            points.append(sum(found) / len(found) if found else float("nan"))
        axes.plot([100 * b for b in budgets], points, marker="o", label=method,
                  color=PALETTE[i % len(PALETTE)])  # fmt: skip
    full = [r[value] for r in mine if r["method"] == "full"]
    if full:
        axes.axhline(sum(full) / len(full), color="black", lw=1, ls=":", label="full cache")
    axes.set_xlabel("share of the cache kept (%)")
    axes.set_ylabel("perplexity" if value == "perplexity" else "share of right answers")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return made


def write_page(cells: list[Cell], path: Path, title: str, setting: str) -> list[Path]:
    """The page ``path`` and, beside it, every plot as a PNG; returns the files written."""
    rows = summary(cells)
    page, files = Page(title, setting), []
    folder = path.parent
    folder.mkdir(parents=True, exist_ok=True)

    def plot(made: Any | None, name: str, caption: str) -> None:
        if made is not None:
            png = png_bytes(made)
            page.image(png, caption)
            (folder / f"{name}.png").write_bytes(png)
            files.append(folder / f"{name}.png")

    for task in dict.fromkeys(c.task for c in cells):
        page.section(task_name(task))
        mine = [r for r in rows if r["task"] == task]
        scored = task != "perplexity"
        ours = [r for r in mine if r["method"] == "nacl"]
        page.cards(
            Card(
                _share(r["accuracy"]) if scored else f"{r['perplexity']:.2f}",
                f"NACL, {100 * r['budget']:g} % kept, {r['length']} tokens",
                f"{r['cases']} cases",
            )
            for r in ours[:8]
        )
        plot(budget_plot(rows, task), f"{task}-budgets", "Mean over prompt lengths and seeds.")
        page.table(COLUMNS[1:], [row[1:] for row in table_rows(mine)],
                   [i for i, r in enumerate(mine) if r["method"] == "nacl"])  # fmt: skip
        if not scored:
            continue
        for method, budget in dict.fromkeys((c.method, c.budget) for c in cells if c.task == task):
            made = depth_map(cells, task, method, budget)
            plot(made, f"{task}-{method}-{100 * budget:g}".replace("@", "-"),
                 f"{task_name(task)}: share of right answers.")  # fmt: skip
    files.append(page.write(path))
    return files
