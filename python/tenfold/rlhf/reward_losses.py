# SPDX-License-Identifier: Apache-2.0
"""Losses of reward models over pairs of answers (MA-RLHF, spec section 3.11), c chosen and r rejected.

bradley_terry        mean over pairs of -log sigmoid(c - r), scores at the last tokens
token_span           per pair, the mean of -log sigmoid(c_j - r_j) over the positions j from the first token
                     that differs on to where the shorter answer ends: padding has no part in it
token_span_padded    the same to where the longer answer ends, with the shorter one's padding, as
                     DeepSpeed-Chat and the paper's published code have it
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

RM_LOSSES = ("bradley_terry", "token_span", "token_span_padded")


def _check(name: str, value: Tensor, like: Tensor) -> None:
    if value.shape != like.shape:
        raise ValueError(f"{name} must be {list(like.shape)} as chosen, got {list(value.shape)}")


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, center: float = 0.0) -> Tensor:
    """Mean of -log sigmoid(chosen - rejected) over pairs [B], plus ``center`` * mean (chosen + rejected)^2.

    Raises ValueError: other shapes than [B] and [B], B >= 1.
    """
    if chosen.ndim != 1 or chosen.numel() == 0:
        raise ValueError(
            f"chosen must be scores [B] of at least one pair, got {list(chosen.shape)}"
        )
    _check("rejected", rejected, chosen)
    loss = -F.logsigmoid(chosen - rejected).mean()
    return loss + center * (chosen + rejected).square().mean() if center else loss


def align_left(values: Tensor, mask: Tensor) -> Tensor:
    """Rows [B, S] with what ``mask`` holds moved to the left, in order; the rest behind it."""
    order = torch.argsort(mask.bool().logical_not().to(torch.uint8), dim=1, stable=True)
    return values.gather(1, order)


def span_mask(ids: Tensor, mask: Tensor, padded: bool = False) -> Tensor:
    """Which positions [B, S] of left-aligned pairs count.

    Args:
        ids: [2, B, S], chosen and rejected, left-aligned. mask: [2, B, S] bool. padded: up to the end of the
            longer answer rather than the shorter one.

    Where one answer is the beginning of the other, or they are equal, the shorter one's last position counts,
    so that every pair has one.
    """
    steps = torch.arange(ids.shape[-1], device=ids.device)
    lengths = mask.bool().sum(-1)
    short, long = lengths.amin(0)[:, None], lengths.amax(0)[:, None]
    differs = (ids[0] != ids[1]) & (steps < short)
    none = ~differs.any(1, keepdim=True)
    first = torch.where(none, short, differs.int().argmax(1, keepdim=True))
    span = (steps >= first) & (steps < (long if padded else short))
    return torch.where(span.any(1, keepdim=True), span, steps == short - 1)


def token_span_loss(
    chosen: Tensor,
    rejected: Tensor,
    chosen_ids: Tensor,
    rejected_ids: Tensor,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    padded: bool = False,
) -> Tensor:
    """The loss over the span in which two answers differ.

    Args:
        chosen, rejected: the head's output at every position, [B, S]. The ids and masks: of the same shape.
            Padding may be on either side.
        padded: with the padding of the shorter answer, up to the longer one's end.

    Raises:
        ValueError: shapes.
    """
    if chosen.ndim != 2 or chosen.numel() == 0:
        raise ValueError(
            f"chosen must be values [B, S] of at least one pair, got {list(chosen.shape)}"
        )
    for name, value in (("rejected", rejected), ("chosen_ids", chosen_ids), ("rejected_ids", rejected_ids),
                        ("chosen_mask", chosen_mask), ("rejected_mask", rejected_mask)):  # fmt: skip
        _check(name, value, chosen)
    masks = torch.stack([chosen_mask, rejected_mask]).bool()
    ids = torch.stack([align_left(i, m) for i, m in zip((chosen_ids, rejected_ids), masks)])
    values = [align_left(v, m) for v, m in zip((chosen, rejected), masks)]
    span = span_mask(ids, torch.stack([align_left(m, m) for m in masks]), padded)
    # Positions that do not count are selected away: they may hold anything.
    margin = torch.where(span, values[0] - values[1], 0.0)
    losses = torch.where(span, -F.logsigmoid(margin), 0.0)
    return (losses.sum(1) / span.sum(1)).mean()


def pair_metrics(chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """Of scores [B]: ``accuracy`` (a tie is half right), ``margin``, means of ``chosen`` and ``rejected``."""
    margin = (chosen - rejected).detach()
    right = (margin > 0).float() + 0.5 * (margin == 0).float()
    return {"accuracy": right.mean(), "margin": margin.mean(), "chosen": chosen.detach().mean(),
            "rejected": rejected.detach().mean()}  # fmt: skip
