# SPDX-License-Identifier: Apache-2.0
"""What a model gives whole sequences, without a log-softmax of their logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tenfold._load import call
from tenfold.ops._register import differentiable_by, inference_only

_ops = torch.ops.tenfold

for _name in ("sequence_nll_forward", "sequence_nll_backward"):
    inference_only(_name)


def _sums(logits: Tensor) -> tuple[Tensor, Tensor]:
    shape = logits.shape[:1]
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int64)


@torch.library.register_fake("tenfold::sequence_nll")
def _(logits, labels, ignore_index=-100):
    return _sums(logits)


@torch.library.register_fake("tenfold::sequence_nll_forward")
def _(logits, labels, ignore_index=-100):
    return *_sums(logits), logits.new_empty(logits.shape[:2], dtype=torch.float32)


@torch.library.register_fake("tenfold::sequence_nll_backward")
def _(grad, logits, labels, lse, ignore_index=-100):
    return logits.new_empty(logits.shape)


class _Sequence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, others: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        named = {"ignore_index": -100, **dict(zip(("labels", "ignore_index"), others)), **kwargs}
        labels, ctx.ignore_index = named["labels"], named["ignore_index"]
        with torch._C._AutoDispatchBelowAutograd():
            made = _ops.sequence_nll_forward.default(logits, labels, ctx.ignore_index)
        nll_sum, count, lse = made
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, labels, lse)
        ctx.mark_non_differentiable(count)
        return nll_sum, count

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _count: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None
        made = _ops.sequence_nll_backward(grad, *ctx.saved_tensors, ctx.ignore_index)
        return made, None, None


_sequence = differentiable_by("sequence_nll", _Sequence)


def sequence_nll(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of whole sequences: the sum over their positions, and how many count.

    Args:
        logits: [B, S, V], float32, bfloat16 or float16; the last dimension contiguous (else copied). A slice such as
            ``logits[:, :-1]`` is read where it lies.
        labels: int32 or int64 [B, S], the token that each position predicts (nothing is shifted here).
        ignore_index: the label of positions that do not count; their logits are not read.

    Returns:
        (nll_sum, count): float32 and int64 [B]. Their quotient is the mean to compare sequences by; its
        exponential, the perplexity, may overflow. ``nll_sum`` is differentiable in logits, once.

    Raises:
        IndexError: a label that is neither ``ignore_index`` nor in [0, V) (checked on the CPU only).
        ValueError: shapes, devices. TypeError: dtypes.

    Source:
        UpIT (arXiv 2410.01610), choice of seed data by perplexity.
    """
    return call(_sequence, logits, labels, ignore_index)
