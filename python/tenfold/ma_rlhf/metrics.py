# SPDX-License-Identifier: Apache-2.0
"""The numbers of a step: TRL's names for what PPO trainers log, and those of macro actions.

TRL's (its PPO trainer, ``trl.experimental.ppo``):

    objective/kl                 KL to the reference, nats per response (mean over responses of the k1 sum)
    objective/entropy            -log-probability of what was sampled, nats per response
    objective/non_score_reward   -beta KL (by the estimator that trains), per response
    objective/scores             scores as they came; objective/rlhf_reward: with the former
    policy/approxkl_avg          half the squared log-ratio, mean over the tokens of all updates
    policy/clipfrac_avg, policy/entropy_avg, loss/policy_avg, loss/value_avg, val/clipfrac_avg
    val/ratio, val/ratio_var     mean ratio of the updates, and its variance between them
    val/num_eos_tokens, lr, episode (responses so far)

Ours: ``policy/ratio_max``, ``policy/grad_norm``, ``critic/grad_norm``, ``critic/lr``, ``critic/error``,
``critic/explained_variance``, ``objective/kl_per_token``, ``objective/beta``, ``objective/score_std``,
``macro/per_response``, ``macro/length_mean``, ``macro/length_max``, ``macro/length_A_B`` (share of macro
actions of so many tokens), ``macro/adv_norm`` (root mean square over macro actions), ``macro/return_mean``,
``macro/parse_fallbacks``, ``response/length_mean``, ``response/length_max``, ``response/truncated``,
``rows/dropped``, ``rows/cut_prompts``, and ``rewards/NAME/mean`` and ``/std`` where there are several.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tenfold.ma_rlhf.experience import Experience
from tenfold.ma_rlhf.rollout import Rollout

Metrics = dict[str, float]
BINS = (1, 2, 3, 5, 9, 17, 33, 65)  # first length of each bin


def bin_names() -> list[str]:
    """Names of the shares of macro-action lengths, in order."""
    ends = [b - 1 for b in BINS[1:]]
    pairs = [f"{a}" if a == b else f"{a}_{b}" for a, b in zip(BINS, ends)]
    return [f"macro/length_{p}" for p in (*pairs, f"{BINS[-1]}_up")]


def macro_lengths(exp: Experience) -> Tensor:
    """Tokens of every macro action of the batch, int64 [sum of nseg], on the CPU."""
    rows, width = exp.seg.shape
    at = exp.seg.long() + width * torch.arange(rows, device=exp.seg.device)[:, None]
    counts = torch.bincount(at[exp.seg >= 0], minlength=rows * width).view(rows, width)
    return counts[torch.arange(width, device=counts.device) < exp.nseg[:, None]].cpu()


def rollout_metrics(
    rollout: Rollout, exp: Experience, beta: float, names: Sequence[str], critic_free: bool = False
) -> Metrics:
    """What a rollout and its experience show; ``names`` of the rewards.

    Dropped rows do not count. What is not defined, as the mean of a reward that judged nothing, is left out.
    """
    on, rows = exp.mask, ~exp.dropped
    length = exp.length[rows].double()
    made: Metrics = {"rows/dropped": float(exp.dropped.sum()), "rows/cut_prompts": float(rollout.batch.cut),
                     "objective/beta": beta, "val/num_eos_tokens": float((~rollout.truncated).sum()),
                     "response/truncated": float(rollout.truncated.double().mean()),
                     "macro/parse_fallbacks": float(exp.fallback.sum())}  # fmt: skip
    if not bool(rows.any()):
        return made | rollout.logs
    k = torch.where(on, exp.logp_old - exp.logp_ref, 0.0).double()
    score = exp.score[rows].double()
    other = -beta * exp.kl_response[rows].double().mean()
    made |= {
        "objective/kl": float(k.sum(1)[rows].mean()),
        "objective/kl_per_token": float(k.sum() / on.sum()),
        "objective/entropy": float(
            torch.where(on, -exp.logp_old, 0.0).double().sum(1)[rows].mean()
        ),
        "objective/non_score_reward": float(other),
        "objective/scores": float(score.mean()),
        "objective/score_std": float(score.std(correction=0)),
        "objective/rlhf_reward": float(score.mean() + other),
        "response/length_mean": float(length.mean()),
        "response/length_max": float(length.max()),
    }
    made |= _macro(exp)
    if not critic_free:
        made["critic/explained_variance"] = explained_variance(exp)
    if len(names) > 1:
        for i, name in enumerate(names):
            part = rollout.parts[:, i].double()
            part = part[~part.isnan()]
            made[f"rewards/{name}/mean"] = float(part.mean()) if len(part) else math.nan
            made[f"rewards/{name}/std"] = float(part.std(correction=0)) if len(part) else math.nan
    return {k: v for k, v in (made | rollout.logs).items() if not math.isnan(v)}


def _macro(exp: Experience) -> Metrics:
    lengths = macro_lengths(exp).double()
    there = torch.arange(exp.adv_m.shape[1], device=exp.nseg.device) < exp.nseg[:, None]
    edges = torch.tensor(BINS[1:], dtype=torch.float64)
    shares = torch.bincount(
        torch.bucketize(lengths, edges, right=True), minlength=len(BINS)
    ).double()
    made = {
        "macro/per_response": float(exp.nseg[exp.nseg > 0].double().mean()),
        "macro/length_mean": float(lengths.mean()),
        "macro/length_max": float(lengths.max()),
        "macro/adv_norm": float(exp.adv_m[there].double().square().mean().sqrt()),
        "macro/return_mean": float(exp.ret_m[there].double().mean()),
    }
    return made | dict(zip(bin_names(), (shares / len(lengths)).tolist()))


def explained_variance(exp: Experience) -> float:
    """1 - Var(return - value) / Var(return) over tokens; NaN where returns do not vary."""
    ret, value = (x[exp.mask].double() for x in (exp.ret, exp.value_old))
    spread = float(ret.var(correction=0))
    return 1 - float((ret - value).var(correction=0)) / spread if spread > 0 else math.nan


class Sums:
    """Weighted means over micro-batches, updates and ranks, and largest values; no transfer before the end."""

    def __init__(self) -> None:
        self._sums: dict[str, list[Tensor]] = {}
        self._top: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor, weight: Tensor | float = 1.0) -> None:
        """``value`` counts ``weight`` times; with weight 0 it may be anything."""
        weight = torch.as_tensor(weight, dtype=torch.float64, device=value.device)
        counted = torch.where(weight > 0, value.detach().double() * weight, 0.0)
        self._sums.setdefault(name, []).append(torch.stack([counted, weight]))

    def top(self, name: str, value: Tensor) -> None:
        """Remembers the largest."""
        value = value.detach().double()
        self._top[name] = torch.maximum(self._top.get(name, value), value)

    def reduced(self, accelerator: Any) -> tuple[list[str], Tensor, Metrics]:
        """(names, (sum, weight) [n, 2] of each over all ranks, largest values).

        A rank that had nothing to add sends zeros: what is there is known by what any rank has.
        """
        mine = {n: torch.stack(x).sum(0).tolist() for n, x in self._sums.items()}
        top = {n: float(x) for n, x in self._top.items()}
        everyone = [(mine, top)]
        if accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            everyone = gather_object(everyone)
        names = sorted({n for found, _ in everyone for n in found})
        table = [[found.get(n, [0.0, 0.0]) for n in names] for found, _ in everyone]
        largest = {n: max(t[n] for _, t in everyone if n in t) for _, t in everyone for n in t}
        return names, torch.tensor(table, dtype=torch.float64).sum(0), largest
