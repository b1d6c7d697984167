"""Products of last-layer gradients, which TracIn and Grad-Dot are made of."""

from __future__ import annotations

import torch
from torch import Tensor

from tenfold.ops._register import call_inference, inference_only

_ops = torch.ops.tenfold

inference_only("outer_dot")


@torch.library.register_fake("tenfold::outer_dot")
def _(J, X, J2, X2, *, paired=False):
    shape = () if J.dim() == 2 else J.shape[:1] if paired else (J.shape[0], J2.shape[0])
    return J.new_empty(shape, dtype=torch.float32)


def outer_dot(J: Tensor, X: Tensor, J2: Tensor, X2: Tensor, *, paired: bool = False) -> Tensor:
    """Inner products of the gradients of a linear layer's weight, without making any: ``<J^T X, J2^T X2>``.

    ``sum((J[i] @ J2[k].T) * (X[i] @ X2[k].T))`` of all pairs (i, k). With the gradients J of an example's loss at the outputs of
    its tokens (for softmax ``p - onehot``) and the layer's inputs X, this is exactly the product of two examples'
    gradients: a checkpoint's part of TracIn, or Grad-Dot.

    Args:
        J: [N, T, V] float32, bfloat16 or float16, of N examples with T tokens. Rows of zeros in J or X are padding.
        X: [N, T, D], dtype of J.
        J2: [M, S, V], X2: [M, S, D], of the examples on the other side.
        paired: only pairs (i, i), N = M: self-influence is ``outer_dot(J, X, J, X, paired=True)``.

        All four may be without their first dimension: one pair.

    Returns:
        float32 [N, M], [N] if ``paired``, or [] of one pair; sums in float32. Not differentiable.

    Raises:
        ValueError: shapes, devices. TypeError: dtypes. RuntimeError: an input requires grad under grad mode.

    Source:
        TracIn (arXiv 2002.08484) on last layers; sections 3.7 and 6 of GPTfluence's specification.
    """
    return call_inference(_ops.outer_dot.default, J, X, J2, X2, paired=paired)
