# SPDX-License-Identifier: Apache-2.0
"""One step of pre-training: its rows as micro-batches, their loss over all ranks' targets; and held-out losses."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.pixelgpt.collate import IGNORE, Batch
from tenfold.pixelgpt.images import without_eos
from tenfold.pixelgpt.streams import MixtureBatches, Streams
from tenfold.pixelgpt.train_config import PretrainConfig
from tenfold.training.loop import Metrics, Pieces
from tenfold.training.recipe import AdamWTrainer

# Modules that only one kind of input goes through.
OF_TEXT, OF_PIXELS = ("model.embed_tokens", "lm_head"), ("model.embed_patches", "pixel_head")
_METRICS = {"token_loss": "ntp", "pixel_loss": "npp"}


def target_counts(batch: Batch, eos_in_loss: bool = True) -> Tensor:
    """(tokens, patches) that are targets in a batch, float64 [2] on its device."""
    device = next(iter(batch.values())).device
    found = torch.zeros(2, dtype=torch.float64, device=device)
    if "labels" in batch:
        found[0] = (batch["labels"][:, 1:] != IGNORE).sum()
    if "pixel_values" in batch:
        mask = batch["patch_mask"]
        found[1] = (mask if eos_in_loss else without_eos(mask))[:, 1:].sum()
    return found


class PretrainLoss(nn.Module):
    """A model with its losses as its forward; what an input does not go through has a gradient of 0.

    So every step is the same for data parallelism and for the optimiser, whatever stream it is of.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, over: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, its parts) of a batch, each divided by ``over`` = (tokens, patches) in the place of its own counts."""
        made = self.model(
            **batch, use_cache=False, return_logits=False, token_count=over[0], patch_count=over[1]
        )
        loss = made.loss
        for used, names in (("input_ids", OF_TEXT), ("pixel_values", OF_PIXELS)):
            if used not in batch and torch.is_grad_enabled():
                # Looked up every time: of a sharded model the gathered ones are others.
                side = (p for n in names for p in self.model.get_submodule(n).parameters())
                loss = loss + sum(0.0 * p.sum() for p in side if p.requires_grad)
        parts = {_METRICS[n]: made[n].detach() for n in _METRICS if made.get(n) is not None}
        return loss, parts


class PretrainTrainer(AdamWTrainer):
    """The loop's part that is pre-training's."""

    config: PretrainConfig
    batches: MixtureBatches
    streams: Streams
    eos_in_loss: bool = True

    def rank_rows(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """This rank's rows, as micro-batches with what the losses of all ranks are divided by."""
        mine = super().rank_rows(batch)
        numbers = mine["input_ids"][:, 0].tolist()
        name = self.batches.names[int(mine["stream"][0, 0])]
        size = self.config.micro_batch_size or len(numbers)
        device = self.accelerator.device
        self.parts = [
            {k: v.to(device) for k, v in self.streams.batch(name, numbers[at : at + size]).items()}
            for at in range(0, len(numbers), size)
        ]
        counts = torch.stack([target_counts(p, self.eos_in_loss) for p in self.parts]).sum(0)
        self.over = self.accelerator.reduce(counts, "sum").float()
        return mine

    def pieces(self, batch: dict[str, Tensor], rows: int | None) -> Pieces:
        """The micro-batches; their losses add up."""
        return [(part, 1.0) for part in self.parts]

    def loss_of(self, model: Any, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Of a micro-batch: gradients, and metrics, are averaged over ranks, and to be added up."""
        ranks = self.accelerator.num_processes
        loss, parts = model(batch, self.over)
        return loss * ranks, {k: v * ranks for k, v in parts.items()}


@torch.no_grad()
def held_out_losses(
    model: Any, streams: Streams, *, batch_size: int = 16, limit: int | None = None, accelerator: Any = None
) -> Metrics:  # fmt: skip
    """Losses over the rows of all streams: ``text/ntp``, ``pixel/npp``, ``pair/npp``, ``pair/ntp``.

    Means over all targets. With an ``accelerator`` its ranks share the rows, and all get the result.

    Args:
        limit: rows per stream, at most.
    """
    was, device = model.training, next(model.parameters()).device
    rank, ranks = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    whole = PretrainLoss(model).eval()
    one = torch.ones(2, device=device)
    found: Metrics = {}
    for name in ("text", "pixel", "pair"):
        rows = range(streams.count(name))[:limit]
        if not rows:
            continue
        sums = torch.zeros(4, dtype=torch.float64, device=device)
        mine = list(rows)[rank::ranks]
        for at in range(0, len(mine), batch_size):
            part = {
                k: v.to(device) for k, v in streams.batch(name, mine[at : at + batch_size]).items()
            }
            with accelerator.autocast() if accelerator else contextlib.nullcontext():
                _, losses = whole(part, one)
            for i, kind in enumerate(_METRICS.values()):
                sums[i] += losses.get(kind, torch.zeros((), device=device)).double()
            sums[2:] += target_counts(part, model.config.eos_in_loss)
        if accelerator:
            sums = accelerator.reduce(sums, "sum")
        values = sums.tolist()
        for i, kind in enumerate(_METRICS.values()):
            if values[2 + i]:
                found[f"{name}/{kind}"] = values[i] / values[2 + i]
    model.train(was)
    return found
