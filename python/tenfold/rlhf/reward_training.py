# SPDX-License-Identifier: Apache-2.0
"""Training a reward model on pairs of answers: on accelerate, on any number of ranks, resumed exactly."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.rlhf.reward_config import RewardConfig
from tenfold.rlhf.reward_losses import bradley_terry_loss, pair_metrics, token_span_loss
from tenfold.rlhf.reward_model import last_index
from tenfold.training.batches import Batches, Data, model_digest
from tenfold.training.loop import Callback, kept_random_state, make_accelerator
from tenfold.training.recipe import AdamWTrainer, steps_of
from tenfold.training.store import WorkFolder, write_text

STAGE = "reward"
_NEEDED = ("input_ids", "attention_mask", "rejected_input_ids", "rejected_attention_mask")


@dataclass
class RewardRecord:
    """The numbers of one run.

    Attributes:
        config: its settings. curve: metrics of every step (loss, accuracy, margin, chosen, rejected).
        before, after: the same over the held-out pairs; empty without them.
        seconds: of training. pairs: of the data (None: a function). parameters: all of them.
    """

    config: dict[str, Any]
    curve: list[dict[str, float]] = field(default_factory=list)
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    pairs: int | None = None
    parameters: int = 0

    def write(self, path: str | Path) -> None:
        """Writes all fields to a JSON file."""
        write_text(Path(path), json.dumps(asdict(self)) + "\n")

    @classmethod
    def read(cls, path: str | Path) -> RewardRecord:
        """Reads what :meth:`write` wrote."""
        return cls(**json.loads(Path(path).read_text()))


class RewardTrainer(AdamWTrainer):
    """The loop's part that is a reward model's."""

    config: RewardConfig


def _joined(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(ids, mask) [2B, S'] of chosen and rejected rows, without the columns in which all are padding."""
    ids = torch.cat([batch["input_ids"], batch["rejected_input_ids"]])
    mask = torch.cat([batch["attention_mask"], batch["rejected_attention_mask"]]).bool()
    used = mask.any(0).nonzero().flatten()
    if used.numel():
        span = slice(int(used[0]), int(used[-1]) + 1)
        ids, mask = ids[:, span], mask[:, span]
    return ids, mask


def reward_step(
    model: Any, batch: dict[str, Tensor], rm_loss: str = "bradley_terry", center: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and metrics of a batch of pairs, in one forward of all answers."""
    ids, mask = _joined(batch)
    if rm_loss == "bradley_terry":
        chosen, rejected = model(ids, mask).chunk(2)
        return bradley_terry_loss(chosen, rejected, center), pair_metrics(chosen, rejected)
    values = model(ids, mask, values=True)
    pair, tokens, masks = values.chunk(2), ids.chunk(2), mask.chunk(2)
    padded = rm_loss == "token_span_padded"
    loss = token_span_loss(pair[0], pair[1], tokens[0], tokens[1], masks[0], masks[1], padded)
    scores = values.gather(1, last_index(mask)[:, None]).squeeze(1)
    return loss, pair_metrics(*scores.chunk(2))


def _check_data(data: Any) -> None:
    missing = [k for k in _NEEDED if k not in data] if isinstance(data, dict) else list(_NEEDED)
    if missing:
        raise ValueError(
            f"data of a reward model must be a dict that has {', '.join(missing)}, too"
        )


@torch.no_grad()
def score_pairs(
    model: nn.Module,
    data: dict[str, Tensor],
    rm_loss: str = "bradley_terry",
    batch_size: int = 16,
) -> dict[str, float]:
    """Loss and metrics of a reward model over pairs, as ``encode_preferences`` makes them."""
    _check_data(data)
    was, device = model.training, next(model.parameters()).device
    model.eval()
    size = len(data["input_ids"])
    sums: dict[str, float] = {}
    for at in range(0, size, batch_size):
        part = {k: data[k][at : at + batch_size].to(device) for k in _NEEDED}
        loss, metrics = reward_step(model, part, rm_loss)
        for name, value in ({"loss": loss} | metrics).items():
            sums[name] = sums.get(name, 0.0) + float(value) * len(part["input_ids"]) / size
    model.train(was)
    return sums


def without_dropout(model: nn.Module) -> None:
    """Turns a model's own dropout off, for training too."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]


def train_reward_model(
    model: nn.Module,
    data: Data,
    config: RewardConfig | None = None,
    *,
    held_out: dict[str, Tensor] | None = None,
    work_dir: str | Path | None = None,
    callback: Callback | None = None,
    quiet: bool = True,
    **changes: Any,
) -> RewardRecord:
    """Trains a reward model on pairs, in place.

    Args:
        model: a :class:`~tenfold.rlhf.reward_model.RewardModel`, or any module with its ``forward``.
        data: a dict of [N, S] tensors as ``encode_preferences`` makes them, or a function (stage, step, size)
            -> such rows. held_out: pairs that are scored before and after.
        config: settings, default :class:`RewardConfig`; ``changes`` are fields of it.
        work_dir: for checkpoints; a run that was killed goes on there, with the same call on the same model.
        callback: told after every step. quiet: no progress bar.

    Returns:
        The record of the run.

    Raises:
        ValueError: settings, data, a work folder of another run. TrainingError: a loss that is not a number.
    """
    config = (config or RewardConfig()).with_changes(**changes)
    if not callable(data):
        _check_data(data)
        data = {k: data[k] for k in _NEEDED}
    batches = Batches(data, config.sequence_length, config.seed)
    accelerator = make_accelerator(config, next(model.parameters()).device)
    folder = WorkFolder(work_dir, accelerator.is_main_process) if work_dir else None
    if folder:
        accelerator.wait_for_everyone()
        folder.claim({"config": config.to_json(), "kind": STAGE, "model": model_digest(model),
                      "data": batches.digest()})  # fmt: skip
        # All ranks have read it before one may finish and release it.
        accelerator.wait_for_everyone()
    record = RewardRecord(config.to_json(), pairs=batches.rows())
    record.parameters = sum(p.numel() for p in model.parameters())
    if held_out is not None:
        record.before = score_pairs(model, held_out, config.rm_loss)
    if not config.dropout:
        without_dropout(model)
    if config.gradient_checkpointing:
        model.trunk.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[union-attr,operator]

    def loss_of(
        wrapped: Any, batch: dict[str, Tensor], step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return reward_step(wrapped, batch, config.rm_loss, config.center)

    trainer = RewardTrainer(accelerator, config, batches, folder, callback, quiet)
    start = time.perf_counter()
    with kept_random_state():
        steps = steps_of(config, batches.rows())
        record.curve = trainer.run(STAGE, model, steps, config.batch_size, loss_of)
    record.seconds = time.perf_counter() - start
    model.eval()
    if held_out is not None:
        record.after = score_pairs(model, held_out, config.rm_loss)
    if folder:
        accelerator.wait_for_everyone()
        folder.drop_checkpoints(STAGE)
        folder.release()
    return record
