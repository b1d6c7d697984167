# SPDX-License-Identifier: Apache-2.0
"""From token rewards and values to advantages of macro actions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tenfold._load import call
from tenfold.ops._masks import as_bytes
from tenfold.ops._register import call_inference, differentiable, inference_only
from tenfold.ops.rl.segments import NO_LIMIT, check_offsets

_ops = torch.ops.tenfold

for _name in ("macro_pool_backward", "macro_gae", "gae", "ma_ppo_prepare"):
    inference_only(_name)


def rows_of(tokens: Tensor, cu_seqlens: Tensor | None) -> int:
    """B of [B, R], or of packed tokens."""
    return tokens.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


@torch.library.register_fake("tenfold::macro_pool")
def _(x, seg, T, weight="equal", *, cu_seqlens=None):
    return x.new_empty(rows_of(seg, cu_seqlens), T)


@torch.library.register_fake("tenfold::macro_pool_backward")
def _(grad, seg, T, weight="equal", *, cu_seqlens=None):
    return grad.new_empty(seg.shape)


@torch.library.register_fake("tenfold::macro_gae")
def _(value_m, reward_m, nseg, length=None, gamma=1.0, lam=0.95, bootstrap=None):
    return value_m.new_empty(value_m.shape), value_m.new_empty(value_m.shape)


@torch.library.register_fake("tenfold::gae")
def _(value, reward, mask, gamma=1.0, lam=0.95, bootstrap=None, *, cu_seqlens=None):
    return value.new_empty(mask.shape), value.new_empty(mask.shape)


@torch.library.register_fake("tenfold::ma_ppo_prepare")
def _(logp_old, logp_ref, value_old, score, seg, nseg, *args, cu_seqlens=None, **kwargs):
    made = [logp_old.new_empty(seg.shape) for _ in range(4)]
    return *made, logp_old.new_empty(rows_of(seg, cu_seqlens))


@torch.library.register_fake("tenfold::macro_segment_check")
def _(seg, nseg, limit, *, cu_seqlens=None):
    return seg.new_empty(rows_of(seg, cu_seqlens), dtype=torch.bool)


def _save(ctx: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    ctx.save_for_backward(args[1])
    ctx.rest = (args[2], args[3] if len(args) > 3 else kwargs.get("weight", "equal"))
    ctx.cu_seqlens = kwargs.get("cu_seqlens")
    ctx.inputs = len(args)


def _backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * ctx.inputs
    (seg,) = ctx.saved_tensors
    made = _ops.macro_pool_backward(grad, seg, *ctx.rest, cu_seqlens=ctx.cu_seqlens)
    return (made, *[None] * (ctx.inputs - 1))


differentiable("macro_pool", _save, _backward)


def wide_of(x: Tensor) -> torch.dtype:
    """float32, or float64 of float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def real(x: Tensor) -> Tensor:
    """``x`` in that dtype."""
    return x if x.dtype == wide_of(x) else x.to(wide_of(x))


def constant(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in that dtype, without its graph."""
    x = x.detach() if x.requires_grad else x
    return x if x.dtype == dtype else x.to(dtype)


def check_segments(
    seg: Tensor, nseg: Tensor | None, limit: int | None = None, cu_seqlens: Tensor | None = None
) -> None:
    """ValueError unless the segments of every row are 0, 1, ... in order, each with a token.

    Waits for a GPU. Under torch.compile nothing is checked: the answer is not known then.
    """
    if torch.compiler.is_compiling():
        return
    check_offsets(cu_seqlens, seg.shape[0])
    most = NO_LIMIT if limit is None else limit
    wrong = call(_ops.macro_segment_check, seg, nseg, most, cu_seqlens=cu_seqlens)
    if bool(wrong.any()):
        raise ValueError(
            "seg must number the macro actions of a row 0, 1, ... without gaps, as many as nseg says "
            f"(at most T), and be -1 at masked tokens; rows {wrong.nonzero()[:8, 0].tolist()} do not"
        )


def macro_pool(
    x: Tensor, seg: Tensor, T: int, weight: str = "equal", *, cu_seqlens: Tensor | None = None,
    validate: bool = True,
) -> Tensor:  # fmt: skip
    """Weighted sums of the tokens of every macro action.

    Args:
        x: [B, R], or [N] with ``cu_seqlens``; any floating dtype; entries where ``seg`` is -1 are not read.
        seg: int32 or int64, of the shape of x. Memory-safe whatever it holds.
        T: columns of the result, at least the number of macro actions.
        weight: ``"sum"``; ``"equal"`` (mean); ``"unit"`` (the last token); ``"position"`` (proportional
            to 1 / distance from the end) or ``"position_early"`` (from the beginning).
        cu_seqlens: int32 or int64 [B + 1], where the rows of a packed batch begin, and N.
        validate: check ``seg`` (and on a GPU ``cu_seqlens``) first. Without it the results of a row whose
            macro actions are not 0, 1, ... one after the other are unspecified.

    Returns:
        float32 [B, T] (float64 of float64), 0 where there is no macro action. Differentiable in x.

    Source:
        MA-RLHF (arXiv 2410.02743), value function of macro actions.
    """
    if validate:
        check_segments(seg, None, T, cu_seqlens)
    return call(_ops.macro_pool, real(x), seg, T, weight, cu_seqlens=cu_seqlens)


def macro_gae(
    value_m: Tensor, reward_m: Tensor, nseg: Tensor, length: Tensor | None = None, gamma: float = 1.0,
    lam: float = 0.95, bootstrap: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Generalised advantage estimation over macro actions (SMDP).

    ``A_t = R_t + g_t V_{t+1} - V_t + g_t lam A_{t+1}`` and ``Ret_t = A_t + V_t``, with
    ``V_{nseg} = bootstrap`` (0) and ``g_t = gamma``, or ``gamma ** length_t``.

    Args:
        value_m, reward_m: [B, T]; what is beyond ``nseg`` is not read.
        nseg: int32 or int64 [B].
        length: int32 [B, T], tokens of the macro actions.
        bootstrap: [B], the value after the last one, of responses that were cut off.

    Returns:
        (adv, ret) float32 [B, T], 0 beyond ``nseg``; not differentiable.
    """
    wide = real(value_m)
    return call_inference(
        _ops.macro_gae, wide, reward_m.to(wide.dtype), nseg, length, gamma, lam,
        None if bootstrap is None else bootstrap.to(wide.dtype),
    )  # fmt: skip


def gae(
    value: Tensor, reward: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95,
    bootstrap: Tensor | None = None, *, cu_seqlens: Tensor | None = None, validate: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Token-level GAE over the valid tokens, across holes of the mask: :func:`macro_gae` at n = 1.

    Args:
        value, reward: [B, R], or [N] with ``cu_seqlens``; masked entries are not read.
        mask: of the same shape, bool, int8 or uint8 (other dtypes: nonzero is valid).
        bootstrap: [B], the value after the last token, of responses that were cut off.
        cu_seqlens: int32 or int64 [B + 1], where the rows of a packed batch begin, and N; ``validate``: its
            values are checked, which waits for a GPU.

    Returns:
        (adv, ret) float32 (float64 of float64) of the shape of ``mask``, 0 at masked tokens; not
        differentiable.
    """
    if validate:
        check_offsets(cu_seqlens, mask.shape[0])
    wide = real(value)
    return call_inference(
        _ops.gae, wide, reward.to(wide.dtype), as_bytes(mask), gamma, lam,
        None if bootstrap is None else bootstrap.to(wide.dtype), cu_seqlens=cu_seqlens,
    )  # fmt: skip


def ma_ppo_prepare(
    logp_old: Tensor, logp_ref: Tensor, value_old: Tensor, score: Tensor, seg: Tensor, nseg: Tensor,
    beta: float = 0.05, gamma: float = 1.0, lam: float = 0.95, score_clip: float = 2.5,
    sigma: str = "equal", reward_reduce: str = "sum", discount: str = "per_macro", kl: str = "k1",
    bootstrap: Tensor | None = None, *, cu_seqlens: Tensor | None = None, validate: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """All that PPO's update needs of a rollout, in one pass: rewards, pooling, GAE and broadcast.

    Args:
        logp_old, logp_ref, value_old: [B, R], or [N] with ``cu_seqlens``; any floating dtype; masked entries
            are not read.
        score: [B], of the response; clipped to ``[-score_clip, score_clip]``.
        seg, nseg: as the ``macro_segment`` ops give them.
        beta: of the KL penalty; token rewards are ``-beta * kl``.
        sigma: weights of values in their macro action, as in :func:`macro_pool`.
        reward_reduce: ``"sum"`` of a macro action's token rewards, the score added to the last one
            (default); ``"sigma"``: pooled like values, after the score was added to the last token.
        discount: ``"per_macro"``, or ``"per_token"``: gamma per token within a macro action and
            ``gamma ** length`` between them.
        kl: ``"k1"`` (difference), ``"k2"`` (half its square) or ``"k3"`` (``exp(-k) - 1 + k``).
        bootstrap: [B], the value after a response that was cut off.
        cu_seqlens, validate: as in :func:`macro_pool`.

    Returns:
        adv, ret [B, R] of tokens; adv_m, ret_m [B, R] of macro actions, 0 beyond ``nseg`` (packed: [N], those of
        row b from ``cu_seqlens[b]`` on); kl_row [B], the mean of kl. float32 (float64 of float64), not differentiable.

    Source:
        MA-RLHF (arXiv 2410.02743), equations of macro value, reward and advantage.
    """
    if validate:
        check_segments(seg, nseg, None, cu_seqlens)
    old = constant(logp_old, wide_of(logp_old))
    ref, value, points = (constant(x, old.dtype) for x in (logp_ref, value_old, score))
    return call_inference(
        _ops.ma_ppo_prepare, old, ref, value, points, seg, nseg, beta, gamma, lam, score_clip, sigma,
        reward_reduce, discount, kl, None if bootstrap is None else bootstrap.to(old.dtype),
        cu_seqlens=cu_seqlens,
    )  # fmt: skip
