# SPDX-License-Identifier: Apache-2.0
"""Pairs of judged answers: the layout of the TARA files, read and written.

One JSON object per line:

    {"id", "question", ["context"], ["test_list"], ..., "pos_answer": A, "neg_answer": A}
    A = {"answer", "score", "actions", "score_agent": {"explanation"}}

``actions`` is one call ``{"Thought", "Action", "Action Input", "Observation"}``, a text with such lines and possibly
``Thought: ...`` and ``Finished.`` at its end, or (an extension, for what neither can say) a list of calls.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tenfold.themis.traces import Query, Step, Trace
from tenfold.training.checks import one_of

_CALL_KEYS = ("Thought", "Action", "Action Input", "Observation")
_OWN = ("id", "question", "context", "source", "pos_answer", "neg_answer")
# Tool families by action name, and of the published files by the beginning of their ids.
_FAMILIES = {
    "calculator": "calculator", "code_run": "code", "translate": "translator", "wiki_search": "search",
    "history_weather": "weather", "google_serper": "google",
}  # fmt: skip
_ID_FAMILIES = {
    "calculator": "calculator", "code": "code", "mlqa": "translator", "calendar": "calendar", "weather": "weather",
    "wikisearch": "search", "webgpt": "google", "multi_tools": "multi",
}  # fmt: skip


@dataclass(frozen=True)
class Candidate:
    """An answer, the trace that judges it, and its score (only the order of a pair's two is used)."""

    answer: str
    trace: Trace
    score: float


@dataclass(frozen=True)
class Pair:
    """Two answers to a question, of which ``chosen`` is preferred.

    ``source``: tool family (``"calculator"``, ...). ``extra``: what tools need besides (``test_list``, ...).
    """

    id: str
    question: str
    context: str | None
    chosen: Candidate
    rejected: Candidate
    source: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def rows(self) -> tuple[tuple[Query, Trace], tuple[Query, Trace]]:
        """(query, trace) of the preferred answer and of the rejected one."""
        chosen, rejected = (
            (Query(self.question, c.answer, self.context), c.trace)
            for c in (self.chosen, self.rejected)
        )
        return chosen, rejected

    def example(self, answer: str) -> dict[str, Any]:
        """What tools are given that judge ``answer``: ``id``, ``question``, ``answer``, ``context`` if any, extras."""
        context = {} if self.context is None else {"context": self.context}
        return {**self.extra, "id": self.id, "question": self.question, "answer": answer} | context


class Pairs(list[Pair]):
    """Pairs as read; ``skipped`` counts lines left out by reason: ``json``, ``malformed``, ``max_steps``, ``scores``,
    ``answers``."""

    def __init__(
        self, pairs: Iterable[Pair] = (), skipped: Mapping[str, int] | None = None
    ) -> None:
        super().__init__(pairs)
        self.skipped: Counter[str] = Counter(skipped or {})


class _BadExample(ValueError):
    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def _bad(message: str) -> _BadExample:
    return _BadExample("malformed", message)


def _call(value: Any) -> Step:
    """A step from one object."""
    if not isinstance(value, Mapping):
        raise _bad(f"a call must be an object, got {type(value).__name__}")
    missing = [k for k in _CALL_KEYS if not isinstance(value.get(k), str)]
    if missing == ["Observation"] and "Observation" in value and value["Observation"] is None:
        missing = []
    if missing:
        raise _bad(
            f"a call needs text in {', '.join(map(repr, missing))}; it has {sorted(map(str, value))}"
        )
    return Step(*(value[k] for k in _CALL_KEYS))


_LINE = re.compile(
    r"^(Thought|Action Input|Action|Observation):[ \t]?|^(Finished)\.?[ \t]*$", re.MULTILINE
)
_AFTER = {"Thought": ("", "Observation"), "Action": ("Thought",), "Action Input": ("Action",),
          "Observation": ("Action Input",), "Finished": ("Thought",)}  # fmt: skip


def parse_actions(text: str) -> tuple[tuple[Step, ...], str | None]:
    """(calls, closing thought) of a text with lines Thought, Action, Action Input, Observation and Finished.

    Fields go on over lines that begin with no such word; white space around them is dropped. A thought after a
    thought belongs to it. ValueError for another order, a call that is not complete, or text that belongs nowhere.
    """
    marks: list[tuple[str, int, int]] = []
    for m in _LINE.finditer(text):
        label = m[1] or m[2]
        last = marks[-1][0] if marks else ""
        if label == "Thought" and last == "Thought":
            continue
        if last not in _AFTER[label]:
            raise _bad(
                f"`{label}` after {f'`{last}`' if last else 'nothing'} in actions {text[:300]!r}"
            )
        marks.append((label, m.start(), m.end()))
    ends = [start for _, start, _ in marks[1:]] + [len(text)]
    values = [(label, text[end:stop].strip()) for (label, _, end), stop in zip(marks, ends)]
    before = text[: marks[0][1]] if marks else text
    if before.strip() or not marks:
        raise _bad(f"actions must begin with `Thought:`, got {text[:300]!r}")
    closing = None
    if values[-1][0] == "Finished":
        if values[-1][1]:
            raise _bad(f"there is text after `Finished` in actions {text[:300]!r}")
        closing = values[-2][1]
        values = values[:-2]
    if len(values) % 4:
        raise _bad(f"the last call is not complete in actions {text[:300]!r}")
    calls = [Step(*(v for _, v in values[i : i + 4])) for i in range(0, len(values), 4)]
    return tuple(calls), closing


def _steps(actions: Any) -> tuple[tuple[Step, ...], str | None]:
    if isinstance(actions, str):
        return parse_actions(actions)
    if isinstance(actions, Mapping):
        return (_call(actions),), None
    if not isinstance(actions, Sequence):
        raise _bad(
            f"actions must be a call, a text or a list of calls, got {type(actions).__name__}"
        )
    rows, closing = list(actions), None
    if rows and isinstance(rows[-1], Mapping) and rows[-1].get("Finished") is True:
        closing = rows.pop().get("Thought")
        if not isinstance(closing, str):
            raise _bad("the finishing thought must be text in 'Thought'")
    steps = tuple(_call(row) for row in rows)
    if any(s.observation is None for s in steps[:-1]):
        raise _bad("only the last call may be without an observation")
    return steps, closing


def _trace(value: Mapping[str, Any], max_steps: int, need_traces: bool) -> Trace:
    if "actions" not in value:
        if need_traces:
            raise _bad(f"the key 'actions' is missing; there are {sorted(map(str, value))}")
        return Trace()
    steps, closing = _steps(value["actions"])
    if len(steps) > max_steps:
        raise _BadExample("max_steps", f"{len(steps)} calls, at most {max_steps} are allowed")
    agent = value.get("score_agent", {})
    rationale = agent.get("explanation") if isinstance(agent, Mapping) else agent
    if not isinstance(rationale, str | None):
        raise _bad(f"score_agent.explanation must be text, got {rationale!r}"[:300])
    return Trace(steps, closing, None if rationale is None else rationale.strip())


def _candidate(row: Mapping[str, Any], key: str, max_steps: int, need_traces: bool) -> Candidate:
    value = row.get(key)
    if not isinstance(value, Mapping):
        raise _bad(f"{key} must be an object, got {type(value).__name__}")
    if not isinstance(value.get("answer"), str):
        raise _bad(f"{key}: 'answer' must be text, got {value.get('answer')!r}"[:300])
    try:
        score = float(value.get("score", math.nan))
    except (TypeError, ValueError):
        score = math.nan
    if not math.isfinite(score):
        raise _bad(f"{key}: 'score' must be a number, got {value.get('score')!r}"[:300])
    try:
        return Candidate(value["answer"], _trace(value, max_steps, need_traces), score)
    except _BadExample as error:
        raise _BadExample(error.reason, f"{key}: {error}") from None


def _source(row: Mapping[str, Any], name: str, pair: Sequence[Candidate]) -> str:
    if isinstance(row.get("source"), str):
        return str(row["source"])
    family = _ID_FAMILIES.get(re.split(r"_(?:train|test)_|_\d", name)[0])
    if family is not None:
        return family
    tools = {s.tool.split(".")[0] for c in pair for s in c.trace.steps}
    if len(tools) > 1:
        return "multi"
    return next((_FAMILIES.get(t, t.lower()) for t in tools), "none")


def _pair(row: Any, max_steps: int, allow_ties: bool, need_traces: bool) -> Pair:
    if not isinstance(row, Mapping):
        raise _bad(f"an example must be an object, got {type(row).__name__}")
    name = str(row.get("id", ""))
    wrong = [k for k in ("question", "context")
             if not isinstance(row.get(k), str) and not (k == "context" and row.get(k) is None)]  # fmt: skip
    if wrong:
        raise _bad(
            f"text is needed in {', '.join(wrong)}; there is {[row.get(k) for k in wrong]}"[:300]
        )
    both = [_candidate(row, k, max_steps, need_traces) for k in ("pos_answer", "neg_answer")]
    chosen, rejected = both
    if chosen.score < rejected.score or (chosen.score == rejected.score and not allow_ties):
        raise _BadExample(
            "scores",
            f"the preferred answer's score {chosen.score} must be above the other's {rejected.score}"
            + ("" if chosen.score < rejected.score else " (allow_ties=True lets equal ones pass)"),
        )
    if chosen.answer == rejected.answer:
        raise _BadExample("answers", "the two answers are equal")
    extra = {k: v for k, v in row.items() if k not in _OWN}
    return Pair(
        name, row["question"], row.get("context"), chosen, rejected, _source(row, name, both), extra
    )


def read_tara(
    source: str | Path | Iterable[str],
    *,
    max_steps: int = 3,
    on_bad: str = "raise",
    allow_ties: bool = False,
    need_traces: bool = True,
) -> Pairs:
    """Reads pairs. White space around rationales is dropped, as the published code does.

    Args:
        source: a file, or its lines. max_steps: calls in a trace, at most. on_bad: ``"raise"``, or ``"skip"``, which
            counts by reason in ``skipped``. allow_ties: pairs of equal scores are kept. need_traces: answers
            without ``actions`` are bad; else their trace is empty.

    Raises:
        ValueError: a bad line, with its number and the example's id: no JSON; keys that are missing or of another
            type; calls not complete or in another order; too many of them; scores equal or the wrong way round;
            equal answers. FileNotFoundError.
    """
    one_of("on_bad", on_bad, ("raise", "skip"))
    if max_steps < 0:
        raise ValueError(f"max_steps must be >= 0, got {max_steps}")
    lines: Iterable[str]
    if isinstance(source, str | Path):
        lines, where = Path(source).read_text(encoding="utf-8").split("\n"), f"{source}: "
    else:
        lines, where = source, ""
    found = Pairs()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name = ""
        try:
            try:
                row = json.loads(line)
            except ValueError as error:
                raise _BadExample("json", f"not JSON: {error}") from None
            name = f", example {row['id']!r}" if isinstance(row, Mapping) and "id" in row else ""
            found.append(_pair(row, max_steps, allow_ties, need_traces))
        except _BadExample as error:
            if on_bad == "raise":
                raise ValueError(f"{where}line {number}{name}: {error}") from None
            found.skipped[error.reason] += 1
    return found


def _actions(trace: Trace) -> Any:
    """The most usual form that says the same."""
    calls = [dict(zip(_CALL_KEYS, vars(s).values())) for s in trace.steps]
    if trace.closing is None and len(calls) == 1:
        return calls[0]
    lines = [f"{k}: {v}" for call in calls for k, v in call.items()]
    if trace.closing is not None:
        lines += [f"Thought: {trace.closing}", "Finished."]
    text = "\n".join(lines)
    try:
        if parse_actions(text) == (trace.steps, trace.closing):
            return text
    except ValueError:
        pass
    closing = [] if trace.closing is None else [{"Thought": trace.closing, "Finished": True}]
    return [*calls, *closing]


def _row(pair: Pair) -> dict[str, Any]:
    taken = sorted(set(pair.extra) & set(_OWN))
    if taken:
        raise ValueError(f"example {pair.id!r}: extra must not have the keys {taken}")
    row: dict[str, Any] = {"id": pair.id, "source": pair.source, "question": pair.question}
    if pair.context is not None:
        row["context"] = pair.context
    row |= pair.extra
    for key, c in (("pos_answer", pair.chosen), ("neg_answer", pair.rejected)):
        row[key] = {"answer": c.answer, "score": c.score, "actions": _actions(c.trace),
                    "score_agent": {"explanation": c.trace.rationale}}  # fmt: skip
    return row


def write_tara(pairs: Iterable[Pair], path: str | Path) -> None:
    """Writes what :func:`read_tara` reads back as it was. ValueError: ``extra`` has a key of the layout's own."""
    text = "".join(json.dumps(_row(p), ensure_ascii=False) + "\n" for p in pairs)
    Path(path).write_bytes(text.encode("utf-8"))
