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
from tenfold.hft import report, speed
from tenfold.hft.config import HFTConfig
from tenfold.hft.record import TuneRecord
from tenfold.hft.sequence import continual
from tenfold.report import Page, png_bytes
from tenfold.training.batches import lm_loss, token_rows
from tenfold.training.tasks import encoder, make_tasks

NAMES = ("german", "docstring")
LENGTH, TEXT_LENGTH = 96, 128
SETTINGS: dict[str, Any] = {"steps": 10, "batch_size": 2, "learning_rate": 1e-4, "schedule": "constant",
                            "warmup": 0.1}  # fmt: skip
METHODS = ("full", "hft")
STEPS = len(METHODS) * (len(NAMES) * SETTINGS["steps"] + 1) + 1
COLUMNS = ("method", "trained", *(f"{n} after it" for n in NAMES), "german at the end", "forgotten",
           "text loss before", "after")  # fmt: skip


@dataclass
class Demo:
    """What the demo found."""

    records: list[TuneRecord]
    text: list[dict[str, float]]
    speed: list[dict[str, Any]]
    setting: str = ""

    def to_json(self) -> dict[str, Any]:
        """Numbers only."""
        return {"setting": self.setting, "speed": self.speed,
                "runs": [r.to_json() | {"curves": {}, "text_loss": t}
                         for r, t in zip(self.records, self.text)]}  # fmt: skip


def text_rows(tokenizer: Any, count: int = 8) -> torch.Tensor:
    """Ordinary text that no task is made of: documentation of the standard library's modules."""
    texts = [d.text[:8000] for d in long_documents(("docs",), limit=12)]
    return token_rows(tokenizer, texts, TEXT_LENGTH)[:: max(1, 64 // count)][:count]


def run_demo(model: Any, tokenizer: Any, step: Callable[[str], None] = lambda text: None) -> Demo:
    """Runs the methods; ``step`` is told after each piece."""
    end = tokenizer.eos_token_id
    tasks = make_tasks(NAMES, encoder(tokenizer), LENGTH, end, end, train=32, test=8)
    held = text_rows(tokenizer)
    records, text = [], []
    for method in METHODS:
        own = copy.deepcopy(model)
        config = HFTConfig.from_preset("small", method=method, **SETTINGS)
        before = lm_loss(own, held)
        record = continual(
            own, tasks, config,
            callback=lambda p: step(f"{p.stage}: loss {p.metrics['loss']:.2f}"),
        )  # fmt: skip
        text.append({"before": before, "after": lm_loss(own, held)})
        records.append(record)
        del own
        step(method)
    found = speed.measure(model, 2, LENGTH, steps=3)
    step("step times")
    setting = (f"SmolLM2-135M-Instruct, float32, {torch.get_num_threads()} threads; {SETTINGS['steps']} steps of "
               f"{SETTINGS['batch_size']} x {LENGTH} tokens per task.")  # fmt: skip
    return Demo(records, text, found, setting)


def table_rows(demo: Demo) -> list[list[str]]:
    """The rows of the table, for ``COLUMNS``: losses in nats per answer token."""
    rows = []
    for record, text in zip(demo.records, demo.text):
        scores = record.scores["log_prob"]
        rows.append([
            report.method_of(record), f"{100 * report.trained_share(record):.1f} %",
            *(f"{-scores[i][i]:.3f}" for i in range(len(NAMES))), f"{-scores[-1][0]:.3f}",
            f"{scores[0][0] - scores[-1][0]:+.3f}", f"{text['before']:.3f}", f"{text['after']:.3f}",
        ])  # fmt: skip
    return rows


def add_demo_section(demo: Demo, page: Page) -> None:
    """HFT's part of the report page."""
    report.add_section(demo.records, page, "HFT: half of the model is fine-tuned")
    page.heading("What was forgotten")
    page.text("Losses per answer token; text is documentation that is in no task.")
    page.text(demo.setting, soft=True)
    page.table(COLUMNS, table_rows(demo), [1])
    page.heading("A training step")
    page.table(speed.COLUMNS, speed.table_rows(demo.speed))
    page.image(
        png_bytes(report.speed_plot(demo.speed)), "Where a step's time goes; methods take turns."
    )
