# SPDX-License-Identifier: Apache-2.0
"""ERNIE-Code on django's messages: a tiny model learns five languages from English pairs, in a minute.

A demo: docs/methods/ernie-code.md has a study.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tenfold.ernie_code import report, speed, study
from tenfold.ernie_code.batching import IGNORE
from tenfold.ernie_code.config import model_config
from tenfold.ernie_code.generation import encode_sources, encode_targets, padded
from tenfold.ernie_code.model import build_model
from tenfold.ernie_code.train_config import CodeTrainConfig
from tenfold.report import Card, Headline, Page, Speedup, TextTable
from tenfold.training.threads import threads

TRAIN_STEPS, TELL = 200, 20
STEPS = 2 * (TRAIN_STEPS // TELL) + 4 + 4 * len(study.KINDS)
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
SPEED_COLUMNS = ("a training step", "transformers", "tenfold", "ratio")
PLAIN, PAIRS = study.VARIANTS
HELD = "corpus/X to English"  # of the validation


@dataclass
class Demo:
    """What the demo found."""

    study: study.Study
    speed: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Numbers, and some samples."""
        return {"speed": self.speed, "study": self.study.to_json(samples=4)}


def run_demo(step: Callable[[str], None] = lambda text: None, seed: int = 0) -> Demo:
    """Runs it, on one thread; ``step`` is told after each piece. ``seed``: of weights, rows and what is asked."""
    config = dataclasses.replace(CONFIG, seed=seed)
    settings = CodeTrainConfig.from_preset("small", **TRAIN, seed=seed)
    with threads(1):
        data = study.material(config)
        made = study.run(config, settings, data=data, step=step, tell=TELL)
        found = timed(made, data)
        step("a step is timed")
    return Demo(made, found)


def timed(made: study.Study, data: study.Material, repeats: int = 9) -> dict[str, Any]:
    """A training step of the model with pairs, on translations of this run: of ``speed.compare_steps``."""
    trained = made.variants[PAIRS].model
    model = build_model(
        model_config("small", vocab_size=len(data.tokenizer), dropout_rate=0.0, **made.config.model),
        kernels="stock",
    )  # fmt: skip
    model.load_state_dict(trained.state_dict())
    return speed.compare_steps(model, translations(made, data), repeats)


def translations(made: study.Study, data: study.Material) -> dict[str, Tensor]:
    """A training batch of translations from English: the first pairs of each language in turn."""
    size, limits = made.settings.batch_size, (made.settings.max_inputs, made.settings.max_targets)
    into = [rows for name, rows in data.pairs.items() if name.endswith("-English")]
    rows = [
        r | {"source": r["target"], "target": r["source"], "source_language": r["target_language"],
             "target_language": r["source_language"]}
        for r in (into[i % len(into)][i // len(into)] for i in range(size))
    ]  # fmt: skip
    ids, mask = padded(encode_sources(data.tokenizer, rows, limits[0]), data.tokenizer.pad_token_id)
    labels, _ = padded(encode_targets(data.tokenizer, rows, limits[1]), IGNORE)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def table_rows(demo: Demo) -> list[list[str]]:
    """Rows for ``COLUMNS``."""
    return report.ranking_rows(demo.study.to_json())


def sample_rows(demo: Demo) -> list[list[str]]:
    """Rows of ``report.SAMPLE_COLUMNS``: what the model with pairs makes of held-out messages."""
    variant = demo.study.variants[PAIRS]
    return report.sample_rows(variant.generated["zero-shot"].rows, 4)


def shown_rows(demo: Demo) -> list[list[str]]:
    """Rows of ``report.SAMPLE_COLUMNS``: some of every kind."""
    made = demo.study.variants[PAIRS].generated
    return [row for e in made.values() for row in report.sample_rows(e.rows, 3)]


def speed_rows(demo: Demo) -> list[list[str]]:
    """Rows for ``SPEED_COLUMNS``: the time, and that the losses are the same."""
    loss = demo.speed["loss"]
    return [
        speed.table_rows(demo.speed)[0],
        ["loss", f"{loss['stock']:.5f}", f"{loss['tenfold']:.5f}", "–"],
    ]


def held_out(demo: Demo) -> tuple[float, float]:
    """Nats per token of held-out translations to English, of the model (with, without) pairs."""
    last = {n: v.record.validation[-1] for n, v in demo.study.variants.items()}
    return last[PAIRS][HELD], last[PLAIN][HELD]


def headline(found: Demo) -> Headline:
    """Its line of the table of all methods."""
    made, (with_pairs, without) = found.study, held_out(found)
    millions = made.variants[PAIRS].record.parameters / 1e6
    return Headline(
        f"{millions:.1f}M mT5, messages in {len(made.config.languages) + 1} languages and Python",
        f"to English {with_pairs:.2f} nats a token; {without:.2f} without pairs",
        Speedup("a step on T5's kernels", "transformers", found.speed["seconds"]["ratio"]),
    )


def tables(found: Demo) -> list[TextTable]:
    """What the terminal shows."""
    return [
        TextTable(
            f"Which of {found.study.config.candidates} is the translation?",
            COLUMNS,
            table_rows(found),
        ),
        TextTable("Held-out messages", report.SAMPLE_COLUMNS, sample_rows(found), prose=True),
        TextTable("A training step", SPEED_COLUMNS, speed_rows(found)),
    ]


def add_demo_section(demo: Demo, page: Page) -> None:
    """ERNIE-Code's part of the report page."""
    page.section("ERNIE-Code: languages and code, with English between them")
    page.text(
        "Two small models: one learns to fill gaps in text of each language and in Python, the other also to translate "
        "to and from English. Held-out messages are then asked for in pairs of languages that neither saw together. "
        "A minute of training shows how it is done; it is not enough to translate, and hardly to be above chance."
    )
    with_pairs, without = held_out(demo)
    label = "nats per token of held-out translations to English"
    page.cards(
        [Card(f"{with_pairs:.2f}", label, PAIRS), Card(f"{without:.2f}", label, f"{PLAIN} alone")]
    )
    report.add_study(page, demo.study, generated=())
    page.heading("What the model with pairs makes of held-out messages")
    page.table(report.SAMPLE_COLUMNS, shown_rows(demo))
    page.heading("A training step on these kernels, and in transformers")
    page.text("Of the model with pairs, on a batch of its translations.", soft=True)
    page.table(SPEED_COLUMNS, speed_rows(demo))
