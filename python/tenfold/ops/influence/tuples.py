# SPDX-License-Identifier: Apache-2.0
"""Single steps of recorded runs, from features of training and test examples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tenfold._load import call
from tenfold.ops._register import differentiable, inference_only
from tenfold.ops.influence.markov import real_of

_ops = torch.ops.tenfold

inference_only("markov_onestep_tuples_backward")


@torch.library.register_fake("tenfold::markov_onestep_tuples")
def _(H, G, order_rows, test_rows, hist, *, residual=False, reduction="sum"):
    return H.new_empty(test_rows.shape, dtype=real_of(H))


@torch.library.register_fake("tenfold::markov_onestep_tuples_backward")
def _(grad, H, G, order_rows, test_rows, hist, of_H, of_G, of_hist, *, residual=False,
      reduction="sum"):  # fmt: skip
    wanted = ((H, of_H), (G, of_G), (hist, of_hist))
    return tuple(x.new_empty(x.shape if of else (0,)) for x, of in wanted)


def _save(ctx: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    ctx.save_for_backward(*args)
    ctx.kwargs = kwargs


def _backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    H, G, order_rows, test_rows, hist = ctx.saved_tensors
    of_inputs = ctx.needs_input_grad[2:]
    wanted = (of_inputs[0], of_inputs[1], of_inputs[4])
    made = _ops.markov_onestep_tuples_backward(
        grad, H, G, order_rows, test_rows, hist, *wanted, **ctx.kwargs
    )
    of_H, of_G, of_hist = (x if of else None for x, of in zip(made, wanted))
    return of_H, of_G, None, None, of_hist


differentiable("markov_onestep_tuples", _save, _backward)


def markov_onestep_tuples(
    H: Tensor, G: Tensor, order_rows: Tensor, test_rows: Tensor, hist: Tensor, *, residual: bool = False,
    reduction: str = "sum",
) -> Tensor:  # fmt: skip
    """Steps (run, time, test example) of recorded runs, one by one, from features: a mini-batch of training.

    ``pred[k] = sum_j alpha_j hist[k, n - j] + beta``, where ``alpha_j`` is the product of row ``test_rows[k]`` of
    ``G[j - 1]`` with the sum of the rows ``order_rows[k]`` of ``H[j - 1]``, and ``beta`` the same of the last planes:
    gather, sums and products in one pass. It is :func:`markov_onestep` of factors ``H @ G^T``, of which only these are
    made.

    Args:
        H: [n + 1, M, E] float32 or bfloat16 (float64 for tests), features of M training examples, a plane per lag and
            the additive one.
        G: [n + 1, Q, E], dtype of H: features of Q test examples.
        order_rows: int32 or int64 [N, B], rows of H: the batch of each tuple's step; -1 is none, repeated ones count
            as often.
        test_rows: int32 or int64 [N], rows of G.
        hist: float32 (float64 with float64 features) [N, n], what was recorded before the step, the oldest first.
        residual: alpha_1 has 1 more.
        reduction: ``"sum"``, or ``"mean"`` over those of a batch that are there.

    Returns:
        float32 (float64 of float64) [N]. Differentiable in H, G and hist, once; the gradients of H and G are dense and
        the same bits for any number of threads.

    Raises:
        IndexError: rows out of range (checked on the CPU; elsewhere such a training example is none, and the prediction
        of such a test example is NaN). ValueError: shapes, devices, n < 1, reduction. TypeError: dtypes.

    Source:
        GPTfluence (arXiv 2404.07840); sections 3.3 and 6 of the method's specification.
    """
    return call(
        _ops.markov_onestep_tuples, H, G, order_rows, test_rows, hist, residual=residual,
        reduction=reduction,
    )  # fmt: skip
