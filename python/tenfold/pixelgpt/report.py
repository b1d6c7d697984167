# SPDX-License-Identifier: Apache-2.0
"""Runs on a page: loss curves, what the pixels look like, and how classifiers do by script."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from tenfold.pixelgpt.config import TITLES
from tenfold.pixelgpt.picture import stack, strip_picture
from tenfold.pixelgpt.record import FineTuneRecord, PretrainRecord
from tenfold.report import PALETTE, Card, Page, figure, png_bytes

_NAMES = {"npp": "next patch (MSE)", "ntp": "next token (nats)"}
PRETRAIN_COLUMNS = (
    "model",
    "loss",
    "before",
    "after",
    "predict zero",
    "copy the last patch",
    "mean patch",
)
TUNE_COLUMNS = ("model", "reads", "task", "set", "metric", "value")


def strip_png(rows: Sequence[Tensor], *, patches: int = 48, scale: int = 2) -> bytes:
    """Strips uint8 [C, p, W] or [p, W, C] under each other as a PNG.

    Args:
        patches: that stand in a row; longer strips go on in the next. scale: pixels are so many times as large.

    ModuleNotFoundError says how to install Pillow.
    """
    if importlib.util.find_spec("PIL") is None:
        raise ModuleNotFoundError(
            "pictures of strips need Pillow; install it with `pip install 'tenfold[pixel]'`"
        )
    from PIL import Image

    made = stack([strip_picture(row, wrap=patches, scale=scale) for row in rows])
    buffer = io.BytesIO()
    Image.fromarray(made).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def pairs_png(
    true: Tensor, expected: Tensor, *, rows: int = 6, patches: int = 48, scale: int = 2
) -> bytes:
    """True strips, each with what was expected under it, as a PNG."""
    stacked = [s for pair in zip(true[:rows], expected[:rows]) for s in pair]
    return strip_png(stacked, patches=patches, scale=scale)


def _smooth(values: Sequence[float], width: int) -> np.ndarray:
    kernel = np.ones(min(width, len(values)))
    over = np.convolve(np.ones(len(values)), kernel, "same")
    return np.convolve(np.asarray(values), kernel, "same") / over


def title_of(record: PretrainRecord) -> str:
    """The variant, as it is written."""
    return TITLES[record.config["variant"]]


def loss_plot(records: Mapping[str, PretrainRecord], kind: str = "npp") -> Any:
    """Losses of one kind: every step (smoothed, thin), held-out rows (dots); lines for what needs no model."""
    made, axes = figure(7.2, 3.4)
    for i, (name, record) in enumerate(records.items()):
        color = PALETTE[i % len(PALETTE)]
        points = [(s + 1, m[kind]) for s, m in enumerate(record.curve) if kind in m]
        if points:
            x, y = zip(*points)
            axes.plot(x, _smooth(y, 9), lw=0.8, color=color, alpha=0.6)
        for stream, marker in (("pixel", "o"), ("text", "o"), ("pair", "^")):
            held = [
                (v["step"], v[f"{stream}/{kind}"])
                for v in record.validation
                if f"{stream}/{kind}" in v
            ]
            if held:
                label = name + (", pairs" if stream == "pair" else "")
                axes.plot(*zip(*held), marker=marker, ms=4, lw=1.2, color=color, label=label,
                          ls="--" if stream == "pair" else "-")  # fmt: skip
    base = next((r.baselines for r in records.values() if r.baselines), {}) if kind == "npp" else {}
    for (name, value), style in zip(base.items(), (":", "-.", "--")):
        if value < 1.2:
            axes.axhline(value, color="#888", lw=0.8, ls=style)
            axes.annotate({"zero": "predict zero", "mean": "mean patch", "copy": "copy"}[name],
                          (0.99, value), xycoords=("axes fraction", "data"), fontsize=7, color="#666",
                          va="bottom", ha="right")  # fmt: skip
    axes.set_xlabel("step")
    axes.set_ylabel(_NAMES[kind])
    axes.legend(frameon=False, fontsize=8)
    return made


def pretrain_rows(records: Mapping[str, PretrainRecord]) -> list[list[str]]:
    """Rows for ``PRETRAIN_COLUMNS``: held-out losses before and after."""
    rows = []
    for name, record in records.items():
        if not record.validation:
            continue
        first, last = record.validation[0], record.validation[-1]
        for key in last:
            if key == "step":
                continue
            stream, kind = key.split("/")
            base = record.baselines if key == "pixel/npp" else {}
            rows.append([
                name, f"{_NAMES[kind]}, {stream}", f"{first[key]:.3f}", f"{last[key]:.3f}",
                *(f"{base[b]:.3f}" if b in base else "–" for b in ("zero", "copy", "mean")),
            ])  # fmt: skip
    return rows


def tune_rows(records: Mapping[str, FineTuneRecord]) -> list[list[str]]:
    """Rows for ``TUNE_COLUMNS``."""
    rows = []
    for name, record in records.items():
        metric = record.task["metric"]
        found = record.scores or ({"validation": record.best} if record.best else {})
        for test, values in found.items():
            rows.append([name, record.config["modality"], record.task["name"], test, metric,
                         f"{values[metric]:.3f}"])  # fmt: skip
    return rows


def tune_plot(records: Mapping[str, FineTuneRecord]) -> Any:
    """The metric over the held-out examples, by step."""
    made, axes = figure(7.2, 3.0)
    for i, (name, record) in enumerate(records.items()):
        points = [(v["step"], v[record.task["metric"]]) for v in record.validation]
        if points:
            axes.plot(*zip(*points), marker="o", ms=3, lw=1, color=PALETTE[i % len(PALETTE)], label=name)  # fmt: skip
    axes.set_xlabel("step")
    axes.set_ylabel(next(iter(records.values())).task["metric"])
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)
    return made


def add_pretraining(
    page: Page, records: Mapping[str, PretrainRecord], pictures: Mapping[str, bytes] | None = None
) -> list[tuple[str, bytes]]:
    """Tables, curves and reconstructions of runs; returns the plots as (name, PNG bytes)."""
    drawn = []
    page.cards(
        Card(f"{r.validation[-1][k]:.3f}", f"{n}: {_NAMES[k.split('/')[1]]}", k.split("/")[0])
        for n, r in records.items()
        if r.validation
        for k in r.validation[-1]
        if k != "step"
    )
    page.table(PRETRAIN_COLUMNS, pretrain_rows(records))
    for kind in _NAMES:
        if any(kind in m for r in records.values() for m in r.curve):
            drawn.append((f"loss-{kind}", png_bytes(loss_plot(records, kind))))
            page.image(drawn[-1][1], f"{_NAMES[kind]}: thin lines are training steps, dots held-out rows.")  # fmt: skip
    for caption, png in (pictures or {}).items():
        page.image(png, caption)
    return drawn


def add_finetuning(page: Page, records: Mapping[str, FineTuneRecord]) -> list[tuple[str, bytes]]:
    """Table and curves of classifiers; returns the plots as (name, PNG bytes)."""
    page.table(TUNE_COLUMNS, tune_rows(records))
    png = png_bytes(tune_plot(records))
    page.image(png, "The metric over held-out examples.")
    return [("finetune", png)]


def write_report(
    records: Mapping[str, PretrainRecord | FineTuneRecord], path: str | Path, subtitle: str = "",
    pictures: Mapping[str, bytes] | None = None,
) -> Path:  # fmt: skip
    """A page for runs at ``path``; the plots stand beside it as PNG files."""
    path = Path(path)
    page = Page("PixelGPT", subtitle)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = []
    trained = {n: r for n, r in records.items() if isinstance(r, PretrainRecord)}
    tuned = {n: r for n, r in records.items() if isinstance(r, FineTuneRecord)}
    if trained:
        page.section("Pre-training")
        drawn += add_pretraining(page, trained, pictures)
    if tuned:
        page.section("Fine-tuning")
        drawn += add_finetuning(page, tuned)
    for name, png in drawn:
        (path.parent / f"{name}.png").write_bytes(png)
    return page.write(path)
