# SPDX-License-Identifier: Apache-2.0
"""What the three loops (SFT, DPO, continual learning) share: a claimed folder, a trainer, one round."""

from __future__ import annotations

import time
from typing import Any

from torch import nn

from tenfold.hft.config import HFTConfig
from tenfold.hft.freeze import release
from tenfold.hft.record import TuneRecord, plan_summary
from tenfold.hft.training import Draws, HalfTrainer
from tenfold.training.batches import Batches, model_digest
from tenfold.training.loop import Callback, LossOf, make_accelerator
from tenfold.training.recipe import steps_of
from tenfold.training.store import WorkFolder


class Session:
    """A run on one model.

    Args:
        kind: ``sft``, ``dpo`` or ``continual``. model, config: what is trained, and how.
        batches: of every round. work_dir: of checkpoints, None for none.
    """

    trainer_class: type[HalfTrainer] = HalfTrainer

    def __init__(
        self, kind: str, model: nn.Module, config: HFTConfig, batches: list[Batches],
        work_dir: Any, callback: Callback | None, quiet: bool, **identity: Any,
    ) -> None:  # fmt: skip
        self.kind, self.model, self.config, self.batches = kind, model, config, batches
        self.accelerator = make_accelerator(config, next(model.parameters()).device)
        self.folder = WorkFolder(work_dir, self.accelerator.is_main_process) if work_dir else None
        if self.folder:
            self.accelerator.wait_for_everyone()
            self.folder.claim({"config": config.to_json(), "kind": kind, "model": model_digest(model),
                               "data": [b.digest() for b in batches], **identity})  # fmt: skip
            # All ranks have read it before one may finish and release it.
            self.accelerator.wait_for_everyone()
        self.trainer = self.trainer_class(
            self.accelerator, config, batches[0], self.folder, callback, quiet
        )
        self.record = TuneRecord(kind, config.to_json())
        self._steps, self._epochs = 0, 0

    def round(self, number: int, module: Any, loss_of: LossOf) -> list[dict[str, float]]:
        """Trains one round on ``module``, in place; returns the metrics of its steps."""
        batches, config = self.batches[number], self.config
        steps = steps_of(config, batches.rows())
        epoch = max(1, -(-(batches.rows() or steps * config.batch_size) // config.batch_size))
        stage = f"round-{number}"
        trainer = self.trainer
        trainer.batches = batches
        trainer.begin(Draws(config, number, self._steps, epoch, self._epochs))
        start = time.perf_counter()
        curve = trainer.run(stage, module, steps, config.batch_size, loss_of)
        self.record.seconds[stage] = time.perf_counter() - start
        self.record.curves[stage] = curve
        for at in sorted({trainer.draws.at(s) for s in range(steps)}):
            if config.method != "lora":
                self.record.plans.append(plan_summary(trainer.plan(at, module)))
        if number == 0:
            self.record.parameters = sum(p.numel() for p in module.parameters())
            share = self.record.plans[0]["fraction"] if self.record.plans else None
            self.record.trained_parameters = (
                sum(p.numel() for p in module.parameters() if p.requires_grad)
                if share is None else round(share * self.record.parameters)
            )  # fmt: skip
        self._steps += steps
        self._epochs += -(-steps // epoch)
        return curve

    def finish(self, module: nn.Module) -> None:
        """Everything trains again; nothing is left in the folder to go on from."""
        if self.config.method != "lora":
            release(module)
        module.eval()
        if self.folder:
            self.accelerator.wait_for_everyone()
            for number in range(len(self.batches)):
                self.folder.drop_checkpoints(f"round-{number}")
            self.folder.release()
