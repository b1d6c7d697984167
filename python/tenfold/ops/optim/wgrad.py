# SPDX-License-Identifier: Apache-2.0
"""Weight gradient of a linear layer of which only some rows train (HFT section 3.4)."""

from __future__ import annotations

import torch
from torch import Tensor

from tenfold.ops._register import call_inference, inference_only

__all__ = ["linear_wgrad_rows"]

_ops = torch.ops.tenfold


@torch.library.register_fake("tenfold::linear_wgrad_rows")
def _(grad_out, input, rows):
    return input.new_empty((rows.shape[0], input.shape[-1]))


inference_only("linear_wgrad_rows")


def linear_wgrad_rows(grad_out: Tensor, input: Tensor, rows: Tensor) -> Tensor:
    """Rows of the weight gradient of ``input @ weight^T``: ``grad_out[..., rows]^T @ input``.

    The cost is R / out of the whole gradient's. ``tenfold.optim.half_linear`` calls it in its backward.

    Args:
        grad_out: [..., out], float32, bfloat16 or float16.
        input: [..., in], dtype and leading dimensions of ``grad_out``.
        rows: [R], int32 or int64, strictly increasing: the rows of ``weight`` that train.

    Returns:
        [R, in], dtype of ``input``, contiguous; sums are float32 and rounded once. On a CPU the chosen
        columns of ``grad_out`` and a block of ``input`` are copied for the time of the call.

    Raises:
        ValueError: shapes or devices, rows not increasing. IndexError: a row out of range. TypeError:
            dtypes. CUDA does not read ``rows`` beforehand: a row out of range gives zeros.
    """
    return call_inference(_ops.linear_wgrad_rows, grad_out, input, rows)
