# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities of chosen tokens from logits, without a log-softmax of them all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tenfold._load import call
from tenfold.ops._register import differentiable, inference_only

_ops = torch.ops.tenfold

inference_only("selective_logprob_backward")


@torch.library.register_fake("tenfold::selective_logprob")
def _(logits, ids, temperature=1.0):
    return tuple(logits.new_empty(logits.shape[:1], dtype=torch.float32) for _ in range(3))


@torch.library.register_fake("tenfold::selective_logprob_backward")
def _(grad_logp, grad_lse, grad_entropy, logits, ids, lse, entropy, temperature):
    return logits.new_empty(logits.shape)


def _save(ctx: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    ctx.save_for_backward(args[0], args[1], result[1], result[2])
    ctx.temperature = args[2] if len(args) > 2 else kwargs.get("temperature", 1.0)
    ctx.inputs = len(args)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    made = _ops.selective_logprob_backward(*grads, *ctx.saved_tensors, ctx.temperature)
    return (made, *[None] * (ctx.inputs - 1))


differentiable("selective_logprob", _save, _backward)


def selective_logprob(
    logits: Tensor, ids: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of one token per row, normaliser and entropy, in one pass over the logits.

    Args:
        logits: [..., V], float32, bfloat16 or float16; the last dimension contiguous (else copied).
        ids: int32 or int64 [...]; outside [0, V) (as -100): logp is 0 and has no gradient.
        temperature: above 0; logits are divided by it.

    Returns:
        logp, lse (log-sum-exp) and entropy, float32 [...], all differentiable in ``logits``. The gradient has the
        logits' dtype and is the only thing of their size.

    Raises:
        ValueError: shapes, devices, temperature <= 0, V = 0. TypeError: dtypes.

    Source:
        MA-RLHF (arXiv 2410.02743), section 7 of the method's specification; ``-logp`` is cross-entropy.
    """
    flat = logits.reshape(-1, logits.shape[-1])
    made = call(_ops.selective_logprob, flat, ids.reshape(-1), temperature)
    return tuple(x.view(ids.shape) for x in made)  # type: ignore[return-value]
