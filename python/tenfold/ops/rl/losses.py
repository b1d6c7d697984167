# SPDX-License-Identifier: Apache-2.0
"""PPO's policy and value losses over macro actions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tenfold._load import call
from tenfold.ops._masks import as_bytes
from tenfold.ops._register import call_inference, differentiable_by, inference_only, is_done
from tenfold.ops.rl.returns import check_segments, constant, real, rows_of
from tenfold.ops.rl.segments import check_offsets

_ops = torch.ops.tenfold
POLICY_STATS = ("clip_high", "clip_low", "ratio_mean", "ratio_max", "kl_old_new", "count")
VALUE_STATS = ("clip", "error", "count")

for _name in ("ma_ppo_policy_loss_forward", "ma_ppo_value_loss_forward", "ma_ppo_loss_backward"):
    inference_only(_name)


def _loss_like(x: Tensor, stats: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    return x.new_empty(()), x.new_empty((len(stats),), dtype=torch.float32)


def _saved_like(x: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    rows = rows_of(x, cu_seqlens)
    return x.new_empty(x.shape), x.new_empty((rows,), dtype=torch.float64)


@torch.library.register_fake("tenfold::ma_ppo_policy_loss")
def _(logp_new, *args, **kwargs):
    return _loss_like(logp_new, POLICY_STATS)


@torch.library.register_fake("tenfold::ma_ppo_policy_loss_forward")
def _(logp_new, *args, weight="macro", cu_seqlens=None, **kwargs):
    return *_loss_like(logp_new, POLICY_STATS), *_saved_like(logp_new, cu_seqlens)


@torch.library.register_fake("tenfold::ma_ppo_value_loss")
def _(v_new, *args, **kwargs):
    return _loss_like(v_new, VALUE_STATS)


@torch.library.register_fake("tenfold::ma_ppo_value_loss_forward")
def _(v_new, *args, cu_seqlens=None, **kwargs):
    return *_loss_like(v_new, VALUE_STATS), *_saved_like(v_new, cu_seqlens)


@torch.library.register_fake("tenfold::ma_ppo_loss_backward")
def _(grad, slope, scale, *, cu_seqlens=None):
    return slope.new_empty(slope.shape)


def _with_slope(name: str) -> type[torch.autograd.Function]:
    """A loss whose forward makes the derivatives of its terms in the same pass, for its backward."""
    forward_op = getattr(_ops, f"{name}_forward").default
    backward_op = _ops.ma_ppo_loss_backward.default

    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, x: Tensor, others: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[Tensor, Tensor]:
            with torch._C._AutoDispatchBelowAutograd():
                loss, stats, slope, scale = forward_op(x, *others, **kwargs)
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(slope, scale)
            ctx.cu_seqlens = kwargs.get("cu_seqlens")
            ctx.mark_non_differentiable(stats)
            return loss, stats

        @staticmethod
        def backward(ctx: Any, grad: Tensor | None, _stats: Any) -> tuple[Tensor | None, ...]:
            if torch.is_grad_enabled():
                raise RuntimeError(f"tenfold::{name} is differentiable once, not with create_graph")
            if grad is None:
                return None, None, None
            slope, scale = ctx.saved_tensors
            if is_done(grad, slope):  # those of a CPU have their scales
                return slope, None, None
            made = call_inference(backward_op, grad, slope, scale, cu_seqlens=ctx.cu_seqlens)
            return made, None, None

    return Loss


_policy = differentiable_by("ma_ppo_policy_loss", _with_slope("ma_ppo_policy_loss"))
_value = differentiable_by("ma_ppo_value_loss", _with_slope("ma_ppo_value_loss"))


def ma_ppo_policy_loss(
    logp_new: Tensor, logp_old: Tensor, adv: Tensor, seg: Tensor, eps_lo: float = 0.2,
    eps_hi: float = 0.2, ratio: str = "token", agg: str = "token_mean", denom: float = 0.0, *,
    weight: str = "macro", cu_seqlens: Tensor | None = None, validate: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """PPO's clipped surrogate: ``max(-A q, -A clip(q, 1 - eps_lo, 1 + eps_hi))``, averaged.

    Args:
        logp_new, logp_old, adv: [B, R], or [N] with ``cu_seqlens``; any floating dtype; masked entries are
            not read. Of ``logp_new`` the loss is differentiable, once.
        seg: int32 or int64 of the same shape; -1 is masked.
        ratio: q is ``exp(logp_new - logp_old)`` of each token (``"token"``), or of a macro action the
            product over its tokens (``"joint"``) or their geometric mean (``"geo_mean"``); its A is the mean.
        agg: over all terms (``"token_mean"``), or of each sequence first (``"seq_mean_token_mean"``).
        denom: what the sum is divided by, where the batch is part of a larger one: tokens (or
            weights of macro actions), or sequences. 0: those of this batch.
        weight: with the last two ratios, a macro action counts once (``"macro"``) or per token
            (``"length"``).
        cu_seqlens: int32 or int64 [B + 1], where the rows of a packed batch begin, and N.
        validate: check ``seg`` (and on a GPU ``cu_seqlens``), which waits for a GPU.

    Returns:
        (loss, stats): 0-d, and float32 [6] ``POLICY_STATS``: shares of terms clipped above and below, mean
        and largest q, mean of ``logp_old - logp_new``, number of terms. Log-ratios are bounded by 20,
        with gradient 0 beyond. Without a valid token the loss is 0.

    Source:
        MA-RLHF (arXiv 2410.02743), objective of MA-PPO.
    """
    here = seg.is_cpu  # there the kernel looks at what it reads
    if validate and not here:
        check_segments(seg, None, None, cu_seqlens)
    new = real(logp_new)
    old, a = (constant(x, new.dtype) for x in (logp_old, adv))
    return call(_policy, new, old, a, seg, eps_lo, eps_hi, ratio, agg, denom, weight=weight,
                cu_seqlens=cu_seqlens, validate=validate and here)  # fmt: skip


def ma_ppo_value_loss(
    v_new: Tensor, v_old: Tensor, ret: Tensor, mask: Tensor, clip: float = 0.2,
    agg: str = "token_mean", denom: float = 0.0, *, cu_seqlens: Tensor | None = None,
    validate: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``0.5 max((v - ret)^2, (clamp(v, v_old - clip, v_old + clip) - ret)^2)``, averaged.

    Args:
        v_new, v_old, ret: [B, R], or [N] with ``cu_seqlens``; any floating dtype; masked entries are not read.
            Differentiable in v_new, once.
        mask: of the same shape, bool, int8 or uint8 (other dtypes: nonzero is valid).
        agg, denom, cu_seqlens: as in :func:`ma_ppo_policy_loss`.
        validate: the values of ``cu_seqlens`` are checked on a GPU too, which waits for it.

    Returns:
        (loss, stats): 0-d, and float32 [3] ``VALUE_STATS``: share of clipped tokens, mean squared error of
        ``v_new``, number of tokens.
    """
    if validate:
        check_offsets(cu_seqlens, mask.shape[0])
    new = real(v_new)
    old, target = (constant(x, new.dtype) for x in (v_old, ret))
    return call(_value, new, old, target, as_bytes(mask), clip, agg, denom, cu_seqlens=cu_seqlens)
