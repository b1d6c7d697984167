# SPDX-License-Identifier: Apache-2.0
"""Regression losses that need no model: what a trained one must be below."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tenfold import ops
from tenfold.pixelgpt.images import without_eos
from tenfold.pixelgpt.streams import Streams


def _targets(streams: Streams, config: Any, limit: int) -> tuple[Tensor, Tensor]:
    """(targets float32 [B, L, P], mask of those that count [B, L]) of strips, uncropped to one length."""
    batch = streams.batch("pixel", range(min(limit, streams.count("pixel"))))
    patches = ops.patchify_u8(
        batch["pixel_values"],
        config.patch_size,
        normalize=config.norm_pix_loss,
        eps=config.norm_pix_eps,
    )
    mask = batch["patch_mask"]
    mask = mask if config.eos_in_loss else without_eos(mask)
    counts = mask.clone()
    counts[:, 0] = False
    return patches, counts


@torch.no_grad()
def strip_baselines(
    held_out: Streams, config: Any, *, train: Streams | None = None, limit: int = 64
) -> dict[str, float]:
    """Next patch losses over strips: ``zero`` (the mean of a normalised patch), ``copy`` (the patch before), ``mean``.

    ``mean`` predicts one patch everywhere: the mean target of ``train``'s strips (default: of the same ones).

    Args:
        limit: strips, at most.
    """
    target, counts = _targets(held_out, config, limit)
    other, other_counts = (target, counts) if train is None else _targets(train, config, limit)
    mean = other[other_counts].mean(0)
    copied = target[:, :-1][counts[:, 1:]]
    target = target[counts]
    return {
        "zero": float(target.square().mean()),
        "copy": float((target - copied).square().mean()),
        "mean": float((target - mean).square().mean()),
    }
