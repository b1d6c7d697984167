# SPDX-License-Identifier: Apache-2.0
"""Token traces of a reward model that calls tools: classes, weights and stops of their tokens."""

from __future__ import annotations

import torch
from torch import Tensor

IGNORE, ANSWER, TOOL, OBSERVATION, RATIONALE, EOS = range(6)


def trace_token_class(
    ids: Tensor, mask: Tensor, asst_start: Tensor, answer_start: Tensor, id_tool: int, id_obs: int,
    id_work: int, id_eos: int,
) -> Tensor:  # fmt: skip
    """Class int8 [N, S] of every token as a target. ids and mask [N, S], starts [N], columns.

    A row: ignored tokens, from ``answer_start`` on the answer, from ``asst_start`` on the trace. There the last
    special token before a token says what it is; special tokens themselves are TOOL (what makes the model call, or
    stop), the end of sequence is EOS, and what follows it is ignored.
    """
    after = {id_tool: TOOL, id_obs: OBSERVATION, id_work: RATIONALE, id_eos: IGNORE}
    after = {token: kind for token, kind in after.items() if token >= 0}  # below 0: there is none
    out = torch.zeros(ids.shape, dtype=torch.int8, device=ids.device)
    for i, row in enumerate(ids.tolist()):
        kind = TOOL
        for j, token in enumerate(row):
            if not mask[i, j] or j < answer_start[i]:
                continue
            if j < asst_start[i]:
                out[i, j] = ANSWER
            elif kind == IGNORE or token not in after:
                out[i, j] = kind
            else:
                kind = after[token]
                out[i, j] = EOS if token == id_eos else TOOL
    return out


def lm_weight(
    cls: Tensor, is_pos: Tensor, beta: float, omega: float, lm_on_positive: bool
) -> Tensor:
    """float32 [N, S]: of classes [N, S], what a token counts in the language model's loss; is_pos [N]."""
    if ((cls < IGNORE) | (cls > EOS)).any():
        raise IndexError("cls must be in [0, 5]")
    table = torch.tensor([0.0, 0.0, 1.0, beta, omega, 1.0], device=cls.device)
    answer = (cls == ANSWER) & (is_pos != 0)[:, None]
    return torch.where(answer, float(lm_on_positive), table[cls.long()])


def first_stop(ids: Tensor, lens: Tensor, stop_ids: Tensor) -> tuple[Tensor, Tensor]:
    """int64 [N]: where the first of ``stop_ids`` [K] is among ``ids[i, :lens[i]]``, and which; else lens, -1."""
    pos, which = lens.long().clone(), torch.full_like(lens, -1, dtype=torch.int64)
    stops = stop_ids.tolist()
    for i, (row, n) in enumerate(zip(ids.tolist(), lens.tolist(), strict=True)):
        for j, token in enumerate(row[:n]):
            if token in stops:
                pos[i], which[i] = j, stops.index(token)
                break
    return pos, which
