# SPDX-License-Identifier: Apache-2.0
"""Themis as a reward: for our MA-RLHF trainer and TRL, for OpenRLHF, for verl; by a scorer here or a server elsewhere.

    trainer = MAPPOTrainer(policy, reward=ThemisReward(scorer), prompts=..., ...)          # TRL's style
    trainer = MAPPOTrainer(policy, reward=ThemisReward(scorer).openrlhf, prompts=..., ...) # OpenRLHF's
    trl.GRPOTrainer(model, reward_funcs=ThemisReward(scorer), ...)

``tenfold.integrations.themis`` has the functions that verl and OpenRLHF load by name.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from tenfold.rlhf.programs import completion_text
from tenfold.themis.judgement import FINISH
from tenfold.themis.normalize import Normalizer
from tenfold.themis.scorer import Scored
from tenfold.themis.traces import Query
from tenfold.training.checks import one_of


class Scores(Protocol):
    """What scores: a :class:`~tenfold.themis.scorer.Scorer` or a :class:`~tenfold.themis.client.RemoteScorer`."""

    def score_many(
        self, queries: Sequence[Query], examples: Any = None, deadline: float | None = None
    ) -> list[Scored]:
        """Answers in the order of the queries."""


def answer_in(text: str, prompt: str, ends: Sequence[str] = ()) -> str:
    """The response in a text that holds prompt and response.

    Args:
        text: as a trainer decodes it, perhaps with tokens of a sequence's beginning before the prompt.
        ends: texts such as an end token's, taken off the end of the response.

    Raises:
        ValueError: the prompt is not in the text.
    """
    at = text.find(prompt)
    if at < 0:
        raise ValueError("does not hold its prompt, so that where the response begins is not known")
    answer = text[at + len(prompt) :]
    cut = True
    while cut:
        cut = False
        for end in ends:
            if end and answer.endswith(end):
                answer, cut = answer[: -len(end)], True
    return answer


def question_of(prompt: Any) -> str:
    """What was asked: a text as it is; of a chat what the user said last.

    Raises TypeError for anything else.
    """
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Sequence):
        for message in reversed(prompt):
            if isinstance(message, Mapping) and message.get("role") == "user":
                content = message.get("content")
                if isinstance(content, str):
                    return content
                if isinstance(content, Sequence):  # TRL's parts, of which text counts
                    return "".join(p.get("text", "") for p in content if p.get("type") == "text")
    raise TypeError(
        f"a prompt must be a text or a chat with a user's message, got {prompt!r}"[:300]
    )


class ThemisReward:
    """A reward function: TRL's style when it is called, OpenRLHF's as :meth:`openrlhf`.

    Columns of the data set other than ``question`` and ``context`` are what tools may read (``test_list`` and
    such).

    Args:
        scorer: that answers; all of a call's requests are made at once, so that it can batch them.
        question: column with the question, or a function of the prompt; default: :func:`question_of`.
        context: column with the context, where there is one.
        deadline: seconds for all answers of a call; None: the scorer's.
        normalizer: makes rewards of raw ones, batch by batch in the order of the responses, so that a run can be
            repeated; default: clipped to +-5.
        missing: reward of a response that got none (deadline, error); None: it is not judged.
        accept: finish reasons whose rewards count, as ``("rationale",)``; others are missing. None: all that have a
            reward, cut-off traces, too. A policy learns to make the judge write no end, if that pays.
        ends: of :func:`answer_in`, for OpenRLHF.

    Attributes:
        last: the answers of the last call, with traces.
    """

    __name__ = "themis"  # what trainers log

    def __init__(
        self, scorer: Scores, *, question: str | Callable[[Any], str] = question_of, context: str = "context",
        deadline: float | None = None, normalizer: Normalizer | None = None, missing: float | None = None,
        accept: Sequence[str] | None = None, ends: Sequence[str] = (),
    ) -> None:  # fmt: skip
        if not callable(getattr(scorer, "score_many", None)):
            raise TypeError(
                f"scorer must be a Scorer or a RemoteScorer (Scorer(loop) makes one); got {type(scorer).__name__}"
            )
        if missing is not None and not math.isfinite(missing):
            raise ValueError(f"missing must be a finite number or None, got {missing}")
        for reason in accept or ():
            one_of("accept", reason, FINISH)
        self.accept = FINISH if accept is None else tuple(accept)
        self.scorer, self.question, self.context = scorer, question, context
        self.deadline, self.missing, self.ends = deadline, missing, tuple(ends)
        self.normalizer = normalizer or Normalizer()
        self.last: list[Scored] = []

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Any = None,
        log_extra: Any = None, log_metric: Any = None, **columns: Any,
    ) -> list[float | None]:  # fmt: skip
        """Rewards, one per completion; None: not judged.

        Args:
            prompts, completions: texts or chats. columns: lists of the data set; what is no list of that length
                (a trainer's state) is left out. log_extra, log_metric: TRL's.

        Raises:
            ValueError: lengths, a missing column. TypeError: prompts or completions of another kind.
        """
        if len(prompts) != len(completions):
            raise ValueError(
                f"prompts and completions must be equally many, got {len(prompts)} and {len(completions)}"
            )
        columns = {k: v for k, v in columns.items()
                   if isinstance(v, Sequence) and not isinstance(v, str) and len(v) == len(prompts)}  # fmt: skip
        queries = [
            Query(q, completion_text(c), x)
            for q, c, x in zip(self._questions(prompts, columns), completions, self._contexts(columns, len(prompts)))
        ]  # fmt: skip
        own = (self.question, self.context)
        examples = [
            {k: v[i] for k, v in columns.items() if k not in own} for i in range(len(prompts))
        ]
        rewards = self._rewards(queries, examples)
        if callable(log_extra):
            log_extra("themis_trace", [found.text for found in self.last])
            log_extra("themis_finish", [found.finish for found in self.last])
        if callable(log_metric):
            for name, value in self.metrics().items():
                log_metric(f"themis/{name}", value)
        return rewards

    def _questions(self, prompts: Sequence[Any], columns: Mapping[str, Any]) -> list[str]:
        if callable(self.question):
            return [self.question(p) for p in prompts]
        if self.question not in columns:
            raise ValueError(
                f"question names the column {self.question!r}; there are: {', '.join(columns) or 'none'}"
            )
        return list(columns[self.question])

    def _contexts(self, columns: Mapping[str, Any], count: int) -> list[str | None]:
        return list(columns.get(self.context, [None] * count))

    def _rewards(
        self, queries: Sequence[Query], examples: Sequence[Mapping[str, Any] | None]
    ) -> list[float | None]:
        self.last = self.scorer.score_many(queries, examples, self.deadline)
        scores = self.normalizer(
            [f.reward if f.finish in self.accept else math.nan for f in self.last]
        )
        return [self.missing if math.isnan(s) else s for s in scores]

    @property
    def openrlhf(self) -> Callable[..., dict[str, Any]]:
        """The same in OpenRLHF's style, ``f(queries, prompts, labels)``.

        It gives ``rewards`` and ``scores`` (raw), float32 [n] with NaN where a response was not judged, and
        ``extra_logs``. ``queries`` are prompts with responses; tools may read ``label``. Raises ValueError for
        lengths, and for a query without its prompt.
        """

        def themis(
            queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any] | None = None, **settings: Any
        ) -> dict[str, Any]:  # fmt: skip
            return self._openrlhf(queries, prompts, labels)

        return themis

    def _openrlhf(
        self, queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any] | None
    ) -> dict[str, Any]:
        import torch

        labels = [None] * len(queries) if labels is None else labels
        if not len(queries) == len(prompts) == len(labels):
            raise ValueError(
                f"queries, prompts and labels must be equally many, got {len(queries)}, {len(prompts)} and "
                f"{len(labels)}"
            )
        answers = [answer_in(q, p, self.ends) for q, p in zip(queries, prompts)]
        questions = self._questions(prompts, {}) if callable(self.question) else list(prompts)
        examples = [None if label is None else {"label": label} for label in labels]
        found = self._rewards([Query(q, a) for q, a in zip(questions, answers)], examples)
        rewards = torch.tensor([math.nan if x is None else x for x in found], dtype=torch.float32)
        raw = torch.tensor([x.reward for x in self.last], dtype=torch.float32)
        logs = {k: torch.full((len(queries),), v) for k, v in self.metrics().items()}
        return {"rewards": rewards, "scores": raw, "extra_logs": logs}

    def metrics(self) -> dict[str, float]:
        """Of the last call: shares of finish reasons, tool calls per response, share of them that failed, tokens."""
        if not self.last:
            return {}
        size = len(self.last)
        calls = [c for found in self.last for c in found.calls]
        shares = {f"finish_{k}": n / size for k, n in Counter(f.finish for f in self.last).items()}
        return shares | {
            "calls": len(calls) / size,
            "calls_failed": sum(c.status != "ok" for c in calls) / max(1, len(calls)),
            "new_tokens": sum(f.new_tokens for f in self.last) / size,
        }
