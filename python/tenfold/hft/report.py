# SPDX-License-Identifier: Apache-2.0
"""Runs as tables and plots: scores by task, forgetting by method, loss curves, a step's time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tenfold.hft.record import TuneRecord
from tenfold.hft.speed import PARTS
from tenfold.report import PALETTE, Card, Page, figure, heat_map, png_bytes

COLUMNS = ("method", "seed", "trained", "OP (log-prob)", "BWT (log-prob)", "OP (accuracy)", "BWT (accuracy)",
           "seconds")  # fmt: skip


def method_of(record: TuneRecord) -> str:
    """A record's method, in words."""
    config = record.config
    if config["method"] != "hft":
        return {"full": "full", "lora": "LoRA", "lisa": "LISA"}[config["method"]]
    name = "half" if config["ratio"] == 0.5 else f"{100 * config['ratio']:g} %"
    if config["strategy"] != "category":
        name += f", {config['strategy']}-level"
    if config["soft_freeze"] is not None:
        name += f", penalty {config['soft_freeze']:g}"
    return name if config["reselect"] == "round" else f"{name}, drawn {config['reselect']}"


def trained_share(record: TuneRecord) -> float:
    """Share of all parameters that had gradients, in the first round."""
    return record.trained_parameters / max(1, record.parameters)


def table_rows(records: Sequence[TuneRecord]) -> list[list[str]]:
    """Rows of continual runs, for ``COLUMNS``."""
    rows = []
    for r in records:
        by = {m: r.summary(m) for m in ("log_prob", "accuracy")}
        rows.append([
            method_of(r), str(r.config["seed"]), f"{100 * trained_share(r):.1f} %",
            f"{by['log_prob']['op']:.3f}", f"{by['log_prob']['bwt']:+.3f}",
            f"{100 * by['accuracy']['op']:.1f}", f"{100 * by['accuracy']['bwt']:+.2f}",
            f"{sum(r.seconds.values()):.1f}",
        ])  # fmt: skip
    return rows


def loss_plot(record: TuneRecord) -> Any:
    """The loss of every step, round after round."""
    made, axes = figure(7.2, 3.0)
    start = 0
    for i, (stage, curve) in enumerate(record.curves.items()):
        at = range(start, start + len(curve))
        name = record.tasks[i] if record.tasks else stage
        axes.plot(at, [m["loss"] for m in curve], lw=1, color=PALETTE[i % len(PALETTE)], label=name)
        start += len(curve)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.legend(frameon=False, fontsize=8)
    return made


def scores_plot(record: TuneRecord, measure: str = "accuracy") -> Any:
    """R[t][i], with the scores before training as the first row."""
    rows = [record.start[measure], *record.scores[measure]]
    flat = [x for row in rows for x in row]
    return heat_map(rows, ["start", *(f"after {t}" for t in record.tasks)], record.tasks,
                    f"{method_of(record)}: {measure}", "", "task", min(flat), max(flat))  # fmt: skip


def methods_plot(records: Sequence[TuneRecord], measure: str = "log_prob") -> Any:
    """OP and BWT per method: a dot per seed, a line at the mean."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(map(method_of, records)))
    made, axes = figure(7.2, 3.2)
    assert isinstance(made, Figure)
    axes.remove()
    for at, (key, title) in enumerate(
        (("op", "overall performance"), ("bwt", "backward transfer")), 1
    ):
        one = made.add_subplot(1, 2, at)
        one.spines[["top", "right"]].set_visible(False)
        for i, name in enumerate(names):
            values = [r.summary(measure)[key] for r in records if method_of(r) == name]
            one.scatter([i] * len(values), values, s=14, color=PALETTE[i % len(PALETTE)])
            one.hlines(sum(values) / len(values), i - 0.3, i + 0.3, color=PALETTE[i % len(PALETTE)])
        one.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
        one.set_title(f"{title} ({measure.replace('_', '-')})", fontsize=10)
    return made


def speed_plot(found: Sequence[dict[str, Any]]) -> Any:
    """A step's time by its parts."""
    made, axes = figure(7.2, 2.6)
    left = [0.0] * len(found)
    names = [r["method"] for r in found]
    for i, part in enumerate(PARTS):
        values = [1e3 * r[part] for r in found]
        axes.barh(names, values, left=left, color=PALETTE[i], label=part)
        left = [a + b for a, b in zip(left, values)]
    axes.invert_yaxis()
    axes.set_xlabel("ms per step (medians of the parts)")
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return made


def add_section(records: Sequence[TuneRecord], page: Page, title: str) -> list[Any]:
    """The runs' part of a page; returns the figures as (name, PNG bytes)."""
    drawn: list[Any] = []

    def plot(made: Any, name: str, caption: str, width: int | None = None) -> None:
        png = png_bytes(made)
        page.image(png, caption, width)
        drawn.append((name, png))

    page.section(title)
    first = records[0]
    cards = [Card(f"{100 * trained_share(first):.1f} %", f"trained by {method_of(first)}")]
    cards += [Card(f"{v:.3f}", f"loss {k}") for k, v in first.losses.items()]
    page.cards(cards)
    scored = [r for r in records if r.scores]
    if scored:
        page.table(COLUMNS, table_rows(scored))
        if len(scored) > 1:
            plot(methods_plot(scored), "methods", "A dot per run; the lines are means.")
        shown = {method_of(r): r for r in reversed(scored)}
        for name, record in shown.items():
            plot(
                scores_plot(record),
                f"scores-{name}",
                f"{name}: rows after each task, columns tasks.",
                520,
            )
    for record in {method_of(r): r for r in reversed(records)}.values():
        plot(loss_plot(record), f"loss-{method_of(record)}", f"Training loss, {method_of(record)}.")
    return drawn


def write_report(records: Sequence[TuneRecord], path: str | Path, subtitle: str = "") -> Path:
    """A page for one or more runs at ``path``; the plots stand beside it as PNG files."""
    path = Path(path)
    page = Page("Half fine-tuning", subtitle)
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, png in add_section(records, page, records[0].kind.upper()):
        safe = "".join(c if c.isalnum() or c == "-" else "-" for c in name.lower())
        (path.parent / f"{safe}.png").write_bytes(png)
    return page.write(path)
