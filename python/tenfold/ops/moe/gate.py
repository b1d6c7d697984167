# SPDX-License-Identifier: Apache-2.0
"""Which experts a token goes to, and with what weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tenfold._load import call
from tenfold.ops._register import (
    below_autograd,
    call_inference,
    differentiable,
    differentiable_by,
    inference_only,
    no_gradient,
)
from tenfold.ops.moe.slots import moe_sort

_ops = torch.ops.tenfold

for _name in ("moe_gate_backward", "moe_gate_linear_backward"):
    inference_only(_name)


def _chosen(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (*logits.shape[:-1], k)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int32)


@torch.library.register_fake("tenfold::moe_gate")
def _(logits, k, renormalize=True):
    return _chosen(logits, k)


@torch.library.register_fake("tenfold::moe_route")
def _(logits, k, renormalize=True):
    n, slots = logits.shape[1], logits.shape[0] * k
    sizes = (slots, slots, n, n + 1)
    return *_chosen(logits, k), *(logits.new_empty((i,), dtype=torch.int32) for i in sizes)


@torch.library.register_fake("tenfold::moe_gate_backward")
def _(grad_weight, logits, weight, index, renormalize=True):
    return logits.new_empty(logits.shape)


@torch.library.register_fake("tenfold::moe_gate_linear")
def _(x, w_router, k, renormalize=True):
    logits = x.new_empty((x.shape[0], w_router.shape[0]), dtype=torch.float32)
    return logits, *_chosen(logits, k)


@torch.library.register_fake("tenfold::moe_gate_linear_backward")
def _(grad_logits, grad_weight, x, w_router, logits, weight, index, renormalize, of_x, of_w):
    return x.new_empty(x.shape if of_x else (0,)), w_router.new_empty(
        w_router.shape if of_w else (0,)
    )


def _renormalizes(at: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return args[at] if len(args) > at else kwargs.get("renormalize", True)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, others: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            weight, index = _ops.moe_gate.default(logits, *others, **kwargs)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, weight, index)
        ctx.renormalize = _renormalizes(1, others, kwargs)
        ctx.mark_non_differentiable(index)
        return weight, index

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None
        return _ops.moe_gate_backward(grad, *ctx.saved_tensors, ctx.renormalize), None, None


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, others: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, ...]:
        with below_autograd():
            made = _ops.moe_route.default(logits, *others, **kwargs)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, *made[:2])
        ctx.renormalize = _renormalizes(1, others, kwargs)
        ctx.mark_non_differentiable(*made[1:])
        return made

    backward = staticmethod(_Gate.backward)


_gate, _route = differentiable_by("moe_gate", _Gate), differentiable_by("moe_route", _Route)
_gate_forward, _route_forward = _ops.moe_gate.default._op, _ops.moe_route.default._op


def _save(ctx: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    ctx.save_for_backward(*args[:2], *result)
    ctx.renormalize = _renormalizes(3, args, kwargs)
    ctx.inputs = len(args)


def _backward(ctx: Any, grad_logits: Tensor | None, grad_weight: Tensor | None, _index: Any) -> Any:
    needed = ctx.needs_input_grad[2:4]
    if grad_logits is None and grad_weight is None:
        return (None,) * ctx.inputs
    made = _ops.moe_gate_linear_backward(
        grad_logits, grad_weight, *ctx.saved_tensors, ctx.renormalize, *needed
    )
    return (*(x if wanted else None for x, wanted in zip(made, needed)),
            *[None] * (ctx.inputs - 2))  # fmt: skip


differentiable("moe_gate_linear", _save, _backward)


def moe_gate(logits: Tensor, k: int, renormalize: bool = True) -> tuple[Tensor, Tensor]:
    """The k experts of every token, and their weights: softmax, then the k largest.

    Args:
        logits: [..., n], float32, bfloat16 or float16.
        k: experts per token, 1 to n.
        renormalize: weights are divided by their sum, which makes them the softmax of the k logits; otherwise
            they are the probabilities among all n.

    Returns:
        (weight, index): float32 and int32 [..., k], in falling order; among equal logits the lower index comes
        first. ``weight`` is differentiable in ``logits``, once. A logit of -inf is an expert that is masked, chosen
        only if fewer than k others are left, with weight 0. NaN is chosen like -inf, and makes the weights
        of its row NaN.

    Raises:
        ValueError: k, shapes. TypeError: dtypes.

    Source:
        UpIT (arXiv 2410.01610), MoE layer; Mixtral's router with ``renormalize``.

    Example:
        >>> moe_gate(torch.tensor([[0.0, 2.0, 2.0]]), 2)[1]
        tensor([[1, 2]], dtype=torch.int32)
    """
    if logits.dim() == 2:
        if no_gradient(logits):
            try:
                with below_autograd():
                    return _gate_forward(logits, k, renormalize)
            except RuntimeError:  # in its own words
                pass
        return call(_gate, logits, k, renormalize)
    weight, index = call(_gate, logits.reshape(-1, logits.shape[-1]), k, renormalize)
    shape = (*logits.shape[:-1], k)
    return weight.view(shape), index.view(shape)


def moe_route(
    logits: Tensor, k: int, renormalize: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`moe_gate`, and its index sorted by :func:`moe_sort`: all that a batch's experts need to know.

    On the CPU one op, which takes half the time of two for few tokens; elsewhere those two.

    Args:
        logits, k, renormalize: as in :func:`moe_gate`.

    Returns:
        (weight, index, order, inverse, counts, offsets): those of :func:`moe_gate`, [..., k], and of :func:`moe_sort`
        with n experts. ``weight`` is differentiable in ``logits``, once.

    Raises:
        ValueError: k, shapes. TypeError: dtypes.

    Source:
        UpIT (arXiv 2410.01610), MoE layer and section 7 of the method's specification.

    Example:
        >>> moe_route(torch.tensor([[0.0, 2.0], [3.0, 1.0]]), 1)[2]
        tensor([1, 0], dtype=torch.int32)
    """
    if logits.dim() == 2 and logits.is_cpu:
        if no_gradient(logits):
            try:
                with below_autograd():
                    return _route_forward(logits, k, renormalize)
            except RuntimeError:  # in its own words
                pass
        return call(_route, logits, k, renormalize)
    weight, index = moe_gate(logits, k, renormalize)
    return weight, index, *moe_sort(index, logits.shape[-1])


def moe_gate_linear(
    x: Tensor, w_router: Tensor, k: int, renormalize: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """A router: logits ``x @ w_router.T`` in float32, and :func:`moe_gate` of them, in one pass over x.

    Args:
        x: [..., d], float32, bfloat16 or float16.
        w_router: [n, d], of the dtype of x, or float32.
        k, renormalize: as in :func:`moe_gate`.

    Returns:
        (logits, weight, index): float32 [..., n], as for :func:`load_balance_loss`, float32 and int32 [..., k].
        Logits and weight are differentiable in x and w_router, once. Under autocast nothing is cast: routing
        stays in float32.

    Raises:
        ValueError: k, shapes. TypeError: dtypes. RuntimeError: devices.

    Source:
        UpIT (arXiv 2410.01610), MoE layer.
    """
    op = _ops.moe_gate_linear.default
    if x.dim() == 2:
        return call_inference(op, x, w_router, k, renormalize)
    flat = x.reshape(-1, x.shape[-1])
    made = call_inference(op, flat, w_router, k, renormalize)
    return tuple(t.view(*x.shape[:-1], t.shape[-1]) for t in made)  # type: ignore[return-value]
