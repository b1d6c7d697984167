# SPDX-License-Identifier: Apache-2.0
"""What a router is trained with besides the model's loss. Losses are returned; nothing is kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tenfold._load import call
from tenfold.ops._masks import as_bytes
from tenfold.ops._register import (
    call_inference,
    differentiable,
    differentiable_by,
    inference_only,
)

_ops = torch.ops.tenfold

for _name in ("load_balance_loss_backward", "router_seed_loss_grads", "router_seed_loss_backward"):
    inference_only(_name)


@torch.library.register_fake("tenfold::load_balance_loss")
def _(logits, counts, token_mask, k, norm="slots"):
    return logits.new_empty((), dtype=torch.float32)


@torch.library.register_fake("tenfold::load_balance_loss_backward")
def _(grad, logits, counts, token_mask, k, norm):
    return logits.new_empty(logits.shape)


@torch.library.register_fake("tenfold::router_seed_loss")
def _(h, r, token_mask=None, target=None):
    return h.new_empty((), dtype=torch.float32)


@torch.library.register_fake("tenfold::router_seed_loss_grads")
def _(h, r, token_mask, target, of_r):
    slope = h.new_empty(h.shape[:-1], dtype=torch.float32)
    return slope.new_empty(()), slope, r.new_empty(r.shape if of_r else (0,))


@torch.library.register_fake("tenfold::router_seed_loss_backward")
def _(grad, slope, h, r):
    return h.new_empty(h.shape)


class _Balance(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, others: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            loss = _ops.load_balance_loss.default(logits, *others, **kwargs)
        named = {"norm": "slots", **dict(zip(("counts", "token_mask", "k", "norm"), others)),
                 **kwargs}  # fmt: skip
        ctx.save_for_backward(logits, named["counts"], named["token_mask"])
        ctx.rest = (named["k"], named["norm"])
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        made = _ops.load_balance_loss_backward(grad, *ctx.saved_tensors, *ctx.rest)
        return made, None, None


_balance = differentiable_by("load_balance_loss", _Balance)

_SEED = ("h", "r", "token_mask", "target")


def _forward(ctx: Any, needed: tuple[bool, ...], args: Any, kwargs: dict[str, Any]) -> Any:
    """The loss, and the gradient of r in the same pass over h."""
    named = {**dict(zip(_SEED, args)), **kwargs}
    ctx.of_h, ctx.of_r = (*needed, False)[:2]
    h, r, mask, target = (named.get(name) for name in _SEED)
    loss, slope, of_r = _ops.router_seed_loss_grads(h, r, mask, target, ctx.of_r)
    # An expert that is frozen need not keep its h.
    ctx.kept = (h if ctx.of_h else None, r, slope, of_r)
    return loss


def _save(ctx: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    ctx.save_for_backward(*ctx.kept)
    ctx.inputs = len(args)
    del ctx.kept


def _backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * ctx.inputs
    if torch.is_grad_enabled():
        raise RuntimeError(
            "tenfold::router_seed_loss is differentiable once, not with create_graph"
        )
    h, r, slope, made = ctx.saved_tensors
    of_h = _ops.router_seed_loss_backward(grad, slope, h, r) if ctx.of_h else None
    of_r = (made * grad).to(r.dtype) if ctx.of_r else None
    return of_h, of_r, *[None] * (ctx.inputs - 2)


differentiable("router_seed_loss", _save, _backward, _forward)


def load_balance_loss(
    logits: Tensor, counts: Tensor, token_mask: Tensor | None, k: int, norm: str = "slots"
) -> Tensor:
    """``n sum_e F_e mean_t P_te``: what keeps a router from using few experts.

    Args:
        logits: [..., n], float32, bfloat16 or float16; P is their softmax.
        counts: int32 or int64 [n], how often the tokens *that count* chose each expert, as of :func:`moe_sort`
            with ``allow_sentinel`` and an index of n at padding tokens.
        token_mask: [...], nonzero where a token counts; None: all do.
        k: experts per token.
        norm: F is ``counts`` over T k (``"slots"``: the loss of a balanced router is 1) or over T (``"tokens"``:
            it is k, as in transformers).

    Returns:
        0-d float32, differentiable in logits, once; F has no gradient. Without a token that counts 0.

    Raises:
        ValueError: k, norm. TypeError: dtypes. RuntimeError: shapes, devices.

    Source:
        UpIT (arXiv 2410.01610), post-training; Switch Transformer (arXiv 2101.03961).
    """
    if logits.dim() != 2:
        logits = logits.reshape(-1, logits.shape[-1])
    mask = None if token_mask is None else as_bytes(token_mask).reshape(-1)
    return call(_balance, logits, counts, mask, k, norm)


def router_seed_loss(
    h: Tensor, r: Tensor, token_mask: Tensor | None = None, target: Tensor | None = None
) -> Tensor:
    """Binary cross-entropy of ``sigmoid(h r)`` against all ones: how an expert's routing vector is seeded.

    Args:
        h: inputs of the expert, [..., d], or [L, ..., d] of L layers; float32, bfloat16 or float16. Rows of tokens
            that do not count are not read.
        r: the routing vector [d], or [L, d]; of the dtype of h, or float32.
        token_mask: [...], nonzero where a token counts; None: all do.
        target: [...], 1 for the expert's own tokens and 0 for those of others; None: all ones.

    Returns:
        0-d float32: the mean over layers and tokens that count of ``t softplus(-z) + (1 - t) softplus(z)`` with
        z = h r; ln 2 at r = 0. Differentiable in h and r, once. Without a token that counts 0.

    Raises:
        ValueError: shapes of h and r. TypeError: dtypes. RuntimeError: other shapes, devices.

    Source:
        UpIT (arXiv 2410.01610), router initialisation.
    """
    if h.dim() > r.dim() + 1 and r.dim() in (1, 2):
        h = h.reshape(*h.shape[: r.dim() - 1], -1, h.shape[-1])
    mask = None if token_mask is None else as_bytes(token_mask).reshape(-1)
    goal = None if target is None else target.reshape(-1).float()
    return call_inference(_ops.router_seed_loss.default, h, r, mask, goal)
