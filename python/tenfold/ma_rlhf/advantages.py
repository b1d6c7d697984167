# SPDX-License-Identifier: Apache-2.0
"""Advantages beyond the fused op: the published code's empty step, no critic, whitening."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tenfold import ops
from tenfold.ma_rlhf.config import MARLHFConfig

Reduce = Callable[[Tensor], Tensor]
LONG = 64  # tokens of a macro action, beyond which a joint ratio says little


@dataclass(frozen=True)
class Inputs:
    """The arguments of ``ma_ppo_prepare``."""

    old: Tensor
    ref: Tensor
    value: Tensor
    score: Tensor
    seg: Tensor
    nseg: Tensor
    beta: float
    future: Tensor | None

    def prepared(self, config: MARLHFConfig, **changes: Any) -> tuple[Tensor, ...]:
        """adv, ret, adv_m, ret_m, kl_row; ``changes`` are of the settings gamma, lam, and so on."""
        settings = {
            name: getattr(config, name)
            for name in ("gamma", "lam", "score_clip", "sigma", "reward_reduce", "discount", "kl")
        }
        return ops.ma_ppo_prepare(
            self.old, self.ref, self.value, self.score, self.seg, self.nseg, self.beta,
            bootstrap=self.future, validate=False, **(settings | changes),
        )  # fmt: skip


@dataclass(frozen=True)
class Moments:
    """Per group: how many, their mean, and the factor of whitening; float64 [G]."""

    count: Tensor
    mean: Tensor
    scale: Tensor

    @classmethod
    def of(
        cls, x: Tensor, there: Tensor, group: Tensor, groups: int | None, reduce: Reduce | None
    ) -> Moments:
        """Of the entries ``there`` of x [B, N], by the group of their row, over all ranks.

        The factor is ``rsqrt(var + 1e-8)`` with Bessel's correction, and 1 of fewer than two entries.
        """
        total = reduce if reduce is not None else lambda table: table
        if groups is None:
            groups = int(group.max()) + 1 if group.numel() else 0
        # a product with the membership matrix, unlike scattered atomic sums, is deterministic
        member = (group == torch.arange(groups, device=group.device)[:, None]).double()
        value = torch.where(there, x.double(), 0.0)
        count, added = total(member @ torch.stack([there.sum(1).double(), value.sum(1)], 1)).unbind(
            1
        )
        mean = added / count.clamp_min(1)
        centred = torch.where(there, value - mean[group][:, None], 0.0).square().sum(1)
        squares = total(member @ centred[:, None])[:, 0]
        var = squares / (count - 1).clamp_min(1)
        return cls(count, mean, torch.where(count >= 2, (var + 1e-8).rsqrt(), 1.0))


def with_phantom(config: MARLHFConfig, inputs: Inputs, on: Tensor) -> tuple[Tensor, ...]:
    """GAE with the published code's empty macro action before the last one, of value and reward 0.

    It is there where the tokens before the last one fill their macro actions.
    """
    seg, nseg, num = inputs.seg, inputs.nseg.long(), on.shape[1]
    if num == 0:
        return inputs.prepared(config)
    length = on.sum(1)
    # without a future, gamma = lam = 0 leave of the advantages the rewards
    only = replace(inputs, value=torch.zeros_like(inputs.value), future=None)
    _, _, reward_m, _, kl_row = only.prepared(config, gamma=0.0, lam=0.0)
    value_m = ops.macro_pool(inputs.value, seg, num, config.sigma, validate=False)
    empty = (length > 1) & ((length - 1) % config.n == 0) if config.n else length < 0

    column = torch.arange(num + 1, device=on.device)
    place = (nseg - 1)[:, None]  # of the last macro action, and of the empty one
    source = (column - (empty[:, None] & (column > place)).long()).clamp(0, num - 1)
    hole = empty[:, None] & (column == place)
    value_m, reward_m = (torch.where(hole, 0.0, x.gather(1, source)) for x in (value_m, reward_m))
    adv, ret = ops.macro_gae(
        value_m, reward_m, nseg + empty, None, config.gamma, config.lam, inputs.future
    )
    back = column[:num] + hole[:, :num].long()
    inside = column[:num] < nseg[:, None]
    adv_m, ret_m = (torch.where(inside, x.gather(1, back), 0.0) for x in (adv, ret))
    at = seg.long().clamp_min(0)
    tokens = [torch.where(on, x.gather(1, at), 0.0) for x in (adv_m, ret_m)]
    return *tokens, adv_m, ret_m, kl_row


def critic_free(
    config: MARLHFConfig, inputs: Inputs, on: Tensor, group: Tensor | None, groups: int | None,
    reduce: Reduce | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """One advantage per response, n = infinity: its reward against those of its group."""
    assert group is not None  # checked on entry
    there = on.any(1)
    whole = replace(inputs, seg=torch.where(on, 0, -1).int(), nseg=there.int(),
                    value=torch.zeros_like(inputs.value))  # fmt: skip
    _, ret, _, ret_m, kl_row = whole.prepared(config, lam=1.0)
    total = ret_m[:, :1].sum(1)  # one macro action, if any
    stats = Moments.of(total[:, None], there[:, None], group, groups, reduce)
    if config.advantage == "rloo":  # (G / (G - 1)) (x - mean) is x less the mean of the others
        scale = stats.count / (stats.count - 1).clamp_min(1)
    else:
        scale = stats.scale
    row = torch.where(there, ((total - stats.mean[group]) * scale[group]).to(total.dtype), 0.0)
    inside = torch.arange(on.shape[1], device=on.device) < inputs.nseg[:, None]
    adv_m, all_m = (torch.where(inside, x[:, None], 0.0) for x in (row, total))
    return torch.where(on, row[:, None], 0.0), ret, adv_m, all_m, kl_row


def whitened(
    config: MARLHFConfig, on: Tensor, nseg: Tensor, adv: Tensor, adv_m: Tensor, group: Tensor | None,
    groups: int | None, reduce: Reduce | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(adv, adv_m) with mean 0 and variance 1 over the population that ``whiten_adv`` names."""
    if config.whiten_adv == "none":
        return adv, adv_m
    inside = torch.arange(on.shape[1], device=on.device) < nseg[:, None]
    if config.whiten_adv != "group":
        group, groups = torch.zeros(len(on), dtype=torch.long, device=on.device), 1
    assert group is not None  # checked on entry
    x, there = (adv, on) if config.whiten_adv == "token" else (adv_m, inside)
    stats = Moments.of(x, there, group, groups, reduce)
    mean, scale = (v[group][:, None] for v in (stats.mean, stats.scale))

    def white(x: Tensor, there: Tensor) -> Tensor:
        return torch.where(there, ((x.double() - mean) * scale).to(x.dtype), 0.0)

    return white(adv, on), white(adv_m, inside)


@functools.cache
def _warn_once(text: str) -> None:
    warnings.warn(text, UserWarning, stacklevel=4)


def warn_if_long(seg: Tensor) -> None:
    """Once: joint ratios of macro actions of many tokens have a large variance."""
    ones = torch.ones(seg.shape, device=seg.device)
    length = ops.macro_pool(ones, seg, seg.shape[1], "sum", validate=False)
    if length.numel() and int(length.max()) > LONG:
        _warn_once(
            f"ratio='joint' with macro actions of more than {LONG} tokens: the product of so many ratios "
            "has a large variance (use ratio='token' or 'geo_mean', or shorter macro actions)"
        )
