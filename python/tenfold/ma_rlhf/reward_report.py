# SPDX-License-Identifier: Apache-2.0
"""Reward models on a page: learning curves, held-out accuracy, best-of-n."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tenfold.report import PALETTE, Card, Page, figure, png_bytes
from tenfold.rlhf.best_of import SIZES, BestOfN, best_of_n_kl
from tenfold.rlhf.reward_training import RewardRecord

COLUMNS = ("loss", "seed", "steps", "pairs", "accuracy before", "after", "margin", "seconds")


def table_rows(records: Sequence[RewardRecord]) -> list[list[str]]:
    """Rows for ``COLUMNS``; accuracies are of the held-out pairs."""
    rows = []
    for r in records:
        held = [f"{100 * part['accuracy']:.1f} %" if part else "–" for part in (r.before, r.after)]
        margin = f"{r.after['margin']:.3f}" if r.after else "–"
        rows.append([r.config["rm_loss"], str(r.config["seed"]), str(len(r.curve)), str(r.pairs or "–"),
                     *held, margin, f"{r.seconds:.1f}"])  # fmt: skip
    return rows


def training_plot(records: Sequence[RewardRecord]) -> Any:
    """Loss and accuracy of every step."""
    made, axes = figure(7.2, 3.0)
    other = axes.twinx()
    for i, record in enumerate(records):
        color = PALETTE[i % len(PALETTE)]
        at = range(1, len(record.curve) + 1)
        axes.plot(at, [m["loss"] for m in record.curve], lw=1.2, color=color,
                  label=f"{record.config['rm_loss']}, seed {record.config['seed']}")  # fmt: skip
        other.plot(at, [m["accuracy"] for m in record.curve], lw=0.8, ls=":", color=color)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    other.set_ylabel("accuracy (dotted)")
    other.set_ylim(0, 1.02)
    axes.legend(frameon=False, fontsize=8)
    return made


def best_of_n_plot(found: Mapping[str, BestOfN], wanted: Sequence[int] = SIZES) -> Any:
    """Mean best score over the n ``wanted`` with its standard error, by policy; n on a logarithmic axis."""
    made, axes = figure(7.2, 3.0)
    sizes: set[int] = set()
    for i, (name, samples) in enumerate(found.items()):
        curve = samples.curve(wanted)
        sizes |= set(curve)
        means, errors = zip(*curve.values())
        axes.errorbar(list(curve), means, errors, marker="o", ms=4, lw=1.2, capsize=3,
                      color=PALETTE[i % len(PALETTE)], label=name)  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(sizes), [f"{n}\n({best_of_n_kl(n):.2f})" for n in sorted(sizes)])
    axes.set_xlabel("samples per prompt (KL from the policy, nats, at most)")
    axes.set_ylabel("reward-model score")
    axes.legend(frameon=False, fontsize=8)
    return made


def add_section(
    records: Sequence[RewardRecord],
    page: Page,
    title: str,
    samples: Mapping[str, BestOfN] | None = None,
) -> list[tuple[str, bytes]]:
    """The reward models' part of a page; returns the figures as (name, PNG bytes)."""
    drawn: list[tuple[str, bytes]] = []

    def plot(made: Any, name: str, caption: str) -> None:
        png = png_bytes(made)
        page.image(png, caption)
        drawn.append((name, png))

    page.section(title)
    first = records[0]
    if first.after:
        page.cards([
            Card(f"{100 * first.after['accuracy']:.1f} %", "of held-out pairs ranked right",
                 f"{100 * first.before['accuracy']:.1f} % before training"),
            Card(f"{first.after['margin']:.2f}", "mean margin"),
        ])  # fmt: skip
    page.table(COLUMNS, table_rows(records))
    plot(
        training_plot(records),
        "reward-training",
        "Training loss, and the share of pairs ranked right.",
    )
    if samples:
        plot(
            best_of_n_plot(samples),
            "best-of-n",
            "Score of the best of n answers; bars are standard errors.",
        )
    return drawn
