# SPDX-License-Identifier: Apache-2.0
"""The language model's loss with a weight per token: a face of the kernel of ``linear_cross_entropy``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tenfold._load import call
from tenfold.ops._register import differentiable, inference_only
from tenfold.ops.loss.linear import flat_rows, like_factors, rows_of, times

_ops = torch.ops.tenfold

for _name in ("weighted_linear_ce_forward", "weighted_linear_ce_grads",
              "weighted_linear_ce_backward"):  # fmt: skip
    inference_only(_name)


def _results(hidden: Tensor) -> tuple[Tensor, ...]:
    nll, lse = rows_of(hidden, 2)
    return nll.new_empty(()), nll.new_empty(()), nll, lse


@torch.library.register_fake("tenfold::weighted_linear_ce")
def _(hidden, weight, targets, w, chunk=0, **options):
    return _results(hidden)[:3]


@torch.library.register_fake("tenfold::weighted_linear_ce_forward")
def _(hidden, weight, targets, w, chunk=0, **options):
    return _results(hidden)


@torch.library.register_fake("tenfold::weighted_linear_ce_grads")
def _(hidden, weight, targets, w, of_hidden, of_weight, chunk=0, **options):
    return *_results(hidden), *like_factors(hidden, weight, of_hidden, of_weight)


@torch.library.register_fake("tenfold::weighted_linear_ce_backward")
def _(grad_sum, grad_nll, hidden, weight, targets, w, lse, of_hidden, of_weight, chunk=0, **options):  # fmt: skip
    return like_factors(hidden, weight, of_hidden, of_weight)


def _forward(ctx: Any, needed: tuple[bool, ...], args: Any, options: dict[str, Any]) -> Any:
    """The results, with the gradients of the sum where they cost no second product for the logits."""
    *tensors, chunk = args if len(args) == 5 else (*args, 0)
    ahead = args[0].device.type == "cpu" and options.get("grad_of", "loss_sum") == "loss_sum"
    ctx.chunk = chunk
    ctx.options = {n: x for n, x in options.items() if n != "grad_of"}
    if ahead:
        made = _ops.weighted_linear_ce_grads(*tensors, *needed[:2], chunk, **ctx.options)
    else:
        made = _ops.weighted_linear_ce_forward(*tensors, chunk, **ctx.options)
    ctx.lse, ctx.made = made[3], made[4:] if ahead else None
    return made[:3]


def _save(ctx: Any, args: tuple[Any, ...], options: dict[str, Any], result: Any) -> None:
    ctx.save_for_backward(*args[:4], ctx.lse)
    del ctx.lse
    ctx.inputs = len(args)
    ctx.mark_non_differentiable(result[1])


def _backward(
    ctx: Any, grad_sum: Tensor | None, _: Any, grad_nll: Tensor | None
) -> tuple[Any, ...]:
    needed = ctx.needs_input_grad[2:4]
    # As for linear_cross_entropy: gradients made by the forward pass are given away, once.
    made, ctx.made = ctx.made, None
    if torch.is_grad_enabled() or grad_sum is None or grad_nll is not None:
        made = None
    if made is not None:
        made = [times(x, grad_sum) for x in made]
    else:
        made = _ops.weighted_linear_ce_backward(
            grad_sum, grad_nll, *ctx.saved_tensors, *needed, ctx.chunk, **ctx.options
        )
    return *(x if wanted else None for x, wanted in zip(made, needed)), *[None] * (ctx.inputs - 2)


differentiable("weighted_linear_ce", _save, _backward, _forward)


def weighted_linear_ce(
    hidden: Tensor, weight: Tensor, targets: Tensor, w: Tensor, chunk: int = 0, *,
    ignore_index: int = -100, grad_of: str = "loss_sum",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Weighted sum of the cross-entropies of ``hidden @ weight.T``, without these logits, and every token's own.

    Args:
        hidden: [..., H], float32, bfloat16 or float16; under autocast cast to its dtype, like ``weight``.
        weight: [V, H], dtype of ``hidden``. Rows of both contiguous (else copied).
        targets: int32 or int64 [...]: in [0, V), or ``ignore_index``. Those of rows with w = 0 may be anything.
        w: floating [...], any sign (see :func:`lm_weight`); not differentiable. A mean over a part of a row is a weight
            too: w divided by the length of that part.
        chunk: rows at a time, at most, rounded up to what the kernel packs (16 on a CPU, 256 on a GPU); 0: as it likes,
            which is fastest. Results differ in the last bits.
        ignore_index: rows with it, and rows with w = 0, do not count: they cost nothing, are never read (their
            hidden may be NaN), and have nll 0 and gradient 0.
        grad_of: ``"loss_sum"`` or ``"nll"``, which of them will be differentiated. On a CPU the gradients of the sum
            are made along with it. The other one can be, too: then these are made again.

    Returns:
        loss_sum (0-d) ``sum w nll``, w_sum (0-d) ``sum w``, nll [...] ``-log p(target)``, float32, of the rows that
        count; without any all are 0. loss_sum and nll are differentiable in ``hidden`` and ``weight``. Memory: as
        :func:`linear_cross_entropy`.

    Raises:
        ValueError: shapes, devices, different dtypes, chunk, grad_of. TypeError: dtypes. IndexError: a target of a row
        that counts outside [0, V) (on the CPU; elsewhere its row is NaN).

    Source:
        Themis (arXiv 2310.01045), sections 4 and 11 of the method's specification.
    """
    rows, weight, to, by = flat_rows("weighted_linear_ce", hidden, weight, targets=targets, w=w)
    if by.is_floating_point():
        by = by.detach().float()
    loss_sum, w_sum, nll = call(_ops.weighted_linear_ce, rows, weight, to, by, chunk,
                                ignore_index=ignore_index, grad_of=grad_of)  # fmt: skip
    return loss_sum, w_sum, nll.view(targets.shape)
