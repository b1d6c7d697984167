# SPDX-License-Identifier: Apache-2.0
"""What the tool loop says about an answer."""

from __future__ import annotations

from dataclasses import dataclass

from tenfold.themis.traces import Trace

FINISH = ("rationale", "no_rationale", "max_rounds", "length", "deadline", "error")


@dataclass(frozen=True)
class CallRecord:
    """One tool call: what was asked for, what came, its status and the seconds it took."""

    tool: str
    arguments: str
    observation: str
    status: str
    seconds: float
    cached: bool = False


@dataclass(frozen=True)
class Judgement:
    """What the loop says about one answer.

    Attributes:
        reward: of the trace as it stands, with the end token. NaN where ``finish`` is ``"error"``, where the deadline
            had passed before the row was begun, and of models without value head.
        ids: of prompt, trace and end token. text: the same, decoded. trace: as far as it can be read.
        calls: in order. finish: one of ``FINISH``. prompt_tokens, new_tokens: read at first, and written by the model.
        message: of an error.
    """

    reward: float
    ids: list[int]
    text: str
    trace: Trace
    calls: tuple[CallRecord, ...]
    finish: str
    prompt_tokens: int
    new_tokens: int
    message: str = ""
