# SPDX-License-Identifier: Apache-2.0
"""Training reward model and trace writer as one: on accelerate, on any number of ranks, resumed exactly.

Held-out pairs are scored on the way, and the weights that rank most of them right are kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from tenfold.rlhf.reward_training import RewardRecord, without_dropout
from tenfold.themis.collate import AnyPair, EncodedPair, encode_pairs
from tenfold.themis.config import ThemisConfig
from tenfold.themis.data import Pair
from tenfold.themis.model import ThemisRewardModel, check_embeddings
from tenfold.themis.steps import JointLoss, PairBatches, ThemisTrainer, means, score_gold
from tenfold.themis.traces import TraceFormat
from tenfold.training.batches import model_digest
from tenfold.training.best import BestWeights
from tenfold.training.loop import Callback, Metrics, kept_random_state, make_accelerator
from tenfold.training.lora import with_lora
from tenfold.training.recipe import steps_of
from tenfold.training.store import WorkFolder

STAGE = "themis"
RECORD = "themis.json"
_BEST = "best"
_HELD_OUT = "validation/"


@dataclass
class ThemisRecord(RewardRecord):
    """The numbers of one run.

    Attributes:
        curve: metrics of every step: loss, loss/rm, loss/lm, loss by class of tokens (loss/tool, ...), accuracy,
            margin. validation: the same over the held-out pairs, with ``step`` and ``epoch``, in order; ``before``
            and ``after`` are the untrained model's and the kept one's.
        best: the entry of ``validation`` whose weights were kept. trained: parameters that trained.
    """

    validation: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, float] = field(default_factory=dict)
    trained: int = 0


class _Keeper:
    """Scores the held-out pairs on the way, and keeps the best weights: in the work folder, else in memory."""

    def __init__(
        self, model: Any, score: Callable[[], Metrics], folder: WorkFolder | None, pairs: int, config: ThemisConfig
    ) -> None:  # fmt: skip
        self.score = score
        self.kept = BestWeights(model, folder, _BEST)
        self.epoch = pairs / config.batch_size  # steps, not always whole
        self.every = config.eval_every or max(1, round(self.epoch))

    def after(self, step: int, last: bool, whole: Callable[[], Any]) -> Metrics:
        """What is logged of a step: scores of the weights as they are after it, if they are due.

        ``whole`` gives a context in which all weights are there.
        """
        if step % self.every and not last:
            return {}
        with whole():
            found = {"step": float(step), "epoch": step / self.epoch} | self.score()
            if not self.kept.found or _rank(found) > _rank(self.kept.found):
                self.kept.keep(found)
        return {_HELD_OUT + name: value for name, value in found.items()}

    def restore(self, record: ThemisRecord) -> None:
        """Puts the best weights in, and takes the scores out of the curve."""
        self.kept.restore()
        record.best = self.kept.found
        record.after = {k: v for k, v in self.kept.found.items() if k not in ("step", "epoch")}
        for metrics in record.curve:
            names = [k for k in metrics if k.startswith(_HELD_OUT)]
            if names:
                record.validation.append({k.removeprefix(_HELD_OUT): metrics.pop(k) for k in names})


def _rank(found: Metrics) -> tuple[float, float]:
    return found["accuracy"], -found["loss"]


def adapters(model: Any, config: ThemisConfig) -> Any:
    """Puts LoRA into a reward model, in place; value head, LM head and embeddings train fully. PEFT's model."""
    into, out = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    tied = into.weight is out.weight
    whole = [names[id(m)] for m in ((model.score, into) if tied else (model.score, into, out))]
    return with_lora(model, config.lora_rank, config.lora_alpha, config.lora_targets,
                     dropout=config.lora_dropout, whole=whole, tied=tied)  # fmt: skip


@contextlib.contextmanager
def _trainable(model: Any, config: ThemisConfig) -> Iterator[Any]:
    """PEFT's model, or None; afterwards all trains again that did, and adapters are part of the weights."""
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    wrapped = adapters(model, config) if config.lora_rank else None
    out = model.get_output_embeddings()
    if config.alpha == 0 and out.weight is not model.get_input_embeddings().weight:
        out.requires_grad_(False)  # without a part in the loss
    try:
        yield wrapped
    finally:
        if wrapped is not None:
            wrapped.merge_and_unload()
            model.tie_weights()
        for name, p in model.named_parameters():
            p.requires_grad_(before[name])


def _digest(pairs: Sequence[AnyPair]) -> str:
    made = hashlib.sha256()
    for item in pairs:
        pair = item.pair if isinstance(item, EncodedPair) else item
        made.update(json.dumps(dataclasses.asdict(pair), sort_keys=True, default=str).encode())
    return made.hexdigest()[:16]


def _claimed(target: Path, accelerator: Any, resume: bool, identity: dict[str, Any]) -> WorkFolder:
    """The work folder of a run, made its own on all ranks."""
    folder = WorkFolder(target / "training", accelerator.is_main_process)
    accelerator.wait_for_everyone()
    if not resume:
        _forget(folder)
        accelerator.wait_for_everyone()
    folder.claim(identity)
    accelerator.wait_for_everyone()  # all ranks have read it
    return folder


def _forget(folder: WorkFolder) -> None:
    folder.drop_checkpoints(STAGE)
    folder.forget(_BEST)
    folder.release()


def _encoded(
    model: Any, pairs: Sequence[Pair], format: TraceFormat, config: ThemisConfig
) -> list[EncodedPair]:
    """Checks what training needs; the pairs in tokens."""
    if not pairs:
        raise ValueError("pairs is empty")
    check_embeddings(model, format)
    if format.max_length != config.max_length:
        raise ValueError(
            f"format cuts rows to max_length={format.max_length} tokens, the settings say {config.max_length}"
        )
    made = _rows(pairs, format, config)
    if not made:
        raise ValueError(f"none of the {len(pairs)} pairs can be encoded")
    return made


def _rows(pairs: Sequence[Pair], format: TraceFormat, config: ThemisConfig) -> list[EncodedPair]:
    return encode_pairs(pairs, format, inputs=config.inputs, drop_rationale=config.drop_rationale,
                        on_bad=config.on_bad)  # fmt: skip


def _ready(model: Any, format: TraceFormat, config: ThemisConfig) -> None:
    """Makes the model's settings those of the run."""
    model.config.themis["pooling"] = config.pooling
    if model.config.pad_token_id is None:
        model.config.pad_token_id = format.ids.pad
    if not config.dropout:
        without_dropout(model)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})


def train_themis(
    model: ThemisRewardModel,
    pairs: Sequence[Pair],
    format: TraceFormat,
    config: ThemisConfig | None = None,
    *,
    validation: Sequence[Pair] = (),
    out: str | Path | None = None,
    resume: bool = True,
    tokenizer: Any = None,
    callback: Callback | None = None,
    quiet: bool = True,
    **changes: Any,
) -> ThemisRecord:
    """Trains a reward model on pairs with traces, in place.

    Under ``torchrun`` or ``accelerate launch`` all ranks take part; they make the same steps as one process.

    Args:
        model: what :meth:`ThemisRewardModel.from_pretrained` gives. pairs: of :mod:`tenfold.themis.data`.
        format: of the model's tokenizer; rows are cut to ``config.max_length`` by it.
        config: settings, default :class:`ThemisConfig`; ``changes`` are fields of it.
        validation: held-out pairs; they are scored before, on the way and after, and the weights with the highest
            accuracy (of equal ones the lowest loss) are what is left in the model.
        out: where model, record (``themis.json``), adapters (LoRA) and ``tokenizer`` are saved; a run that was killed
            goes on from ``out/training``, with the same call on the same model, unless ``resume`` is False.
        callback: told after every step. quiet: no progress bar.

    Raises:
        ValueError: settings, no pairs, a model without embeddings for the special tokens, a folder of another run.
        TrainingError: a loss that is not a number.
    """
    config = (config or ThemisConfig()).with_changes(**changes)
    encoded, held_out = _encoded(model, pairs, format, config), _rows(validation, format, config)
    accelerator = make_accelerator(config, next(model.parameters()).device)
    target = None if out is None else Path(out).expanduser()
    folder = None
    if target is not None:
        identity = {"config": config.to_json(), "kind": STAGE, "model": model_digest(model),
                    "data": _digest(encoded), "validation": _digest(held_out)}  # fmt: skip
        folder = _claimed(target, accelerator, resume, identity)
    _ready(model, format, config)
    record = ThemisRecord(config.to_json(), pairs=len(encoded))
    record.parameters = sum(p.numel() for p in model.parameters())
    model.to(accelerator.device)
    start = time.perf_counter()
    with kept_random_state():
        keeper = _Keeper(model, lambda: score_gold(model, held_out, format, config, accelerator=accelerator),
                         folder, len(encoded), config) if held_out else None  # fmt: skip
        if keeper:
            record.before = keeper.score()
        with _trainable(model, config) as wrapped:
            record.trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            trainer = ThemisTrainer(
                accelerator, config, PairBatches(len(encoded), config.seed), folder, callback, quiet
            )
            trainer.pairs, trainer.format = encoded, format
            steps = steps_of(config, len(encoded))

            def after_step(module: nn.Module, step: int, metrics: Metrics) -> bool:
                means(metrics)
                if keeper:
                    metrics |= keeper.after(step, step == steps, trainer.whole)
                return False

            record.curve = trainer.run(
                STAGE,
                JointLoss(model, config),
                steps,
                config.batch_size,
                trainer.loss_of,
                after_step,
            )
            accelerator.wait_for_everyone()
            if keeper:
                keeper.restore(record)
            if wrapped is not None and target is not None and accelerator.is_main_process:
                wrapped.save_pretrained(str(target / "adapter"))
    record.seconds = time.perf_counter() - start
    model.eval()
    if folder is not None:
        if accelerator.is_main_process:
            _save(model, record, folder.path.parent, tokenizer)
        accelerator.wait_for_everyone()
        _forget(folder)
    return record


def _save(model: Any, record: ThemisRecord, target: Path, tokenizer: Any) -> None:
    model.save_pretrained(str(target))
    if tokenizer is not None:
        tokenizer.save_pretrained(str(target))
    record.write(target / RECORD)
