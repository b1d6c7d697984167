# SPDX-License-Identifier: Apache-2.0
"""ERNIE-Code on django's messages: a tiny model learns five languages from English pairs, in a minute.

A demo: docs/methods/ernie-code.md has a study.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tenfold.ernie_code import report, speed, study
from tenfold.ernie_code.config import model_config
from tenfold.ernie_code.train_config import CodeTrainConfig
from tenfold.report import Page
from tenfold.training.threads import threads

TRAIN_STEPS, TELL = 160, 20
STEPS = 2 * (TRAIN_STEPS // TELL) + 22
CONFIG = study.StudyConfig(
    languages=("de", "fr", "es", "it", "nl"), vocab_size=2048, max_chars=48, code_chars=90, text_tokens=32,
    neighbours=(1,), candidates=8, ranked=64, generated=12,
    model={"d_model": 128, "d_ff": 256, "num_layers": 1, "num_heads": 4, "d_kv": 32},
)  # fmt: skip
TRAIN: dict[str, Any] = {
    "steps": TRAIN_STEPS, "batch_size": 32, "rows_per_draw": 16, "learning_rate": 4e-3, "warmup_steps": 20,
    "max_inputs": 96, "max_targets": 96,
}  # fmt: skip
COLUMNS = report.RANKING_COLUMNS
SPEED_COLUMNS = speed.COLUMNS


@dataclass
class Demo:
    """What the demo found."""

    study: study.Study
    speed: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Numbers, and some samples."""
        return {"speed": self.speed, "study": self.study.to_json(samples=4)}


def run_demo(step: Callable[[str], None] = lambda text: None) -> Demo:
    """Runs it, on one thread; ``step`` is told after each piece."""
    with threads(1):
        made = study.run(
            CONFIG, CodeTrainConfig.from_preset("small", **TRAIN), step=step, tell=TELL
        )
        small = model_config("small", vocab_size=32_000, dropout_rate=0.0)
        found = speed.compare(small, batch_size=4, inputs=128, targets=48)
        step("a step is timed")
    return Demo(made, found)


def table_rows(demo: Demo) -> list[list[str]]:
    """Rows for ``COLUMNS``."""
    return report.ranking_rows(demo.study.to_json())


def sample_rows(demo: Demo) -> list[list[str]]:
    """Rows of ``report.SAMPLE_COLUMNS``: what the model with pairs makes of held-out messages."""
    variant = demo.study.variants["SCLM + PTLM"]
    return report.sample_rows(variant.generated["zero-shot"].rows, 4)


def speed_rows(demo: Demo) -> list[list[str]]:
    """Rows for ``SPEED_COLUMNS``."""
    return speed.table_rows(demo.speed)


def add_demo_section(demo: Demo, page: Page) -> None:
    """ERNIE-Code's part of the report page."""
    page.section("ERNIE-Code: languages and code, with English between them")
    page.text(
        "Two small models: one learns to fill gaps in text of each language and in Python, the other also to translate "
        "to and from English. Held-out messages are then asked for in pairs of languages that neither saw together. "
        "A minute of training shows how it is done; it is not enough to translate, and hardly to be above chance."
    )
    report.add_study(page, demo.study)
    page.heading("A training step on these kernels, and in transformers")
    page.table(SPEED_COLUMNS, speed_rows(demo))
