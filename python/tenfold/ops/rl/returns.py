"""From token rewards and values to advantages of macro actions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tenfold._load import call
from tenfold.ops._register import call_inference, differentiable, inference_only

_ops = torch.ops.tenfold

for _name in ("macro_pool_backward", "macro_gae", "ma_ppo_prepare"):
    inference_only(_name)


@torch.library.register_fake("tenfold::macro_pool")
def _(x, seg, T, weight="equal"):
    return x.new_empty(seg.shape[0], T)


@torch.library.register_fake("tenfold::macro_pool_backward")
def _(grad, seg, T, weight="equal"):
    return grad.new_empty(seg.shape)


@torch.library.register_fake("tenfold::macro_gae")
def _(value_m, reward_m, nseg, length=None, gamma=1.0, lam=0.95, bootstrap=None):
    return torch.empty_like(value_m), torch.empty_like(value_m)


@torch.library.register_fake("tenfold::ma_ppo_prepare")
def _(logp_old, logp_ref, value_old, score, seg, nseg, *args, **kwargs):
    made = [logp_old.new_empty(seg.shape) for _ in range(4)]
    return *made, logp_old.new_empty(seg.shape[:1])


def _save(ctx: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    ctx.save_for_backward(args[1])
    ctx.rest = (args[2], args[3] if len(args) > 3 else kwargs.get("weight", "equal"))
    ctx.inputs = len(args)


def _backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    (seg,) = ctx.saved_tensors
    made = None if grad is None else _ops.macro_pool_backward(grad.contiguous(), seg, *ctx.rest)
    return (made, *[None] * (ctx.inputs - 1))


differentiable("macro_pool", _save, _backward)


def real(x: Tensor) -> Tensor:
    """float32 or float64."""
    return x if x.dtype == torch.float64 else x.float()


def check_segments(seg: Tensor, nseg: Tensor | None, limit: int | None = None) -> None:
    """ValueError unless the segments of every row are 0, 1, ... in order, each with a token.

    Waits for a GPU.
    """
    if seg.shape[1] == 0:
        return
    on = seg >= 0
    top = torch.where(on, seg, -1).cummax(1).values
    before = torch.nn.functional.pad(top[:, :-1], (1, 0), value=-1)
    wrong = (on & ((seg < before) | (seg > before + 1))).any(1) | (seg < -1).any(1)
    count = top[:, -1] + 1
    if nseg is not None:
        wrong |= count != nseg
    if limit is not None:
        wrong |= count > limit
    rows = wrong.nonzero()[:, 0].tolist()
    if rows:
        raise ValueError(
            f"seg must number the macro actions of a row 0, 1, ... without gaps, as many as nseg says "
            f"(at most T), and be -1 at masked tokens; rows {rows[:8]} do not"
        )


def macro_pool(
    x: Tensor, seg: Tensor, T: int, weight: str = "equal", *, validate: bool = True
) -> Tensor:
    """Weighted sums of the tokens of every macro action.

    Args:
        x: [B, R], any floating dtype; entries where ``seg`` is -1 are not read.
        seg: int32 or int64 [B, R].
        T: columns of the result, at least the number of macro actions.
        weight: ``"sum"``; ``"equal"`` (mean); ``"unit"`` (the last token); ``"position"`` (proportional
            to 1 / distance from the end) or ``"position_early"`` (from the beginning).
        validate: check ``seg`` first.

    Returns:
        float32 [B, T] (float64 of float64), 0 where there is no macro action. Differentiable in x.

    Source:
        MA-RLHF (arXiv 2410.02743), value function of macro actions.
    """
    if validate:
        check_segments(seg, None, T)
    return call(_ops.macro_pool, real(x), seg, T, weight)


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
    bootstrap: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Token-level GAE [B, R] over the valid tokens, across holes of the mask: :func:`macro_gae` at n = 1."""
    on = mask != 0
    seg = torch.where(on, on.int().cumsum(1, dtype=torch.int32) - 1, -1)
    num = seg.shape[1]
    packed = [macro_pool(x, seg, num, "sum", validate=False) for x in (value, reward)]
    made = macro_gae(*packed, on.sum(1), None, gamma, lam, bootstrap)
    at = seg.clamp_min(0).long()
    adv, ret = (torch.where(on, x.gather(1, at), 0.0) for x in made)
    return adv, ret


def ma_ppo_prepare(
    logp_old: Tensor, logp_ref: Tensor, value_old: Tensor, score: Tensor, seg: Tensor, nseg: Tensor,
    beta: float = 0.05, gamma: float = 1.0, lam: float = 0.95, score_clip: float = 2.5,
    sigma: str = "equal", reward_reduce: str = "sum", discount: str = "per_macro", kl: str = "k1",
    bootstrap: Tensor | None = None, *, validate: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """All that PPO's update needs of a rollout, in one pass: rewards, pooling, GAE and broadcast.

    Args:
        logp_old, logp_ref, value_old: [B, R], any floating dtype; masked entries are not read.
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

    Returns:
        adv, ret [B, R] of tokens; adv_m, ret_m [B, R] of macro actions, 0 beyond ``nseg``; kl_row [B], the
        mean of kl. float32 (float64 of float64), not differentiable.

    Source:
        MA-RLHF (arXiv 2410.02743), equations of macro value, reward and advantage.
    """
    if validate:
        check_segments(seg, nseg)
    old = real(logp_old.detach())
    ref, value, points = (x.detach().to(old.dtype) for x in (logp_ref, value_old, score))
    return call_inference(
        _ops.ma_ppo_prepare, old, ref, value, points, seg, nseg, beta, gamma, lam, score_clip, sigma,
        reward_reduce, discount, kl, None if bootstrap is None else bootstrap.to(old.dtype),
    )  # fmt: skip
