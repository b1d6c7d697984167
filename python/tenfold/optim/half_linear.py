# SPDX-License-Identifier: Apache-2.0
"""A linear layer of which only some rows of the weight train (HFT section 3.4).

The forward and the gradient of the input are the ordinary ones. The weight's gradient is computed for
the trained rows only, at R / out of its cost, and a layer without any stores no input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from tenfold.ops import linear_wgrad_rows

__all__ = ["HalfLinear", "half_linear"]


class HalfLinear(torch.autograd.Function):
    """``input @ weight^T + bias`` with gradients of ``weight`` and ``bias`` in ``rows`` only.

    Use :func:`half_linear`. What is kept for the backward: ``weight`` if ``input`` needs a gradient,
    ``input`` if ``weight`` needs one and ``rows`` is not empty.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, compact: bool
    ) -> Tensor:
        """The ordinary linear layer; ``rows`` [R], ``compact`` as in :func:`half_linear`."""
        need_input, need_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(
            input if need_weight and rows.numel() else None, weight if need_input else None, rows
        )
        ctx.compact = compact and need_weight
        ctx.parameter = weight if ctx.compact else None
        ctx.shape = weight.shape
        return functional.linear(input, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of input, weight and bias."""
        input, weight, rows = ctx.saved_tensors
        need_input, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_input = grad_out @ weight if need_input else None
        grad_weight = None
        if need_weight and input is not None:
            grad_rows = linear_wgrad_rows(grad_out, input, rows)
            if ctx.compact:
                _accumulate(ctx.parameter, grad_rows)
            else:
                grad_weight = grad_rows.new_zeros(ctx.shape)
                grad_weight.index_copy_(0, rows.long(), grad_rows)
        grad_bias = None
        if need_bias and rows.numel():
            sums = grad_out.reshape(-1, grad_out.shape[-1]).sum(0)
            grad_bias = torch.zeros_like(sums).index_copy_(0, rows.long(), sums[rows.long()])
        return grad_input, grad_weight, grad_bias, None, None


def _accumulate(parameter: Any, grad_rows: Tensor) -> None:
    before = getattr(parameter, "grad_rows", None)
    parameter.grad_rows = grad_rows if before is None else before + grad_rows


def half_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    *,
    compact: bool = False,
) -> Tensor:
    """``functional.linear(input, weight, bias)`` of which only the rows ``rows`` of ``weight`` train.

    Args:
        input: [..., in].
        weight: [out, in]. bias: [out] or None; it trains in the same rows.
        rows: [R], int32 or int64, strictly increasing, on the device of ``weight``. Empty: the layer is
            frozen, stores no input, and weight and bias get no gradient. None: all rows train, as in
            ``functional.linear``.
        compact: add the weight's gradient, [R, in], to the attribute ``weight.grad_rows`` (None it to
            clear it) and leave ``weight.grad`` alone: no memory for frozen rows. Hooks of the parameter
            (DDP, FSDP) do not see it.

    Returns:
        [..., out]. By default ``weight.grad`` is whole, with zeros in the frozen rows; an optimiser
        with a row mask does not read those. Differentiable once. Under autocast, input, weight and
        bias are cast as ``functional.linear`` does it; ``compact`` does not go with a cast weight.

    Raises:
        ValueError, IndexError, TypeError: as :func:`tenfold.ops.linear_wgrad_rows`, from the backward.
    """
    device = input.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        if compact and weight.dtype != dtype:
            raise ValueError(
                f"half_linear: compact gradients need a weight of the autocast dtype {dtype}, got "
                f"{weight.dtype}"
            )
        bias = None if bias is None else bias.to(dtype)
        with torch.amp.autocast(device, enabled=False):
            return half_linear(input.to(dtype), weight.to(dtype), bias, rows, compact=compact)
    if rows is None:
        return functional.linear(input, weight, bias)
    return HalfLinear.apply(input, weight, bias, rows, compact)
