# SPDX-License-Identifier: Apache-2.0
"""HFT on SmolLM2-135M-Instruct: two tasks one after the other, half against all, in a few minutes.

What is asked: how much of the first task, and of ordinary text, is left after the second; and what a
training step costs. A demo of a few dozen steps, not a study: docs/methods/hft.md has one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tenfold.data import long_documents
from tenfold.data.models import given_or_smollm2
from tenfold.hft import report, speed
from tenfold.hft.config import HFTConfig
from tenfold.hft.record import TuneRecord
from tenfold.hft.sequence import continual
from tenfold.report import Card, Headline, Page, Speedup, TextTable, png_bytes
from tenfold.training.batches import lm_loss, token_rows
from tenfold.training.tasks import encoder, make_tasks
from tenfold.training.threads import threads_text

NAMES = ("german", "docstring")
LENGTH, TEXT_LENGTH, TEXT_ROWS, TEST = 64, 128, 4, 4
SETTINGS: dict[str, Any] = {"steps": 5, "batch_size": 2, "learning_rate": 2e-4, "schedule": "constant",
                            "warmup": 0.1}  # fmt: skip
METHODS = ("full", "hft")
TIMED = ("half, torch AdamW", "half")
STEPS = len(METHODS) * (len(NAMES) * SETTINGS["steps"] + 1) + 1
OPTIMIZER_COLUMNS = (
    "optimiser's step, half of the model", "op", "against", "speed-up", "largest difference of a weight",
)  # fmt: skip
COLUMNS = ("method", "trained", *(f"{n} after it" for n in NAMES), "german at the end", "forgotten",
           "text loss before", "after")  # fmt: skip


@dataclass
class Demo:
    """What the demo found."""

    records: list[TuneRecord]
    text: list[dict[str, float]]
    speed: list[dict[str, Any]]
    model: str = ""
    setting: str = ""

    def timed(self, method: str) -> dict[str, Any]:
        """The row of ``speed`` for a method of ``tenfold.hft.speed``."""
        return next(r for r in self.speed if r["method"] == method)

    def seconds(self, at: int) -> float:
        """Mean seconds of a training step of run ``at``."""
        record = self.records[at]
        return sum(record.seconds.values()) / sum(map(len, record.curves.values()))

    def forgotten(self, at: int) -> float:
        """By how many nats per answer token the first task's loss grew while the second was learnt (run ``at``)."""
        scores = self.records[at].scores["log_prob"]
        return scores[0][0] - scores[-1][0]

    def to_json(self) -> dict[str, Any]:
        """Numbers only."""
        return {"setting": self.setting, "speed": self.speed,
                "runs": [r.to_json() | {"curves": {}, "text_loss": t}
                         for r, t in zip(self.records, self.text)]}  # fmt: skip


def text_rows(tokenizer: Any, count: int = 8) -> torch.Tensor:
    """Ordinary text that no task is made of: documentation of the standard library's modules."""
    texts = [d.text[:8000] for d in long_documents(("docs",), limit=12)]
    return token_rows(tokenizer, texts, TEXT_LENGTH)[:: max(1, 64 // count)][:count]


def run_demo(
    step: Callable[[str], None] = lambda text: None,
    seed: int = 0,
    model: tuple[Any, Any] | None = None,
) -> Demo:
    """Runs the methods.

    Args:
        step: told after each piece.
        seed: of the halves, the rows trained on and their order.
        model: (model, tokenizer); default SmolLM2-135M-Instruct.

    Raises:
        TypeError: ``model`` is not a pair. MissingData: no model here.
    """
    name, start, tokenizer = given_or_smollm2(model)
    end = tokenizer.eos_token_id
    tasks = make_tasks(NAMES, encoder(tokenizer), LENGTH, end, end, train=32, test=TEST, seed=seed)
    held = text_rows(tokenizer)[:TEXT_ROWS]
    before = lm_loss(start, held)
    records, text = [], []
    for method in METHODS:
        own = copy.deepcopy(start)
        config = HFTConfig.from_preset("small", method=method, **SETTINGS, seed=seed)
        record = continual(
            own, tasks, config,
            callback=lambda p: step(f"{p.stage}: loss {p.metrics['loss']:.2f}"),
        )  # fmt: skip
        text.append({"before": before, "after": lm_loss(own, held)})
        records.append(record)
        del own
        step(method)
    found = speed.measure(start, 1, LENGTH, steps=3, seed=seed, methods=TIMED)
    step("step times")
    setting = (f"{name}, {str(start.dtype).removeprefix('torch.')}, {threads_text()}; "
               f"{SETTINGS['steps']} steps of {SETTINGS['batch_size']} x {LENGTH} tokens per task.")  # fmt: skip
    return Demo(records, text, found, name, setting)


def table_rows(demo: Demo) -> list[list[str]]:
    """The rows of the table, for ``COLUMNS``: losses in nats per answer token."""
    rows = []
    for at, (record, text) in enumerate(zip(demo.records, demo.text)):
        scores = record.scores["log_prob"]
        rows.append([
            report.method_of(record), f"{100 * report.trained_share(record):.1f} %",
            *(f"{-scores[i][i]:.3f}" for i in range(len(NAMES))), f"{-scores[-1][0]:.3f}",
            f"{demo.forgotten(at):+.3f}", f"{text['before']:.3f}", f"{text['after']:.3f}",
        ])  # fmt: skip
    return rows


def speedup_of(found: Demo) -> Speedup:
    """The optimiser's step with clipping, half of the model: MaskedAdamW against torch's fused AdamW."""
    ours, torchs = found.timed("half"), found.timed("half" + speed.TORCH)
    ratio = torchs["optimizer"] / ours["optimizer"]
    return Speedup("MaskedAdamW", "torch's fused AdamW with clipping", ratio)


def optimizer_rows(found: Demo) -> list[list[str]]:
    """Rows for ``OPTIMIZER_COLUMNS``."""
    ours = found.timed("half")
    torchs = found.timed("half" + speed.TORCH)
    times = f"ours {1e3 * ours['optimizer']:.1f} ms, torch's {1e3 * torchs['optimizer']:.1f} ms"
    gap = f"{ours['gap']:.1e} after a step of {speed.RATE:g}"
    return [[times, *speedup_of(found).cells, gap]]


def headline(found: Demo) -> Headline:
    """HFT's line in the demo's table."""
    steps = sum(map(len, found.records[0].curves.values()))
    full, half = (found.text[METHODS.index(m)] for m in ("full", "hft"))
    return Headline(
        f"{found.model}, German, then docstrings, {steps} steps",
        f"loss of other text {full['before']:.2f} before, {half['after']:.2f} after half, {full['after']:.2f} after "
        "full tuning",
        speedup_of(found),
    )


def tables(found: Demo) -> list[TextTable]:
    """What the demo shows on a terminal."""
    return [
        TextTable(f"{found.model}: German, then docstrings", COLUMNS, table_rows(found)),
        TextTable("A training step", speed.COLUMNS, speed.table_rows(found.speed)),
        TextTable("Its last part", OPTIMIZER_COLUMNS, optimizer_rows(found)),
    ]


def add_demo_section(demo: Demo, page: Page) -> None:
    """HFT's part of the report page."""
    report.add_section(demo.records[::-1], page, "HFT: half of the model is fine-tuned")
    page.heading("What was forgotten")
    page.cards(
        Card(f"{text['after'] - text['before']:+.2f}", f"loss of other text, {report.method_of(record)}",
             f"{text['before']:.2f} before, {text['after']:.2f} after both tasks")
        for record, text in zip(demo.records, demo.text)
    )  # fmt: skip
    page.text("Losses per answer token; text is documentation that is in no task.")
    page.text(demo.setting, soft=True)
    page.table(COLUMNS, table_rows(demo), [1])
    page.heading("A training step")
    made = speedup_of(demo)
    full, half = (demo.seconds(METHODS.index(m)) for m in ("full", "hft"))
    page.cards([
        Card(f"{full / half:.2f}×", "faster training step", f"half: {half:.2f} s, all: {full:.2f} s"),
        Card(made.times, "faster optimiser's step", f"than {made.against}"),
    ])  # fmt: skip
    page.table(speed.COLUMNS, speed.table_rows(demo.speed))
    page.table(OPTIMIZER_COLUMNS, optimizer_rows(demo))
    page.image(
        png_bytes(report.speed_plot(demo.speed)), "Where a step's time goes; methods take turns."
    )
