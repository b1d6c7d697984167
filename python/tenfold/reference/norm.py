# SPDX-License-Identifier: Apache-2.0
"""RMSNorm with the residual addition before it, and gated activations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tenfold.reference.numbers import work


def rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float = 1e-6, *, order: str = "llama"
) -> tuple[Tensor, Tensor, Tensor]:
    """``h rstd weight`` of rows [..., D], ``rstd = 1 / sqrt(mean(h^2) + eps)``; h is x, or sum = x + residual.

    Returns (y, sum, rstd). ``order`` says what is rounded to 16 bits before it is multiplied by the weight: the
    normalised rows to the dtype of x (``llama``), to that of the weight (``t5``), or nothing (``float``). y has that
    dtype of the weight, or else the dtype of x. sum is empty without a residual.
    """
    total = x.new_empty(0) if residual is None else x + residual
    h = work(x if residual is None else total)
    rstd = (h.pow(2).mean(-1, keepdim=True) + eps).rsqrt()
    normal = h * rstd
    narrow = weight.dtype in (torch.float16, torch.bfloat16)
    dtype = weight.dtype if order == "t5" and narrow else x.dtype
    if order == "llama":
        normal = normal.to(x.dtype)
    elif order == "t5" and narrow:
        normal = normal.to(weight.dtype)
    elif order not in ("t5", "float"):
        raise ValueError(f"order must be llama, t5 or float, got {order!r}")
    return (work(normal) * work(weight)).to(dtype), total, rstd.squeeze(-1)


def rms_norm_(
    y: Tensor, sum: Tensor | None, x: Tensor, residual: Tensor | None, weight: Tensor,
    eps: float = 1e-6, *, order: str = "llama",
) -> None:  # fmt: skip
    """:func:`rms_norm` into y and sum, which may be x and residual."""
    made, total, _ = rms_norm(x, residual, weight, eps, order=order)
    y.copy_(made)
    if sum is not None:
        sum.copy_(total)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``gate / (1 + e^-gate) * up``, rounded once."""
    g = work(gate)
    return (g * torch.sigmoid(g) * work(up)).to(gate.dtype)


def swiglu_(out: Tensor, gate: Tensor, up: Tensor) -> None:
    """:func:`swiglu` into out."""
    out.copy_(swiglu(gate, up))


def gated_gelu(a: Tensor, b: Tensor, *, approximate: str = "tanh") -> Tensor:
    """``gelu(a) * b``, rounded once."""
    return (F.gelu(work(a), approximate=approximate) * work(b)).to(a.dtype)


def gated_gelu_(out: Tensor, a: Tensor, b: Tensor, *, approximate: str = "tanh") -> None:
    """:func:`gated_gelu` into out."""
    out.copy_(gated_gelu(a, b, approximate=approximate))


def gn1_gelu(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """``gelu(group_norm(x, 1) * weight + bias) + residual`` of [B, C, L]; also mean and rstd of each sample, [B].

    One group: mean and variance (divisor C L) are over channels and positions. gelu is the exact one.
    """
    wide = x.double()
    mean = wide.mean((1, 2))
    rstd = (wide.var((1, 2), correction=0) + eps).rsqrt()
    normal = (wide - mean[:, None, None]) * rstd[:, None, None]
    made = F.gelu(normal * weight.double()[:, None] + bias.double()[:, None])
    if residual is not None:
        made = made + residual.double()
    real = work(x).dtype
    return made.to(x.dtype), mean.to(real), rstd.to(real)


def gn1_gelu_(
    y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None, eps: float = 1e-5
) -> None:  # fmt: skip
    """:func:`gn1_gelu` into y, which may be x or residual."""
    y.copy_(gn1_gelu(x, weight, bias, residual, eps)[0])
