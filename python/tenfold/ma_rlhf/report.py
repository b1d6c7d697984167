# SPDX-License-Identifier: Apache-2.0
"""Runs of MA-PPO as pages: learning curves, lengths of macro actions, samples, a step's time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tenfold.ma_rlhf.metrics import bin_names
from tenfold.ma_rlhf.record import PPORecord
from tenfold.report import PALETTE, Card, Page, figure, png_bytes
from tenfold.report.plots import smoothed

CURVES = (
    ("objective/scores", "score"),
    ("objective/kl", "KL to the reference (nats per response)"),
    ("response/length_mean", "tokens per response"),
    ("critic/explained_variance", "explained variance of the returns"),
    ("policy/entropy_avg", "entropy (nats per token)"),
    ("policy/clipfrac_avg", "share of clipped ratios"),
    ("macro/adv_norm", "advantage (root mean square)"),
    ("loss/value_avg", "value loss"),
)
COLUMNS = ("run", "seed", "score", "KL", "tokens", "macro actions", "seconds per step")


def run_name(record: PPORecord) -> str:
    """A run in words: its macro actions, and what is unusual about its advantages."""
    config = record.config
    if config["advantage"] != "gae":
        return config["advantage"].upper()
    kind, n = config["termination"], config["n"]
    fixed = "PPO (n = 1)" if n == 1 else f"MA-PPO, n = {'∞' if n is None else n}"
    name = fixed if kind == "fixed" else f"MA-PPO, {kind}"
    return name if config["lam"] == 0.95 else f"{name}, λ = {config['lam']:g}"


def curve_plot(
    records: Sequence[PPORecord], metric: str, label: str, window: int | None = None
) -> Any:
    """A metric over steps: a colour per kind of run, a line for its seeds' mean and a band for their range.

    ``window``: steps of the running mean, default a fortieth of the run.
    """
    made, axes = figure(7.2, 3.0)
    names = list(dict.fromkeys(map(run_name, records)))
    for i, name in enumerate(names):
        runs = [r.series(metric) for r in records if run_name(r) == name]
        wide = max(1, max(map(len, runs)) // 40) if window is None else window
        shortest = min(map(len, runs))
        at = range(1, shortest + 1)
        columns = list(zip(*(smoothed(r, wide)[:shortest] for r in runs)))
        color = PALETTE[i % len(PALETTE)]
        if len(runs) > 1:
            lows, highs = [min(c) for c in columns], [max(c) for c in columns]
            axes.fill_between(at, lows, highs, color=color, alpha=0.18, lw=0)
            name = f"{name}, {len(runs)} seeds"
        axes.plot(at, [math.fsum(c) / len(c) for c in columns], lw=1.8, color=color, label=name)
    axes.set_xlabel("step")
    axes.set_ylabel(label, fontsize=9)
    axes.legend(frameon=False, fontsize=8)
    return made


def lengths_plot(records: Sequence[PPORecord]) -> Any:
    """Shares of macro actions by their length, over all steps, a group of bars per run."""
    made, axes = figure(7.2, 3.0)
    names = bin_names()
    labels = [n.removeprefix("macro/length_").replace("_up", "+").replace("_", "–") for n in names]
    width = 0.8 / len(records)
    for i, record in enumerate(records):
        shares = [100 * record.last(n, len(record.curve)) for n in names]
        at = [j + (i - (len(records) - 1) / 2) * width for j in range(len(names))]
        axes.bar(at, shares, width, color=PALETTE[i % len(PALETTE)], label=run_name(record))
    axes.set_xticks(range(len(names)), labels)
    axes.set_xlabel("tokens per macro action")
    axes.set_ylabel("% of macro actions")
    axes.legend(frameon=False, fontsize=8)
    return made


def time_plot(records: Sequence[PPORecord]) -> Any:
    """Where a step's time goes."""
    made, axes = figure(7.2, 0.9 + 0.5 * len(records))
    names = [run_name(r) for r in records]
    left = [0.0] * len(records)
    parts = list(dict.fromkeys(p for r in records for p in r.time_shares()))
    for i, part in enumerate(parts):
        values = [r.time_shares().get(part, 0.0) for r in records]
        axes.barh(range(len(names)), values, left=left, color=PALETTE[i % len(PALETTE)], label=part)
        left = [a + b for a, b in zip(left, values)]
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("seconds per step (means)")
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return made


def table_rows(records: Sequence[PPORecord]) -> list[list[str]]:
    """Rows for ``COLUMNS``: means of the last ten steps."""
    rows = []
    for r in records:
        rows.append([
            run_name(r), str(r.config["seed"]), f"{r.last('objective/scores'):.3f}",
            f"{r.last('objective/kl'):.2f}", f"{r.last('response/length_mean'):.1f}",
            f"{r.last('macro/per_response'):.1f}", f"{sum(r.time_shares().values()):.2f}",
        ])  # fmt: skip
    return rows


def add_samples(page: Page, record: PPORecord, count: int = 4) -> None:
    """Samples of the first and the last step that has any: macro actions are shaded in turn."""
    kept = [s for s in record.samples if not s["dropped"]]
    for step in dict.fromkeys((kept[0]["step"], kept[-1]["step"]) if kept else ()):
        page.heading(f"{run_name(record)}: samples of step {step}")
        for s in [s for s in kept if s["step"] == step][:count]:
            score = "–" if s["score"] is None else f"{s['score']:.3f}"
            end = ", cut off" if s["truncated"] else ""
            page.text(
                f"score {score}, KL {s['kl']:.2f} nats, {len(s['segments'])} macro actions{end}",
                soft=True,
            )
            page.tokens(
                [
                    (s["prompt"], 0.0),
                    *((t, 0.4 if i % 2 else 0.1) for i, t in enumerate(s["segments"])),
                ]
            )


def add_section(records: Sequence[PPORecord], page: Page, title: str) -> list[Any]:
    """The runs' part of a page; returns the figures as (name, PNG bytes)."""
    drawn: list[Any] = []

    def plot(made: Any, name: str, caption: str) -> None:
        png = png_bytes(made)
        page.image(png, caption)
        drawn.append((name, png))

    page.section(title)
    first = records[0]
    page.cards([
        Card(f"{first.last('objective/scores'):.3f}", "score", f"{run_name(first)}, last 10 steps"),
        Card(f"{first.last('objective/kl'):.2f}", "KL, nats per response"),
        Card(f"{first.last('macro/length_mean'):.2f}", "tokens per macro action"),
        Card(f"{first.trained_parameters:,}", "parameters that train", f"of {first.parameters:,}"),
    ])  # fmt: skip
    page.table(COLUMNS, table_rows(records))
    for metric, label in CURVES:
        if any(not math.isnan(r.last(metric)) for r in records):
            plot(curve_plot(records, metric, label), metric.replace("/", "-"), f"{label}, by step.")
    one = list({run_name(r): r for r in reversed(records)}.values())[::-1]
    if any(not math.isnan(r.last("macro/length_mean")) for r in one):
        plot(lengths_plot(one), "macro-lengths", "How long macro actions are.")
    if any(r.seconds for r in one):
        plot(time_plot([r for r in one if r.seconds]), "time", "A step's time by its parts.")
    for record in one:
        add_samples(page, record)
    return drawn


def write_report(records: Sequence[PPORecord], path: str | Path, subtitle: str = "") -> Path:
    """A page for one or more runs at ``path``; the plots stand beside it as PNG files."""
    path = Path(path)
    page = Page("PPO with macro actions", subtitle)
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, png in add_section(records, page, "MA-RLHF"):
        (path.parent / f"{name}.png").write_bytes(png)
    return page.write(path)
