# SPDX-License-Identifier: Apache-2.0
"""One step of Themis training: its pairs as micro-batches, their loss, and what is logged of it.

A step's pairs are a function of the step; their loss is normalised over all of them, however they are split into
micro-batches and ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.rlhf.reward_training import RewardTrainer
from tenfold.themis.collate import AnyPair, collate
from tenfold.themis.config import ThemisConfig
from tenfold.themis.objective import CLASS_NAMES, Normaliser, ThemisLoss, joint_loss
from tenfold.themis.traces import TraceFormat
from tenfold.training.batches import Batches
from tenfold.training.loop import Metrics, Pieces


class JointLoss(nn.Module):
    """A reward model with its loss as its forward, so that data parallelism sees one forward for both heads."""

    def __init__(self, model: Any, config: ThemisConfig) -> None:
        super().__init__()
        self.model, self.config = model, config

    def forward(self, batch: dict[str, Tensor], normaliser: Normaliser | None = None) -> ThemisLoss:
        """The loss of a batch of :func:`~tenfold.themis.collate.collate`."""
        if "offsets" in batch:
            hidden = self.model.packed_hidden(batch["ids"], batch["position_ids"])
        else:
            hidden = self.model.hidden(batch["ids"], batch["mask"])
        x, weight, v = hidden, None, self.model.score.weight
        if self.config.alpha > 0:
            x, weight, v = self.model.operands(hidden)
        return joint_loss(x, batch, weight, v, self.config, normaliser=normaliser)


class PairBatches(Batches):
    """Numbers of pairs, and the step that they are for."""

    def __init__(self, count: int, seed: int) -> None:
        super().__init__({"input_ids": torch.arange(count)[:, None]}, 1, seed)

    def take(self, stage: str, step: int, size: int) -> dict[str, Tensor]:
        """The pairs of a step."""
        ids = super().take(stage, step, size)["input_ids"]
        return {"input_ids": ids, "step": torch.full_like(ids, step)}


def _sums(made: ThemisLoss, over: Normaliser) -> dict[str, Tensor]:
    """What adds up over micro-batches and ranks; :func:`means` makes metrics of the sums."""
    found = {"loss/rm": made.rm.detach(), "loss/lm": made.lm.detach(),
             "accuracy": made.correct / over.pairs, "margin": made.delta.detach().sum() / over.pairs}  # fmt: skip
    for i, name in CLASS_NAMES.items():
        found |= {f"sum/{name}": made.nll_sum[i], f"count/{name}": made.nll_count[i]}
    return found


def means(sums: Metrics) -> Metrics:
    """Sums of losses by class become their means, in place."""
    for name in CLASS_NAMES.values():
        total, count = sums.pop(f"sum/{name}"), sums.pop(f"count/{name}")
        if count:
            sums[f"loss/{name}"] = total / count
    return sums


class ThemisTrainer(RewardTrainer):
    """The loop's part that is Themis's."""

    config: ThemisConfig  # type: ignore[assignment]
    pairs: Sequence[AnyPair]
    format: TraceFormat

    def rank_rows(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """This rank's pairs, as micro-batches with what the loss of all ranks is divided by."""
        mine = super().rank_rows(batch)
        numbers, step = mine["input_ids"][:, 0].tolist(), int(mine["step"][0, 0])
        size = self.config.micro_batch_size or len(numbers)
        self.parts = [
            collated([self.pairs[i] for i in numbers[at : at + size]], self.format, self.config,
                     self.accelerator.device, step=step)
            for at in range(0, len(numbers), size)
        ]  # fmt: skip
        mine_of = [Normaliser.of(part, self.config) for part in self.parts]
        totals = torch.tensor(
            [[n.weight, n.pairs] for n in mine_of],
            dtype=torch.float64,
            device=self.accelerator.device,
        )
        self.over = Normaliser(*self.accelerator.reduce(totals.sum(0), "sum").tolist())
        return mine

    def pieces(self, batch: dict[str, Tensor], rows: int | None) -> Pieces:
        """The micro-batches; their losses add up."""
        return [(part, 1.0) for part in self.parts]

    def loss_of(
        self, model: Any, batch: dict[str, Tensor], step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Of a micro-batch: gradients, and metrics, are averaged over ranks, and to be added up."""
        ranks = self.accelerator.num_processes
        made = model(batch, self.over)
        return made.loss * ranks, {k: v * ranks for k, v in _sums(made, self.over).items()}


def collated(
    pairs: Sequence[AnyPair], format: TraceFormat, config: ThemisConfig, device: Any, *, step: int | None = None
) -> dict[str, Tensor]:  # fmt: skip
    """A batch as the settings want it; observations are dropped in training alone (``step`` is given)."""
    batch = collate(
        pairs, format, beta=config.beta, omega=config.omega, lm_on_positive=config.lm_on_positive,
        obs_dropout=config.obs_dropout if step is not None else 0.0, drop_rationale=config.drop_rationale,
        inputs=config.inputs, seed=config.seed, step=step or 0, packed=config.packed,
    )  # fmt: skip
    return {k: v.to(device) for k, v in batch.items()}


@torch.no_grad()
def score_gold(
    model: Any, pairs: Sequence[AnyPair], format: TraceFormat, config: ThemisConfig, *,
    batch_size: int = 16, accelerator: Any = None,
) -> Metrics:  # fmt: skip
    """Loss and metrics over pairs whose traces are given (no tool is called); a tie is wrong.

    With an ``accelerator`` its ranks share the pairs, and all get the result.
    """
    was, device = model.training, next(model.parameters()).device
    rank, ranks = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    whole = JointLoss(model, config).eval()
    own = Normaliser(1.0, 1.0)  # sums; they are divided when all are there
    found: dict[str, Tensor] = {}
    total = Normaliser(0.0, 0.0)
    mine = pairs[rank::ranks]
    # A rank without pairs of its own needs the names of what is added up.
    for at in range(0, max(len(mine), 1), batch_size):
        part = mine[at : at + batch_size] or pairs[:1]
        batch = collated(part, format, config, device)
        with accelerator.autocast() if accelerator else contextlib.nullcontext():
            made = _sums(whole(batch, own), own)
        share = 1.0 if mine else 0.0
        for name, value in made.items():
            found[name] = found.get(name, torch.zeros((), device=device)) + share * value
        if mine:
            total += Normaliser.of(batch, config)
    model.train(was)
    names = sorted(found)
    values = torch.stack([*(found[n].double() for n in names),
                          *torch.tensor([total.weight, total.pairs], dtype=torch.float64, device=device)])  # fmt: skip
    if accelerator:
        values = accelerator.reduce(values, "sum")
    *sums, weight, count = values.tolist()
    metrics = dict(zip(names, sums))
    for name in ("loss/rm", "accuracy", "margin"):
        metrics[name] /= count
    metrics["loss/lm"] /= weight or 1.0
    metrics["loss"] = config.rm_coef * metrics["loss/rm"] + config.alpha * metrics["loss/lm"]
    return means(metrics)
