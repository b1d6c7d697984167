# SPDX-License-Identifier: Apache-2.0
"""From one rollout to what PPO's update needs: checks, macro actions, KL reward, advantages, whitening."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from tenfold.ma_rlhf.advantages import (
    Inputs,
    Reduce,
    critic_free,
    warn_if_long,
    whitened,
    with_phantom,
)
from tenfold.ma_rlhf.config import MARLHFConfig
from tenfold.ma_rlhf.segmenters import Segmenter
from tenfold.ops.rl.returns import check_segments, real
from tenfold.training.checks import not_negative


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
    """All that the update needs of a rollout. Nothing is differentiable; masked entries may hold anything.

    Args:
        segmenter: cuts the rows, see :func:`~tenfold.ma_rlhf.make_segmenter`.
        mask: [B, R], bool or integer, 1 for every generated token up to and including the end.
        logp_old, logp_ref, value_old: [B, R], floating: of token j, and the critic before token j.
            ``value_old`` may be None without a critic (``advantage`` ``"rloo"`` or ``"grpo"``).
        score: [B], floating; clipped to ``config.score_clip``.
        ids: [B, R] integers, the response; needed to cut by text.
        truncated, bootstrap: bool [B], and the critic's value [B] after the last token; both needed with
            ``config.bootstrap_truncated``.
        texts, generator, keys: for the segmenter: responses as text; and what random lengths are drawn from:
            a CPU generator, or int64 [B], one number per row (the draw then does not depend on the other rows).
        beta: weight of the KL penalty instead of ``config.beta`` (adaptive control).
        group: int64 [B], which prompt a row answers, from 0; needed without a critic and to whiten by group.
            groups: how many there are (on all ranks; default: those here).
        reduce: sums a tensor over ranks. With it means, variances and baselines are those of the batch of all
            ranks, and must be called on all of them, also with no row.

    Returns:
        An :class:`Experience` of the same B and R. Dropped rows have no valid token.

    Raises:
        ValueError: shapes, devices; rows that are not finite (``config.non_finite="error"``), with their
            indices; segments that do not number the valid tokens; what is missing for the settings.
        TypeError: dtypes.

    Source:
        MA-RLHF (arXiv 2410.02743), sections 3.1 to 3.7 of the method's specification.
    """
    beta = config.beta if beta is None else beta
    not_negative("beta", beta)
    if value_old is None:
        if not config.critic_free:
            raise ValueError("value_old is None, but advantage='gae' needs a critic's values")
        value_old = torch.zeros_like(logp_old)
    on = _checked_inputs(mask, logp_old, logp_ref, value_old, score, ids)
    future = _future(config, on, truncated, bootstrap, value_old)
    group = _checked_group(config, on, group, groups, reduce)

    on, dropped = _usable(config, on, (logp_old, logp_ref, value_old), score, future)
    width = real(logp_old).dtype
    old, ref, value = (
        torch.where(on, x.detach().to(width), 0.0) for x in (logp_old, logp_ref, value_old)
    )
    there = on.any(1)
    points = torch.where(there, score.detach().to(width), 0.0)
    if future is not None:
        future = torch.where(there, future.to(width), 0.0)

    seg, nseg, fallback = _segments(segmenter, on, ids, ref, texts, generator, keys)
    inputs = Inputs(old, ref, value, points, seg, nseg, beta, future)
    if config.critic_free:
        made = critic_free(config, inputs, on, group, groups, reduce)
    elif config.phantom_step:
        made = with_phantom(config, inputs, on)
    else:
        made = inputs.prepared(config)
    adv, ret, adv_m, ret_m, kl_row = made
    adv, adv_m = whitened(config, on, nseg, adv, adv_m, group, groups, reduce)
    if config.ratio == "joint":
        warn_if_long(seg)
    return Experience(on, seg, nseg, old, ref, value, points, adv, ret, adv_m, ret_m, kl_row, dropped,
                      fallback, ids)  # fmt: skip


def response_mask(
    ids: Tensor, *, eos: int | Sequence[int], pad: int | None = None, mask: Tensor | None = None
) -> Tensor:
    """The valid tokens of generated ``ids`` [B, R]: up to and including the first end-of-sequence token.

    Without an end, up to the last token that is not padding.

    Args:
        eos: token or tokens that end a response. pad: the padding token (None: none is used).
        mask: known already; then it is only checked.

    Raises:
        ValueError: padding and end are the same token, so that the last valid one is ambiguous, and there
            is no ``mask``; shapes. TypeError: dtypes.
    """
    if ids.dim() != 2:
        raise ValueError(f"ids must be [B, R], got {list(ids.shape)}")
    if ids.is_floating_point() or ids.is_complex():
        raise TypeError(f"ids must be integers, got {ids.dtype}")
    if mask is not None:
        if mask.shape != ids.shape:
            raise ValueError(f"mask must be {list(ids.shape)} as ids, got {list(mask.shape)}")
        return mask != 0
    ends = [eos] if isinstance(eos, int) else list(eos)
    if pad is not None and pad in ends:
        raise ValueError(
            f"pad and eos are both token {pad}: the last valid token is ambiguous; pass mask= or use "
            "another padding token"
        )
    end = torch.isin(ids, torch.tensor(ends, dtype=ids.dtype, device=ids.device))
    before = end.int().cumsum(1) - end.int()  # ends before this token
    content = torch.ones_like(end) if pad is None else ids != pad
    later = content.int().flip(1).cumsum(1).flip(1)  # tokens from here on that are no padding
    return (before == 0) & (later > 0)


def _checked_inputs(mask: Tensor, old: Tensor, ref: Tensor, value: Tensor, score: Tensor,
                    ids: Tensor | None) -> Tensor:  # fmt: skip
    """The mask as bool, after all shapes, dtypes and devices were looked at."""
    if mask.dim() != 2:
        raise ValueError(f"mask must be [B, R], got {list(mask.shape)}")
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(f"mask must be bool or integer, got {mask.dtype}")
    named = {"logp_old": old, "logp_ref": ref, "value_old": value, "score": score, "ids": ids}
    for name, x in named.items():
        if x is None:
            continue
        shape = mask.shape[:1] if name == "score" else mask.shape
        if x.shape != shape:
            raise ValueError(f"{name} must be {list(shape)} as the mask, got {list(x.shape)}")
        if x.device != mask.device:
            raise ValueError(f"{name} is on {x.device}, the mask on {mask.device}")
        if name != "ids" and not x.is_floating_point():
            raise TypeError(f"{name} must be floating, got {x.dtype}")
        if name == "ids" and x.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"ids must be int32 or int64, got {x.dtype}")
    return mask != 0


def _row_vector(name: str, x: Tensor | None, on: Tensor, need: str) -> Tensor:
    if x is None:
        raise ValueError(f"{need} needs {name} [B]")
    if x.shape != on.shape[:1] or x.device != on.device:
        raise ValueError(
            f"{name} must be [{on.shape[0]}] on {on.device}, got {list(x.shape)} on {x.device}"
        )
    return x


def _future(config: MARLHFConfig, on: Tensor, truncated: Tensor | None, bootstrap: Tensor | None,
            value: Tensor) -> Tensor | None:  # fmt: skip
    if not config.bootstrap_truncated:
        return None
    cut = _row_vector("truncated", truncated, on, "bootstrap_truncated=True") != 0
    after = _row_vector("bootstrap", bootstrap, on, "bootstrap_truncated=True")
    if not after.is_floating_point():
        raise TypeError(f"bootstrap must be floating, got {after.dtype}")
    return torch.where(cut, after.detach().to(value.dtype), 0.0)


def _checked_group(
    config: MARLHFConfig,
    on: Tensor,
    group: Tensor | None,
    groups: int | None,
    reduce: Reduce | None,
) -> Tensor | None:
    """The group of every row as int64; None where no setting needs it."""
    if not (config.critic_free or config.whiten_adv == "group"):
        return None
    need = f"advantage={config.advantage!r}" if config.critic_free else "whiten_adv='group'"
    group = _row_vector("group", group, on, need)
    if group.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"group must be int32 or int64, got {group.dtype}")
    if reduce is not None and groups is None:
        raise ValueError(
            f"{need} over several ranks needs groups, the number of groups on all of them"
        )
    if group.numel() == 0:
        return group.long()
    low, high = int(group.min()), int(group.max())
    if low < 0 or (groups is not None and high >= groups):
        most = "" if groups is None else f" and below groups = {groups}"
        raise ValueError(f"group must be at least 0{most}, got {low} to {high}")
    if config.critic_free and reduce is None and int(group.long().bincount().max()) < 2:
        raise ValueError(f"{need} needs a group of at least two rows, every row is one of its own")
    return group.long()


def _usable(config: MARLHFConfig, on: Tensor, of_tokens: Sequence[Tensor], score: Tensor,
            future: Tensor | None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(mask without the rows that cannot be used, those rows)."""
    length = on.sum(1)
    short = (length > 0) & (length < config.min_response)
    wrong = ~score.isfinite()
    for x in of_tokens:
        wrong = wrong | (on & ~x.isfinite()).any(1)
    if future is not None:
        wrong = wrong | ~future.isfinite()
    wrong &= (length > 0) & ~short
    if config.non_finite == "error" and bool(wrong.any()):
        rows = wrong.nonzero()[:, 0].tolist()
        raise ValueError(
            f"score, or logp or value at a valid token, is not finite in rows {rows[:8]} "
            f"({len(rows)} rows); non_finite='drop' leaves such rows out"
        )
    dropped = short | wrong
    return on & ~dropped[:, None], dropped


def _segments(
    segmenter: Segmenter, on: Tensor, ids: Tensor | None, ref: Tensor, texts: Sequence[str] | None,
    generator: torch.Generator | None, keys: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    seg, nseg = segmenter(on, ids=ids, logp_ref=ref, texts=texts, generator=generator, keys=keys)
    for name, x, shape in (("seg", seg, on.shape), ("nseg", nseg, on.shape[:1])):
        if x.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} of the segmenter must be int32 or int64, got {x.dtype}")
        if x.shape != shape or x.device != on.device:
            raise ValueError(
                f"{name} of the segmenter must be {list(shape)} on {on.device}, got {list(x.shape)} on {x.device}"
            )
    check_segments(seg, nseg)
    rows = ((seg >= 0) != on).any(1).nonzero()[:, 0].tolist()
    if rows:
        raise ValueError(
            f"seg must be -1 at masked tokens and nowhere else; rows {rows[:8]} are not"
        )
    fallback = getattr(segmenter, "fallback", None)
    if fallback is None:
        fallback = torch.zeros(on.shape[0], dtype=torch.bool)
    return seg, nseg, fallback.to(on.device)
