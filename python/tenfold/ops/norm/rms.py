# SPDX-License-Identifier: Apache-2.0
"""Root-mean-square normalisation of rows, with the residual addition before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tenfold._load import call
from tenfold.ops._register import (
    call_inference,
    differentiable_by,
    inference_only,
    no_gradient,
    written,
)

_ops = torch.ops.tenfold
# By these numbers the op without an Autograd kernel takes what others take by name.
_ORDERS = {"llama": 0, "t5": 1, "float": 2}

inference_only("rms_norm_", mutates=(0, 1))
inference_only("rms_norm_backward")


def _results(x: Tensor, residual: Tensor | None, weight: Tensor, order: int) -> tuple[Tensor, ...]:
    narrow = order == _ORDERS["t5"] and weight.dtype != torch.float32
    y = x.new_empty(x.shape, dtype=weight.dtype if narrow else x.dtype)
    total = x.new_empty((0,) if residual is None else x.shape)
    return y, total, x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.register_fake("tenfold::rms_norm")
def _(x, residual, weight, eps, *, order="llama"):
    return _results(x, residual, weight, _ORDERS[order])


@torch.library.register_fake("tenfold::rms_norm_forward")
def _(x, residual, weight, eps, order):
    return _results(x, residual, weight, order)


@torch.library.register_fake("tenfold::rms_norm_")
def _(y, sum, x, residual, weight, eps, *, order="llama"):
    return None


@torch.library.register_fake("tenfold::rms_norm_forward_")
def _(y, sum, x, residual, weight, eps, order):
    return None


@torch.library.register_fake("tenfold::rms_norm_backward")
def _(grad_y, grad_sum, x, weight, rstd, of_x, of_weight):
    return x.new_empty(x.shape if of_x else (0,)), weight.new_empty(
        weight.shape if of_weight else (0,)
    )


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, others: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        with torch._C._AutoDispatchBelowAutograd():
            made = _ops.rms_norm.default(x, residual, weight, *others, **kwargs)
        _, total, rstd = made
        ctx.set_materialize_grads(False)
        if residual is None:
            ctx.mark_non_differentiable(total, rstd)
            ctx.save_for_backward(x, weight, rstd)
        else:
            ctx.mark_non_differentiable(rstd)
            ctx.save_for_backward(total, weight, rstd)
        return made

    @staticmethod
    def backward(
        ctx: Any, grad_y: Tensor | None, grad_sum: Tensor | None, _: Any
    ) -> tuple[Tensor | None, ...]:
        of_x, of_residual, of_weight = ctx.needs_input_grad[:3]
        of_rows = of_x or of_residual
        if grad_y is None:  # only the sum was used
            dx, dw = grad_sum, None
        else:
            dx, dw = call_inference(
                _ops.rms_norm_backward.default, grad_y, grad_sum, *ctx.saved_tensors, of_rows, of_weight
            )  # fmt: skip
        return (
            dx if of_x else None,
            dx if of_residual else None,
            dw if of_weight else None,
            None,
            None,
        )


_rms_norm = differentiable_by("rms_norm", _Norm, (0, 1, 2))
_forward = _ops.rms_norm_forward.default._op
_forward_into = _ops.rms_norm_forward_.default._op


def rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float = 1e-6, *, order: str = "llama"
) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm of ``h = x + residual``, or of x: ``h / sqrt(mean(h^2) + eps) * weight`` over the last dimension.

    Args:
        x: [..., D], float32, bfloat16 or float16. What is not rows of D neighbours, equally far apart, is copied.
        residual: None, or the shape and dtype of ``x``: what the residual stream holds; ``x`` is added to it.
        weight: [D], float32 or the dtype of ``x``; any of the three if that is float32.
        eps: at least 0. 1e-6 in T5 and Llama 1, 1e-5 in later Llamas and PixelGPT.
        order: what is rounded, where something has 16 bits.

            - ``"llama"``, as transformers' LlamaRMSNorm: the normalised ``h`` to the dtype of ``x``, then the product.
            - ``"t5"``, as T5LayerNorm: the normalised ``h`` to the dtype of ``weight`` if that has 16 bits, then the
              product. ``y`` has the dtype of ``weight`` then: of float32 ``x`` comes what 16-bit layers take.
            - ``"float"``, as ``torch.nn.functional.rms_norm``: the product only.

            Those modules give float32 of a 16-bit ``x`` and a float32 weight; ``y`` here is that rounded to the
            dtype of ``x``.

    Returns:
        (y, sum, rstd). y: [..., D], of the dtype of ``x`` but for ``"t5"``. sum: ``x + residual`` rounded to its dtype,
        which is what was normalised: the new residual stream; without a residual an empty tensor [0], no copy of x.
        rstd: float32 [...], ``1 / sqrt(mean(h^2) + eps)``. All contiguous. y and sum are differentiable in ``x``,
        ``residual`` and ``weight``, once, as if nothing were rounded; the gradient of ``weight`` has the same bits for
        any number of threads.

    Raises:
        ValueError: shapes, devices, eps, order, dtypes that differ. TypeError: dtypes.

    Source:
        Zhang and Sennrich, arXiv 1910.07467; sections 3.1 of ERNIE-Code's and 3.4 of PixelGPT's specification.
    """
    if no_gradient(x, residual, weight):
        try:
            return _forward(x, residual, weight, eps, _ORDERS.get(order, -1))
        except RuntimeError:  # in its own words
            return call(_rms_norm, x, residual, weight, eps, order=order)
    return call(_rms_norm, x, residual, weight, eps, order=order)


def rms_norm_(
    y: Tensor, sum: Tensor | None, x: Tensor, residual: Tensor | None, weight: Tensor,
    eps: float = 1e-6, *, order: str = "llama",
) -> None:  # fmt: skip
    """:func:`rms_norm` into given tensors, without a gradient: no memory is taken, and none is touched first.

    Args:
        y: [..., D], rows of neighbours; of the dtype that :func:`rms_norm` returns. May be ``x`` or ``residual``.
        sum: [..., D] of the dtype of ``x``, with a residual and only then. May be ``residual`` or ``x``, not ``y``.
        x, residual, weight, eps, order: as of :func:`rms_norm`.

    ``rms_norm_(x, residual, x, residual, weight)`` adds x to the residual stream and normalises it in place of x.

    Raises:
        ValueError: as :func:`rms_norm`; tensors that overlap in another way. RuntimeError: an input requires grad.
    """
    results = (y,) if sum is None else (y, sum)
    if no_gradient(y, sum, x, residual, weight):
        try:
            _forward_into(y, sum, x, residual, weight, eps, _ORDERS.get(order, -1))
        except RuntimeError:  # as below, in its own words
            pass
        else:
            return written(*results)
    call_inference(
        _ops.rms_norm_.default, y, sum, x, residual, weight, eps, mutates=results, order=order
    )
