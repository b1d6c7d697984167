# SPDX-License-Identifier: Apache-2.0
"""PPO's losses of a prepared batch, or of a shard of one: faces of the fused ops for an ``Experience``.

A batch that is split (minibatches accumulated, ranks) passes the counts of the whole, the sum of
``Experience.counts()`` over its shards; the losses of the shards then add up to the loss of the whole.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from tenfold import ops
from tenfold.ma_rlhf.config import MARLHFConfig
from tenfold.ma_rlhf.experience import Experience
from tenfold.ops.rl.losses import POLICY_STATS, VALUE_STATS
from tenfold.ops.rl.returns import real

Metrics = dict[str, Tensor]


def _check(exp: Experience, name: str, new: Tensor) -> Tensor:
    if not new.is_floating_point():
        raise TypeError(f"{name} must be floating, got {new.dtype}")
    if new.shape != exp.mask.shape:
        raise ValueError(
            f"{name} must be {list(exp.mask.shape)} as the experience, got {list(new.shape)}"
        )
    if new.device != exp.mask.device:
        raise ValueError(f"{name} is on {new.device}, the experience on {exp.mask.device}")
    return real(new)


def _denominator(agg: str, terms: str, **counts: int | None) -> float:
    """What the sum of terms is divided by; 0 leaves it to the op, which counts what is there."""
    given = {k: v for k, v in counts.items() if v is not None}
    for name, value in given.items():
        if value < 0:
            raise ValueError(f"{name} must be >= 0, got {value}")
    if not given:
        return 0.0
    need = terms if agg == "token_mean" else "sequences"
    if need not in given:
        raise ValueError(
            f"the loss is a mean over {need} of the whole batch: pass {need}=, got only {', '.join(given)}"
        )
    return float(max(given[need], 1))


def _warn_if_empty(exp: Experience, denominator: float) -> None:
    if denominator == 0 and not bool(exp.mask.any()):
        warnings.warn("no valid token in the batch: the loss is 0", UserWarning, stacklevel=3)


def _dual_clip(config: MARLHFConfig, exp: Experience, new: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities whose ratio stays at the bound, without gradient, where A < 0 and it is above.

    The clipped surrogate of such a ratio is ``-A c``, which is what dual clipping asks for.
    """
    assert config.dual_clip is not None
    on, num = exp.mask, exp.mask.shape[1]
    bound = torch.full_like(new, math.log(config.dual_clip))
    with torch.no_grad():
        d = torch.where(on, new - exp.logp_old, 0.0)
        if config.ratio != "token":
            pooled = ops.macro_pool(
                d, exp.seg, num, "sum" if config.ratio == "joint" else "equal", validate=False
            )
            at = exp.seg.long().clamp_min(0)
            d = pooled.gather(1, at)
            if config.ratio == "joint":
                one = ops.macro_pool(torch.ones_like(d), exp.seg, num, "sum", validate=False)
                bound = bound / one.gather(1, at).clamp_min(1)
        over = on & (exp.adv < 0) & (d > math.log(config.dual_clip))
    return torch.where(over, exp.logp_old + bound, new), over


def policy_loss(
    config: MARLHFConfig, exp: Experience, logp_new: Tensor, *, tokens: int | None = None,
    sequences: int | None = None, macros: int | None = None,
) -> tuple[Tensor, Metrics]:  # fmt: skip
    """The clipped surrogate of the batch, differentiable in ``logp_new``.

    Args:
        logp_new: [B, R], any floating dtype; masked entries may hold anything.
        tokens, sequences, macros: of the whole batch, where ``exp`` is a shard of it. Needed is the one
            that the mean is over: tokens (ratio per token, or weight by length), macro actions, or sequences
            (``agg="seq_mean_token_mean"``); the others are ignored.

    Returns:
        (loss, metrics): 0-d, float32 (float64 of float64); detached 0-d: ``clip_high``, ``clip_low`` (shares of
        terms), ``ratio_mean``, ``ratio_max`` (after dual clipping), ``kl_old_new``, ``count`` (terms), and
        ``dual_clip`` (share of tokens). Without a valid token the loss is 0, with a warning unless counts were given.

    Raises:
        TypeError, ValueError: dtype, shape or device of ``logp_new``; a negative or a missing count.

    Source:
        MA-RLHF (arXiv 2410.02743), MA-PPO's objective; dual clipping: arXiv 1912.09729.
    """
    new = _check(exp, "logp_new", logp_new)
    by_macro = config.ratio != "token" and config.weight == "macro"
    denominator = _denominator(config.agg, "macros" if by_macro else "tokens",
                               tokens=tokens, sequences=sequences, macros=macros)  # fmt: skip
    _warn_if_empty(exp, denominator)
    over = None
    if config.dual_clip is not None:
        new, over = _dual_clip(config, exp, new)
    loss, stats = ops.ma_ppo_policy_loss(
        new, exp.logp_old, exp.adv, exp.seg, config.eps_lo, config.eps_hi, config.ratio, config.agg,
        denominator, weight=config.weight, validate=False,
    )  # fmt: skip
    metrics = dict(zip(POLICY_STATS, stats.detach().unbind()))
    if over is not None:
        metrics["dual_clip"] = over.sum() / exp.mask.sum().clamp_min(1)
    return loss, metrics


def value_loss(
    config: MARLHFConfig, exp: Experience, value_new: Tensor, *, tokens: int | None = None,
    sequences: int | None = None, macros: int | None = None,
) -> tuple[Tensor, Metrics]:  # fmt: skip
    """Half the squared error of values to the macro returns, clipped around the old values.

    Args:
        value_new: [B, R], any floating dtype; the loss is differentiable in it. Masked entries may hold
            anything. With ``critic_target="macro"`` it is pooled like the old values first.
        tokens, sequences, macros: as in :func:`policy_loss`; the mean is over tokens, or over
            macro actions with ``critic_target="macro"``.

    Returns:
        (loss, metrics): 0-d, without ``vf_coef``; ``clip`` (share of terms), ``error`` (mean square),
        ``count``.

    Raises:
        TypeError, ValueError: dtype, shape or device of ``value_new``; a negative or a missing count.

    Source:
        MA-RLHF (arXiv 2410.02743), section 3.9 of the method's specification.
    """
    new = _check(exp, "value_new", value_new)
    if config.critic_free:
        raise ValueError(f"advantage={config.advantage!r} has no critic to train")
    macro = config.critic_target == "macro"
    denominator = _denominator(config.agg, "macros" if macro else "tokens",
                               tokens=tokens, sequences=sequences, macros=macros)  # fmt: skip
    _warn_if_empty(exp, denominator)
    old, target, on = exp.value_old, exp.ret, exp.mask
    if macro:
        num = new.shape[1]
        new, old = (
            ops.macro_pool(x, exp.seg, num, config.sigma, validate=False) for x in (new, old)
        )
        target, on = exp.ret_m, torch.arange(num, device=on.device) < exp.nseg[:, None]
    clip = math.inf if config.value_clip is None else config.value_clip
    loss, stats = ops.ma_ppo_value_loss(new, old, target, on, clip, config.agg, denominator)
    return loss, dict(zip(VALUE_STATS, stats.detach().unbind()))
