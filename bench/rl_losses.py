# SPDX-License-Identifier: Apache-2.0
"""Cases of PPO's losses with their gradients: part of the family ``rl``.

Every form gives the loss, its gradient and the statistics that trainers log. Plain torch in two forms:
autograd of the masked formula, as trainers write it, and the derivative written out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tenfold import ops, reference

from .case import Case, Inputs, Shape, provider
from .gradients import autograd, compiled_gradients, with_gradients
from .rl_batch import CLIP, SIZES, mask_of, num_segments, randn, segments_of

RATIOS = ("token", "joint", "geo_mean")
BOUND = 20.0  # of log-ratios


def _inputs(s: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    sizes = (s["b"], s["r"])
    seg, _ = segments_of(s)
    old = -randn(*sizes, seed=1).abs()
    value = randn(*sizes, seed=2)
    num = num_segments(s)
    made = Inputs(
        old=old, new=old + 0.1 * randn(*sizes, seed=3), value=value,
        value_new=value + 0.2 * randn(*sizes, seed=4), ret=value + randn(*sizes, seed=5),
        adv=randn(s["b"], num, seed=6).gather(1, seg.clamp_min(0).long()),  # one per macro action
    )  # fmt: skip
    made = Inputs(**{name: x.to(device, dtype) for name, x in vars(made).items()})
    made.seg, made.mask, made.num = seg.to(device), mask_of(s).to(device), num
    return made


# -- policy ------------------------------------------------------------------------------------------


class Terms:
    """Log-ratios and advantages of what has a term each: tokens, or macro actions."""

    def __init__(self, i: Inputs, ratio: str) -> None:
        self.valid = i.seg >= 0
        self.token_d = torch.where(self.valid, i.new - i.old, 0.0)
        self.by_token = ratio == "token"
        if self.by_token:
            self.d, self.on = self.token_d, self.valid
            self.adv = torch.where(self.valid, i.adv, 0.0)
            return
        self.at = torch.where(self.valid, i.seg, i.num).long()
        zeros = i.old.new_zeros(self.at.shape[0], i.num + 1)
        count = zeros.scatter_add(1, self.at, torch.ones_like(i.old))
        count[:, -1] = 0.0
        self.on, self.share = count > 0, 1 / count.clamp_min(1)
        self.d = zeros.scatter_add(1, self.at, self.token_d)
        self.adv = zeros.scatter_add(1, self.at, torch.where(self.valid, i.adv, 0.0)) * self.share
        if ratio == "geo_mean":
            self.d = self.d * self.share
        else:
            self.share = torch.ones_like(self.share)

    def surrogate(self) -> tuple[Tensor, Tensor, Tensor]:
        """(q, plain, clipped)."""
        q = self.d.clamp(-BOUND, BOUND).exp()
        return q, -self.adv * q, -self.adv * q.clamp(1 - CLIP, 1 + CLIP)

    def stats(self, q: Tensor, num: Tensor) -> Tensor:
        """Clipped above and below, mean and largest ratio, mean log-ratio, number of terms."""
        high = ((self.adv > 0) & (q > 1 + CLIP) & self.on).sum()
        low = ((self.adv < 0) & (q < 1 - CLIP) & self.on).sum()
        there = torch.where(self.on, q, 0.0)
        drift = -self.token_d.sum() / self.valid.sum()
        return torch.stack([high / num, low / num, there.sum() / num, there.max(), drift, num])


def policy_formula(ratio: str) -> Callable[[Inputs], tuple[Tensor, Tensor]]:
    """(loss, stats), for autograd."""

    def run(i: Inputs) -> tuple[Tensor, Tensor]:
        terms = Terms(i, ratio)
        q, plain, clipped = terms.surrogate()
        num = terms.on.sum()
        loss = torch.where(terms.on, torch.maximum(plain, clipped), 0.0).sum() / num
        with torch.no_grad():
            return loss, terms.stats(q, num)

    return run


def policy_written_out(ratio: str) -> Callable[[Inputs], tuple[Tensor, ...]]:
    """(loss, stats, gradient): the clipped terms have none, the others their own value."""

    def run(i: Inputs) -> tuple[Tensor, ...]:
        terms = Terms(i, ratio)
        q, plain, clipped = terms.surrogate()
        num = terms.on.sum()
        worst = torch.maximum(plain, clipped)
        slope = torch.where((clipped > plain) | (terms.d.abs() > BOUND), 0.0, plain / num)
        if not terms.by_token:
            slope *= terms.share
            slope[:, -1] = 0.0
            slope = slope.gather(1, terms.at)
            worst = torch.where(terms.on, worst, 0.0)
        return worst.sum() / num, terms.stats(q, num), slope

    return run


# -- value -------------------------------------------------------------------------------------------


def _value_terms(i: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bounded = torch.minimum(torch.maximum(i.value_new, i.value - CLIP), i.value + CLIP)
    plain, other = (i.value_new - i.ret).square(), (bounded - i.ret).square()
    return bounded, plain, other, i.mask.sum()


def _value_stats(i: Inputs, plain: Tensor, other: Tensor, num: Tensor) -> Tensor:
    clipped = ((other > plain) & i.mask).sum()
    return torch.stack([clipped / num, torch.where(i.mask, plain, 0.0).sum() / num, num])


def value_formula(i: Inputs) -> tuple[Tensor, Tensor]:
    """(loss, stats), for autograd."""
    _, plain, other, num = _value_terms(i)
    loss = 0.5 * torch.where(i.mask, torch.maximum(plain, other), 0.0).sum() / num
    with torch.no_grad():
        return loss, _value_stats(i, plain, other, num)


def value_written_out(i: Inputs) -> tuple[Tensor, ...]:
    """(loss, stats, gradient)."""
    bounded, plain, other, num = _value_terms(i)
    loss = 0.5 * torch.where(i.mask, torch.maximum(plain, other), 0.0).sum() / num
    # Where the bound holds and is worse, the value does not matter.
    flat = ~i.mask | ((other > plain) & (bounded != i.value_new))
    slope = torch.where(flat, 0.0, (i.value_new - i.ret) / num)
    return loss, _value_stats(i, plain, other, num), slope


# -- cases -------------------------------------------------------------------------------------------


def _case(op: str, variant: str, shape: Shape, per_token: Callable[[int], int],
          ours: Callable[[Inputs], Any], formula: Callable[[Inputs], Any],
          written_out: Callable[[Inputs], Any], defined: Callable[[Inputs], Any],
          name: str) -> Case:  # fmt: skip
    first = shape == SIZES[0]
    return Case(
        op=op, variant=variant, shape=shape, dtype=torch.float32, inputs=_inputs,
        bytes=lambda s, size: s["b"] * s["r"] * per_token(size),
        providers=[
            autograd("tenfold", ours, name), provider("eager:written_out", written_out),
            autograd("peer:autograd", formula, name),
            *([compiled_gradients(formula, name)] if first else []),
        ],
        reference=with_gradients(defined, name), quick=first,
    )  # fmt: skip


def _policy_case(shape: Shape, ratio: str) -> Case:
    def defined(i: Inputs) -> Any:
        wide = (x.double() for x in (i.new, i.old, i.adv))
        return reference.ma_ppo_policy_loss(*wide, i.seg, CLIP, CLIP, ratio)

    def ours(i: Inputs) -> Any:
        return ops.ma_ppo_policy_loss(i.new, i.old, i.adv, i.seg, CLIP, CLIP, ratio, validate=False)

    return _case(
        "ma_ppo_policy_loss", ratio, shape, lambda size: 4 * size + 4, ours,
        policy_formula(ratio), policy_written_out(ratio), defined, "new",
    )  # fmt: skip


def _value_case(shape: Shape) -> Case:
    def defined(i: Inputs) -> Any:
        wide = (x.double() for x in (i.value_new, i.value, i.ret))
        return reference.ma_ppo_value_loss(*wide, i.mask, CLIP)

    def ours(i: Inputs) -> Any:
        return ops.ma_ppo_value_loss(i.value_new, i.value, i.ret, i.mask, CLIP)

    return _case(
        "ma_ppo_value_loss", "", shape, lambda size: 4 * size + 1, ours, value_formula,
        value_written_out, defined, "value_new",
    )  # fmt: skip


def cases() -> Iterator[Case]:
    """All cases of the group, in the order of the table."""
    for shape in SIZES:
        for ratio in RATIOS:
            yield _policy_case(shape, ratio)
        yield _value_case(shape)
