"""PPO's policy and value losses over macro actions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tenfold._load import call
from tenfold.ops._register import differentiable, inference_only
from tenfold.ops.rl.returns import check_segments, real

_ops = torch.ops.tenfold
POLICY_STATS = ("clip_high", "clip_low", "ratio_mean", "ratio_max", "kl_old_new", "count")
VALUE_STATS = ("clip", "error", "count")

inference_only("ma_ppo_policy_loss_backward")
inference_only("ma_ppo_value_loss_backward")


@torch.library.register_fake("tenfold::ma_ppo_policy_loss")
def _(logp_new, *args, **kwargs):
    return logp_new.new_empty(()), logp_new.new_empty((len(POLICY_STATS),), dtype=torch.float32)


@torch.library.register_fake("tenfold::ma_ppo_policy_loss_backward")
def _(grad, logp_new, *args):
    return torch.empty_like(logp_new)


@torch.library.register_fake("tenfold::ma_ppo_value_loss")
def _(v_new, *args, **kwargs):
    return v_new.new_empty(()), v_new.new_empty((len(VALUE_STATS),), dtype=torch.float32)


@torch.library.register_fake("tenfold::ma_ppo_value_loss_backward")
def _(grad, v_new, *args):
    return torch.empty_like(v_new)


def _saver(defaults: tuple[Any, ...], *keywords: str) -> Any:
    def save(ctx: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        ctx.save_for_backward(*args[:4])
        ctx.rest = (
            *args[4:],
            *defaults[len(args) - 4 :],
            *(kwargs.get(k, "macro") for k in keywords),
        )
        ctx.inputs = len(args)
        ctx.mark_non_differentiable(result[1])

    return save


def _backward_of(op: Any) -> Any:
    def backward(ctx: Any, grad: Tensor | None, _stats: Any) -> tuple[Tensor | None, ...]:
        made = None if grad is None else op(grad, *ctx.saved_tensors, *ctx.rest)
        return (made, *[None] * (ctx.inputs - 1))

    return backward


differentiable("ma_ppo_policy_loss", _saver((0.2, 0.2, "token", "token_mean", 0.0), "weight"),
               _backward_of(_ops.ma_ppo_policy_loss_backward))  # fmt: skip
differentiable("ma_ppo_value_loss", _saver((0.2, "token_mean", 0.0)),
               _backward_of(_ops.ma_ppo_value_loss_backward))  # fmt: skip


def ma_ppo_policy_loss(
    logp_new: Tensor, logp_old: Tensor, adv: Tensor, seg: Tensor, eps_lo: float = 0.2,
    eps_hi: float = 0.2, ratio: str = "token", agg: str = "token_mean", denom: float = 0.0, *,
    weight: str = "macro", validate: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """PPO's clipped surrogate: ``max(-A q, -A clip(q, 1 - eps_lo, 1 + eps_hi))``, averaged.

    Args:
        logp_new, logp_old, adv: [B, R], any floating dtype; masked entries are not read. Of ``logp_new``
            the loss is differentiable.
        seg: int32 or int64 [B, R]; -1 is masked.
        ratio: q is ``exp(logp_new - logp_old)`` of each token (``"token"``), or of a macro action the
            product over its tokens (``"joint"``) or their geometric mean (``"geo_mean"``); its A is the mean.
        agg: over all terms (``"token_mean"``), or of each sequence first (``"seq_mean_token_mean"``).
        denom: what the sum is divided by, where the batch is part of a larger one: tokens (or
            weights of macro actions), or sequences. 0: those of this batch.
        weight: with the last two ratios, a macro action counts once (``"macro"``) or per token
            (``"length"``).

    Returns:
        (loss, stats): 0-d, and float32 [6] ``POLICY_STATS``: shares of terms clipped above and below, mean
        and largest q, mean of ``logp_old - logp_new``, number of terms. Log-ratios are bounded by 20,
        with gradient 0 beyond. Without a valid token the loss is 0.

    Source:
        MA-RLHF (arXiv 2410.02743), objective of MA-PPO.
    """
    if validate:
        check_segments(seg, None)
    new = real(logp_new)
    old, a = (x.detach().to(new.dtype) for x in (logp_old, adv))
    return call(_ops.ma_ppo_policy_loss, new, old, a, seg, eps_lo, eps_hi, ratio, agg, denom,
                weight=weight)  # fmt: skip


def ma_ppo_value_loss(
    v_new: Tensor, v_old: Tensor, ret: Tensor, mask: Tensor, clip: float = 0.2,
    agg: str = "token_mean", denom: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``0.5 max((v - ret)^2, (clamp(v, v_old - clip, v_old + clip) - ret)^2)``, averaged.

    Args:
        v_new, v_old, ret: [B, R], any floating dtype; masked entries are not read. Differentiable in v_new.
        mask: [B, R].
        agg, denom: as in :func:`ma_ppo_policy_loss`.

    Returns:
        (loss, stats): 0-d, and float32 [3] ``VALUE_STATS``: share of clipped tokens, mean squared error of
        ``v_new``, number of tokens.
    """
    new = real(v_new)
    old, target = (x.detach().to(new.dtype) for x in (v_old, ret))
    on = mask if mask.dtype in (torch.bool, torch.uint8, torch.int8) else mask != 0
    return call(_ops.ma_ppo_value_loss, new, old, target, on, clip, agg, denom)
