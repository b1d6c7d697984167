# SPDX-License-Identifier: Apache-2.0
"""A conversion as tables and plots: head budgets, similarity of heads, distances, loss curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from tenfold.dha.record import ConversionRecord
from tenfold.report import PALETTE, Card, Page, figure, heat_map, png_bytes

COLUMNS = ("stage", "steps", "seconds", "first loss", "last loss", "last mse")


def _shown_layers(layers: int) -> list[int]:
    """Layers whose matrices are drawn: first, middle, last."""
    return sorted({0, layers // 2, layers - 1})


def budget_plot(record: ConversionRecord) -> Any:
    """Key and value heads kept, per layer."""
    made, axes = figure(7.2, 3.0)
    at = range(record.layers)
    axes.step(at, record.key_heads, where="mid", color=PALETTE[0], label="key heads")
    axes.step(at, record.value_heads, where="mid", color=PALETTE[1], label="value heads", ls="--")
    axes.set_ylim(0, record.query_heads + 0.5)
    axes.set_xlabel("layer")
    axes.set_ylabel(f"heads (of {record.query_heads})")
    axes.legend(frameon=False, fontsize=8)
    return made


def loss_plot(record: ConversionRecord) -> Any:
    """The LM loss of every step, stage after stage."""
    made, axes = figure(7.2, 3.2)
    start = 0
    for i, (stage, curve) in enumerate(record.curves.items()):
        losses = [m.get("lm", m["loss"]) for m in curve]
        if losses:
            at = range(start, start + len(losses))
            axes.plot(at, losses, color=PALETTE[i % len(PALETTE)], lw=1, label=stage)
            start += len(losses)
    for moment, loss in record.losses.items():
        if moment == "parent":
            axes.axhline(loss, color="black", lw=1, ls=":", label="parent (evaluation)")
    axes.set_xlabel("step, all stages")
    axes.set_ylabel("LM loss (nats)")
    if axes.lines:
        axes.legend(frameon=False, fontsize=8)
    return made


def fusion_plot(record: ConversionRecord) -> Any | None:
    """Mean mse of the operators and the multiplier over the fusion stages; None without one."""
    curves = [c for stage, c in record.curves.items() if stage.startswith("fusion")]
    steps = [m for curve in curves for m in curve]
    if not steps:
        return None
    made, axes = figure(7.2, 3.0)
    axes.semilogy([max(m["mse"], 1e-9) for m in steps], color=PALETTE[0], label="mean mse")
    axes.set_xlabel("fusion step")
    axes.set_ylabel("mean mse")
    other = axes.twinx()
    other.plot([m["lambda"] for m in steps], color=PALETTE[1], lw=1, label="multiplier")
    other.set_ylabel("multiplier")
    made.legend(frameon=False, fontsize=8, loc="outside upper right")
    return made


def matrix_plot(matrix: Tensor, title: str, high: float | None = None) -> Any:
    """A head-by-head matrix as a heat map."""
    heads = matrix.shape[0]
    names = [str(h) for h in range(heads)]
    top = float(matrix.max()) if high is None else high
    if heads <= 16:
        return heat_map(matrix.tolist(), names, names, title, "head", "head", 0.0, max(top, 1e-9))
    made, axes = figure(4.4, 3.8)
    picture = axes.imshow(matrix.tolist(), cmap="viridis", vmin=0, vmax=max(top, 1e-9))
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("head")
    axes.set_ylabel("head")
    made.colorbar(picture, ax=axes)
    return made


def redundancy_plot(record: ConversionRecord) -> Any | None:
    """Mean CKA over the pairs of heads, per layer; None for single heads."""
    if not record.cka or record.cka[0].shape[0] < 2:
        return None
    made, axes = figure(7.2, 3.0)
    for kind, name in enumerate(("key heads", "value heads")):
        means = []
        for matrix in record.cka[kind::2]:
            n = matrix.shape[0]
            means.append(float(matrix.triu(1).sum()) / (n * (n - 1) / 2))
        axes.plot(means, marker="o", ms=3, color=PALETTE[kind], label=name)
    axes.set_xlabel("layer")
    axes.set_ylabel("mean CKA of head pairs")
    axes.legend(frameon=False, fontsize=8)
    return made


def stage_rows(record: ConversionRecord) -> list[list[str]]:
    """The rows of the table of stages, for ``COLUMNS``."""
    rows = []
    for stage, curve in record.curves.items():
        if not curve:
            continue
        spent = record.seconds.get(stage.split("-")[0])
        mse = curve[-1].get("mse")
        rows.append([
            stage, str(len(curve)), "–" if spent is None else f"{spent:.1f}",
            f"{curve[0].get('lm', curve[0]['loss']):.3f}",
            f"{curve[-1].get('lm', curve[-1]['loss']):.3f}", "–" if mse is None else f"{mse:.2g}",
        ])  # fmt: skip
    return rows


def cards(record: ConversionRecord) -> list[Card]:
    """The headline numbers."""
    kept = sum(record.key_heads) + sum(record.value_heads)
    total = 2 * record.layers * record.query_heads
    made = [
        Card(f"{kept} of {total}", "key and value heads", f"{100 * record.ratio:.1f} % of MHA"),
        Card(f"{record.kv_bytes_per_token() / 1024:.4g} KiB", "cache per token (16 bit)",
             f"MHA: {total * record.head_dim * 2 / 1024:.4g} KiB"),
    ]  # fmt: skip
    names = {
        "parent": "loss of the parent",
        "collapsed": "loss after fusion",
        "final": "final loss",
    }
    made += [Card(f"{record.losses[k]:.3f}", names[k]) for k in names if k in record.losses]
    return made


def add_section(
    record: ConversionRecord, page: Page, title: str = "Conversion to DHA"
) -> list[Any]:
    """One conversion's part of a page; returns the figures as (name, PNG bytes)."""
    drawn = []

    def plot(made: Any | None, name: str, caption: str, width: int | None = None) -> None:
        if made is not None:
            png = png_bytes(made)
            page.image(png, caption, width)
            drawn.append((name, png))

    page.section(title)
    page.text(
        f"Method {record.config['method']}, budget {100 * record.config['budget']:g} % of the key and "
        f"value heads that MHA would have; {record.layers} layers of {record.query_heads} query heads."
    )
    page.cards(cards(record))
    page.table(COLUMNS, stage_rows(record))
    page.heading("Heads per layer")
    plot(budget_plot(record), "heads", "Key and value heads kept in every layer.")
    page.heading("Training")
    plot(loss_plot(record), "loss", "LM loss by step (without penalty and distillation).")
    plot(fusion_plot(record), "fusion", "The operators of each group coincide at mse 0.")
    page.heading("Similarity of the parent's heads")
    plot(
        redundancy_plot(record), "redundancy", "Linear CKA of the projection weights, no centring."
    )
    for layer in _shown_layers(record.layers):
        for kind, name in enumerate(("key", "value")):
            if record.cka:
                plot(matrix_plot(record.cka[2 * layer + kind], f"layer {layer}, {name} heads", 1.0),
                     f"cka-{layer}-{name}", f"CKA, {name} heads of layer {layer}.", 480)  # fmt: skip
    if any(float(m.max()) > 0 for m in record.distances):
        page.heading("Distances that grouped the heads")
        for layer in _shown_layers(record.layers):
            for kind, name in enumerate(("key", "value")):
                matrix = record.distances[2 * layer + kind]
                plot(matrix_plot(matrix, f"layer {layer}, {name} heads"), f"M-{layer}-{name}",
                     f"M, {name} heads of layer {layer}: 0 where operators agree.", 480)  # fmt: skip
    return drawn


def write_report(records: Sequence[ConversionRecord], path: str | Path, subtitle: str = "") -> Path:
    """A page for one or more conversions at ``path``; the plots stand beside it as PNG files."""
    path = Path(path)
    page = Page("Decoupled-head attention", subtitle)
    path.parent.mkdir(parents=True, exist_ok=True)
    for number, record in enumerate(records, 1):
        share = 100 * record.config["budget"]
        title = f"{record.config['method']}, {share:g} %"
        prefix = f"{number}-" if len(records) > 1 else ""
        for name, png in add_section(record, page, title):
            (path.parent / f"{prefix}{name}.png").write_bytes(png)
    return page.write(path)
