# SPDX-License-Identifier: Apache-2.0
"""Advantages over macro actions (MA-RLHF) of what a host's PPO has at hand: token rewards, values and mask.

The adapters ``tenfold.integrations.{verl,openrlhf,skyrl,trl}`` all compute through :class:`MacroActions`.
No host is imported here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tenfold import ops
from tenfold.ma_rlhf.config import DISCOUNTS, HOLES, REDUCTIONS, SIGMAS
from tenfold.training.checks import integers, one_of

__all__ = ["MacroActions", "Segment"]

Segment = Callable[[Tensor], tuple[Tensor, Tensor]]

_CHOICES = {
    "sigma": SIGMAS, "reward_reduce": REDUCTIONS, "discount": DISCOUNTS, "holes": HOLES,
}  # fmt: skip


@dataclass(frozen=True)
class MacroActions:
    """How a response is cut into macro actions, and how their advantages are estimated.

    Attributes:
        n: tokens per macro action; 1 is the host's own token-level estimator, None one macro action per
            response (or, with ``holes="split"``, per turn).
        segment: in place of ``n`` and ``holes``: called with the mask, bool [B, R]; gives ``(seg, nseg)`` as
            :func:`tenfold.ops.macro_segment_fixed` does. A segmenter of :func:`tenfold.ma_rlhf.make_segmenter`
            serves, but hosts hand over no tokens here: what else it needs is yours to bind, as in
            ``functools.partial(segmenter, generator=generator)``.
        sigma: weights of the values in a macro action: ``"equal"``, ``"unit"``, ``"position"``,
            ``"position_early"``.
        reward_reduce: ``"sum"`` of a macro action's token rewards, or ``"sigma"`` (as the values).
        discount: gamma ``"per_macro"`` action or ``"per_token"``.
        holes: at masked tokens inside a response (tool output) a macro action goes on (``"bridge"``), ends
            (``"split"``), or the batch is refused (``"error"``). GAE crosses holes without decay.

    Raises:
        ValueError, TypeError: a wrong setting, by name.

    Source:
        MA-RLHF (arXiv 2410.02743).
    """

    n: int | None = 5
    segment: Segment | None = None
    sigma: str = "equal"
    reward_reduce: str = "sum"
    discount: str = "per_macro"
    holes: str = "bridge"

    def __post_init__(self) -> None:
        integers(self, {"n": 1}, ("n",))
        for name, allowed in _CHOICES.items():
            one_of(name, getattr(self, name), allowed)
        if self.reward_reduce == "sigma" and self.sigma != "unit" and self.n != 1:
            warnings.warn(
                "reward_reduce='sigma' dilutes the score, which hosts add to the last token, by that token's "
                "weight in its macro action (use 'sum', or segments whose last one is a single token)",
                UserWarning,
                stacklevel=3,
            )

    def segments(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """``seg`` int32 [B, R] (-1 where masked) and ``nseg`` int32 [B] of a mask [B, R]."""
        on = mask != 0
        if self.segment is None:
            return ops.macro_segment_fixed(on, self.n, holes=self.holes)
        seg, nseg = self.segment(on)
        if seg.shape != on.shape or not torch.equal(seg >= 0, on):
            raise ValueError(
                f"segment must give a seg [B, R] that is -1 exactly at masked tokens; the mask is "
                f"{list(on.shape)}, seg is {list(seg.shape)}"
            )
        return seg, nseg

    @torch.no_grad()
    def advantages(
        self, rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
    ) -> tuple[Tensor, Tensor]:
        """Advantages and returns of the macro actions, at each of their tokens, not whitened.

        Args:
            rewards, values: [B, R], any floating dtype; masked entries are not read (they may be NaN).
            mask: [B, R]; nonzero are the policy's own tokens.
            gamma, lam: in [0, 1].

        Returns:
            (adv, ret), float32 [B, R] (float64 if an input is), 0 at masked tokens, without gradient.

        Raises:
            ValueError: shapes that differ, non-finite rewards or values at valid tokens (with their rows),
                gamma or lam out of range, segments of ``segment`` that are none.
        """
        for name, x in {"rewards": rewards, "values": values}.items():
            if x.shape != mask.shape or mask.dim() != 2:
                raise ValueError(
                    f"{name}, values and mask must be [B, R] alike; {name} is {list(x.shape)}, "
                    f"mask is {list(mask.shape)}"
                )
            rows = (~torch.isfinite(x) & (mask != 0)).any(1).nonzero()[:, 0].tolist()
            if rows:
                raise ValueError(f"{name} must be finite at valid tokens; rows {rows[:8]} are not")
        seg, nseg = self.segments(mask)
        wide = torch.promote_types(rewards.dtype, values.dtype)
        # With beta 1, k1 and a reference of 0, the op's token reward -(logp_old - logp_ref) is the host's,
        # and the host has added the score to its last token.
        zero = torch.zeros_like(rewards, dtype=wide)
        adv, ret, *_ = ops.ma_ppo_prepare(
            -rewards.to(wide), zero, values, zero.new_zeros(len(mask)), seg, nseg, 1.0, float(gamma),
            float(lam), sigma=self.sigma, reward_reduce=self.reward_reduce, discount=self.discount,
            validate=self.segment is not None,
        )  # fmt: skip
        return adv, ret
