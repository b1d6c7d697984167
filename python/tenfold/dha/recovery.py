# SPDX-License-Identifier: Apache-2.0
"""Continued pre-training of a converted model, optionally with the parent as its teacher."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tenfold.dha.config import DhaConfig
from tenfold.dha.training import Trainer
from tenfold.training.batches import Batches, Data, model_digest
from tenfold.training.loop import Callback, Metrics, kept_random_state, make_accelerator
from tenfold.training.store import WorkFolder


def distillation_loss(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float
) -> Tensor:
    """Mean KL(teacher || student) over the positions that predict a label, times temperature^2.

    student, teacher [B, S, V] logits; labels [B, S], -100 where nothing is predicted.
    """
    used = labels[:, 1:] != -100
    ours = F.log_softmax(student[:, :-1][used].float() / temperature, -1)
    theirs = F.log_softmax(teacher[:, :-1][used].float() / temperature, -1)
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * temperature**2


@contextlib.contextmanager
def teaching(teacher: Any | None, device: torch.device) -> Iterator[None]:
    """The teacher is on ``device`` and in eval mode inside, and as it was afterwards."""
    if teacher is None:
        yield
        return
    home = next(teacher.parameters()).device
    modes = [(module, module.training) for module in teacher.modules()]
    teacher.to(device).eval()
    try:
        yield
    finally:
        teacher.to(home)
        for module, mode in modes:
            module.training = mode


def train_recovery(trainer: Trainer, model: Any, teacher: Any | None) -> list[Metrics]:
    """The recovery stage on ``model``, in place."""
    config = trainer.config
    share = config.distill if teacher is not None else 0.0
    guide: Any = teacher

    def loss_of(
        student: Any, batch: dict[str, Tensor], step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        out = student(**batch, use_cache=False)
        if share == 0:
            return out.loss, {"lm": out.loss.detach()}
        with torch.no_grad():
            logits = guide(
                **{k: v for k, v in batch.items() if k != "labels"}, use_cache=False
            ).logits
        kl = distillation_loss(out.logits, logits, batch["labels"], config.temperature)
        loss = (1 - share) * out.loss + share * kl
        return loss, {"lm": out.loss.detach(), "kl": kl.detach()}

    with teaching(teacher, trainer.accelerator.device):
        return trainer.run(
            "recovery", model, config.recovery_steps, config.recovery_batch_size, loss_of
        )


def recover(
    model: Any,
    data: Data,
    config: DhaConfig | None = None,
    *,
    teacher: Any | None = None,
    work_dir: str | None = None,
    callback: Callback | None = None,
    quiet: bool = True,
    **changes: Any,
) -> list[Metrics]:
    """Trains a DHA model further, in place.

    Args:
        model: a ``DhaLlamaForCausalLM`` (or any causal LM). data: as in ``convert``.
        config: ``recovery_steps``, ``recovery_batch_size``, rates, ``distill`` and so on.
        teacher: the parent, read where ``distill`` > 0; it is not changed.
        work_dir: for checkpoints; a run that was killed goes on there, with the same call on the model
            as it was before.
        callback, quiet, changes: as in ``convert``.

    Returns:
        The metrics of every step.

    Raises:
        ValueError: ``distill`` without a teacher; a work folder of another run. ConversionError: a
            loss that is not a number.
    """
    config = (config or DhaConfig()).with_changes(**changes)
    if config.distill > 0 and teacher is None:
        raise ValueError(f"distill {config.distill} needs a teacher: the model before conversion")
    accelerator = make_accelerator(config, next(model.parameters()).device)
    folder = WorkFolder(work_dir, accelerator.is_main_process) if work_dir else None
    batches = Batches(data, config.sequence_length, config.seed)
    guide = teacher if config.distill > 0 else None
    if folder:
        accelerator.wait_for_everyone()
        folder.claim({"config": config.to_json(), "model": model_digest(model),
                      "teacher": model_digest(guide) if guide is not None else None,
                      "data": batches.digest()})  # fmt: skip
    dtype = next(model.parameters()).dtype
    with kept_random_state():
        trainer = Trainer(accelerator, config, batches, folder, callback, quiet)
        curve = train_recovery(trainer, model.float(), guide)
    model.to(dtype).eval()
    if folder:
        # All ranks have read what there was. The trained model is the caller's to keep.
        accelerator.wait_for_everyone()
        folder.drop_checkpoints("recovery")
        folder.release()
    return curve
