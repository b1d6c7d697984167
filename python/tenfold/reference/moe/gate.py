# SPDX-License-Identifier: Apache-2.0
"""Which experts a token goes to, and with what weights."""

from __future__ import annotations

import torch
from torch import Tensor

from tenfold.reference.moe.slots import moe_sort


def moe_gate(logits: Tensor, k: int, renormalize: bool = True) -> tuple[Tensor, Tensor]:
    """Weight and index [..., k] of the k largest logits [..., n], the lower index first among equals.

    Weights are the softmax of all n, over their sum among the k if ``renormalize``. NaN is chosen as -inf is,
    and makes the weights of its row NaN.
    """
    if not 1 <= k <= logits.shape[-1]:
        raise ValueError(f"k must be in [1, {logits.shape[-1]}], got {k}")
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    lowest = x.detach().masked_fill(x.isnan(), float("-inf"))
    index = lowest.argsort(dim=-1, descending=True, stable=True)[..., :k]
    weight = x.softmax(-1).gather(-1, index)
    if renormalize:
        weight = weight / weight.sum(-1, keepdim=True)
    return weight, index.int()


def moe_route(logits: Tensor, k: int, renormalize: bool = True) -> tuple[Tensor, ...]:
    """Weight, index of :func:`moe_gate`, and order, inverse, counts, offsets of :func:`moe_sort` of that index."""
    weight, index = moe_gate(logits, k, renormalize)
    return weight, index, *moe_sort(index, logits.shape[-1])


def moe_gate_linear(
    x: Tensor, w_router: Tensor, k: int, renormalize: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits ``x @ w_router.T`` [..., n] of x [..., d] and w_router [n, d], weight and index [..., k]."""
    real = torch.promote_types(x.dtype, torch.float32)
    logits = x.to(real) @ w_router.to(real).t()
    return logits, *moe_gate(logits, k, renormalize)
