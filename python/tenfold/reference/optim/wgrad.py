# SPDX-License-Identifier: Apache-2.0
"""Definition of the weight gradient of a linear layer of which only some rows train."""

from __future__ import annotations

import math

from torch import Tensor

from tenfold.reference.numbers import work

__all__ = ["linear_wgrad_rows"]


def linear_wgrad_rows(grad_out: Tensor, input: Tensor, rows: Tensor) -> Tensor:
    """``grad_out[:, rows]^T @ input``: rows [R] of the gradient of ``weight`` in ``input @ weight^T``.

    grad_out [..., out], input [..., in] -> [R, in] in the dtype of ``input``, accumulated in float32
    (float64 for float64).
    """
    tokens = math.prod(input.shape[:-1])
    dy = work(grad_out).reshape(tokens, grad_out.shape[-1])[:, rows.long()]
    x = work(input).reshape(tokens, input.shape[-1])
    return (dy.T @ x).to(input.dtype)
