"""The tool loop: write, call tools, read what they say, judge. Batched, with one KV cache from prompt to score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tenfold.themis.traces import Query, Trace

FINISH = ("rationale", "no_rationale", "max_rounds", "length", "deadline", "error")


@dataclass(frozen=True)
class CallRecord:
    """One tool call: what was asked for, what came, its status and the seconds it took."""

    tool: str
    arguments: str
    observation: str
    status: str
    seconds: float


@dataclass(frozen=True)
class Judgement:
    """What the loop says about one answer.

    Attributes:
        reward: of the trace as it stands, with EOS; NaN where ``finish`` is ``"error"``.
        ids: of prompt, trace and EOS. text: the same, decoded. trace: as far as it could be read.
        calls: in order. finish: one of ``FINISH``. prompt_tokens, new_tokens: of ``ids``, new ones without EOS.
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


class ToolLoop:
    """Judges answers.

    Args:
        model: a ``ThemisRewardModel``. format: of its traces. toolbox: what it may call.
        max_iterations: rounds of writing. max_new_tokens: per round. temperature (0: greedy), top_p, top_k.
        max_length: tokens of a row (None: what the model can hold). batch_size: rows at a time.
    """

    def __init__(
        self, model: Any, format: Any, toolbox: Any, *, max_iterations: int = 3, max_new_tokens: int = 1024,
        temperature: float = 0.0, top_p: float = 1.0, top_k: int = 0, max_length: int | None = None,
        batch_size: int = 16,
    ) -> None:  # fmt: skip
        raise NotImplementedError

    def judge(
        self,
        queries: Sequence[Query],
        examples: Sequence[Mapping[str, Any] | None] | None = None,
        *,
        deadlines: Sequence[float | None] | None = None,
        seed: int = 0,
    ) -> list[Judgement]:
        """Judgements in the order of the queries.

        ``deadlines`` are times of ``time.monotonic()``; ``examples`` are what tools may read beside arguments.
        """
        raise NotImplementedError
