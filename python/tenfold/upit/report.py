# SPDX-License-Identifier: Apache-2.0
"""Experts as plots: their load by layer, and which family of texts goes to whom."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tenfold.report import PALETTE, Card, Page, figure, heat_map, png_bytes
from tenfold.upit.measure import specialisation


def load_plot(load: Tensor | Sequence[Sequence[float]]) -> Any:
    """Share of slots, layers by experts; 1 / n is balance."""
    values = torch.as_tensor(load).tolist()
    n = len(values[0])
    top = max(max(row) for row in values)
    return heat_map(values, [str(i) for i in range(len(values))], [str(e) for e in range(n)],
                    f"share of slots (balanced: {1 / n:.2f})", "layer", "expert", 0.0, top)  # fmt: skip


def affinity_plot(affinity: Tensor, families: Sequence[str], layer: int | None = None) -> Any:
    """Share of slots, families by experts, of a layer or of the mean over layers."""
    values = (affinity.mean(0) if layer is None else affinity[layer]).tolist()
    if len(values) != len(families):
        raise ValueError(f"{len(families)} names for {len(values)} families")
    where = "mean over layers" if layer is None else f"layer {layer}"
    top = max(max(row) for row in values)
    return heat_map(values, list(families), [str(e) for e in range(len(values[0]))],
                    f"share of slots by family ({where})", "", "expert", 0.0, top)  # fmt: skip


def specialisation_plot(runs: dict[str, Tensor]) -> Any:
    """:func:`tenfold.upit.measure.specialisation` by layer, a line for each named affinity."""
    made, axes = figure(6.4, 3.0)
    for i, (name, shares) in enumerate(runs.items()):
        axes.plot(
            specialisation(shares).tolist(),
            "o-",
            ms=3,
            lw=1,
            color=PALETTE[i % len(PALETTE)],
            label=name,
        )
    axes.set_xlabel("layer")
    axes.set_ylabel("specialisation")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    return made


def balance_plot(curves: dict[str, Sequence[dict[str, float]]]) -> Any:
    """L_load of every step, a line for each named run."""
    made, axes = figure(6.4, 2.8)
    for i, (name, curve) in enumerate(curves.items()):
        axes.plot([m["balance"] for m in curve], lw=1, color=PALETTE[i % len(PALETTE)], label=name)
    axes.set_xlabel("step")
    axes.set_ylabel("load-balance loss")
    axes.legend(frameon=False, fontsize=8)
    return made


def add_experts(
    page: Page,
    load: Tensor,
    affinity: Tensor | None = None,
    families: Sequence[str] = (),
    title: str = "Experts",
) -> list[tuple[str, bytes]]:
    """A part of a page on the experts of one model; returns the figures as (name, PNG bytes).

    Args:
        load: of ``expert_load``. affinity, families: of ``affinity``, and its names.
    """
    drawn: list[tuple[str, bytes]] = []

    def plot(made: Any, name: str, caption: str) -> None:
        png = png_bytes(made)
        page.image(png, caption, 560)
        drawn.append((name, png))

    load = torch.as_tensor(load)
    page.heading(title)
    idle = int((load == 0).sum())
    cards = [
        Card(f"{float(load.max()):.2f}", "busiest expert", f"balanced: {1 / load.shape[1]:.2f}"),
        Card(
            f"{float(load.min()):.2f}", "idlest expert", f"{idle} without a token" if idle else ""
        ),
    ]
    if affinity is not None:
        cards.append(
            Card(
                f"{float(specialisation(affinity).max()):.2f}",
                "specialisation",
                "largest of all layers",
            )
        )
    page.cards(cards)
    plot(load_plot(load), "load", "Share of slots by layer and expert.")
    if affinity is not None:
        best = int(specialisation(affinity).argmax())
        plot(
            affinity_plot(affinity, families),
            "affinity",
            "Who is chosen for which texts, all layers.",
        )
        caption = f"The same in layer {best}, where families differ most."
        plot(affinity_plot(affinity, families, best), "affinity-best", caption)
    return drawn
