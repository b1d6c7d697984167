# SPDX-License-Identifier: Apache-2.0
"""From token rewards and values to advantages of macro actions (sections 3.2, 3.4 to 3.6)."""

from __future__ import annotations

import torch
from torch import Tensor

from tenfold.reference.rl.packed import pack_rows, pad_rows

WEIGHTS = ("sum", "equal", "unit", "position", "position_early")
KL = ("k1", "k2", "k3")
REDUCE = ("sum", "sigma")
DISCOUNTS = ("per_macro", "per_token")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def _places(seg: Tensor, num: int) -> tuple[Tensor, Tensor, Tensor]:
    """valid [B, R]; place of every token in its segment; length of its segment (1 where invalid)."""
    seg = seg.long()
    valid = seg >= 0
    if num == 0:
        return valid, torch.zeros_like(seg), torch.ones_like(seg)
    at = seg.clamp_min(0)
    lengths = torch.zeros(seg.shape[0], num, dtype=torch.long, device=seg.device)
    lengths.scatter_add_(1, at, valid.long())
    rank = valid.long().cumsum(1) - 1
    first = torch.full_like(lengths, seg.shape[1])
    first.scatter_reduce_(1, at, torch.where(valid, rank, seg.shape[1]), "amin")
    place = torch.where(valid, rank - first.gather(1, at), 0)
    return valid, place, torch.where(valid, lengths.gather(1, at), 1)


def token_weights(seg: Tensor, num: int, weight: str) -> Tensor:
    """[B, R] weights of tokens in their segment, in float64; 0 where invalid."""
    _one_of("weight", weight, WEIGHTS)
    valid, place, length = _places(seg, num)
    if weight == "sum":
        w = torch.ones(seg.shape, dtype=torch.float64, device=seg.device)
    elif weight == "equal":
        w = 1.0 / length.double()
    elif weight == "unit":
        w = (place == length - 1).double()
    else:
        most = seg.shape[1] + 1
        harmonic = torch.zeros(most + 1, dtype=torch.float64, device=seg.device)
        harmonic[1:] = (1.0 / torch.arange(1, most + 1, device=seg.device).double()).cumsum(0)
        distance = length - place if weight == "position" else place + 1
        w = 1.0 / (distance.double() * harmonic[length])
    return torch.where(valid, w, 0.0)


def macro_pool(
    x: Tensor, seg: Tensor, T: int, weight: str = "equal", *, cu_seqlens: Tensor | None = None
) -> Tensor:
    """[B, T] weighted sums of the tokens of every segment; 0 for segments that do not exist."""
    if cu_seqlens is not None:
        return macro_pool(pad_rows(x, cu_seqlens), pad_rows(seg, cu_seqlens, -1), T, weight)
    w = token_weights(seg, T, weight)
    if x.dtype != torch.float64:
        x, w = x.float(), w.float()
    terms = torch.where(seg >= 0, x, 0.0) * w
    out = terms.new_zeros(seg.shape[0], T)
    return out.scatter_add(1, seg.long().clamp_min(0), terms) if T > 0 else out + terms.sum()


def macro_gae(
    value_m: Tensor, reward_m: Tensor, nseg: Tensor, length: Tensor | None = None, gamma: float = 1.0,
    lam: float = 0.95, bootstrap: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Advantages and returns [B, T] of macro actions; 0 beyond ``nseg``.

    ``length`` [B, T]: discount by ``gamma ** length`` instead of gamma. ``bootstrap`` [B]: the value
    after the last macro action.
    """
    wide = torch.promote_types(value_m.dtype, torch.float32)
    value_m, reward_m = value_m.to(wide), reward_m.to(wide)
    adv, ret = torch.zeros_like(value_m), torch.zeros_like(value_m)
    for b in range(value_m.shape[0]):
        later = value_m.new_zeros(()) if bootstrap is None else bootstrap[b].to(wide)
        carry = value_m.new_zeros(())
        for t in range(int(nseg[b]) - 1, -1, -1):
            g = gamma if length is None else gamma ** int(length[b, t])
            delta = reward_m[b, t] + g * later - value_m[b, t]
            carry = delta + g * lam * carry
            adv[b, t], ret[b, t] = carry, carry + value_m[b, t]
            later = value_m[b, t]
    return adv, ret


def gae(
    value: Tensor, reward: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95,
    bootstrap: Tensor | None = None, *, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Token-level GAE [B, R]: macro actions of one token, over the valid ones."""
    if cu_seqlens is not None:
        v, r, on = (pad_rows(x, cu_seqlens) for x in (value, reward, mask))
        adv, ret = (pack_rows(x, cu_seqlens) for x in gae(v, r, on, gamma, lam, bootstrap))
        return adv, ret
    seg, nseg = torch.where(mask.bool(), mask.bool().int().cumsum(1) - 1, -1), mask.bool().sum(1)
    num = seg.shape[1]
    made = macro_gae(macro_pool(value, seg, num, "sum"), macro_pool(reward, seg, num, "sum"), nseg,
                     None, gamma, lam, bootstrap)  # fmt: skip
    adv, ret = (torch.where(seg >= 0, x.gather(1, seg.clamp_min(0)), 0.0) for x in made)
    return adv, ret


def kl_estimate(logp: Tensor, logp_ref: Tensor, kl: str = "k1") -> Tensor:
    """Per-token estimate of KL(policy, reference) from the policy's samples."""
    _one_of("kl", kl, KL)
    k = logp - logp_ref
    return k if kl == "k1" else 0.5 * k * k if kl == "k2" else torch.expm1(-k) + k


def ma_ppo_prepare(
    logp_old: Tensor, logp_ref: Tensor, value_old: Tensor, score: Tensor, seg: Tensor, nseg: Tensor,
    beta: float = 0.05, gamma: float = 1.0, lam: float = 0.95, score_clip: float = 2.5,
    sigma: str = "equal", reward_reduce: str = "sum", discount: str = "per_macro", kl: str = "k1",
    bootstrap: Tensor | None = None, *, cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Everything that PPO's update needs of a rollout: adv, ret, adv_m, ret_m [B, R], kl_row [B].

    Token rewards are ``-beta * kl``; the score, clipped to ``[-score_clip, score_clip]``, is added to the
    last macro action after summing, or with ``reward_reduce="sigma"`` to the last token before pooling
    with the values' weights. ``discount="per_token"``: within a macro action by gamma per token, between
    them by ``gamma ** length``.
    """
    if cu_seqlens is not None:
        old, ref, value = (pad_rows(x, cu_seqlens) for x in (logp_old, logp_ref, value_old))
        made = ma_ppo_prepare(old, ref, value, score, pad_rows(seg, cu_seqlens, -1), nseg, beta, gamma, lam,
                              score_clip, sigma, reward_reduce, discount, kl, bootstrap)  # fmt: skip
        adv, ret, adv_m, ret_m = (pack_rows(x, cu_seqlens) for x in made[:4])
        return adv, ret, adv_m, ret_m, made[4]
    _one_of("reward_reduce", reward_reduce, REDUCE)
    _one_of("discount", discount, DISCOUNTS)
    num = seg.shape[1]
    seg = seg.long()
    wide = torch.promote_types(logp_old.dtype, torch.float32)
    valid, place, _ = _places(seg, num)
    old, ref, value = (torch.where(valid, x.to(wide), 0.0) for x in (logp_old, logp_ref, value_old))
    k = torch.where(valid, kl_estimate(old, ref, kl), 0.0)
    reward = -beta * k
    clipped = score.to(wide).clamp(-score_clip, score_clip)
    rank, count = valid.long().cumsum(1) - 1, valid.sum(1, keepdim=True)
    last = valid & (rank == count - 1)
    if reward_reduce == "sigma":
        reward_m = macro_pool(reward + last * clipped[:, None], seg, num, sigma)
    else:
        rho = gamma**place if discount == "per_token" else torch.ones_like(reward)
        reward_m = macro_pool(reward * rho.to(wide), seg, num, "sum")
        end = (nseg.long() - 1).clamp_min(0)[:, None][:, :num]
        reward_m = reward_m.scatter_add(1, end, torch.where(count > 0, clipped[:, None], 0.0))
    length = macro_pool(torch.ones_like(reward), seg, num, "sum").long()
    adv_m, ret_m = macro_gae(
        macro_pool(value, seg, num, sigma), reward_m, nseg,
        length if discount == "per_token" else None, gamma, lam, bootstrap,
    )  # fmt: skip
    adv, ret = (torch.where(valid, x.gather(1, seg.clamp_min(0)), 0.0) for x in (adv_m, ret_m))
    kl_row = k.sum(1) / valid.sum(1).clamp_min(1)
    return adv, ret, adv_m, ret_m, kl_row
