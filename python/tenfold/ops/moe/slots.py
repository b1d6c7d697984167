# SPDX-License-Identifier: Apache-2.0
"""Slots, one for each of the k choices of every token, sorted by expert and back.

Slot ``t k + j`` is the j-th choice of token t; a position is a place in the list of slots that
:func:`moe_sort` has sorted by expert.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tenfold._load import call
from tenfold.ops._register import (
    call_inference,
    differentiable,
    differentiable_by,
    inference_only,
    is_compiling,
)

_ops = torch.ops.tenfold
_sort = _ops.moe_sort.default._op  # which has no Autograd kernel

for _name in ("moe_permute_backward", "moe_combine_backward"):
    inference_only(_name)


@torch.library.register_fake("tenfold::moe_sort")
def _(index, num_experts, *, allow_sentinel=False):
    sizes = (index.numel(), index.numel(), num_experts, num_experts + 1)
    return tuple(index.new_empty((n,), dtype=torch.int32) for n in sizes)


@torch.library.register_fake("tenfold::moe_permute")
def _(x, order, k):
    return x.new_empty((order.shape[0], x.shape[1]))


@torch.library.register_fake("tenfold::moe_permute_backward")
def _(grad, order, k, tokens):
    return grad.new_empty((tokens, grad.shape[1]))


@torch.library.register_fake("tenfold::moe_combine")
def _(y, weight, inverse):
    return y.new_empty((weight.shape[0], y.shape[1]))


@torch.library.register_fake("tenfold::moe_combine_backward")
def _(grad, y, weight, inverse, of_y, of_weight):
    return y.new_empty(y.shape if of_y else (0,)), weight.new_empty(
        weight.shape if of_weight else (0,)
    )


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, others: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            y = _ops.moe_permute.default(x, *others, **kwargs)
        named = {**dict(zip(("order", "k"), others)), **kwargs}
        ctx.save_for_backward(named["order"])
        ctx.rest = (named["k"], x.shape[0])
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _ops.moe_permute_backward(grad, *ctx.saved_tensors, *ctx.rest), None, None


_permute = differentiable_by("moe_permute", _Permute)


def _save(ctx: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    named = {**dict(zip(("y", "weight", "inverse"), args)), **kwargs}
    ctx.save_for_backward(*(named[n] for n in ("y", "weight", "inverse")))
    ctx.inputs = len(args)


def _backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    needed = (*ctx.needs_input_grad[2:4], False)[:2]
    if grad is None:
        return (None,) * ctx.inputs
    made = _ops.moe_combine_backward(grad, *ctx.saved_tensors, *needed)
    return (*(x if wanted else None for x, wanted in zip(made, needed)),
            *[None] * (ctx.inputs - 2))  # fmt: skip


differentiable("moe_combine", _save, _backward)


def moe_sort(
    index: Tensor, num_experts: int, *, allow_sentinel: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Slots sorted by expert, stable: a counting sort that waits for no device.

    Args:
        index: experts, int32 or int64 [T, k] (any shape), in [0, num_experts); a token may name one twice.
        num_experts: n.
        allow_sentinel: an index of n or more, as of experts elsewhere or of padding tokens, leaves its slot out.

    Returns:
        int32 order [S] (the slot at each position), inverse [S] (the position of each slot), counts [n] and
        offsets [n + 1] (where experts begin). A slot that is left out has inverse -1; order ends in as many -1.

    Raises:
        IndexError: dtype, or a value that is negative, or n or more without ``allow_sentinel`` (values are
            checked on the CPU only). ValueError: num_experts < 1.

    Source:
        UpIT (arXiv 2410.01610), section 7 of the method's specification.

    Example:
        >>> moe_sort(torch.tensor([[1, 0], [1, 2]]), 3)[0]
        tensor([1, 0, 2, 3], dtype=torch.int32)
    """
    if not is_compiling():
        try:
            return _sort(index, num_experts, allow_sentinel=allow_sentinel)
        except RuntimeError:  # in its own words
            pass
    return call(_ops.moe_sort.default, index, num_experts, allow_sentinel=allow_sentinel)


def moe_permute(x: Tensor, order: Tensor, k: int) -> Tensor:
    """The rows of tokens in the order of their slots: ``x[order // k]``.

    Args:
        x: [T, d], float32, bfloat16 or float16; rows may be strided.
        order: int32 or int64 [S] of :func:`moe_sort`, in [0, T k); -1 gives a row of zeros.
        k: slots per token.

    Returns:
        [S, d] of the dtype of x, in which it is differentiable, once; the gradient is a float32 sum over the k slots
        of a token in their order, without atomics, for which order must not repeat a slot.

    Raises:
        IndexError: dtype or values of order (checked on the CPU only). ValueError: shapes, k, a repeated slot.
        TypeError: dtype of x. RuntimeError: devices.

    Source:
        UpIT (arXiv 2410.01610), section 7 of the method's specification.
    """
    return call(_permute, x, order, k)


def moe_combine(y: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    """The weighted sum of a token's slots: ``out[t] = sum_j weight[t, j] y[inverse[t k + j]]``.

    Args:
        y: [S, d] by position, float32, bfloat16 or float16; rows may be strided.
        weight: [T, k], of :func:`moe_gate`; other dtypes are converted to float32.
        inverse: int32 or int64 [T k] of :func:`moe_sort`; a slot of -1 is left out.

    Returns:
        [T, d] of the dtype of y: float32 sums over j in order, rounded once. Differentiable in y and weight, once,
        for which no two slots may have one position.

    Raises:
        IndexError: dtype or values of inverse (checked on the CPU only). RuntimeError: shapes of weight and
        inverse that do not match, devices. ValueError: other shapes, a repeated position. TypeError: dtypes.

    Source:
        UpIT (arXiv 2410.01610), section 7 of the method's specification.
    """
    if weight.dtype != torch.float32 and weight.is_floating_point():
        weight = weight.float()
    return call_inference(_ops.moe_combine.default, y, weight, inverse)
