# SPDX-License-Identifier: Apache-2.0
"""A metric of test examples as a recurrence over the batches of training, simulated or step by step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tenfold._load import call
from tenfold.ops._masks import as_bytes
from tenfold.ops._register import call_inference, differentiable, differentiable_by, inference_only

_ops = torch.ops.tenfold

for _name in ("markov_scan_backward", "markov_onestep_backward"):
    inference_only(_name)


def real_of(factors: Tensor) -> torch.dtype:
    """float32, or float64 of float64."""
    return torch.float64 if factors.dtype == torch.float64 else torch.float32


def _states(factors: Tensor, order: Tensor) -> Tensor:
    return factors.new_empty((*order.shape[:2], factors.shape[2]), dtype=real_of(factors))


@torch.library.register_fake("tenfold::markov_scan")
def _(factors, order, y0, residual=False, *, lengths=None, reduction="sum"):
    return _states(factors, order)


@torch.library.register_fake("tenfold::markov_scan_backward")
def _(grad, factors, order, y0, pred, residual=False, *, lengths=None, reduction="sum"):
    return factors.new_empty(factors.shape), y0.new_empty(y0.shape)


@torch.library.register_fake("tenfold::markov_onestep")
def _(factors, order, y, residual=False, y0=None, *, mask=None, lengths=None, reduction="sum"):
    return _states(factors, order)


@torch.library.register_fake("tenfold::markov_onestep_backward")
def _(grad, factors, order, y, residual=False, y0=None, of_past=False, *, mask=None, lengths=None,
      reduction="sum"):  # fmt: skip
    of_y = y.new_empty(y.shape if of_past else (0,))
    of_y0 = y.new_empty(y0.shape if of_past and y0 is not None else (0,))
    return factors.new_empty(factors.shape), of_y, of_y0


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, factors: Tensor, y0: Tensor, others: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        order, *residual = others
        with torch._C._AutoDispatchBelowAutograd():
            pred = _ops.markov_scan.default(factors, order, y0, *residual, **kwargs)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(factors, order, y0, pred)
        ctx.residual, ctx.kwargs = residual, kwargs
        return pred

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None
        of_factors, of_y0 = call_inference(
            _ops.markov_scan_backward.default, grad, *ctx.saved_tensors, *ctx.residual, **ctx.kwargs
        )
        return of_factors, of_y0, None, None


_scan = differentiable_by("markov_scan", _Scan, (0, 2))


def _save_onestep(ctx: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    ctx.inputs, ctx.kwargs = len(args), kwargs
    ctx.residual = args[3] if len(args) > 3 else kwargs.get("residual", False)
    ctx.save_for_backward(*args[:3], args[4] if len(args) > 4 else None)


def _onestep_backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * ctx.inputs
    factors, order, y, y0 = ctx.saved_tensors
    needed = ctx.needs_input_grad[2:]
    wanted = needed[2] or any(needed[4:])
    of_factors, of_y, of_y0 = _ops.markov_onestep_backward(
        grad, factors, order, y, ctx.residual, y0, wanted,
        **{k: v for k, v in ctx.kwargs.items() if k in ("mask", "lengths", "reduction")},
    )  # fmt: skip
    past = (of_y, None, of_y0 if y0 is not None else None) if wanted else (None, None, None)
    return (of_factors, None, *past)[: ctx.inputs]


differentiable("markov_onestep", _save_onestep, _onestep_backward)


def markov_scan(
    factors: Tensor, order: Tensor, y0: Tensor, residual: bool = False, *, lengths: Tensor | None = None,
    reduction: str = "sum",
) -> Tensor:  # fmt: skip
    """Simulated runs: what a metric of test examples does over the batches of training, from its start alone.

    ``y[t] = sum_j alpha_j y[t - j] + beta`` for every run and test example, where ``alpha_j`` and ``beta`` are sums
    over the batch of step t: ``alpha_j = sum_b factors[j - 1, order[r, t, b], q]``, ``beta`` of the last plane.

    Args:
        factors: [n + 1, M, Q] float32 or bfloat16 (float64 for tests): of M training examples on Q test examples,
            planes 0 to n - 1 multiplicative (lags 1 to n, n >= 1), plane n additive.
        order: int32 or int64 [R, T, B], the training examples of every step of R runs; -1 is none, anywhere in a
            batch; repeated ones count as often. ``order[:, t]`` leads to ``pred[:, t]``.
        y0: float32 (float64 with float64 factors) [R, n, Q], the metric before step 0, the oldest first: lag 1 of
            step 0 is ``y0[:, n - 1]``. May be expanded over runs.
        residual: alpha_1 has 1 more: a batch of factors 0 changes nothing.
        lengths: int32 or int64 [R], steps of each run, in [0, T]; predictions after them are 0 and have no gradient.
        reduction: ``"sum"``, or ``"mean"`` over those of a batch that are there (the 1 of ``residual`` is outside).

    Returns:
        float32 (float64 of float64) [R, T, Q]. Differentiable in factors and y0, once; equal bits for any number of
        threads. What overflows is infinite, without an error.

    Raises:
        IndexError: ids or lengths out of range (checked on the CPU; elsewhere such ids are none, and the nearest
        length counts). ValueError: shapes, devices, n < 1, reduction. TypeError: dtypes.

    Source:
        GPTfluence (arXiv 2404.07840), equation of the n-th order Markov process; sections 3.1, 3.4 and 6 of the
        method's specification.
    """
    return call(_scan, factors, order, y0, residual, lengths=lengths, reduction=reduction)


def markov_onestep(
    factors: Tensor, order: Tensor, y: Tensor, residual: bool = False, *, y0: Tensor | None = None,
    mask: Tensor | None = None, lengths: Tensor | None = None, reduction: str = "sum",
) -> Tensor:  # fmt: skip
    """Every step of recorded runs from what was recorded before it: teacher forcing, for training the factors.

    ``pred[t] = sum_j alpha_j y[t - j] + beta``, all steps at once. Given what :func:`markov_scan` made, and its y0,
    this makes the same.

    Args:
        factors, order, residual, lengths, reduction: as in :func:`markov_scan`.
        y: float32 (float64 with float64 factors) [R, T, Q], recorded after each step; the last one is not read.
        y0: [R, n, Q], what was recorded before step 0, the oldest first; without it zeros.
        mask: [R, T, Q] bool, int8 or uint8 (other dtypes: nonzero is yes), where y was recorded. What is elsewhere,
            NaN too, is not used: a prediction of which one lag is missing is 0 and has no gradient. (Leave those out of
            the loss, like missing targets.) Without a mask NaN makes NaN.

    Returns:
        float32 (float64 of float64) [R, T, Q]. Differentiable in factors, y and y0, once.

    Raises:
        As :func:`markov_scan`.

    Source:
        GPTfluence (arXiv 2404.07840); sections 3.3 and 6 of the method's specification.
    """
    mask = None if mask is None else as_bytes(mask)
    return call(
        _ops.markov_onestep, factors, order, y, residual, y0, mask=mask, lengths=lengths,
        reduction=reduction,
    )  # fmt: skip
