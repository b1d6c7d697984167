# SPDX-License-Identifier: Apache-2.0
"""A run as numbers, a table and a page: losses by family, what was merged, who has which texts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tenfold.report import PALETTE, Card, Page, figure, png_bytes
from tenfold.training.store import write_text
from tenfold.upit.families import family_losses

if TYPE_CHECKING:
    from tenfold.upit.pipeline import Pipeline

Losses = Mapping[str, Mapping[str, float]]  # model -> family -> loss


def loss_columns(families: Sequence[str]) -> list[str]:
    """Of the table of losses."""
    return ["model", *families, "mean"]


def loss_rows(losses: Losses, families: Sequence[str]) -> list[list[str]]:
    """Nats per answer token, models by families."""
    return [
        [name, *(f"{found[f]:.3f}" for f in (*families, "mean"))] for name, found in losses.items()
    ]


def losses_plot(losses: Losses, families: Sequence[str]) -> Any:
    """A group of bars per family."""
    made, axes = figure(7.2, 3.2)
    width = 0.8 / max(1, len(losses))
    for i, (name, found) in enumerate(losses.items()):
        at = [x + (i - (len(losses) - 1) / 2) * width for x in range(len(families))]
        axes.bar(
            at, [found[f] for f in families], width, color=PALETTE[i % len(PALETTE)], label=name
        )
    axes.set_xticks(range(len(families)), families)
    axes.set_ylabel("loss (nats per answer token)")
    axes.legend(frameon=False, fontsize=8)
    return made


def buckets_plot(shares: Sequence[Sequence[float]], families: Sequence[str]) -> Any:
    """Families in the seed bucket of every expert."""
    made, axes = figure(6.4, 2.8)
    left = [0.0] * len(shares)
    names = [f"expert {i}" for i in range(len(shares))]
    for i, family in enumerate(families):
        values = [s[i] for s in shares]
        axes.barh(names, values, left=left, color=PALETTE[i % len(PALETTE)], label=family)
        left = [a + b for a, b in zip(left, values)]
    axes.invert_yaxis()
    axes.set_xlabel("share of the seed samples")
    axes.legend(frameon=False, fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return made


def child_rows(children: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """How merged experts were made."""
    return [[str(c["number"]), " + ".join(map(str, c["parents"])), f"{c['alpha']:.3f}",
             "–" if c["similarity"] is None else f"{c['similarity']:.4f}"] for c in children]  # fmt: skip


CHILD_COLUMNS = ("expert", "parents", "share of the first", "similarity")


def measure(run: Pipeline) -> dict[str, Any]:
    """Losses by family of the dense models and the mixture; load and affinity of its experts."""
    from tenfold.upit.measure import affinity, expert_load

    data = run.data
    losses: dict[str, dict[str, float]] = {}

    def judged(name: str, model: Any) -> None:
        losses[name] = family_losses(model, data.tests)

    judged("base", run.expert(run.base()))
    judged("dense, last checkpoint", run.expert(run.found("collect")["experts"][-1]))
    model = run.mixture(run.found("assemble")["model"])
    judged("mixture", model)
    tuned = run.found("post-train")
    if tuned is not None:
        model = run.mixture(tuned["model"])
        judged("mixture, post-trained", model)
    load = expert_load(model, run.data.train if len(data.train["input_ids"]) <= 256 else
                       {k: v[:: len(v) // 256] for k, v in data.train.items()})  # fmt: skip
    who = affinity(model, data.tests)
    return {
        "families": list(data.names),
        "losses": losses,
        "load": load.tolist(),
        "affinity": who.tolist(),
    }


def add_section(page: Page, run: Mapping[str, Any], title: str) -> list[Any]:
    """A run's part of a page; ``run``: what all stages found. Returns the figures as (name, PNG bytes)."""
    import torch

    from tenfold.upit.report import add_experts

    found, drawn = run["report"], []
    names, losses = found["families"], found["losses"]

    def plot(made: Any, name: str, caption: str) -> None:
        png = png_bytes(made)
        page.image(png, caption)
        drawn.append((name, png))

    page.section(title)
    last = list(losses)[-1]
    cards = [
        Card(f"{losses[n]['mean']:.3f}", n)
        for n in dict.fromkeys(("base", "dense, last checkpoint", last))
    ]
    page.cards(cards)
    page.table(loss_columns(names), loss_rows(losses, names), [len(losses) - 1])
    plot(losses_plot(losses, names), "losses", "Loss of test rows by family.")
    children = run["expand"]["children"]
    if children:
        page.heading("Merged experts")
        page.table(CHILD_COLUMNS, child_rows(children))
    if "seeds" in run:
        plot(
            buckets_plot(run["seeds"]["families"], names),
            "seeds",
            "What the routers were seeded with.",
        )
    load, who = (torch.tensor(found[k], dtype=torch.float64) for k in ("load", "affinity"))
    return drawn + list(add_experts(page, load, who, names))


def summarize(run: Pipeline) -> dict[str, Any]:
    """Measures a run, and writes ``report/index.html``, its plots and ``report/run.json``."""
    found = {s: run.found(s) for s in run.stages if s != "report" and run.found(s) is not None}
    made = measure(run)
    folder = run.out / "report"
    folder.mkdir(parents=True, exist_ok=True)
    config = run.config
    page = Page("Upcycling instruction tuning", f"{run.recipe.base}: {config.num_experts} experts, "
                f"{config.experts_per_token} per token, {config.variant} experts, seed {config.seed}")  # fmt: skip
    for name, png in add_section(page, found | {"report": made}, "UpIT"):
        (folder / f"{name}.png").write_bytes(png)
    path = page.write(folder / "index.html")
    made["page"] = str(path)
    write_text(
        folder / "run.json",
        json.dumps({"config": config.to_json(), **found, "report": made}) + "\n",
    )
    return made
