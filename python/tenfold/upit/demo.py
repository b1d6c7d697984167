# SPDX-License-Identifier: Apache-2.0
"""UpIT on a byte-level model that is trained here: four experts, two per token, against two others, in two minutes.

A small Llama over bytes learns Python's documentation, then four families of questions and answers. Three checkpoints
of that tuning and one merged from them become the experts. One seed and few steps: a demo, not a study;
docs/methods/upit.md has one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tenfold.report import Card, Page, png_bytes
from tenfold.training import tiny
from tenfold.training.tasks import byte_encoder, make_tasks
from tenfold.upit import summary
from tenfold.upit.families import Families
from tenfold.upit.study import BASE, METHODS, TUNED, Comparison, compare

LENGTH, END, TRAIN, TEST = 128, 0, 256, 48
NAMES = ("docstring", "german", "licence", "topic")
PARENT_STEPS, TELL, LAYERS, HEADS = 120, 10, 4, 4
COMPARED = ("dense", "vanilla", "upit")
RECIPE: dict[str, Any] = {
    "base_model": "bytes", "preset": "small", "num_experts": 4, "experts_per_token": 2,
    "collect": {"epochs": 2.0, "save_every": 0.25, "keep": 3, "learning_rate": 2e-3, "dtype": "float32"},
    "seeds": {"fraction": 0.1, "assign": "relative"}, "router": {"normalize": "unit"},
    "post": {"epochs": 1.0, "learning_rate": 1e-3},
}  # fmt: skip
BATCH = 16
EPOCH = len(NAMES) * TRAIN // BATCH


def data_of(
    names: tuple[str, ...] = NAMES, train: int = TRAIN, test: int = TEST, seed: int = 0
) -> Families:
    """Rows of bytes by family."""
    made = make_tasks(names, byte_encoder, LENGTH, END, END, train=train, test=test, seed=seed)
    return Families.of({t.name: (t.train, t.test) for t in made})  # type: ignore[dict-item]


def parent(
    steps: int = PARENT_STEPS, layers: int = LAYERS, heads: int = HEADS, seed: int = 0,
    told: Callable[[int, float], None] | None = None,
) -> Any:  # fmt: skip
    """A byte-level Llama that has read Python's documentation."""
    stream, _ = tiny.split(tiny.byte_stream())

    def rows(stage: str, at: int, size: int) -> Tensor:
        made = torch.Generator().manual_seed(seed * 1_000_003 + at)
        return tiny.text_rows(stream, size, made, LENGTH)

    return tiny.train(
        tiny.make_model(seed, layers, heads), rows, steps, batch_size=BATCH, callback=told
    )


@dataclass
class Demo:
    """What the demo found."""

    found: Comparison
    setting: str = ""

    def to_json(self) -> dict[str, Any]:
        """Numbers only."""
        return {"setting": self.setting} | {
            k: v for k, v in self.found.to_json().items() if k != "curves"
        }


def steps() -> int:
    """How often ``run_demo`` tells its step."""
    from tenfold.upit.config import UpITConfig
    from tenfold.upit.options import RouterConfig
    from tenfold.upit.router import equal_steps

    groups = {k: v for k, v in RECIPE.items() if k != "base_model"}
    config = UpITConfig.make(**groups)
    samples = round(config.seeds.fraction * len(NAMES) * TRAIN)
    router: RouterConfig = config.router
    each = equal_steps([samples / config.num_experts] * config.num_experts, router)  # type: ignore[list-item]
    tuning = round(EPOCH * (config.collect.epochs + len(COMPARED) * config.post.epochs))
    return PARENT_STEPS // TELL + tuning + config.num_experts * each


def run_demo(step: Callable[[str], None] = lambda text: None) -> Demo:
    """Runs everything; ``step`` is told after each piece."""
    loss = 0.0

    def told(at: int, now: float) -> None:
        nonlocal loss
        loss = now
        if at % TELL == 0:
            step(f"learning text: loss {now:.2f}")

    model = parent(told=told)
    data = data_of()
    with tempfile.TemporaryDirectory() as folder:
        found = compare(RECIPE, folder, methods=COMPARED, model=model, data=data, step=step)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    setting = (f"A Llama over bytes with {size:.1f}M parameters ({LAYERS} layers), {PARENT_STEPS} steps on Python's "
               f"documentation, then {len(NAMES)} families of {TRAIN} rows: 2 epochs of dense tuning, and one more of "
               f"each method; {BATCH} rows of up to {LENGTH} bytes per step, float32, {torch.get_num_threads()} "
               "threads, one seed.")  # fmt: skip
    return Demo(found, setting)


COLUMNS = tuple(summary.loss_columns(NAMES))


def table_rows(demo: Demo) -> list[list[str]]:
    """The rows of the table, for ``COLUMNS``."""
    return summary.loss_rows(demo.found.losses, NAMES)


def add_demo_section(demo: Demo, page: Page) -> None:
    """UpIT's part of the report page."""
    from tenfold.upit import report

    found, name = demo.found, METHODS["upit"]
    page.section("UpIT: checkpoints of one tuning become a mixture of experts")
    titles = [METHODS[m] for m in COMPARED]
    page.cards(
        Card(f"{found.losses[t]['mean']:.3f}", t, "loss, mean of the families") for t in titles
    )
    page.text(
        f"Losses are nats per answer byte of rows that nothing was trained on. {BASE}: before instruction tuning; "
        f"{TUNED}: what all others go on from, with the same steps on the same rows."
    )
    page.text(demo.setting, soft=True)
    rows = table_rows(demo)
    best = min(range(len(rows)), key=lambda i: float(rows[i][-1]))
    page.table(COLUMNS, rows, [best])
    page.image(png_bytes(summary.losses_plot(found.losses, NAMES)), "Loss of test rows by family.")
    page.heading("Where the experts come from")
    page.table(summary.CHILD_COLUMNS, summary.child_rows(found.stages["expand"]["children"]))
    page.image(
        png_bytes(summary.buckets_plot(found.stages["seeds"]["families"], NAMES)),
        "What each expert's router was seeded with.", 560,
    )  # fmt: skip
    load, who = (torch.tensor(x[name], dtype=torch.float64) for x in (found.load, found.affinity))
    report.add_experts(page, load, who, NAMES, "UpIT's experts")
    shares = {t: torch.tensor(a, dtype=torch.float64) for t, a in found.affinity.items()}
    page.image(
        png_bytes(report.specialisation_plot(shares)),
        "How far families differ in their choice of experts.",
        560,
    )
