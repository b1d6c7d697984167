# SPDX-License-Identifier: Apache-2.0
"""PixelGPT on packaged text: pre-training on pixels and on tokens, and a task in scripts that neither saw.

Two small models of the same size: one reads strips of rendered text and regresses the next patch, the other reads
tokens. Then both learn to tell languages apart, in scripts of the pre-training and in others. A demo of one seed:
docs/methods/pixelgpt.md has a study.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from tenfold.pixelgpt import report, small
from tenfold.pixelgpt.classifier import classifier_of
from tenfold.pixelgpt.finetuning import finetune
from tenfold.pixelgpt.pretraining import pretrain
from tenfold.pixelgpt.record import FineTuneRecord, PretrainRecord
from tenfold.pixelgpt.texts import language_task
from tenfold.pixelgpt.train_config import FineTuneConfig, PretrainConfig
from tenfold.report import Page
from tenfold.training.loop import Progress

# Languages to tell apart: in scripts of the pre-training, and in scripts that it never saw.
SEEN, UNSEEN = ("de", "fr", "es", "ru", "el"), ("hy", "ka", "he", "ar")
VARIANTS = {"pixelgpt": "pixel", "textgpt": "text"}
PRETRAIN: dict[str, Any] = {"steps": 320, "batch_size": 16, "length": 48, "eval_every": 80, "seed": 0,
                            "checkpoint_every": 10_000, "learning_rate": 2e-3}  # fmt: skip
FINETUNE: dict[str, Any] = {"steps": 150, "batch_size": 32, "length": 24, "eval_every": 50, "seed": 0,
                            "checkpoint_every": 10_000}  # fmt: skip
TELL = 20
STEPS = 1 + len(VARIANTS) * (PRETRAIN["steps"] // TELL + 2)
COLUMNS = report.PRETRAIN_COLUMNS
TUNE_COLUMNS = ("model", "reads", "languages told apart, %", "in seen scripts, %", "in unseen scripts, %")  # fmt: skip


@dataclass
class Demo:
    """What the demo found."""

    records: dict[str, PretrainRecord] = field(default_factory=dict)
    tuned: dict[str, FineTuneRecord] = field(default_factory=dict)
    pictures: dict[str, bytes] = field(default_factory=dict)
    setting: str = ""

    def to_json(self) -> dict[str, Any]:
        """Numbers only."""
        return {"setting": self.setting,
                "pretraining": {n: r.to_json() | {"curve": []} for n, r in self.records.items()},
                "finetuning": {n: r.to_json() | {"curve": []} for n, r in self.tuned.items()}}  # fmt: skip


def run_demo(step: Callable[[str], None] = lambda text: None) -> Demo:
    """Runs it; ``step`` is told after each piece."""
    corpus = small.packaged_corpus(per_language=80)
    step("documents")
    found = Demo()
    spec, train, test = language_task(SEEN + UNSEEN, train=100, test=30)
    tests = {"seen": [e for e in test if e.language in SEEN], "unseen": [e for e in test if e.language in UNSEEN],
             "all": test}  # fmt: skip
    for variant, modality in VARIANTS.items():
        config = PretrainConfig.from_preset("small", variant=variant, **PRETRAIN)
        streams, held = corpus.streams(config)
        model = small.model_for(corpus, "tiny", seed=0)

        def told(p: Progress) -> None:
            if p.step % TELL == 0:
                step(f"pre-training, step {p.step}: loss {p.metrics['loss']:.3f}")

        record = pretrain(model, streams, config, held_out=held, callback=told)
        name = report.title_of(record)
        found.records[name] = record
        found.pictures |= small.pictures(model, held)
        step(f"{name} is trained")
        tuned = classifier_of(model, spec.num_labels)
        found.tuned[name] = finetune(
            tuned, spec, train, (), FineTuneConfig.from_preset("small", modality=modality, **FINETUNE),
            processor=corpus.processor, tokenizer=corpus.tokenizer, tests=tests,
        )  # fmt: skip
        step(f"{name} tells languages apart")
    pixels = next(iter(found.records.values()))
    found.setting = (
        f"{pixels.parameters / 1e6:.1f}M parameters, {len(corpus.train)} documents in {', '.join(small.LANGUAGES)}; "
        f"{PRETRAIN['steps']} steps of {PRETRAIN['batch_size']} strips of {PRETRAIN['length']} patches, or rows of as "
        f"many tokens (vocabulary {len(corpus.tokenizer)}); then {FINETUNE['steps']} steps on {len(train)} lines. "
        f"{torch.get_num_threads()} threads, one seed."
    )
    return found


def table_rows(demo: Demo) -> list[list[str]]:
    """Rows for ``COLUMNS``."""
    return report.pretrain_rows(demo.records)


def tune_rows(demo: Demo) -> list[list[str]]:
    """Rows for ``TUNE_COLUMNS``."""
    return [
        [n, r.config["modality"], *(f"{100 * r.scores[s]['accuracy']:.0f}" for s in ("all", "seen", "unseen"))]
        for n, r in demo.tuned.items()
    ]  # fmt: skip


def add_demo_section(demo: Demo, page: Page) -> None:
    """PixelGPT's part of the report page."""
    page.section("PixelGPT: text as pixels")
    page.text(
        "A strip of 16 x 16 patches of rendered text is read from left to right; the model regresses the pixels of the "
        "next patch. There is no vocabulary, so no script is out of it."
    )
    page.text(demo.setting, soft=True)
    report.add_pretraining(page, demo.records, demo.pictures)
    page.heading("Which language is it?")
    page.text(
        f"Both models learn to tell {', '.join(SEEN)} (scripts of the pre-training) and {', '.join(UNSEEN)} (scripts "
        "that it never saw) apart, from the same lines."
    )
    page.table(TUNE_COLUMNS, tune_rows(demo))
