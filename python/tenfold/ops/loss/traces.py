# SPDX-License-Identifier: Apache-2.0
"""Tokens of traces of a reward model that calls tools: classes, weights, stops."""

from __future__ import annotations

import torch
from torch import Tensor

from tenfold.ops._masks import as_bytes
from tenfold.ops._register import call_inference, inference_only

_ops = torch.ops.tenfold

for _name in ("trace_token_class", "lm_weight", "first_stop"):
    inference_only(_name)


@torch.library.register_fake("tenfold::trace_token_class")
def _(ids, mask, asst_start, answer_start, id_tool, id_obs, id_work, id_eos):
    return ids.new_empty(ids.shape, dtype=torch.int8)


@torch.library.register_fake("tenfold::lm_weight")
def _(cls, is_pos, beta, omega, lm_on_positive):
    return cls.new_empty(cls.shape, dtype=torch.float32)


@torch.library.register_fake("tenfold::first_stop")
def _(ids, lens, stop_ids):
    return tuple(ids.new_empty(ids.shape[:1], dtype=torch.int64) for _ in range(2))


def trace_token_class(
    ids: Tensor, mask: Tensor, asst_start: Tensor, answer_start: Tensor, id_tool: int, id_obs: int,
    id_work: int, id_eos: int,
) -> Tensor:  # fmt: skip
    """What every token of a trace is as a target: 0 ignored, 1 answer, 2 tool, 3 observation, 4 rationale, 5 EOS.

    Args:
        ids: int32 or int64 [N, S], padded on either side; what padding holds does not matter (it may be EOS).
        mask: [N, S], bool, int8 or uint8 (other dtypes: nonzero is a real token).
        asst_start: int32 or int64 [N], column of the first token that the model writes (of ``### ASSISTANT:``); S
            where there is none.
        answer_start: likewise of the answer, at most ``asst_start``; ``asst_start`` itself where the answer is not
            to be a class of its own. What lies before it is ignored.
        id_tool, id_obs, id_work, id_eos: ids of ``<start_tool>``, ``<start_observation>``, ``<start_work>`` and the end
            of sequence; all different; below 0 for none.

    Returns:
        int8 [N, S]. From ``asst_start`` on tokens are of class 2, after the observation token 3, after the work
        token 4, after the tool token 2 again. These three tokens themselves are of class 2, so that a model still
        learns where to stop when observations (or rationales) do not count. EOS is 5, and what follows it 0.

    Raises:
        IndexError: a start out of range (checked on the CPU only). ValueError: shapes, devices, equal ids. TypeError:
        dtypes.

    Source:
        Themis (arXiv 2310.01045), sections 2 and 4 of the method's specification.
    """
    return call_inference(_ops.trace_token_class.default, ids, as_bytes(mask), asst_start, answer_start, id_tool,
                          id_obs, id_work, id_eos)  # fmt: skip


def lm_weight(
    cls: Tensor, is_pos: Tensor, beta: float, omega: float, lm_on_positive: bool
) -> Tensor:
    """What every token counts in the language model's loss of Themis.

    Args:
        cls: int8 [N, S], classes of :func:`trace_token_class`.
        is_pos: [N], bool, int8 or uint8 (other dtypes: nonzero is yes): preferred rows.
        beta, omega: weights of observations and rationales, finite and at least 0.
        lm_on_positive: whether the answers of preferred rows count, with 1.

    Returns:
        float32 [N, S]: 1 for classes 2 and 5, beta for 3, omega for 4, 1 or 0 for 1, 0 for 0. Of a token as a
        target: the prediction at column t has the weight of column t + 1.

    Raises:
        IndexError: a class outside [0, 5] (checked on the CPU; elsewhere its weight is 0). ValueError: shapes, devices,
        beta or omega. TypeError: dtypes.

    Source:
        Themis (arXiv 2310.01045), section 4 of the method's specification.
    """
    return call_inference(
        _ops.lm_weight.default, cls, as_bytes(is_pos), beta, omega, lm_on_positive
    )


def first_stop(ids: Tensor, lens: Tensor, stop_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Where generated text must end: the first of some tokens in every row.

    Args:
        ids: int32 or int64 [N, S].
        lens: int32 or int64 [N], how many tokens of a row count; others are not read.
        stop_ids: int32 or int64 [K], may be empty; of equal ones the first is named.

    Returns:
        (pos, which), int64 [N]: the column, so that ``ids[i, : pos[i]]`` is what comes before it, and the number in
        ``stop_ids``; ``lens[i]`` and -1 where there is none.

    Raises:
        IndexError: a length outside [0, S] (checked on the CPU; elsewhere the nearest one counts). ValueError: shapes,
        devices. TypeError: dtypes.

    Source:
        Themis (arXiv 2310.01045), section 5 of the method's specification: stop at the observation token.
    """
    return call_inference(_ops.first_stop.default, ids, lens, stop_ids)
