# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning on a classification or regression task, in pixels, text or pairs, with early stopping."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.pixelgpt.collate import Batch, classifier_batch, with_settings
from tenfold.pixelgpt.record import FineTuneRecord, model_summary
from tenfold.pixelgpt.tasks import Example, TaskSpec
from tenfold.pixelgpt.train_config import FineTuneConfig
from tenfold.training.batches import Batches
from tenfold.training.best import BestWeights
from tenfold.training.loop import Callback, Metrics, Pieces, kept_random_state
from tenfold.training.metrics import METRICS
from tenfold.training.recipe import AdamWTrainer, even_pieces
from tenfold.training.record import HELD_OUT
from tenfold.training.session import Session

STAGE = "finetune"
RECORD = "finetune.json"


def _batch(
    examples: Sequence[Example], spec: TaskSpec, processor: Any, tokenizer: Any, config: FineTuneConfig
) -> Batch:  # fmt: skip
    texts = [e.text if e.other is None else (e.text, e.other) for e in examples]
    made = classifier_batch(processor, tokenizer, texts, config.modality, config.length)
    kind = torch.int64 if spec.labels else torch.float32
    return made | {"labels": torch.tensor([e.label for e in examples], dtype=kind)}


class _TaskTrainer(AdamWTrainer):
    """The loop's part that is fine-tuning's: numbers of examples become batches on their rank."""

    config: FineTuneConfig
    examples: Sequence[Example]
    make: Any

    def pieces(self, batch: dict[str, Tensor], rows: int | None) -> Pieces:
        """Micro-batches of examples, which count equally."""
        made = []
        for part, share in even_pieces(batch, rows):
            numbers = part["input_ids"][:, 0].tolist()
            rows_ = self.make([self.examples[i] for i in numbers])
            made.append(({k: v.to(self.accelerator.device) for k, v in rows_.items()}, share))
        return made

    def loss_of(self, model: Any, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The classifier's loss, and the share of right ones."""
        made = model(**batch)
        if made.logits.shape[1] == 1:
            return made.loss, {}
        right = (made.logits.argmax(-1) == batch["labels"]).float().mean()
        return made.loss, {"accuracy": right.detach()}


@torch.no_grad()
def predict(
    model: Any, examples: Sequence[Example], spec: TaskSpec, processor: Any, tokenizer: Any, config: FineTuneConfig,
    *, batch_size: int = 64, accelerator: Any = None,
) -> Tensor:  # fmt: skip
    """Scores float32 [N, num_labels] of examples, in their order; ranks of an ``accelerator`` share them."""
    was, device = model.training, next(model.parameters()).device
    rank, ranks = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    model.eval()
    made = torch.zeros(len(examples), spec.num_labels, device=device)
    mine = list(range(rank, len(examples), ranks))
    # Examples of like length beside each other: less padding.
    mine.sort(key=lambda i: len(examples[i].text) + len(examples[i].other or ""))
    for at in range(0, len(mine), batch_size):
        numbers = mine[at : at + batch_size]
        batch = _batch([examples[i] for i in numbers], spec, processor, tokenizer, config)
        batch = {k: v.to(device) for k, v in batch.items() if k != "labels"}
        with accelerator.autocast() if accelerator else contextlib.nullcontext():
            made[numbers] = model(**batch).logits.float()
    model.train(was)
    return accelerator.reduce(made, "sum") if accelerator else made


def score(logits: Tensor, examples: Sequence[Example], spec: TaskSpec) -> Metrics:
    """The task's metric over scores [N, C], and per language where examples have one (``metric/de``, and their mean).

    Raises ValueError without examples.
    """
    values = logits.argmax(-1) if spec.labels else logits[:, 0]
    predicted, gold = values.cpu().numpy(), [e.label for e in examples]
    measure = METRICS[spec.metric]
    found = {spec.metric: measure(predicted, gold)}
    languages = sorted({e.language for e in examples} - {""})
    for language in languages:
        at = [i for i, e in enumerate(examples) if e.language == language]
        found[f"{spec.metric}/{language}"] = measure(predicted[at], [gold[i] for i in at])
    if languages:
        found["average"] = sum(found[f"{spec.metric}/{c}"] for c in languages) / len(languages)
    return found


def _digest(*parts: Sequence[Example]) -> str:
    made = hashlib.sha256()
    for examples in parts:
        made.update(b"\0")
        for e in examples:
            made.update(repr((e.text, e.other, e.label, e.language)).encode("utf-8", "backslashreplace"))  # fmt: skip
    return made.hexdigest()[:16]


def check_model(model: Any, spec: TaskSpec, config: FineTuneConfig) -> None:
    """Raises ValueError if a classifier does not fit the task or the rows of the settings."""
    if model.config.num_labels != spec.num_labels:
        raise ValueError(
            f"task {spec.name!r} has {spec.num_labels} labels (1: regression), the model {model.config.num_labels}"
        )
    longest = config.length * (2 if config.modality == "pair" else 1)
    if longest > model.config.max_position_embeddings:
        raise ValueError(f"rows of {longest} patches and tokens are longer than the model's "
                         f"{model.config.max_position_embeddings} positions")  # fmt: skip


def finetune(
    model: Any,
    spec: TaskSpec,
    train: Sequence[Example],
    validation: Sequence[Example] = (),
    config: FineTuneConfig | None = None,
    *,
    processor: Any = None,
    tokenizer: Any = None,
    tests: Mapping[str, Sequence[Example]] | None = None,
    out: str | Path | None = None,
    resume: bool = True,
    callback: Callback | None = None,
    quiet: bool = True,
    **changes: Any,
) -> FineTuneRecord:
    """Fine-tunes a classifier on a task, in place; the weights with the best metric on ``validation`` are left in it.

    Args:
        model: a :class:`~tenfold.pixelgpt.PixelGPTForSequenceClassification`. spec: the task.
        train, validation, tests: examples; without ``validation`` the last weights stay. For cross-lingual transfer
            train and validate on one language, and test on all; for translate-train-all train on all.
        config: settings, default :class:`~tenfold.pixelgpt.train_config.FineTuneConfig`; ``changes`` are fields of it.
        processor, tokenizer: of strips (modality ``"pixel"``, ``"pair"``), of tokens (``"text"``, ``"pair"``).
        out: where model, processor, tokenizer and record (``finetune.json``) are saved; a run that was killed goes on
            from ``out/training``, with the same call, unless ``resume`` is False.
        callback: told after every step. quiet: no progress bar.

    Raises:
        ValueError: settings, no examples, a model with other labels or too few positions, a folder of another run.
        TrainingError: a loss that is not a number.
    """
    config = (config or FineTuneConfig()).with_changes(**changes)
    check_model(model, spec, config)
    if not train:
        raise ValueError("train has no examples")
    for name, thing, used in (("processor", processor, "text"), ("tokenizer", tokenizer, "pixel")):
        if thing is None and config.modality != used:
            raise ValueError(f"modality {config.modality!r} needs a {name}")
    if processor is not None:
        processor = with_settings(processor, mode=config.render_mode, channels=model.config.num_channels,
                                  max_patches=config.length)  # fmt: skip
    session = Session(STAGE, model, config, _digest(train, validation), out, resume)
    accelerator = session.accelerator
    record = FineTuneRecord(
        config.to_json(), model_summary(model.config), task=asdict(spec), examples=len(train)
    )
    record.parameters = sum(p.numel() for p in model.parameters())
    batches = Batches({"input_ids": torch.arange(len(train))[:, None]}, 1, config.seed)

    def scored(examples: Sequence[Example]) -> Metrics:
        return score(predict(model, examples, spec, processor, tokenizer, config,
                             accelerator=accelerator), examples, spec)  # fmt: skip

    start = time.perf_counter()
    unused = ("model.embed_patches",) if config.modality == "text" else ("model.embed_tokens",)
    with (
        kept_random_state(),
        session.training(() if config.modality == "pair" else unused) as record.trained,
    ):
        best = BestWeights(model, session.folder)
        trainer = _TaskTrainer(accelerator, config, batches, session.folder, callback, quiet)
        trainer.examples = train
        trainer.make = lambda some: _batch(some, spec, processor, tokenizer, config)
        every = config.eval_every or max(1, config.steps // 10)

        def after_step(module: nn.Module, step: int, metrics: Metrics) -> bool:
            if not validation or (step % every and step != config.steps):
                return False
            with trainer.whole():
                found = {"step": float(step)} | scored(validation)
                metrics |= {HELD_OUT + k: v for k, v in found.items()}
                if not best.found or found[spec.metric] > best.found[spec.metric]:
                    best.keep(found)
            # From the best step, which a resumed run knows: not from how often it was looked at.
            return bool(config.patience) and step - best.found["step"] >= config.patience * every

        curve = trainer.run(
            STAGE, model, config.steps, config.batch_size, trainer.loss_of, after_step
        )
        record.take_curve(curve)
        accelerator.wait_for_everyone()
        best.restore()
        record.best = best.found
        record.scores = {name: scored(some) for name, some in (tests or {}).items()}
    record.seconds = time.perf_counter() - start
    session.finish(record, RECORD, processor, tokenizer)
    return record
