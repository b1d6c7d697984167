# SPDX-License-Identifier: Apache-2.0
"""Rewards of sequences, and the loss of pairs of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tenfold._load import call
from tenfold.ops._masks import as_bytes
from tenfold.ops._register import call_inference, differentiable_by, inference_only, is_done

_ops = torch.ops.tenfold

for _name in ("last_token_reward_forward", "last_token_reward_backward",
              "pairwise_logsigmoid_grads"):  # fmt: skip
    inference_only(_name)


def _reward(hidden: Tensor, w_v: Tensor) -> Tensor:
    shape = hidden.shape[:1] if w_v.dim() == 1 else (hidden.shape[0], w_v.shape[0])
    return hidden.new_empty(shape, dtype=torch.float32)


@torch.library.register_fake("tenfold::last_token_reward")
def _(hidden, mask, w_v, pool="last"):
    return _reward(hidden, w_v)


@torch.library.register_fake("tenfold::last_token_reward_forward")
def _(hidden, mask, w_v, pool="last"):
    pooled = hidden.new_empty((hidden.shape[0], hidden.shape[2]), dtype=torch.float32)
    return _reward(hidden, w_v), pooled


@torch.library.register_fake("tenfold::last_token_reward_backward")
def _(grad, pooled, mask, w_v, like, of_hidden, of_weight, pool="last"):
    shape = (*mask.shape, pooled.shape[1])
    return like.new_empty(shape if of_hidden else (0,)), w_v.new_empty(
        w_v.shape if of_weight else (0,)
    )


@torch.library.register_fake("tenfold::pairwise_logsigmoid")
def _(r_pos, r_neg, margin=None, center=0.0):
    floats = r_pos.new_empty(r_pos.shape, dtype=torch.float32)
    return floats.new_empty(()), floats


@torch.library.register_fake("tenfold::pairwise_logsigmoid_grads")
def _(r_pos, r_neg, margin=None, center=0.0):
    floats = [r_pos.new_empty(r_pos.shape, dtype=torch.float32) for _ in range(3)]
    return floats[0].new_empty(()), *floats


def _named(
    names: dict[str, Any], others: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...]:
    """Arguments in the order of ``names``, which holds their defaults."""
    if len(others) == len(names):  # as the faces call
        return others
    return tuple({**names, **dict(zip(names, others)), **kwargs}.values())


class _Reward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, w_v: Tensor, others: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        mask, ctx.pool = _named({"mask": None, "pool": "last"}, others, kwargs)
        with torch._C._AutoDispatchBelowAutograd():
            made = _ops.last_token_reward_forward.default(hidden, mask, w_v, ctx.pool)
        reward, pooled = made
        # Of hidden only the dtype: it need not be kept for this.
        ctx.save_for_backward(pooled, mask, w_v, hidden.new_empty(0))
        return reward

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[:2]
        made = call_inference(
            _ops.last_token_reward_backward.default, grad, *ctx.saved_tensors, *needed, ctx.pool
        )
        return *(x if wanted else None for x, wanted in zip(made, needed)), None, None


class _Pairs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, r_pos: Tensor, r_neg: Tensor, others: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        margin, ctx.center = _named({"margin": None, "center": 0.0}, others, kwargs)
        with torch._C._AutoDispatchBelowAutograd():
            made = _ops.pairwise_logsigmoid_grads.default(r_pos, r_neg, margin, ctx.center)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*made[2:])
        ctx.dtype = r_pos.dtype
        return made[:2]

    @staticmethod
    def backward(
        ctx: Any, grad_loss: Tensor | None, grad_delta: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "tenfold::pairwise_logsigmoid is differentiable once, not with create_graph"
            )
        of_pos, of_neg = ctx.saved_tensors
        if grad_loss is None:
            of_pos = of_neg = None
        elif not is_done(grad_loss, of_pos):
            of_pos, of_neg = of_pos * grad_loss, of_neg * grad_loss
        if grad_delta is not None:
            of_pos = grad_delta if of_pos is None else of_pos + grad_delta
            of_neg = -grad_delta if of_neg is None else of_neg - grad_delta
        if ctx.dtype != torch.float32 and of_pos is not None:
            of_pos, of_neg = of_pos.to(ctx.dtype), of_neg.to(ctx.dtype)
        return of_pos, of_neg, None, None


_last_token_reward = differentiable_by("last_token_reward", _Reward, (0, 2))
_pairwise_logsigmoid = differentiable_by("pairwise_logsigmoid", _Pairs, (0, 1))


def last_token_reward(hidden: Tensor, mask: Tensor, w_v: Tensor, pool: str = "last") -> Tensor:
    """Pooled hidden states of a sequence times a head without bias: its reward, or its class scores.

    Args:
        hidden: [N, S, H], float32, bfloat16 or float16; H contiguous (else copied).
        mask: [N, S], bool, int8 or uint8 (other dtypes: nonzero is a real token). Padding may be on either side, or
            between; what it holds is never read and has gradient 0.
        w_v: [H], or [C, H] for C scores; float32, bfloat16 or float16, whatever ``hidden`` is.
        pool: ``"last"``, the last real token, or ``"mean"`` over the real tokens.

    Returns:
        float32 [N], or [N, C] of [C, H], whose bits depend on no other row and no padding. Differentiable in ``hidden``
        and ``w_v``, once; ``hidden`` is not kept for that.

    Raises:
        ValueError: a row without a real token (checked on the CPU; elsewhere its reward is NaN), shapes, devices, pool.
        TypeError: dtypes.

    Source:
        Themis (arXiv 2310.01045), section 4 of the method's specification; PixelGPT's pooled classifier.
    """
    return call(_last_token_reward, hidden, as_bytes(mask), w_v, pool)


def pairwise_logsigmoid(
    r_pos: Tensor, r_neg: Tensor, margin: Tensor | None = None, center: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Bradley-Terry loss of pairs: mean of ``-log sigmoid(r_pos - r_neg - margin) + center (r_pos + r_neg)^2``.

    Args:
        r_pos, r_neg: [B], rewards of preferred and rejected answers, one dtype of float32, bfloat16 and float16.
        margin: floating [B], by how much the first should be above the second; not differentiable. None: 0.
        center: at least 0; pulls the rewards towards 0, whose place the ranking leaves open.

    Returns:
        (loss, delta): float32, 0-d and [B], ``delta = r_pos - r_neg``; both differentiable in ``r_pos`` and
        ``r_neg``, once.

    Raises:
        ValueError: no pair, another number of rejected than of preferred rewards, devices, center. TypeError: dtypes.

    Source:
        Themis (arXiv 2310.01045), section 4 of the method's specification; margin and center as in TRL's RewardTrainer.
    """
    if margin is not None and margin.is_floating_point():
        margin = margin.detach().float()
    return call(_pairwise_logsigmoid, r_pos, r_neg, margin, center)
