# SPDX-License-Identifier: Apache-2.0
"""Pixels against tokens, alone, mixed and paired: the four variants at equal rows per stream, then the same tasks.

Tasks are in scripts of the pre-training and in one that it never saw. For ``examples/pixelgpt.py``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tenfold.pixelgpt import report, small
from tenfold.pixelgpt.classifier import classifier_of
from tenfold.pixelgpt.config import TITLES, VARIANTS
from tenfold.pixelgpt.finetuning import finetune
from tenfold.pixelgpt.loading import load
from tenfold.pixelgpt.pretraining import pretrain
from tenfold.pixelgpt.record import PretrainRecord
from tenfold.pixelgpt.tasks import Example, TaskSpec
from tenfold.pixelgpt.texts import domain_task, language_task
from tenfold.pixelgpt.train_config import FineTuneConfig, PretrainConfig
from tenfold.report import PALETTE, figure
from tenfold.training.loop import Progress
from tenfold.training.store import write_text

Step = Callable[[str], None]
NONE = "none"  # a random model: what the task alone teaches
# Which classifiers there are: what was pre-trained, and what it reads.
CELLS = (("pixelgpt", "pixel"), ("monogpt", "pixel"), ("dualgpt", "pixel"), (NONE, "pixel"),
         ("textgpt", "text"), ("monogpt", "text"), ("dualgpt", "text"), (NONE, "text"),
         ("dualgpt", "pair"))  # fmt: skip
# Languages by whether their script was in the pre-training (en, de, fr, es, ru, el). Arabic's was not.
GROUPS: dict[str, dict[str, tuple[str, ...]]] = {
    "language": {"seen script": ("de", "fr", "es", "it", "ru", "uk", "bg", "el"),
                 "unseen script": ("ar", "fa", "ur", "ckb")},
    "domain": {"seen script": ("de", "fr", "ru", "el"), "unseen script": ("ar", "fa", "hy", "ka", "he")},
}  # fmt: skip


def task(
    name: str, train: int, test: int
) -> tuple[TaskSpec, list[Example], list[Example], list[Example]]:
    """(task, training, validation, test examples): so many per language."""
    languages = [c for codes in GROUPS[name].values() for c in codes]
    make = language_task if name == "language" else domain_task
    spec, some, rest = make(languages, train=train, test=2 * test)
    return spec, some, rest[::2], rest[1::2]


def group_tests(name: str, test: Sequence[Example]) -> dict[str, list[Example]]:
    """Test examples by group of languages, and all of them."""
    found = {g: [e for e in test if e.language in codes] for g, codes in GROUPS[name].items()}
    return found | {"all": list(test)}


def run_pretraining(
    variant: str, corpus: small.Corpus, settings: Mapping[str, Any], sizes: Mapping[str, Any], seed: int,
    folder: Path, step: Step = lambda text: None,
) -> PretrainRecord:  # fmt: skip
    """Pre-trains a variant; a finished run in ``folder`` is not done again.

    A variant has ``settings["steps"]`` steps per stream, so that all see equally many rows of each.
    """
    if (folder / "pretrain.json").is_file():
        return PretrainRecord.read(folder / "pretrain.json")
    steps = settings["steps"] * len(VARIANTS[variant])
    options = dict(settings) | {"steps": steps, "eval_every": max(1, steps // 8)}
    config = PretrainConfig.from_preset("small", variant=variant, seed=seed, **options)
    streams, held = corpus.streams(config)
    model = small.model_for(corpus, seed=seed, **sizes)

    def told(p: Progress) -> None:
        if p.step % 100 == 0:
            step(
                f"{TITLES[variant]}, seed {seed}, step {p.step} of {p.steps}: loss {p.metrics['loss']:.3f}"
            )

    return pretrain(model, streams, config, held_out=held, out=folder, callback=told)


def run_task(
    name: str, variant: str, modality: str, corpus: small.Corpus, settings: Mapping[str, Any],
    sizes: Mapping[str, Any], seed: int, pretrained: Path, file: Path, *, train: int, test: int,
) -> dict[str, Any]:  # fmt: skip
    """Fine-tunes one classifier; its scores by group and language. A finished ``file`` is not done again."""
    if file.is_file():
        return json.loads(file.read_text())
    spec, some, validation, rest = task(name, train, test)
    if variant == NONE:
        model = classifier_of(small.model_for(corpus, seed=seed, **sizes), spec.num_labels, seed)
    else:
        model, _, _ = load(pretrained, num_labels=spec.num_labels, seed=seed)
    options = dict(settings)
    if modality == "pair":  # as many positions as the others have, half of each kind
        options["length"] = options["length"] // 2
    config = FineTuneConfig.from_preset("small", modality=modality, seed=seed, **options)
    record = finetune(model, spec, some, validation, config, processor=corpus.processor,
                      tokenizer=corpus.tokenizer, tests=group_tests(name, rest))  # fmt: skip
    made = {"task": name, "variant": variant, "modality": modality, "seed": seed, "scores": record.scores,
            "best": record.best, "examples": record.examples, "seconds": record.seconds}  # fmt: skip
    write_text(file, json.dumps(made) + "\n")
    return made


def cell_title(variant: str, modality: str) -> str:
    """A classifier in words."""
    name = "no pre-training" if variant == NONE else TITLES[variant]
    return f"{name}, {modality}"


def tasks_plot(found: Sequence[Mapping[str, Any]], name: str) -> Any:
    """Accuracy of all classifiers on a task, by group: a dot per seed, a line at the mean."""
    groups = list(GROUPS[name])
    made, axes = figure(7.6, 3.6)
    for i, (variant, modality) in enumerate(CELLS):
        for j, group in enumerate(groups):
            values = [100 * r["scores"][group]["accuracy"] for r in found
                      if (r["task"], r["variant"], r["modality"]) == (name, variant, modality)]  # fmt: skip
            if values:
                at = i + 0.3 * (j - 0.5)
                axes.scatter([at] * len(values), values, s=12, color=PALETTE[j])
                axes.hlines(sum(values) / len(values), at - 0.14, at + 0.14, color=PALETTE[j],
                            label=group if i == 0 else None)  # fmt: skip
    axes.set_xticks(
        range(len(CELLS)), [cell_title(*c) for c in CELLS], rotation=30, ha="right", fontsize=8
    )
    axes.set_ylabel(f"{name}: % right")
    axes.legend(frameon=False, fontsize=8)
    return made


def pretraining_row(record: PretrainRecord, seed: int) -> dict[str, Any]:
    """What the result file keeps of a run."""
    return {"variant": record.config["variant"], "seed": seed, "validation": record.validation,
            "baselines": record.baselines, "rows": record.rows, "seconds": record.seconds,
            "parameters": record.parameters, "title": report.title_of(record)}  # fmt: skip
