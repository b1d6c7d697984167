# SPDX-License-Identifier: Apache-2.0
"""Pairs made by rules, with observations of the real tools: data without a network.

    calculator  word problems in the style of GSM8K: a slip in one calculation, or a final number that does not follow
    calendar    weekday of a date, date after some days, days between two dates
    weather     one property of a day's weather, from a table of weather that never was
    multi       the same some days after a date: two calls
    code        small functions with tests; the rejected one is subtly wrong
    translator  what a text means in English, alone or among several; from packaged catalogues
    search      what a function of the standard library does; from its documentation
    none        on-topic text against text that is not, repeats itself or is out of order; no tool is of use

The two answers of a pair differ in the value alone, are written alike, and the wrong value is drawn from what right
ones look like, so that nothing but the tool tells them apart (not so for ``none``, and only partly for
``calculator``). Traces are true: a call's observation is what the tool says, and the rationale says what follows.

A question belongs to the training part or to the test part by a hash of what it asks for (however it is put), so the
two never share one, whatever the seeds.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tenfold.themis.data import Candidate, Pair
from tenfold.themis.tools import (
    BadArguments,
    Calculator,
    Calendar,
    CodeRun,
    HistoryWeather,
    Tool,
    Translate,
    WikiSearch,
)
from tenfold.themis.traces import Step, Trace
from tenfold.training.checks import one_of

KINDS = ("calculator", "calendar", "weather", "multi", "code", "translator", "search", "none")
SPLITS = ("train", "test")
TEST_SHARE = 0.25  # of the questions
_TRIES = 40  # drafts per pair wanted, and 1,000 more, before it is said that there are not enough


class Useless(Exception):
    """A draft that makes no pair: its two answers are equally good, say."""


class Recorder:
    """Calls tools for one answer and keeps the steps."""

    def __init__(self, tools: Mapping[str, Tool], example: Mapping[str, Any]) -> None:
        self._tools, self._example = tools, example
        self.steps: list[Step] = []

    def __call__(self, thought: str, tool: str, arguments: str) -> str:
        """The observation. Useless: the tool cannot say."""
        try:
            text = self._tools[tool].call(tool, arguments, self._example)
        except (BadArguments, LookupError) as error:
            raise Useless(str(error)) from error
        self.steps.append(Step(thought, tool, arguments, text))
        return text


@dataclass(frozen=True)
class Judged:
    """What a kind says of one answer: the rationale, a closing thought, and the score."""

    rationale: str
    closing: str | None = None
    score: float | None = None


@dataclass(frozen=True)
class Draft:
    """A question, a right and a wrong answer, and how an answer is judged: ``judge(call, answer, right)``.

    ``asks``: what is asked for, however it is said (default: as the question says it).
    """

    question: str
    good: str
    bad: str
    judge: Callable[[Recorder, str, bool], Judged]
    context: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    asks: str = ""


Maker = Callable[[random.Random], Draft]


def _maker(kind: str, split: str) -> Maker:
    from tenfold.themis import synthetic_code, synthetic_rules, synthetic_texts

    return {
        "calculator": synthetic_rules.calculator, "calendar": synthetic_rules.calendar,
        "weather": synthetic_rules.weather, "multi": synthetic_rules.multi, "code": synthetic_code.code,
        "translator": synthetic_texts.translator, "search": synthetic_texts.search,
        "none": lambda draw: synthetic_texts.none(draw, split),
    }[kind]  # fmt: skip


def synthetic_tools() -> list[Tool]:
    """The tools that the traces were made with, for models that are to write such traces themselves."""
    from tenfold.themis.synthetic_rules import weather_table
    from tenfold.themis.synthetic_texts import search_passages

    return [Calculator(), Calendar(), CodeRun(), HistoryWeather(weather_table()), Translate(),
            WikiSearch(search_passages())]  # fmt: skip


def _tools(kind: str) -> dict[str, Tool]:
    from tenfold.themis.synthetic_rules import weather_table
    from tenfold.themis.synthetic_texts import search_passages

    make: dict[str, Callable[[], list[Tool]]] = {
        "calculator": lambda: [Calculator()],
        "calendar": lambda: [Calendar()],
        "weather": lambda: [HistoryWeather(weather_table())],
        "multi": lambda: [Calendar(), HistoryWeather(weather_table())],
        "code": lambda: [CodeRun()],
        "translator": lambda: [Translate()],
        "search": lambda: [WikiSearch(search_passages())],
        "none": list,
    }
    return {name: tool for tool in make[kind]() for name in tool.names}


def part_of(asked: str) -> str:
    """The part that what is asked for belongs to: ``"train"`` or ``"test"``."""
    digest = hashlib.sha256(asked.encode("utf-8")).digest()
    return SPLITS[int.from_bytes(digest[:8], "big") < TEST_SHARE * 2**64]


def _judged(draft: Draft, right: bool, name: str, tools: Mapping[str, Tool]) -> Candidate:
    answer = draft.good if right else draft.bad
    context = {} if draft.context is None else {"context": draft.context}
    example = {**draft.extra, **context, "id": name, "question": draft.question, "answer": answer}
    call = Recorder(tools, example)
    made = draft.judge(call, answer, right)
    score = (1.0 if right else -1.0) if made.score is None else made.score
    return Candidate(answer, Trace(tuple(call.steps), made.closing, made.rationale), score)


def synthetic_pairs(kind: str, count: int, seed: int = 0, *, split: str = "train") -> list[Pair]:
    """``count`` pairs of a kind, no question twice; the same for the same arguments.

    Args:
        kind: of ``KINDS``; ``source`` of the pairs. split: ``"train"`` or ``"test"``, which share no question.

    Raises:
        ValueError: an unknown kind or split; more pairs than there are questions. MissingData: ``translator`` without
            its catalogues. Refused: ``code`` where no isolation can be had.
    """
    one_of("kind", kind, KINDS)
    one_of("split", split, SPLITS)
    if count < 0:
        raise ValueError(f"count must be >= 0, got {count}")
    maker, tools = _maker(kind, split), _tools(kind)
    found: list[Pair] = []
    seen: set[str] = set()
    for number in itertools.count():
        if len(found) == count:
            return found
        if number == _TRIES * count + 1000:
            raise ValueError(
                f"only {len(found)} of {count} pairs of {kind!r} were found for the {split} part; ask for fewer"
            )
        draw = random.Random(f"{seed} {kind} {split} {number}")
        name = f"{kind}_{split}_{seed}_{len(found)}"
        try:
            draft = maker(draw)
            asked = draft.asks or draft.question
            if draft.question in seen or (kind != "none" and part_of(asked) != split):
                continue
            chosen, rejected = (_judged(draft, right, name, tools) for right in (True, False))
        except Useless:
            continue
        seen.add(draft.question)
        if chosen.score > rejected.score:
            found.append(
                Pair(name, draft.question, draft.context, chosen, rejected, kind, draft.extra)
            )
    raise AssertionError("unreachable")


def synthetic_mixture(
    counts: Mapping[str, int], seed: int = 0, *, split: str = "train"
) -> list[Pair]:
    """Pairs of several kinds in a random order: ``{"calculator": 200, "calendar": 100, ...}``."""
    made = [
        p for kind, count in counts.items() for p in synthetic_pairs(kind, count, seed, split=split)
    ]
    random.Random(f"{seed} order").shuffle(made)
    return made
