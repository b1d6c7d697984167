# SPDX-License-Identifier: Apache-2.0
"""Continual learning: one task after the other, a new half for each, and what is forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tenfold.hft.baselines import merge_lora, prepared
from tenfold.hft.config import HFTConfig
from tenfold.hft.record import TuneRecord
from tenfold.hft.session import Session
from tenfold.hft.training import lm_step
from tenfold.training.batches import Batches
from tenfold.training.loop import Callback, kept_random_state
from tenfold.training.scoring import score
from tenfold.training.tasks import Task

MEASURES = ("log_prob", "accuracy")


def continual(
    model: Any,
    tasks: Sequence[Task],
    config: HFTConfig | None = None,
    *,
    work_dir: str | None = None,
    callback: Callback | None = None,
    quiet: bool = True,
    **changes: Any,
) -> TuneRecord:
    """Trains on one task after the other, in place, and scores all tasks after each.

    Every task is a round: with ``reselect="round"`` each has its own draw, and optimiser and schedule
    begin anew. Arguments as in :func:`tenfold.hft.sft`.

    Returns:
        The record: ``scores[measure][t][i]`` on task i after task t, for ``log_prob`` and ``accuracy``.
    """
    config = (config or HFTConfig.from_preset("trace")).with_changes(**changes)
    if not tasks:
        raise ValueError("continual learning needs at least one task")
    batches = [
        Batches(t.train, config.sequence_length, config.seed + i) for i, t in enumerate(tasks)
    ]
    session = Session("continual", model, config, batches, work_dir, callback, quiet,
                      tasks=[t.name for t in tasks])  # fmt: skip
    record, folder = session.record, session.folder
    record.tasks = [t.name for t in tasks]
    record.scores = {m: [] for m in MEASURES}

    def judged(module: Any) -> dict[str, list[float]]:
        found = [score(module, t.test) for t in tasks]
        return {m: [f[m] for f in found] for m in MEASURES}

    with kept_random_state():
        module = prepared(model, config)
        record.start = judged(module)
        for number in range(len(tasks)):
            done = folder.load(f"round-{number}") if folder else None
            if done is not None:
                _skip(session, number, module, done)
                continue
            session.round(number, module, lm_step)
            for measure, values in judged(module).items():
                record.scores[measure].append(values)
            if folder:
                _keep(session, number, module)
    session.finish(module)
    if folder:
        for number in range(len(tasks)):
            folder.forget(f"round-{number}")
    if config.method == "lora":
        merge_lora(module)
    return record


def _keep(session: Session, number: int, module: Any) -> None:
    """Stores a finished round: the weights, and all numbers so far."""
    folder, stage = session.folder, f"round-{number}"
    assert folder is not None
    state = {n: p for n, p in module.named_parameters()}
    counts = {"steps": session._steps, "epochs": session._epochs}
    folder.save(stage, {"record": session.record.to_json(), **counts}, state)
    session.accelerator.wait_for_everyone()
    folder.drop_checkpoints(stage)


def _skip(session: Session, number: int, module: Any, done: dict[str, Any]) -> None:
    """Goes on after a finished round: weights and numbers come from the folder."""
    folder = session.folder
    assert folder is not None
    if (folder.path / f"round-{number + 1}.json").exists():
        return  # a later round has all that is needed
    with torch.no_grad():
        saved = folder.load_tensors(f"round-{number}")
        for name, parameter in module.named_parameters():
            parameter.copy_(saved[name])
    values = dict(done["record"])
    values.pop("summary")
    for key, value in values.items():
        setattr(session.record, key, value)
    session._steps, session._epochs = done["steps"], done["epochs"]
