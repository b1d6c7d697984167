# SPDX-License-Identifier: Apache-2.0
"""Face of the template family (``csrc/_template``): the pattern to copy."""

from __future__ import annotations

import torch
from torch import Tensor

from tenfold._load import call

_op = torch.ops.tenfold.template_scale


@torch.library.register_fake("tenfold::template_scale")
def _(x: Tensor, scale: float) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _setup(ctx, inputs, output) -> None:
    ctx.scale = inputs[1]


def _backward(ctx, grad: Tensor):
    return torch.ops.tenfold.template_scale(grad, ctx.scale), None


torch.library.register_autograd("tenfold::template_scale", _backward, setup_context=_setup)


def template_scale(x: Tensor, scale: float) -> Tensor:
    """``x * scale`` in float32 arithmetic, rounded once.

    Args:
        x: any shape; float32, bfloat16 or float16.
        scale: finite factor.

    Returns:
        A contiguous tensor of the shape and dtype of ``x``. Differentiable in ``x``.

    Raises:
        TypeError: dtype of ``x``. ValueError: ``scale`` is not finite.
    """
    return call(_op, x, scale)
