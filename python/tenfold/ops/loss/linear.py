# SPDX-License-Identifier: Apache-2.0
"""Losses of a linear layer over a vocabulary, without its logits in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tenfold._load import call
from tenfold.ops._register import differentiable, inference_only

_ops = torch.ops.tenfold

for _name in ("linear_cross_entropy_grads", "linear_cross_entropy_backward",
              "linear_logprob_backward"):  # fmt: skip
    inference_only(_name)


def rows_of(like: Tensor, count: int) -> tuple[Tensor, ...]:
    """Fakes of so many results, one number per row."""
    return tuple(like.new_empty(like.shape[:1], dtype=torch.float32) for _ in range(count))


def like_factors(hidden: Tensor, weight: Tensor, of_hidden: bool, of_weight: bool) -> tuple[Tensor, ...]:  # fmt: skip
    """Fakes of the gradients that are wanted; the others are empty."""
    return tuple(x.new_empty(x.shape if wanted else (0,))
                 for x, wanted in ((hidden, of_hidden), (weight, of_weight)))  # fmt: skip


@torch.library.register_fake("tenfold::linear_cross_entropy")
def _(hidden, weight, target, *, reduction="mean", **options):
    loss, lse = rows_of(hidden, 2)
    return loss if reduction == "none" else loss.new_empty(()), lse


@torch.library.register_fake("tenfold::linear_cross_entropy_grads")
def _(hidden, weight, target, of_hidden, of_weight, **options):
    (lse,) = rows_of(hidden, 1)
    return lse.new_empty(()), lse, *like_factors(hidden, weight, of_hidden, of_weight)


@torch.library.register_fake("tenfold::linear_cross_entropy_backward")
def _(grad_loss, grad_lse, hidden, weight, target, lse, of_hidden, of_weight, **options):
    return like_factors(hidden, weight, of_hidden, of_weight)


@torch.library.register_fake("tenfold::linear_logprob")
def _(hidden, weight, ids, temperature=1.0):
    return rows_of(hidden, 3)


@torch.library.register_fake("tenfold::linear_logprob_backward")
def _(grad_logp, grad_lse, grad_entropy, hidden, weight, ids, lse, entropy, of_hidden, of_weight,
      temperature):  # fmt: skip
    return like_factors(hidden, weight, of_hidden, of_weight)


def _forward(ctx: Any, needed: tuple[bool, ...], args: Any, options: dict[str, Any]) -> Any:
    """The loss, with its gradients where they cost no second product for the logits."""
    ctx.made = None
    if args[0].device.type != "cpu" or options.get("reduction", "mean") == "none":
        return _ops.linear_cross_entropy(*args, **options)
    loss, lse, *ctx.made = _ops.linear_cross_entropy_grads(*args, *needed[:2], **options)
    return loss, lse


def _save(ctx: Any, args: tuple[Any, ...], options: dict[str, Any], result: Any) -> None:
    ctx.save_for_backward(*args, result[1], options.get("row_weight"))
    ctx.options = {n: x for n, x in options.items() if n != "row_weight"}


def times(x: Tensor, by: Tensor) -> Tensor:
    """A gradient times that of its loss, in place."""
    # A loss that is not scaled: no pass over a gradient as large as the weight. While a graph is
    # traced the value is not known.
    if type(by) is Tensor and by.device.type == "cpu" and bool(by == 1):
        return x
    return x.mul_(by)


def _backward(ctx: Any, grad_loss: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    hidden, weight, target, lse, row_weight = ctx.saved_tensors
    needed = ctx.needs_input_grad[2:4]
    # Gradients made by the forward pass are given away: only then are they not copied. A second
    # backward pass (retain_graph) makes them again, and so does one that needs lse's, too: the sum
    # of two gradients that have been rounded is worse than one.
    made, ctx.made = ctx.made, None
    if torch.is_grad_enabled() or grad_loss is None or grad_lse is not None:
        made = None
    if made is not None:
        made = [times(x, grad_loss) for x in made]
    else:
        made = _ops.linear_cross_entropy_backward(
            grad_loss, grad_lse, hidden, weight, target, lse, *needed, row_weight=row_weight,
            **ctx.options,
        )  # fmt: skip
    return *(x if wanted else None for x, wanted in zip(made, needed)), None


differentiable("linear_cross_entropy", _save, _backward, _forward)


def _save_logprob(ctx: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    ctx.save_for_backward(*args[:3], *result[1:])
    ctx.temperature = args[3] if len(args) > 3 else kwargs.get("temperature", 1.0)
    ctx.inputs = len(args)


def _backward_logprob(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    needed = ctx.needs_input_grad[2:4]
    made = _ops.linear_logprob_backward(*grads, *ctx.saved_tensors, *needed, ctx.temperature)
    return (*(x if wanted else None for x, wanted in zip(made, needed)),
            *[None] * (ctx.inputs - 2))  # fmt: skip


differentiable("linear_logprob", _save_logprob, _backward_logprob)


def flat_rows(op: str, hidden: Tensor, weight: Tensor, **of_rows: Tensor | None) -> Any:
    """``hidden`` as [N, H], ``weight``, and what is [...] as [N]; under autocast in its dtype, as F.linear."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    if hidden.dim() in (0, 2):  # checked by the op
        return hidden, weight, *of_rows.values()
    for name, x in of_rows.items():
        if x is not None and x.shape != hidden.shape[:-1]:
            raise ValueError(f"tenfold::{op}: {name} must be {list(hidden.shape[:-1])}, one per row "
                             f"of hidden {list(hidden.shape)}, got {list(x.shape)}")  # fmt: skip
    flat = (None if x is None else x.reshape(-1) for x in of_rows.values())
    return hidden.reshape(-1, hidden.shape[-1]), weight, *flat


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, *, row_weight: Tensor | None = None,
    ignore_index: int = -100, reduction: str = "mean", softcap: float = 0.0, z_loss: float = 0.0,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Cross-entropy of ``hidden @ weight.T`` without these logits: row loss ``w (lse - x[target] + z_loss lse^2)``.

    Args:
        hidden: [..., H], float32, bfloat16 or float16; under autocast cast to its dtype, like ``weight``.
        weight: [V, H], dtype of ``hidden``. Rows of both contiguous (else copied).
        target: int32 or int64 [...]: in [0, V), or ``ignore_index``.
        row_weight: w, floating [...], any sign; default 1. Not differentiable.
        ignore_index: rows with it, and rows with w = 0, do not count: they cost nothing, are never read
            (their hidden may be NaN), and have lse 0 and gradient 0.
        reduction: ``"mean"`` over the sum of w of the rows that count (their number without
            ``row_weight``), ``"sum"`` or ``"none"``. Without a row that counts the loss is 0.
        softcap: c > 0 turns a logit x into ``c tanh(x / c)``, before the temperature.
        z_loss: coefficient of lse^2, at least 0.
        temperature: above 0; logits are divided by it.

    Returns:
        loss (0-d, or [...] with ``"none"``) and lse [...], float32, both differentiable in ``hidden`` and
        ``weight``. Memory: the gradients (made with the loss for a mean or sum, so use ``torch.no_grad``
        to evaluate), and on the CPU a workspace of some 20 MB, whatever V is (128 MB more where only
        ``hidden`` needs a gradient).

    Raises:
        ValueError: shapes, devices, different dtypes, options out of range. TypeError: dtypes. IndexError: a target
        outside [0, V) that is not ``ignore_index`` (on the CPU; elsewhere its row is undefined).

    Source:
        MA-RLHF (arXiv 2410.02743), section 7 of the method's specification; PixelGPT's and ERNIE-Code's loss.
    """
    rows, weight, to, w = flat_rows("linear_cross_entropy", hidden, weight, target=target,
                                row_weight=row_weight)  # fmt: skip
    if w is not None and w.is_floating_point():
        w = w.detach().float()
    loss, lse = call(
        _ops.linear_cross_entropy, rows, weight, to,
        row_weight=w, ignore_index=ignore_index,
        reduction=reduction, softcap=softcap, z_loss=z_loss, temperature=temperature,
    )  # fmt: skip
    return (loss.view(target.shape) if reduction == "none" else loss), lse.view(target.shape)


def linear_logprob(
    hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probability of one token per row and entropy under ``hidden @ weight.T / temperature``, without the logits.

    Args:
        hidden: [..., H], float32, bfloat16 or float16; under autocast cast to its dtype, like ``weight``.
        weight: [V, H], dtype of ``hidden``.
        ids: int32 or int64 [...]; rows whose id is outside [0, V) (as -100) are skipped: both results are
            0, without gradient, and their hidden is never read.
        temperature: above 0.

    Returns:
        logp and entropy, float32 [...], both differentiable in ``hidden`` and ``weight``.

    Raises:
        ValueError: shapes, devices, different dtypes, temperature <= 0. TypeError: dtypes.

    Source:
        MA-RLHF (arXiv 2410.02743), section 7 of the method's specification.
    """
    rows, weight, to = flat_rows("linear_logprob", hidden, weight, ids=ids)
    logp, _, entropy = call(_ops.linear_logprob, rows, weight, to, temperature)
    return logp.view(ids.shape), entropy.view(ids.shape)
