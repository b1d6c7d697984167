# SPDX-License-Identifier: Apache-2.0
"""Pre-training (span corruption and translation by way of English) and fine-tuning, one loop on accelerate.

A step is a number of draws, each of one corpus and so of one task. Draws are a function of (seed, number), their rows
of (seed, number, row): a run that was killed goes on with the same bits, and any number of ranks makes the same steps.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.ernie_code.adafactor import ShardedAdafactor
from tenfold.ernie_code.collators import PivotTranslationCollator, SpanCorruptionCollator
from tenfold.ernie_code.mixture import Mixture, MixtureDataset
from tenfold.ernie_code.model import check_untied
from tenfold.ernie_code.tokenizer import check_rows
from tenfold.ernie_code.train_config import CodeTrainConfig
from tenfold.training.best import BestWeights
from tenfold.training.loop import Callback, Metrics, Pieces, kept_random_state
from tenfold.training.recipe import AdamWTrainer, decay_groups, scheduled, steps_of
from tenfold.training.record import HELD_OUT, Record
from tenfold.training.session import Session
from tenfold.training.sharding import mesh_of

STAGE = "train"
RECORD = "train.json"
TASKS = ("sclm", "ptlm")
_KEYS = ("input_ids", "attention_mask", "labels")

Corpora = Mapping[str, Sequence[Mapping[str, Any]]]


@dataclass
class CodeRecord(Record):
    """Of training: the curve has ``loss`` (nats per label token), and ``sclm`` and ``ptlm`` of the steps that had them.

    Attributes:
        rows: by corpus. weights: of corpora. best: the best evaluation, where training stops by ``patience``.
    """

    rows: dict[str, int] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)


def task_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """``"ptlm"`` for pairs (``source``, ``target``), ``"sclm"`` for packed rows (``input_ids``).

    Raises ValueError for other ones, or none.
    """
    if not len(rows):
        raise ValueError("a corpus has no rows")
    first = rows[0]
    if "source" in first and "target" in first:
        return "ptlm"
    if "input_ids" in first:
        return "sclm"
    raise ValueError(
        f"rows must have source and target (pairs), or input_ids (packed rows), got {', '.join(first)}"
    )


class Draws:
    """Corpora, tasks and collators: batches by the number of a draw.

    Args:
        corpora: rows by name. tokenizer: the model's. config: settings. weights: of corpora; None: ``p^alpha``.
    """

    def __init__(
        self, corpora: Corpora, tokenizer: Any, config: CodeTrainConfig, weights: Mapping[str, float] | None = None
    ) -> None:  # fmt: skip
        if not corpora:
            raise ValueError("there is no corpus to train on")
        self.data, self.config = MixtureDataset(corpora), config
        self.tasks = {name: task_of(rows) for name, rows in corpora.items()}
        self.mixture = Mixture(
            self.data.sizes, config.rows_per_draw, alpha=config.alpha, seed=config.seed, weights=weights
        )  # fmt: skip
        span = {"density": config.density, "mean_span": config.mean_span, "seed": config.seed}
        sizes = {"max_inputs": config.max_inputs}
        self._collate: dict[str, Any] = {
            "sclm": SpanCorruptionCollator(tokenizer, **sizes, **span),  # type: ignore[arg-type]
            "ptlm": PivotTranslationCollator(
                tokenizer, **sizes, **span, max_targets=config.max_targets, directions=config.directions  # type: ignore[arg-type]
            ),
        }  # fmt: skip

    def load(self, number: int) -> tuple[str, dict[str, Tensor]]:
        """(task, batch) of a draw."""
        draw = self.mixture.draw(number)
        task = self.tasks[draw.corpus]
        return task, self._collate[task](self.data.batch(draw))

    def some(self, corpus: str, rows: Sequence[int]) -> dict[str, Tensor]:
        """The batch of given rows of a corpus, the same each time."""
        examples = [self.data[corpus, row, 0, at] for at, row in enumerate(rows)]
        return self._collate[self.tasks[corpus]](examples)

    def take(self, stage: str, step: int, size: int) -> dict[str, Tensor]:
        """The numbers of a step's draws."""
        count = size // self.config.rows_per_draw
        return {"input_ids": torch.arange(step * count, (step + 1) * count)}

    def digest(self) -> str:
        """Identifies corpora by their sizes, and what decides the draws."""
        return self.mixture.digest()


def _trimmed(batch: Mapping[str, Tensor], rows: slice) -> dict[str, Tensor]:
    """Some rows, without the columns that are padding in all of them."""
    part = {k: batch[k][rows] for k in _KEYS}
    width = max(1, int(part["attention_mask"].sum(1).max()))
    labels = part["labels"]
    used = (labels != -100).any(0).nonzero()
    length = int(used[-1]) + 1 if len(used) else 1
    return {"input_ids": part["input_ids"][:, :width], "attention_mask": part["attention_mask"][:, :width],
            "labels": labels[:, :length]}  # fmt: skip


class CodeTrainer(AdamWTrainer):
    """The loop's part that is an encoder-decoder's: label tokens count equally, over all draws and ranks."""

    config: CodeTrainConfig
    batches: Draws  # type: ignore[assignment]

    def pieces(self, batch: dict[str, Tensor], rows: int | None) -> Pieces:
        """The draws of this rank, loaded, in parts of ``rows`` rows, with their shares of all ranks' label tokens."""
        device = self.accelerator.device
        found: list[tuple[dict[str, Tensor], int]] = []
        for number in batch["input_ids"].tolist():
            task, made = self.batches.load(number)
            size = len(made["labels"])
            for at in range(0, size, rows or size):
                part = _trimmed(made, slice(at, at + (rows or size)))
                tokens = int((part["labels"] != -100).sum())
                part = {k: v.to(device, non_blocking=True) for k, v in part.items()}
                found.append((part | {"task": torch.tensor(TASKS.index(task))}, tokens))
        total = torch.tensor(float(sum(n for _, n in found)), device=device)
        total = float(self.accelerator.reduce(total, "sum"))
        # Ranks' gradients and losses are averaged.
        scale = self.accelerator.num_processes / max(1.0, total)
        return [(part, n * scale) for part, n in found if n] or [(found[0][0], 0.0)]

    def loss_of(
        self, model: Any, batch: dict[str, Tensor], step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean over label tokens, and its parts by task."""
        loss = model(**{k: batch[k] for k in _KEYS}, use_cache=False).loss
        task, now = int(batch["task"]), loss.detach()
        parts = {}
        for i, name in enumerate(TASKS):
            parts[f"sum/{name}"] = now if i == task else torch.zeros_like(now)
            parts[f"share/{name}"] = torch.full_like(now, float(i == task))
        return loss, parts

    def make_optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        """Adafactor or AdamW over everything that trains."""
        if self.config.optimizer == "adamw":
            return super().make_optimizer(module)
        from transformers.optimization import Adafactor

        c = self.config
        trained = [p for p in module.parameters() if p.requires_grad]
        groups = decay_groups(trained, c.learning_rate, c.weight_decay)
        common: dict[str, Any] = {
            "lr": c.learning_rate, "clip_threshold": c.clip_threshold, "decay_rate": c.decay_rate,
            "scale_parameter": c.scale_parameter,
        }  # fmt: skip
        if mesh_of(self.accelerator) is not None:
            return ShardedAdafactor(groups, **common)
        return Adafactor(groups, beta1=None, relative_step=False, warmup_init=False, **common)

    def rate(self, step: int, steps: int) -> float:
        """The schedule; warm-up is in steps."""
        warm = min(self.config.warmup_steps, steps - 1) / steps
        return scheduled(step, steps, self.config.schedule, warm)

    def clip(self, optimizer: Any) -> None:
        """Clips the gradients' norm where the settings say so."""
        if self.config.max_grad_norm is not None:
            super().clip(optimizer)


def set_dropout(model: nn.Module, p: float) -> None:
    """Sets all dropout of a T5 model, that of its attention's probabilities too."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = p
        if hasattr(module, "relative_attention_num_buckets"):
            module.dropout = p  # type: ignore[assignment]
        if hasattr(module, "config"):
            module.config.dropout_rate = p  # type: ignore[union-attr]


@torch.no_grad()
def held_out_loss(
    model: Any, draws: Draws, *, rows: int = 64, batch_size: int = 16
) -> dict[str, float]:
    """Nats per label token of the first rows of each corpus, the same spans each time: ``loss``, and by corpus."""
    was, device = model.training, model.shared.weight.device
    model.eval()
    found, losses, tokens = {}, 0.0, 0
    for name, length in draws.data.sizes.items():
        sums, counts = 0.0, 0
        for at in range(0, min(rows, length), batch_size):
            batch = draws.some(name, range(at, min(rows, length, at + batch_size)))
            part = _trimmed(batch, slice(None))
            n = int((part["labels"] != -100).sum())
            out = model(**{k: v.to(device) for k, v in part.items()}, use_cache=False)
            sums, counts = sums + n * float(out.loss), counts + n
        found[f"corpus/{name}"] = sums / max(1, counts)
        losses, tokens = losses + sums, tokens + counts
    model.train(was)
    return {"loss": losses / max(1, tokens)} | found


def train(
    model: Any,
    tokenizer: Any,
    corpora: Corpora,
    config: CodeTrainConfig | None = None,
    *,
    weights: Mapping[str, float] | None = None,
    held_out: Corpora | None = None,
    out: str | Path | None = None,
    resume: bool = True,
    callback: Callback | None = None,
    quiet: bool = True,
    **changes: Any,
) -> CodeRecord:
    """Trains a model in place: pre-training, or fine-tuning with pairs alone. Weights of the best evaluation are kept
    with ``patience``.

    Under ``torchrun`` or ``accelerate launch`` all ranks take part, and make the same steps as one process.

    Args:
        model: of :func:`build_model` or :func:`load_model`; its head must be its own. tokenizer: with as many ids.
        corpora: rows by name: packed rows (``input_ids``: span corruption), or pairs (``source``, ``target``,
            ``source_language``, ``target_language``: translation).
        config: settings; ``changes`` are fields of it. weights: of corpora. held_out: corpora whose loss is measured.
        out: where model, tokenizer and record (``train.json``) go; a run that was killed goes on from ``out/training``,
            with the same call on the same model, unless ``resume`` is False.
        callback: told after every step. quiet: no progress bar.

    Raises:
        ValueError: settings, data, a vocabulary of another length, a folder of another run, ranks that do not divide
            the draws. RuntimeError: a head that is tied. TrainingError: a loss that is not a number.
    """
    config = (config or CodeTrainConfig()).with_changes(**changes)
    check_untied(model)
    check_rows(tokenizer, model.shared.num_embeddings)
    draws = Draws(corpora, tokenizer, config, weights)
    unseen = (
        Draws(held_out, tokenizer, config.with_changes(directions="forward")) if held_out else None
    )
    rows = len(draws.data)
    steps = steps_of(config, rows)
    config = config.with_changes(steps=steps)
    if config.dropout is not None:
        set_dropout(model, config.dropout)
    session = Session(STAGE, model, config, draws.digest(), out, resume)
    record = CodeRecord(config.to_json(), model.config.to_dict(), rows=draws.data.sizes)
    record.parameters = sum(p.numel() for p in model.parameters())
    record.weights = draws.mixture.weights
    start = time.perf_counter()
    with kept_random_state(), session.training() as record.trained:
        best = BestWeights(model, session.folder)
        trainer = CodeTrainer(session.accelerator, config, draws, session.folder, callback, quiet)  # type: ignore[arg-type]
        every = config.eval_every or max(1, rows // config.batch_size)

        def after_step(module: nn.Module, step: int, metrics: Metrics) -> bool:
            _by_task(metrics)
            due = step == steps or (step % every == 0 and (config.eval_every or config.patience))
            if unseen is None or not due:
                return False
            with trainer.whole():
                found = {"step": float(step)} | held_out_loss(model, unseen)
                metrics |= {HELD_OUT + k: v for k, v in found.items()}
                if config.patience is None:
                    return False
                if not best.found or found["loss"] < best.found["loss"]:
                    best.keep(found)
            return step - best.found["step"] >= config.patience * every

        curve = trainer.run(STAGE, model, steps, config.batch_size, trainer.loss_of, after_step)
        record.take_curve(curve)
        session.accelerator.wait_for_everyone()
        best.restore()
        record.best = best.found
    record.seconds = time.perf_counter() - start
    session.finish(record, RECORD, tokenizer)
    return record


def _by_task(metrics: Metrics) -> None:
    for name in TASKS:
        total, share = metrics.pop(f"sum/{name}"), metrics.pop(f"share/{name}")
        if share > 0:
            metrics[name] = total / share
