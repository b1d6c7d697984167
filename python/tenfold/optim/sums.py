# SPDX-License-Identifier: Apache-2.0
"""The gradient norm over all trained elements, across kinds of masks, devices and shards."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from tenfold import ops

# kind of mask, gradients, masks, a DTensor whose mesh the gradients are sharded over (or None)
Piece = tuple[str, list[Tensor], list[Tensor | None], Any]


def _over_mesh(square: Tensor, like: Any) -> Tensor:
    """Adds up over the mesh dimensions along which ``like`` is sharded."""
    from torch.distributed.tensor import Shard

    for dim, placement in enumerate(like.placements):
        if isinstance(placement, Shard):
            group = like.device_mesh.get_group(dim)
            torch.distributed.all_reduce(square, group=group)
    return square


def global_norm(pieces: Iterable[Piece], block: int, scale: Tensor | None = None) -> Tensor:
    """L2 norm (float32, 0-d) of gradients / ``scale`` over what the masks train."""
    parts = []
    for kind, grads, masks, like in pieces:
        given = masks if kind != "none" else []
        here = None if scale is None else scale.to(grads[0].device, torch.float32).reshape(())
        norm = ops.grad_norm(grads, given, mask_kind=kind, block_size=block, grad_scale_tensor=here)
        parts.append((norm, like))
    if len(parts) == 1 and parts[0][1] is None:
        return parts[0][0]
    device = parts[0][0].device
    squares = [
        (_over_mesh(n.double().square(), like) if like is not None else n.double().square()).to(
            device
        )
        for n, like in parts
    ]
    return torch.stack(squares).sum().sqrt().float()
