# SPDX-License-Identifier: Apache-2.0
"""Recording inside transformers' Trainer (and its subclasses): one callback."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import Dataset, IterableDataset
from transformers import TrainerCallback

from tenfold.gptfluence.ids import Id
from tenfold.gptfluence.metrics import Metric
from tenfold.gptfluence.recorder import Recorder, dist_on

KEY = "example_rows"


class _Row:
    """An item of the data set with its number; no dict, so that Trainer removes no column of it."""

    def __init__(self, number: int, item: Any) -> None:
        self.number, self.item = number, item

    def __getitem__(self, key: Any) -> Any:
        return self.item[key]


class NumberedRows(Dataset):
    """A data set whose items carry their numbers."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> _Row:
        return _Row(int(number), self.rows[number])


class NumberedCollator:
    """The Trainer's collator, whose batches also have the numbers of their items."""

    def __init__(self, collate: Any) -> None:
        self.collate = collate

    def __call__(self, items: list[Any]) -> Any:
        """Of evaluation items, which carry no numbers, what the Trainer's own collator makes."""
        if not items or not isinstance(items[0], _Row):
            return self.collate(items)
        batch = self.collate([i.item for i in items])
        batch[KEY] = torch.tensor([i.number for i in items])
        return batch


class DynamicsCallback(TrainerCallback):
    """Records a Trainer's run: what was in each batch, and what each step did to test examples.

        callback = DynamicsCallback("runs/000", tests, [LossMetric(rows)])
        trainer = Trainer(..., callbacks=[callback])
        callback.attach(trainer)      # the callback alone does not see batches
        trainer.train()

    Gradient accumulation is one step; several ranks are one run. A run that goes on from a checkpoint goes on in
    the same folder.
    The data set must be map-style. Nothing is recorded of examples that a collator drops or merges.

    Args:
        folder, tests, metrics, every, initial, subset, seed, about: of :class:`~tenfold.gptfluence.recorder.Recorder`.
        ids: of the rows of the training set, or the name of a column; default: their numbers.
    """

    def __init__(
        self,
        folder: str | Path,
        tests: Iterable[Id],
        metrics: Sequence[Metric],
        *,
        ids: Sequence[Id] | str | None = None,
        every: int = 1,
        initial: bool = True,
        subset: int | None = None,
        seed: int = 0,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.recorder = Recorder(
            folder,
            tests,
            metrics,
            every=every,
            initial=initial,
            subset=subset,
            seed=seed,
            about=about,
        )
        self._ids = ids
        self._names: Sequence[Id] | None = None
        self._batch: list[Id] = []
        self._attached = False

    def attach(self, trainer: Any) -> DynamicsCallback:
        """Lets this trainer's batches carry the numbers of their rows, and reads them; of this object alone.

        Raises TypeError for an iterable-style data set, ValueError for ids of another number than its rows.
        """
        rows = trainer.train_dataset
        if rows is None or isinstance(rows, IterableDataset) or not hasattr(rows, "__getitem__"):
            raise TypeError(f"recording needs a map-style training set, got {type(rows).__name__}")
        self._names = [r[self._ids] for r in rows] if isinstance(self._ids, str) else self._ids
        if self._names is not None and len(self._names) != len(rows):
            raise ValueError(f"there are {len(self._names)} ids for {len(rows)} training examples")
        # What the Trainer would drop of items that are dicts is dropped inside.
        inner = trainer._get_collator_with_removed_columns(trainer.data_collator, "training")
        trainer.train_dataset = NumberedRows(rows)
        trainer.data_collator = NumberedCollator(inner)
        step = trainer.training_step

        def training_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            numbers = inputs.pop(KEY).tolist()
            self._batch += numbers if self._names is None else [self._names[i] for i in numbers]
            return step(model, inputs, *args, **kwargs)

        trainer.training_step = training_step
        self._attached = True
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Opens the folder, at the step from which the run goes on."""
        if not self._attached:
            raise RuntimeError("call DynamicsCallback.attach(trainer) before trainer.train()")
        self._batch = []
        self.recorder.begin(kwargs["model"], state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Records the step's batch, of all ranks, and measures."""
        mine, self._batch = self._batch, []
        if dist_on():
            parts: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(parts, mine)
            mine = [name for part in parts for name in part]
        self.recorder.step(kwargs["model"], mine)
        if state.global_step >= state.max_steps:
            # Now: before on_train_end the Trainer may load another state, its best one.
            self.recorder.finish(kwargs["model"])

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A checkpoint must not know more than the folder."""
        self.recorder.flush()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Closes a run that ended early: measures its last state."""
        if not self.recorder.finished:
            self.recorder.finish(kwargs["model"])
