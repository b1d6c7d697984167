# SPDX-License-Identifier: Apache-2.0
"""Half and double rate by a fixed filter of eight taps, each channel by itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tenfold._load import call
from tenfold.ops._register import call_inference, differentiable_by, inference_only

_ops = torch.ops.tenfold

for _name in ("fir_down2_backward", "fir_up2_backward"):
    inference_only(_name)
for _name in ("fir_down2_", "fir_up2_cat_"):
    inference_only(_name, mutates=(0,))


@torch.library.register_fake("tenfold::fir_down2")
def _(x):
    return x.new_empty((*x.shape[:2], x.shape[2] // 2))


@torch.library.register_fake("tenfold::fir_down2_")
def _(out, x):
    return None


@torch.library.register_fake("tenfold::fir_down2_backward")
def _(grad, length):
    return grad.new_empty((*grad.shape[:2], length))


@torch.library.register_fake("tenfold::fir_up2_cat")
def _(x, skip):
    channels = x.shape[1] + (0 if skip is None else skip.shape[1])
    return x.new_empty((x.shape[0], channels, 2 * x.shape[2]))


@torch.library.register_fake("tenfold::fir_up2_cat_")
def _(out, x, skip):
    return None


@torch.library.register_fake("tenfold::fir_up2_backward")
def _(grad, channels):
    return grad.new_empty((grad.shape[0], channels, grad.shape[2] // 2))


def _once(name: str) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(f"tenfold::{name} is differentiable once, not with create_graph")


class _Down(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, others: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        ctx.length = x.shape[2]
        with torch._C._AutoDispatchBelowAutograd():
            return _ops.fir_down2.default(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _once("fir_down2")
        return call_inference(_ops.fir_down2_backward.default, grad, ctx.length), None, None


class _Up(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, skip: Tensor | None, others: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        ctx.channels = x.shape[1]
        with torch._C._AutoDispatchBelowAutograd():
            return _ops.fir_up2_cat.default(x, skip)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _once("fir_up2_cat")
        of_x, of_skip = ctx.needs_input_grad[:2]
        dx = call_inference(_ops.fir_up2_backward.default, grad, ctx.channels) if of_x else None
        return dx, grad[:, ctx.channels :] if of_skip else None, None, None


_down = differentiable_by("fir_down2", _Down)
_up = differentiable_by("fir_up2_cat", _Up, (0, 1))


def fir_down2(x: Tensor) -> Tensor:
    """Half the rate: ``y[j] = sum_k h[k] x[2 j + k - 3]``, x reflected by three samples at both ends.

    h = (-3, -9, 29, 111, 111, 29, -9, -3) / 256: Dance Diffusion's Down2, as one filter of each channel instead of
    a dense convolution.

    Args:
        x: [B, C, L], L at least 4; float32, bfloat16 or float16 (float64 on the CPU). A slice of channels or of a
            batch is read where it is; what has other strides within a row is copied.

    Returns:
        [B, C, L // 2], contiguous, dtype of ``x``: float32 arithmetic, rounded once. A constant of up to 15
        significant bits, and any of 16-bit dtypes, is returned exactly. Differentiable, once.

    Raises:
        ValueError: L below 4, not three dimensions. TypeError: dtype.

    Source:
        ERNIE-Music (arXiv 2302.04456), section 3.4 of the method's specification.
    """
    return call(_down, x)


def fir_down2_(out: Tensor, x: Tensor) -> None:
    """:func:`fir_down2` into ``out``, [B, C, L // 2] of rows of neighbours, apart from ``x``; without a gradient.

    Raises:
        ValueError: as :func:`fir_down2`; shape or layout of out, memory shared with x.
    """
    call_inference(_ops.fir_down2_.default, out, x, mutates=(out,))


def fir_up2_cat(x: Tensor, skip: Tensor | None = None) -> Tensor:
    """Twice the rate, with the skip connection's channels behind: ``cat([Up2(x), skip], 1)`` in one pass.

    ``y[2 m] = 2 sum_i h[2 i + 1] x[m + 1 - i]``, ``y[2 m + 1] = 2 sum_i h[2 i] x[m + 2 - i]``, i = 0 to 3, x reflected
    by two samples at both ends, h as of :func:`fir_down2`: Dance Diffusion's Up2.

    Args:
        x: [B, C, L], L at least 3; float32, bfloat16 or float16 (float64 on the CPU).
        skip: [B, K, 2 L], dtype of ``x``; None: nothing is behind.

    Returns:
        [B, C + K, 2 L], contiguous: arithmetic as of :func:`fir_down2`. Differentiable in both, once; the gradient of
        ``skip`` is a view of the result's.

    Raises:
        ValueError: L below 3, shapes, devices, dtypes that differ. TypeError: dtype.

    Source:
        ERNIE-Music (arXiv 2302.04456), sections 3.4 and 6 of the method's specification.
    """
    return call(_up, x, skip)


def fir_up2_cat_(out: Tensor, x: Tensor, skip: Tensor | None = None) -> None:
    """:func:`fir_up2_cat` into the first channels of ``out``, and ``skip`` behind; without a gradient.

    Args:
        out: [B, C + K, 2 L] of rows of neighbours, apart from ``x``. Without ``skip`` the K channels behind stay what
            they are: a network that writes its skip connection there once copies nothing.
        x, skip: as of :func:`fir_up2_cat`.

    Raises:
        ValueError: as :func:`fir_up2_cat`; shape or layout of out, memory shared with an input.
    """
    call_inference(_ops.fir_up2_cat_.default, out, x, skip, mutates=(out,))
