# SPDX-License-Identifier: Apache-2.0
"""A convolution some of whose input channels are constant over positions: conditions that are the same everywhere."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tenfold._load import call
from tenfold.ops._register import (
    _library,
    autocast_floats,
    call_inference,
    differentiable,
    inference_only,
)

_ops = torch.ops.tenfold

inference_only("planes_check")
inference_only("planes_add_", mutates=(0,))
inference_only("planes_sums")


@torch.library.register_fake("tenfold::conv1d_planes")
def _(x, c, weight, bias):
    return x.new_empty((x.shape[0], weight.shape[0], x.shape[2]))


@torch.library.register_fake("tenfold::planes_check")
def _(x, c, weight, bias):
    return None


@torch.library.register_fake("tenfold::planes_add_")
def _(y, taps, bias, edges_only):
    return None


@torch.library.register_fake("tenfold::planes_sums")
def _(grad, kernel_size):
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    return grad.new_empty((*grad.shape[:2], kernel_size), dtype=wide)


def _sums(equation: str, *of: Tensor) -> Tensor:
    """Few products, in float64: those in float32 may be of TensorFloat-32."""
    return torch.einsum(equation, *(x.double() for x in of))


def _convolve(x: Tensor, c: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The kernel on every device: torch's convolution of x, and what the planes add to it.

    Where no tap falls outside, that is one number of each sample and output channel. A batch of one takes it as the
    convolution's bias, so that only positions at the ends are touched again; in 16 bits the bias would be rounded.
    """
    _ops.planes_check(x, c, weight, bias)
    own = x.shape[1]
    taps = _sums("bi,oik->bok", c, weight[:, own:])
    one = x.shape[0] == 1 and x.element_size() >= 4
    given = None
    if one:
        given = (taps[0].sum(-1) + (0.0 if bias is None else bias)).to(x.dtype)
    if x.dtype != torch.float64:
        taps = taps.float()
    y = F.conv1d(x, weight[:, :own], given, padding=weight.shape[2] // 2).contiguous()
    _ops.planes_add_(y, taps.contiguous(), bias, one)
    return y


for _device in ("CPU", "CUDA"):
    _library.impl("conv1d_planes", _convolve, _device)


def _save(ctx: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    ctx.save_for_backward(*args[:3])


def _backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError("tenfold::conv1d_planes is differentiable once, not with create_graph")
    if grad is None:
        return (None,) * 4
    x, c, weight = ctx.saved_tensors
    own, size = x.shape[1], weight.shape[2]
    of_x, of_c, of_weight, of_bias = ctx.needs_input_grad[2:]
    dx = dc = dweight = dbias = None
    if of_x or of_weight:
        dx, dweight, _ = torch.ops.aten.convolution_backward(
            grad, x, weight[:, :own], None, [1], [size // 2], [1], False, [0], 1,
            [of_x, of_weight, False],
        )  # fmt: skip
    if of_c or of_weight or of_bias:
        sums = call_inference(_ops.planes_sums.default, grad, size)
        if of_c:
            dc = _sums("bok,oik->bi", sums, weight[:, own:]).to(c.dtype)
        if of_weight:
            planes = _sums("bok,bi->oik", sums, c).to(weight.dtype)
            dweight = torch.cat((dweight, planes), 1)
        if of_bias:  # the tap in the middle never falls outside
            dbias = sums[:, :, size // 2].sum(0).to(weight.dtype)
    return dx, dc, dweight, dbias


differentiable("conv1d_planes", _save, _backward)
autocast_floats("conv1d_planes")


def conv1d_planes(x: Tensor, c: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``conv1d(cat([x, c[..., None].expand(B, D, L)], 1), weight, bias, padding=K // 2)`` without any plane in memory.

    A constant plane adds one number to each output channel, less the taps that fall outside at the ends: exact, and
    independent of how many planes there are.

    Args:
        x: [B, C, L]; float32, bfloat16 or float16 (float64 on the CPU).
        c: [B, D], what the D planes hold; all of one dtype.
        weight: [O, C + D, K], K odd. bias: [O] or None.

    Returns:
        [B, O, L], contiguous, dtype of ``x``. The convolution of x is torch's; what the planes add is made in
        float64 and added in float32. Differentiable in all four, once. Under autocast all are cast, as for torch's
        convolutions.

    Raises:
        ValueError: shapes, devices, dtypes that differ, an even K, C = 0 or L = 0. TypeError: dtype.

    Source:
        ERNIE-Music (arXiv 2302.04456), sections 3.3 and 6 of the method's specification.
    """
    return call(_ops.conv1d_planes.default, x, c, weight, bias)
