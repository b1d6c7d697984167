"""From one rollout to what PPO's update needs: checks, macro actions, KL reward, advantages, whitening."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from tenfold.ma_rlhf.config import MARLHFConfig
from tenfold.ma_rlhf.segmenters import Segmenter

Reduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Experience:
    """One rollout, ready for updates; made by :func:`prepare`. R is the padded response length.

    Attributes:
        mask: bool [B, R], the tokens that count. seg: int32 [B, R], -1 elsewhere. nseg: int32 [B].
        logp_old, logp_ref, value_old: [B, R], 0 where masked. score: [B], as it came (0 of dropped rows).
        adv, ret: [B, R], of tokens. adv_m, ret_m: [B, R], of macro actions, 0 beyond ``nseg``.
        kl_row: [B], mean of the KL estimate per token.
        dropped: bool [B], rows taken out (too short or not finite). fallback: bool [B], rows that could
            not be parsed.
        ids: int64 [B, R] or None, the response's tokens.
    """

    mask: Tensor
    seg: Tensor
    nseg: Tensor
    logp_old: Tensor
    logp_ref: Tensor
    value_old: Tensor
    score: Tensor
    adv: Tensor
    ret: Tensor
    adv_m: Tensor
    ret_m: Tensor
    kl_row: Tensor
    dropped: Tensor
    fallback: Tensor
    ids: Tensor | None = None

    def _map(self, f: Callable[[Tensor], Tensor]) -> Experience:
        made = {x.name: getattr(self, x.name) for x in fields(self)}
        return replace(self, **{k: None if v is None else f(v) for k, v in made.items()})

    def rows(self, index: Tensor | slice | Sequence[int]) -> Experience:
        """The rows of a minibatch: a slice, a list, or a bool [B] or integer tensor."""
        at: Any = (
            index if isinstance(index, slice | Tensor) else torch.as_tensor(list(index)).long()
        )
        if isinstance(at, Tensor):
            at = at.to(self.mask.device)
        return self._map(lambda x: x[at])

    def to(self, device: torch.device | str) -> Experience:
        """A copy on another device."""
        return self._map(lambda x: x.to(device))

    def __len__(self) -> int:
        return self.mask.shape[0]

    @property
    def length(self) -> Tensor:
        """Valid tokens per row, int64 [B]."""
        return self.mask.sum(1)

    @property
    def kl_response(self) -> Tensor:
        """KL estimate summed over the response, [B] in nats: what an adaptive controller looks at."""
        return self.kl_row * self.length

    def counts(self) -> dict[str, int]:
        """``tokens``, ``sequences`` and ``macros`` here.

        Summed over all shards of a batch they are the keywords of :func:`~tenfold.ma_rlhf.policy_loss`
        and :func:`~tenfold.ma_rlhf.value_loss`.
        """
        made = torch.stack([self.mask.sum(), (self.nseg > 0).sum(), self.nseg.sum()])
        return dict(zip(("tokens", "sequences", "macros"), made.tolist()))


def prepare(
    config: MARLHFConfig, segmenter: Segmenter, *, mask: Tensor, logp_old: Tensor, logp_ref: Tensor,
    value_old: Tensor | None, score: Tensor, ids: Tensor | None = None, truncated: Tensor | None = None,
    bootstrap: Tensor | None = None, texts: Sequence[str] | None = None,
    generator: torch.Generator | None = None, keys: Tensor | None = None, beta: float | None = None,
    group: Tensor | None = None, groups: int | None = None, reduce: Reduce | None = None,
) -> Experience:  # fmt: skip
    raise NotImplementedError


def response_mask(
    ids: Tensor, *, eos: int | Sequence[int], pad: int | None = None, mask: Tensor | None = None
) -> Tensor:
    raise NotImplementedError
