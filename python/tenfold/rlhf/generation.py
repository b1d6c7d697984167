# SPDX-License-Identifier: Apache-2.0
"""Sampling responses: a decode loop whose draws belong to rows, not to a generator's state.

A token is chosen by inverting its distribution at a uniform number that was drawn for (step, row, position).
So what is sampled depends on weights and seed alone: not on ranks, the batch split, or rows that ended.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.integrations import transformers as hf
from tenfold.rlhf.trunks import model_inputs, plain_face

# (policy, prompt ids [B, P], mask [B, P], draws [B, R]) -> response ids [B, <= R].
Generate = Callable[[Any, Tensor, Tensor, Tensor], Tensor]


def choose(
    logits: Tensor, draws: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Tensor:
    """One token id [B] per row of logits [B, V], by draws [B] uniform in [0, 1).

    ``top_k`` (0: all) keeps the likeliest tokens, ``top_p`` the fewest whose probability reaches it;
    temperature 0 takes the likeliest.
    """
    if temperature == 0:
        return logits.argmax(-1)
    x, ids = logits.float() / temperature, None
    if top_k or top_p < 1:
        x, ids = x.topk(min(top_k or x.shape[1], x.shape[1]))
    p = x.softmax(-1)
    if top_p < 1:
        p = torch.where(p.cumsum(1) - p < top_p, p, 0.0)
    total = p.cumsum(1)
    whole = total[:, -1:].contiguous()
    at = torch.searchsorted(total, draws[:, None].to(total) * whole, right=True)
    # Rounding may put the draw at the very end: then the last token that has a probability.
    at = torch.minimum(at, torch.searchsorted(total, whole))
    return (at if ids is None else ids.gather(1, at))[:, 0]


def sampler(
    *, eos: tuple[int, ...], pad: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Generate:
    """The trainer's own :data:`Generate`: left-padded prompts, ``pad`` after an end token, which is kept."""

    @torch.no_grad()
    def generate(model: nn.Module, ids: Tensor, mask: Tensor, draws: Tensor) -> Tensor:
        from tenfold.rlhf.cache import roomy_cache

        (rows, width), limit = ids.shape, draws.shape[1]
        face = plain_face(model)
        made = torch.full((rows, limit), pad, dtype=torch.int64, device=ids.device)
        live = torch.arange(rows, device=ids.device)  # rows that are still in the cache
        running = torch.ones(rows, dtype=torch.bool, device=ids.device)
        ends = torch.tensor(eos, dtype=torch.int64, device=ids.device)
        seen = torch.cat([mask.long(), mask.new_ones((rows, limit), dtype=torch.int64)], 1)
        cache = roomy_cache(face, width + limit - 1)
        inputs = model_inputs(face, ids, seen[:, :width])
        position = inputs["position_ids"][:, -1:] if "position_ids" in inputs else None
        for t in range(limit):
            out = hf.forward(face, inputs.pop("input_ids"), cache, logits_to_keep=1, **inputs)
            token = choose(out.logits[:, -1], draws[live, t], temperature, top_k, top_p)
            made[live, t] = torch.where(running, token, pad)
            running = running & ~torch.isin(token, ends)
            left = int(running.sum())
            if left == 0 or t + 1 == limit:
                return made[:, : t + 1]
            if 2 * left <= len(live):  # half of the work would be for rows that ended
                kept = running.nonzero()[:, 0]
                cache.batch_select_indices(kept)
                live, running, token = live[kept], running[kept], token[kept]
                position = None if position is None else position[kept]
            inputs = {"input_ids": token[:, None], "attention_mask": seen[live, : width + t + 1]}
            if position is not None:
                position = inputs["position_ids"] = position + 1
        return made

    return generate


def hf_generate(
    *, eos: tuple[int, ...], pad: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
    **settings: Any,
) -> Generate:  # fmt: skip
    """A :data:`Generate` that calls ``model.generate``, for what :func:`sampler` lacks.

    ``settings`` go to ``generate``. It draws from torch's global generator, which the trainer seeds per
    step and rank.
    """
    drawn: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        drawn = {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}

    @torch.no_grad()
    def generate(model: Any, ids: Tensor, mask: Tensor, draws: Tensor) -> Tensor:
        out = model.generate(
            input_ids=ids, attention_mask=mask.long(), max_new_tokens=draws.shape[1],
            eos_token_id=list(eos) or None, pad_token_id=pad, **(drawn | settings),
        )  # fmt: skip
        return out[:, ids.shape[1] :]

    return generate


def response_tokens(ids: Tensor, eos: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """(mask bool [B, R], truncated bool [B]) of responses [B, R]: up to the first end token, with it.

    Reads no padding, so the id that pads may be the one that ends.
    """
    ends = torch.isin(ids, torch.tensor(eos, dtype=ids.dtype, device=ids.device))
    return ends.int().cumsum(1) - ends.int() == 0, ~ends.any(1)
