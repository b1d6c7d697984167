# SPDX-License-Identifier: Apache-2.0
"""Evaluations and training runs on a page: accuracy by tool, calibration, calls, ends, traces, learning curves.

Evaluations are those of ``Evaluation.to_json()``, by the name of the judge, so that stored ones can be drawn again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tenfold.report import PALETTE, Card, Page, figure, png_bytes

Found = Mapping[str, Any]  # of Evaluation.to_json()
Evaluations = Mapping[str, Found]
Drawn = list[tuple[str, bytes]]
CALL_COLUMNS = ("judge", "tool", "calls", "answered", "bad arguments", "failed", "mean seconds")
LOSSES = ("tool", "observation", "rationale", "answer", "eos")


def sources(found: Evaluations) -> list[str]:
    """Of all evaluations, in alphabetical order, without ``"all"``."""
    return sorted({s for e in found.values() for s in e["accuracy"]} - {"all"})


def accuracy_columns(found: Evaluations) -> list[str]:
    """Of the table of accuracies."""
    return ["tool", "pairs", *found]


def accuracy_rows(found: Evaluations) -> list[list[str]]:
    """Per cent of the pairs ranked right, tools by judges; the last row is the average over all pairs."""
    rows = []
    for source in [*sources(found), "all"]:
        parts = [e["accuracy"].get(source) for e in found.values()]
        count = next((p["count"] for p in parts if p), 0)
        name = "all (micro average)" if source == "all" else source
        rows.append(
            [name, str(count), *("–" if p is None else f"{100 * p['value']:.1f}" for p in parts)]
        )
    return rows


def call_rows(found: Evaluations) -> list[list[str]]:
    """Rows for ``CALL_COLUMNS``; shares in per cent."""
    rows = []
    for name, e in found.items():
        for tool, c in e["calls"].items():
            status, count = c["status"], c["count"]
            bad = status.get("bad_args", 0) + status.get("unknown_tool", 0)
            ok = status.get("ok", 0)
            shares = [f"{100 * n / count:.1f} %" for n in (ok, bad, count - ok - bad)]
            rows.append([name, tool, str(count), *shares, f"{c['seconds']:.4f}"])
    return rows


def accuracy_plot(found: Evaluations) -> Any:
    """A group of bars per tool, with the intervals of the accuracies."""
    made, axes = figure(7.2, 3.3)
    names = [*sources(found), "all"]
    width = 0.8 / len(found)
    for i, (judge, e) in enumerate(found.items()):
        parts = [e["accuracy"].get(n) for n in names]
        at = [x + (i - (len(found) - 1) / 2) * width for x in range(len(names))]
        values = [100 * p["value"] if p else 0.0 for p in parts]
        errors = [[100 * (p["value"] - p["low"]) if p else 0.0 for p in parts],
                  [100 * (p["high"] - p["value"]) if p else 0.0 for p in parts]]  # fmt: skip
        axes.bar(at, values, width, color=PALETTE[i % len(PALETTE)], label=judge, yerr=errors,
                 error_kw={"lw": 0.8})  # fmt: skip
    axes.axhline(50, color="#888", lw=0.8, ls=":")
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.set_ylabel("% of pairs ranked right")
    axes.set_ylim(0, 119)
    axes.set_yticks(range(0, 101, 25))
    axes.legend(frameon=False, fontsize=8, ncols=4, loc="upper center")
    return made


def calibration_plot(found: Evaluations) -> Any:
    """Accuracy of the pairs of a bin over their mean confidence; a dot's area is the share of pairs in it."""
    made, axes = figure(4.6, 4.2)
    axes.plot([0.5, 1], [0.5, 1], color="#888", lw=0.8, ls=":")
    for i, (judge, e) in enumerate(found.items()):
        c = e["calibration"]
        if c is None:
            continue
        color = PALETTE[i % len(PALETTE)]
        x, y = [b["confidence"] for b in c["bins"]], [b["accuracy"] for b in c["bins"]]
        axes.plot(x, y, lw=1, color=color, label=f"{judge} (ECE {c['ece']:.3f})")
        axes.scatter(
            x, y, s=[6 + 180 * b["count"] / c["count"] for b in c["bins"]], color=color, alpha=0.7
        )
    axes.set_xlabel("confidence, sigmoid of the difference of rewards")
    axes.set_ylabel("share ranked right")
    axes.set_xlim(0.48, 1.02)
    axes.set_ylim(-0.03, 1.03)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    return made


def finish_plot(found: Evaluations) -> Any:
    """Why traces ended, a bar per judge."""
    made, axes = figure(7.2, 0.9 + 0.42 * len(found))
    left = [0.0] * len(found)
    reasons = list(dict.fromkeys(r for e in found.values() for r in e["finish"]))
    for i, reason in enumerate(reasons):
        shares = [
            100 * e["finish"].get(reason, 0) / sum(e["finish"].values()) for e in found.values()
        ]
        axes.barh(list(found), shares, left=left, color=PALETTE[i % len(PALETTE)], label=reason)
        left = [a + b for a, b in zip(left, shares)]
    axes.invert_yaxis()
    axes.set_xlabel("% of traces")
    axes.legend(frameon=False, fontsize=8, ncols=6, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return made


def training_plot(records: Mapping[str, Any]) -> Any:
    """Ranking loss and loss per token of every step (smoothed), a colour per run; accuracy on held-out pairs."""
    made, axes = figure(7.2, 3.3)
    other = axes.twinx()
    for i, (name, record) in enumerate(records.items()):
        color = PALETTE[i % len(PALETTE)]
        for key, style in (("loss/rm", "-"), ("loss/lm", ":")):
            values = [m.get(key, math.nan) for m in record.curve]
            if any(v > 0 for v in values):
                axes.plot(range(1, len(values) + 1), _smooth(values), style, lw=1.2, color=color,
                          label=f"{name}, {'ranking' if key == 'loss/rm' else 'tokens'}")  # fmt: skip
        if record.validation:
            other.plot([v["step"] for v in record.validation], [100 * v["accuracy"] for v in record.validation],
                       "o", ms=4, color=color)  # fmt: skip
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats)")
    axes.set_ylim(bottom=0)
    other.set_ylabel("% right, given traces (dots)", fontsize=9)
    other.set_ylim(0, 104)
    axes.legend(frameon=False, fontsize=8)
    return made


def classes_plot(record: Any) -> Any:
    """Loss of every class of tokens over the steps of one run."""
    made, axes = figure(7.2, 3.0)
    for i, name in enumerate(LOSSES):
        values = [m.get(f"loss/{name}", math.nan) for m in record.curve]
        if not all(map(math.isnan, values)):
            axes.plot(
                range(1, len(values) + 1),
                _smooth(values),
                lw=1.2,
                color=PALETTE[i % len(PALETTE)],
                label=name,
            )
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    return made


def _smooth(values: Sequence[float]) -> list[float]:
    from tenfold.report.plots import smoothed

    return smoothed(values, max(1, len(values) // 40))


def add_evaluations(
    page: Page,
    found: Evaluations,
    title: str = "Evaluation",
    samples: int = 6,
    inside: bool = False,
) -> Drawn:
    """The evaluations' part of a page, or of a section (``inside``); returns the figures as (name, PNG bytes)."""
    drawn: Drawn = []

    def plot(made: Any, name: str, caption: str, width: int | None = None) -> None:
        png = png_bytes(made)
        page.image(png, caption, width)
        drawn.append((name, png))

    (page.heading if inside else page.section)(title)
    page.cards([
        Card(f"{100 * e['accuracy']['all']['value']:.1f} %", name,
             f"{e['accuracy']['all']['low'] * 100:.1f} to {e['accuracy']['all']['high'] * 100:.1f} %")
        for name, e in found.items()
    ])  # fmt: skip
    page.table(accuracy_columns(found), accuracy_rows(found), [len(sources(found))])
    ties = {
        n: (e["accuracy"]["all"]["ties"], e["accuracy"]["all"]["missing"]) for n, e in found.items()
    }
    odd = "; ".join(f"{n}: {t} ties, {m} missing" for n, (t, m) in ties.items() if t or m)
    page.text("Per cent of pairs whose preferred answer has the higher reward. A tie or a missing reward is wrong"
              + (f" ({odd})." if odd else "; there were none."), soft=True)  # fmt: skip
    plot(accuracy_plot(found), "accuracy", "Accuracy by tool; bars show 95 % intervals.")
    if any(e["calibration"] for e in found.values()):
        plot(calibration_plot(found), "calibration",
             "Calibration: how often the preferred answer is the preferred one, by how sure the rewards are.",
             460)  # fmt: skip
    rows = call_rows(found)
    if rows:
        page.heading("Tool calls")
        page.table(CALL_COLUMNS, rows)
        for name, e in found.items():
            if e["calls"]:
                page.text(
                    f"{name}: {e['calls_per_trace']:.2f} calls per trace, the data's own traces have "
                    f"{e['expected_calls_per_trace']:.2f}; {100 * e['call_agreement']:.1f} % of the traces call the "
                    "same tools.", soft=True)  # fmt: skip
        plot(finish_plot(found), "finish", "Why traces ended.")
    _add_samples(page, found, samples)
    return drawn


def _add_samples(page: Page, found: Evaluations, most: int) -> None:
    judge = next((n for n, e in found.items() if e["calls"]), None)
    if judge is None or not most:
        return
    page.heading(f"Traces of {judge}")
    for s in found[judge]["samples"][:most]:
        reward = "–" if s["reward"] is None else f"{s['reward']:.2f}"
        side = "preferred" if s["preferred"] else "rejected"
        page.text(f"{s['source']}, {side} answer: reward {reward}, {s['finish']}", soft=True)
        page.preformatted(s["text"])


def add_training(
    page: Page, records: Mapping[str, Any], title: str = "Training", inside: bool = False
) -> Drawn:
    """The runs' part of a page, or of a section (``inside``), by name (``ThemisRecord``); returns the figures."""
    drawn: Drawn = []
    (page.heading if inside else page.section)(title)
    rows = []
    for name, r in records.items():
        after = r.after or {}
        held = [f"{100 * part['accuracy']:.1f} %" if part else "–" for part in (r.before, r.after)]
        rows.append([name, str(r.config["seed"]), str(len(r.curve)), str(r.pairs or "–"), *held,
                     f"{after['loss/rm']:.3f}" if after else "–", f"{r.seconds:.0f}"])  # fmt: skip
    page.table(
        ("run", "seed", "steps", "pairs", "accuracy before", "after", "ranking loss", "seconds"),
        rows,
    )
    page.text("Accuracies on held-out pairs whose traces are given, not written.", soft=True)
    drawn.append(("training", png_bytes(training_plot(records))))
    page.image(
        drawn[-1][1], "Training: ranking loss, loss per token of the traces, and held-out accuracy."
    )
    for name, record in records.items():
        if any(f"loss/{c}" in m for m in record.curve for c in LOSSES):
            drawn.append((f"classes-{len(drawn)}", png_bytes(classes_plot(record))))
            page.image(drawn[-1][1], f"{name}: loss by class of tokens.")
    return drawn


def write_page(
    path: str | Path, subtitle: str = "", found: Evaluations | None = None, records: Mapping[str, Any] | None = None
) -> Path:  # fmt: skip
    """A page of evaluations and runs; the plots stand beside it as PNG files."""
    path = Path(path)
    page = Page("Tool-augmented reward modelling", subtitle)
    drawn: Drawn = []
    if records:
        drawn += add_training(page, records)
    if found:
        drawn += add_evaluations(page, found)
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, png in drawn:
        (path.parent / f"{name}.png").write_bytes(png)
    return page.write(path)
