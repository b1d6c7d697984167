# SPDX-License-Identifier: Apache-2.0
"""Group normalisation with one group, exact GELU and the residual addition after it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tenfold._load import call
from tenfold.ops._register import call_inference, differentiable_by, inference_only

_ops = torch.ops.tenfold

inference_only("gn1_gelu_", mutates=(0,))
inference_only("gn1_gelu_backward")


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@torch.library.register_fake("tenfold::gn1_gelu")
def _(x, weight, bias, residual, eps):
    mean, rstd = (x.new_empty(x.shape[:1], dtype=_wide(x)) for _ in range(2))
    return x.new_empty(x.shape), mean, rstd


@torch.library.register_fake("tenfold::gn1_gelu_")
def _(y, x, weight, bias, residual, eps):
    return None


@torch.library.register_fake("tenfold::gn1_gelu_backward")
def _(dy, x, weight, bias, mean, rstd):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None,
        others: tuple[Any, ...], kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        with torch._C._AutoDispatchBelowAutograd():
            made = _ops.gn1_gelu.default(x, weight, bias, residual, *others)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*made[1:])
        ctx.save_for_backward(x, weight, bias, *made[1:])
        return made

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _mean: Any, _rstd: Any) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("tenfold::gn1_gelu is differentiable once, not with create_graph")
        if dy is None:
            return (None,) * 6
        *needed, of_residual = ctx.needs_input_grad[:4]
        made: tuple[Tensor | None, ...] = (None, None, None)
        if any(needed):
            made = call_inference(_ops.gn1_gelu_backward.default, dy, *ctx.saved_tensors)
            made = tuple(g if wanted else None for g, wanted in zip(made, needed))
        return *made, dy if of_residual else None, None, None


_gn1_gelu = differentiable_by("gn1_gelu", _Norm, (0, 1, 2, 3))


def gn1_gelu(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """``gelu(group_norm(x, num_groups=1) * weight + bias) + residual``: what follows a convolution in a waveform U-Net.

    Args:
        x: [B, C, L], float32, bfloat16 or float16 (float64 on the CPU). What is not contiguous is copied.
        weight, bias: [C], both float32 or the dtype of ``x``.
        residual: None, or shape and dtype of ``x``: added last.
        eps: at least 0.

    Returns:
        (y, mean, rstd). y: contiguous, shape and dtype of ``x``, float32 arithmetic, rounded once; gelu is the exact
        one (erf). mean, rstd: float32 [B] (float64 if x is), of all C L elements of a sample, variance with divisor
        C L. Sums are of differences to the mean of blocks of a fixed size, joined in float64 in their order: exact
        for 40 million elements far from 0, the same bits for any number of threads. y is differentiable in ``x``,
        ``weight``, ``bias`` and ``residual``, once.

    Raises:
        ValueError: shapes, devices, eps, dtypes that differ. TypeError: dtypes.

    Source:
        ERNIE-Music (arXiv 2302.04456), sections 3.4 and 6 of the method's specification; group normalisation
        (arXiv 1803.08494).
    """
    return call(_gn1_gelu, x, weight, bias, residual, eps)


def gn1_gelu_(
    y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None, eps: float = 1e-5
) -> None:  # fmt: skip
    """:func:`gn1_gelu` into ``y``, without a gradient: no memory is taken.

    Args:
        y: contiguous, shape and dtype of ``x``; it may be ``x`` or ``residual``.
        x, weight, bias, residual, eps: as of :func:`gn1_gelu`; x contiguous if y is x.

    Raises:
        ValueError: as :func:`gn1_gelu`; tensors that overlap in another way. RuntimeError: an input requires grad.
    """
    call_inference(_ops.gn1_gelu_.default, y, x, weight, bias, residual, eps, mutates=(y,))
