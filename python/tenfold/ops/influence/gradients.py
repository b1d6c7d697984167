# SPDX-License-Identifier: Apache-2.0
"""Products of last-layer gradients, which TracIn and Grad-Dot are made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tenfold._load import call
from tenfold.ops._register import differentiable

_ops = torch.ops.tenfold


@torch.library.register_fake("tenfold::outer_dot")
def _(J, X, J2, X2, *, paired=False):
    shape = () if J.dim() == 2 else J.shape[:1] if paired else (J.shape[0], J2.shape[0])
    return J.new_empty(shape, dtype=torch.float32)


def _save(ctx: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    ctx.save_for_backward(*args)
    ctx.paired = kwargs.get("paired", False)


def _sides(a: Tensor, b: Tensor, a2: Tensor, b2: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the sum of ``weight * (a @ a2.T) * (b @ b2.T)`` by a and a2."""
    scaled = (b @ b2.mT) * weight
    return scaled @ a2, scaled.mT @ a


def _backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 4
    given = ctx.saved_tensors
    J, X, J2, X2 = (x.float() for x in given)
    if given[0].dim() == 2 or ctx.paired:
        weight = grad[..., None, None]
    else:  # all tokens with all tokens
        weight = grad.repeat_interleave(J.shape[1], 0).repeat_interleave(J2.shape[1], 1)
        J, X, J2, X2 = (x.flatten(0, 1) for x in (J, X, J2, X2))
    of_j, of_x = ctx.needs_input_grad[2:6:2], ctx.needs_input_grad[3:6:2]
    by_j = _sides(J, X, J2, X2, weight) if any(of_j) else (None, None)
    by_x = _sides(X, J, X2, J2, weight) if any(of_x) else (None, None)
    made = (by_j[0], by_x[0], by_j[1], by_x[1])
    return tuple(None if g is None else g.view(x.shape).to(x.dtype) for g, x in zip(made, given))


differentiable("outer_dot", _save, _backward)


def outer_dot(J: Tensor, X: Tensor, J2: Tensor, X2: Tensor, *, paired: bool = False) -> Tensor:
    """Inner products of the gradients of a linear layer's weight, without making any: ``<J^T X, J2^T X2>``.

    ``sum((J[i] @ J2[k].T) * (X[i] @ X2[k].T))`` of all pairs (i, k). With the gradients J of an example's loss at the
    outputs of its tokens (for softmax ``p - onehot``) and the layer's inputs X, this is exactly the product of two
    examples' gradients: a checkpoint's part of TracIn, or Grad-Dot.

    Args:
        J: [N, T, V] float32, bfloat16 or float16, of N examples with T tokens. Rows of zeros in J or X are padding.
        X: [N, T, D], dtype of J.
        J2: [M, S, V], X2: [M, S, D], of the examples on the other side.
        paired: only pairs (i, i), N = M: self-influence is ``outer_dot(J, X, J, X, paired=True)``.

        All four may be without their first dimension: one pair.

    Returns:
        float32 [N, M], [N] if ``paired``, or [] of one pair; sums in float32. Differentiable in all four: the backward
        pass is plain PyTorch, and makes the products of all tokens with all tokens (N T M S numbers), never V x D.

    Raises:
        ValueError: shapes, devices, dtypes that differ. TypeError: dtype of J.

    Source:
        TracIn (arXiv 2002.08484) on last layers; sections 3.7 and 6 of GPTfluence's specification.
    """
    return call(_ops.outer_dot, J, X, J2, X2, paired=paired)
