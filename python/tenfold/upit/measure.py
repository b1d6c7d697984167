# SPDX-License-Identifier: Apache-2.0
"""What a mixture's experts do: the share of slots each has, over all tokens or by family of texts; losses by family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tenfold.upit.language import lm_loss
from tenfold.upit.mixture import mixture_layers, routings

Rows = Any  # Tensor [R, S], or a mapping of input_ids, labels, attention_mask


def as_rows(rows: Rows) -> dict[str, Tensor]:
    """Rows as a batch with labels."""
    made = (
        {"input_ids": rows}
        if isinstance(rows, Tensor)
        else {k: v for k, v in rows.items() if v is not None}
    )
    if "labels" not in made:
        made["labels"] = made["input_ids"]
        if "attention_mask" in made:
            made["labels"] = made["labels"].masked_fill(made["attention_mask"] == 0, -100)
    return made


@torch.no_grad()
def _over(
    model: Any, rows: Rows, batch_size: int, act: Callable[[dict[str, Tensor]], None]
) -> None:
    batch, device, was = as_rows(rows), next(model.parameters()).device, model.training
    model.eval()
    for at in range(0, len(batch["input_ids"]), batch_size):
        act({k: v[at : at + batch_size].to(device) for k, v in batch.items()})
    model.train(was)


def mean_loss(model: Any, rows: Rows, batch_size: int = 16) -> float:
    """Mean loss (nats) per token that ``labels`` ask for."""
    totals = torch.zeros(2, dtype=torch.float64)

    def act(part: dict[str, Tensor]) -> None:
        count = float((part["labels"][:, 1:] != -100).sum())
        if count:
            totals.add_(torch.tensor([count * float(lm_loss(model, part)), count]))

    _over(model, rows, batch_size, act)
    return float(totals[0] / totals[1].clamp_min(1))


def expert_load(model: Any, rows: Rows, batch_size: int = 16) -> Tensor:
    """Share of slots of every expert in every layer, float64 [L, n]: rows add up to 1; 1 / n each is balance.

    Padding (``attention_mask`` 0) does not count.

    Raises:
        ValueError: the model has no mixture layers.
    """
    layers = mixture_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no mixture layers")
    total = torch.zeros(len(layers), layers[0].count, dtype=torch.float64)

    def act(part: dict[str, Tensor]) -> None:
        mask = part.get("attention_mask")
        with routings(layers) as said:
            model(**{k: v for k, v in part.items() if k != "labels"}, use_cache=False)
        for row, routing in zip(total, said):
            row += routing.counts(mask).double().cpu()

    _over(model, rows, batch_size, act)
    return total / total.sum(1, keepdim=True).clamp_min(1)


def affinity(model: Any, families: Mapping[str, Rows], batch_size: int = 16) -> Tensor:
    """:func:`expert_load` of texts of several families, float64 [L, F, n]: who is chosen for what."""
    if not families:
        raise ValueError("families must be at least one name with rows")
    return torch.stack([expert_load(model, rows, batch_size) for rows in families.values()], 1)


def specialisation(shares: Tensor) -> Tensor:
    """How far families differ in their choice, [L] in [0, 1], of :func:`affinity`'s [L, F, n].

    The mutual information of family and expert (families weigh equally) over its largest value, ln min(F, n).
    """
    layers, families, experts = shares.shape
    if min(families, experts) < 2:
        return torch.zeros(layers, dtype=shares.dtype)
    mean = shares.mean(1, keepdim=True)
    terms = torch.where(shares > 0, shares * (shares / mean.clamp_min(1e-300)).log(), 0.0)
    return terms.sum(2).mean(1) / torch.tensor(float(min(families, experts))).log()
