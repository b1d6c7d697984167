# SPDX-License-Identifier: Apache-2.0
"""Means over named parts of rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tenfold._load import call
from tenfold.ops._register import call_inference, differentiable_by, inference_only

_ops = torch.ops.tenfold

inference_only("segment_mean_backward")


@torch.library.register_fake("tenfold::segment_mean")
def _(nll, seg, T):
    return nll.new_empty((seg.shape[0], T))


@torch.library.register_fake("tenfold::segment_mean_backward")
def _(grad, seg, T):
    return grad.new_empty(seg.shape)


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, nll: Tensor, others: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        seg, ctx.count = {**dict(zip(("seg", "T"), others)), **kwargs}.values()
        with torch._C._AutoDispatchBelowAutograd():
            out = _ops.segment_mean.default(nll, seg, ctx.count)
        ctx.save_for_backward(seg)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (seg,) = ctx.saved_tensors
        return call_inference(_ops.segment_mean_backward.default, grad, seg, ctx.count), None, None


_mean = differentiable_by("segment_mean", _Mean)


def segment_mean(nll: Tensor, seg: Tensor, T: int) -> Tensor:
    """Mean of every segment of every row.

    Args:
        nll: [N, S], float32 (bfloat16 and float16 are cast).
        seg: int32 or int64 [N, S], number of the segment that a token is part of, in any order; a token whose
            number is outside [0, T) is not read.
        T: how many segments a row may have, at least 0.

    Returns:
        float32 [N, T], 0 where a segment has no token. Differentiable in ``nll``, once.

    Raises:
        ValueError: shapes, devices, T. TypeError: dtypes.

    Source:
        Themis (arXiv 2310.01045), section 4 of the method's specification (``component_sum``).
    """
    if nll.dtype in (torch.bfloat16, torch.float16):
        nll = nll.float()
    return call(_mean, nll, seg, T)
