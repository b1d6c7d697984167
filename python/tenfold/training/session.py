# SPDX-License-Identifier: Apache-2.0
"""What the two trainings share: a claimed work folder, a ready model, what is saved at the end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tenfold.data.models import quiet_transformers
from tenfold.training.batches import model_digest
from tenfold.training.loop import make_accelerator
from tenfold.training.store import WorkFolder


class Session:
    """A run on one model.

    Args:
        stage: its name. model, config: what is trained, and how. data: identifies the data.
        out: where the result is saved; a run that was killed goes on from ``out/training``, unless ``resume`` is False.

    Raises:
        ValueError: a folder of another run.
    """

    def __init__(
        self, stage: str, model: Any, config: Any, data: str, out: str | Path | None, resume: bool
    ) -> None:  # fmt: skip
        self.stage, self.model, self.config = stage, model, config
        self.accelerator = make_accelerator(config, next(model.parameters()).device)
        self.target = None if out is None else Path(out).expanduser()
        self.folder: WorkFolder | None = None
        if self.target is not None:
            self.folder = WorkFolder(self.target / "training", self.accelerator.is_main_process)
            self.accelerator.wait_for_everyone()
            if not resume:
                self._forget()
                self.accelerator.wait_for_everyone()
            self.folder.claim({"config": config.to_json(), "kind": stage, "model": model_digest(model),
                               "data": data})  # fmt: skip
            self.accelerator.wait_for_everyone()  # all ranks have read it

    def _forget(self) -> None:
        assert self.folder is not None
        self.folder.drop_checkpoints(self.stage)
        self.folder.forget("best")
        self.folder.release()

    @contextlib.contextmanager
    def training(self, frozen: tuple[str, ...] = ()) -> Iterator[int]:
        """The model is on its device, with these modules frozen; how many parameters train. Afterwards all do."""
        model = self.model
        model.to(self.accelerator.device)
        if self.config.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        before = {n: p.requires_grad for n, p in model.named_parameters()}
        for name in frozen:
            model.get_submodule(name).requires_grad_(False)
        try:
            yield sum(p.numel() for p in model.parameters() if p.requires_grad)
        finally:
            for name, p in model.named_parameters():
                p.requires_grad_(before[name])
            if self.config.gradient_checkpointing:
                model.gradient_checkpointing_disable()
            model.eval()

    def finish(self, record: Any, name: str, *others: Any, model: Any = None) -> None:
        """Saves model (or what is given in its place), record and what else has ``save_pretrained``.

        Nothing is left to go on from.
        """
        if self.target is None:
            return
        if self.accelerator.is_main_process:
            with quiet_transformers():
                for thing in (self.model if model is None else model, *others):
                    if thing is not None:
                        thing.save_pretrained(str(self.target))
            record.write(self.target / name)
        self.accelerator.wait_for_everyone()
        self._forget()
