# SPDX-License-Identifier: Apache-2.0
"""Function-preserving alignment of heads before they are fused (generalised Procrustes).

Heads share structure only up to a basis: W_q and W_k of a head may be rotated together, and W_v with
W_o, without any change of the model. RoPE rotates the dimensions (i, i + d/2) of queries and keys as a
pair, so keys allow a rotation inside each pair; values allow any. Both are chosen so that the heads
of a group agree best with their mean, by alternating between the mean and the rotations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

ROUNDS = 20


def pair_rotations(heads: Tensor, target: Tensor) -> Tensor:
    """Angles [n, d/2] that turn each head's dimension pairs towards ``target``.

    heads [n, d, m], target [n or 1, d, m]; pair i is the dimensions (i, i + d/2).
    """
    half = heads.shape[1] // 2
    x, y = heads[:, :half], heads[:, half:]
    a, b = target[:, :half], target[:, half:]
    # argmax of <R(t) (x, y), (a, b)> = cos t (x.a + y.b) + sin t (x.b - y.a)
    return torch.atan2((x * b - y * a).sum(-1), (x * a + y * b).sum(-1))


def rotate_pairs(heads: Tensor, angles: Tensor) -> Tensor:
    """heads [n, d, m] with each pair (i, i + d/2) turned by angles [n, d/2]."""
    half = heads.shape[1] // 2
    x, y = heads[:, :half], heads[:, half:]
    cos, sin = angles.cos()[..., None], angles.sin()[..., None]
    return torch.cat([x * cos - y * sin, x * sin + y * cos], 1)


def full_rotations(heads: Tensor, target: Tensor) -> Tensor:
    """Orthogonal matrices R [n, d, d] that minimise ||R heads - target||: orthogonal Procrustes."""
    u, _, vt = torch.linalg.svd(target @ heads.transpose(1, 2))
    return u @ vt


def _agree(heads: Tensor, keys: bool) -> Tensor:
    """Angles [g, d/2] (keys) or matrices [g, d, d] that make one group's heads [g, d, m] agree."""
    # The head closest to all others is where the mean starts.
    flat = torch.nn.functional.normalize(heads.flatten(1), dim=1)
    target = heads[(flat @ flat.T).sum(1).argmax()][None]
    for _ in range(ROUNDS):
        if keys:
            turn = pair_rotations(heads, target)
            turned = rotate_pairs(heads, turn)
        else:
            turn = full_rotations(heads, target)
            turned = turn @ heads
        target = turned.mean(0, keepdim=True)
    return turn


def _turn_rows(linear: Any, base: int, turn: Tensor, keys: bool) -> None:
    """Turns the output rows of a projection's heads (weight and bias)."""
    for name in ("weight", "bias"):
        tensor = getattr(linear, name, None)
        if tensor is None:
            continue
        blocks = tensor.data.double().view(base, -1, tensor.shape[1] if tensor.ndim == 2 else 1)
        turned = rotate_pairs(blocks, turn) if keys else turn @ blocks
        tensor.data.copy_(turned.reshape(tensor.shape))


@torch.no_grad()
def align_layer(
    attention: Any,
    key_groups: Tensor,
    value_groups: Tensor,
    key_map: Tensor,
    value_map: Tensor,
) -> None:
    """Rotates a layer's heads in place so that those of each group agree; the function is unchanged.

    Args:
        attention: has q_proj, k_proj, v_proj (one block of rows per head) and o_proj.
        key_groups, value_groups: [N, g] base heads that are to agree.
        key_map, value_map: [H] base head of every query head.
    """
    device = attention.q_proj.weight.device
    for kind, groups, query_map in (("k", key_groups, key_map), ("v", value_groups, value_map)):
        keys, projection = kind == "k", getattr(attention, f"{kind}_proj")
        base = groups.numel()
        heads = projection.weight.data.double().view(base, -1, projection.weight.shape[1])
        d = heads.shape[1]
        turn = torch.zeros(base, d // 2) if keys else torch.eye(d).repeat(base, 1, 1)
        turn = turn.to(heads)
        for group in groups.to(device):
            if len(group) > 1:
                turn[group] = _agree(heads[group], keys)
        _turn_rows(projection, base, turn, keys)
        per_query = turn[query_map.to(device)]
        if keys:
            _turn_rows(attention.q_proj, len(query_map), per_query, True)
        else:
            # o = W_o R^T (R v): columns of W_o belong to query heads.
            weight = attention.o_proj.weight
            blocks = weight.data.double().view(weight.shape[0], len(query_map), d)
            turned = torch.einsum("mhd,hed->mhe", blocks, per_query)
            weight.data.copy_(turned.reshape(weight.shape))


def align(layers: Sequence[Any], groups: Sequence[Tensor], query_maps: Sequence[Tensor]) -> None:
    """:func:`align_layer` on every layer; ``groups`` and ``query_maps`` per component."""
    for i, layer in enumerate(layers):
        align_layer(layer.self_attn, groups[2 * i], groups[2 * i + 1], query_maps[2 * i],
                    query_maps[2 * i + 1])  # fmt: skip
