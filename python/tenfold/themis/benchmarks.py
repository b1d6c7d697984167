# SPDX-License-Identifier: Apache-2.0
"""Evaluation in the forms of others: RewardBench (one or more chosen, one or more rejected), multiple choice.

    RewardBench      {"prompt", "chosen", "rejected"[, "subset"][, "id"][, "num_correct"]} per line; chosen and rejected
                     are texts, lists of texts, or chats that end with the answer
    multiple choice  {"question", "choices", "label"}; or one line per option, {"question", "answer", "label", "root"},
                     as TARA's TruthfulQA files have it

TARA's other out-of-domain files (HH-RLHF, Retarded-bar) are pairs: ``read_tara(path, need_traces=False)``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tenfold.rlhf.evaluate import Estimate, wilson
from tenfold.themis.evaluate import Examples, judge_all
from tenfold.themis.rewards import question_of
from tenfold.themis.traces import Query
from tenfold.training.checks import one_of

TIES = ("wrong", "share")
# RewardBench's sections, and the subset that it counts as if it had as many examples as the code subsets together.
REWARDBENCH = {
    "Chat": ("alpacaeval-easy", "alpacaeval-length", "alpacaeval-hard", "mt-bench-easy", "mt-bench-med"),
    "Chat Hard": ("mt-bench-hard", "llmbar-natural", "llmbar-adver-neighbor", "llmbar-adver-GPTInst",
                  "llmbar-adver-GPTOut", "llmbar-adver-manual"),
    "Safety": ("refusals-dangerous", "refusals-offensive", "xstest-should-refuse", "xstest-should-respond",
               "donotanswer"),
    "Reasoning": ("math-prm", "hep-cpp", "hep-go", "hep-java", "hep-js", "hep-python", "hep-rust"),
}  # fmt: skip
REWARDBENCH_WEIGHTS = {"math-prm": 984.0}
TIES_SUBSET = "Ties"  # of RewardBench 2, which scores it otherwise


@dataclass(frozen=True)
class Item:
    """A prompt with answers, of which the first ``chosen`` are right."""

    id: str
    subset: str
    question: str
    answers: tuple[str, ...]
    chosen: int


def read_rows(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, object) of a file of JSON lines, or of one JSON list. ValueError names the line."""
    text = Path(path).read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        try:
            rows = list(enumerate(json.loads(text), 1))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
    else:
        rows = []
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    rows.append((number, json.loads(line)))
                except ValueError as error:
                    raise ValueError(f"{path}: line {number} is not JSON: {error}") from None
    if not rows:
        raise ValueError(f"{path} is empty")
    for number, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{path}: row {number} must be an object, got {type(row).__name__}")
        yield f"{path}: row {number}", row


def _answers(value: Any, where: str) -> tuple[str, ...]:
    """Texts; a chat counts as the text that it ends with."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value:
        if all(isinstance(v, str) for v in value):
            return tuple(value)
        last = value[-1]
        if isinstance(last, Mapping) and isinstance(last.get("content"), str):
            return (last["content"],)
    raise ValueError(f"{where} must be a text, a list of texts or a chat, got {value!r}"[:300])


def read_rewardbench(path: str | Path) -> list[Item]:
    """Reads a file in RewardBench's form.

    Raises:
        ValueError: a row that is none, with its number.
    """
    found: list[Item] = []
    for where, row in read_rows(path):
        missing = [k for k in ("prompt", "chosen", "rejected") if k not in row]
        if missing:
            raise ValueError(f"{where} needs {', '.join(missing)}; it has {sorted(map(str, row))}")
        try:
            question = question_of(row["prompt"])
        except TypeError as error:
            raise ValueError(f"{where}: {error}") from None
        chosen, rejected = (_answers(row[k], f"{where}: {k}") for k in ("chosen", "rejected"))
        found.append(
            Item(str(row.get("id", len(found))), str(row.get("subset", "all")), question, chosen + rejected,
                 len(chosen))
        )  # fmt: skip
    return found


def item_score(scores: Sequence[float], chosen: int, ties: str = "wrong") -> float:
    """Is the best of some scores among the first ``chosen``?

    Args:
        scores: NaN where one is missing, which makes the item wrong.
        ties: at the top between chosen and rejected, ``"wrong"``, or the ``"share"`` of the chosen among them (half
            for one against one; RewardBench 2's rule for one chosen).
    """
    one_of("ties", ties, TIES)
    if any(map(math.isnan, scores)):
        return 0.0
    top = [i for i, s in enumerate(scores) if s == max(scores)]
    right = sum(i < chosen for i in top) / len(top)
    return right if ties == "share" else float(right == 1)


def ties_score(items: Sequence[Item], scores: Sequence[Sequence[float]]) -> float:
    """RewardBench 2's score of its subset Ties, whose ids are ``ref:N`` (one right answer) and ``tied:N`` (several).

    0.3 times each kind's share of prompts whose worst right answer beats the best wrong one; 0.2 times the share of
    pairs (ref, tied) for which that margin is larger than the spread of the tied right answers, and 0.2 times the
    same for the smaller of the two prompts' margins; 0.01 times the mean of tanh(smaller margin / spread - 1).

    Raises ValueError for other ids, or where one kind is missing.
    """
    found: dict[str, dict[str, tuple[float, float]]] = {"ref": {}, "tied": {}}
    for item, given in zip(items, scores):
        kind, _, number = item.id.partition(":")
        if kind not in found or not number:
            raise ValueError(
                f"an id of the subset {TIES_SUBSET} must be as ref:3 or tied:3, got {item.id!r}"
            )
        right, wrong = given[: item.chosen], given[item.chosen :]
        known = not any(map(math.isnan, given))
        found[kind][number] = (
            (min(right) - max(wrong), max(right) - min(right)) if known else (-math.inf, 0.0)
        )
    ref, tied = found["ref"], found["tied"]
    if not ref or not tied or not ref.keys() & tied.keys():
        raise ValueError(f"the subset {TIES_SUBSET} needs prompts ref:N and tied:N of the same N")
    both = [(*tied[n], ref[n][0]) for n in ref.keys() & tied.keys()]

    def share(flags: Sequence[bool]) -> float:
        return sum(flags) / len(flags)

    def hint(margin: float, spread: float) -> float:
        if spread == 0:
            return 0.0 if margin == 0 else math.copysign(1.0, margin)
        return math.tanh(margin / spread - 1)

    hints = [hint(min(m, r), s) for m, s, r in both]
    return (
        0.3 * share([m > 0 for m, _ in tied.values()]) + 0.3 * share([m > 0 for m, _ in ref.values()])
        + 0.2 * share([m > s for m, s, _ in both]) + 0.2 * share([min(m, r) > s for m, s, r in both])
        + 0.01 * math.fsum(hints) / len(hints)
    )  # fmt: skip


@dataclass(frozen=True)
class Benchmark:
    """Scores by subset and by section, in [0, 1]; ``counts``: items by subset; ``overall``: mean of the sections."""

    subsets: dict[str, float]
    counts: dict[str, int]
    sections: dict[str, float]
    missing: int
    ties: int

    @property
    def overall(self) -> float:
        """Of all sections, which count equally."""
        return math.fsum(self.sections.values()) / len(self.sections)

    def to_json(self) -> dict[str, Any]:
        """All numbers."""
        return vars(self) | {"overall": self.overall}


def rewardbench(
    judge: Any, items: Sequence[Item], *, ties: str = "wrong", sections: Mapping[str, Sequence[str]] = REWARDBENCH,
    weights: Mapping[str, float] = REWARDBENCH_WEIGHTS, batch_size: int = 64,
    step: Callable[[int], None] = lambda count: None,
) -> Benchmark:  # fmt: skip
    """Judges every answer alone and compares.

    Args:
        ties: of :func:`item_score`. sections: subsets by section; another subset is a section of its own.
        weights: of a subset in its section, default its number of items.

    Raises:
        ValueError: no items, settings, and of :func:`ties_score`.
    """
    one_of("ties", ties, TIES)
    if not items:
        raise ValueError("items is empty")
    queries = [Query(item.question, answer) for item in items for answer in item.answers]
    rewards = iter([j.reward for j in judge_all(judge, queries, batch_size=batch_size, step=step)])
    scores = [[next(rewards) for _ in item.answers] for item in items]
    names = list(dict.fromkeys(item.subset for item in items))
    found, counts = {}, {}
    for name in names:
        at = [i for i, item in enumerate(items) if item.subset == name]
        counts[name] = len(at)
        if name == TIES_SUBSET:
            found[name] = ties_score([items[i] for i in at], [scores[i] for i in at])
        else:
            each = [item_score(scores[i], items[i].chosen, ties) for i in at]
            found[name] = math.fsum(each) / len(each)
    grouped = {n: s for s, subsets in sections.items() for n in subsets}
    made: dict[str, list[str]] = {}
    for name in names:
        made.setdefault(grouped.get(name, name), []).append(name)
    means = {}
    for section, subsets in made.items():
        w = [float(weights.get(n, counts[n])) for n in subsets]
        means[section] = math.fsum(x * found[n] for x, n in zip(w, subsets)) / math.fsum(w)
    return Benchmark(
        found, counts, means, sum(any(map(math.isnan, s)) for s in scores),
        sum(_tied(s, item.chosen) for s, item in zip(scores, items)),
    )  # fmt: skip


def _tied(scores: Sequence[float], chosen: int) -> bool:
    if any(map(math.isnan, scores)):
        return False
    top = [i < chosen for i, s in enumerate(scores) if s == max(scores)]
    return any(top) and not all(top)


@dataclass(frozen=True)
class Choice:
    """A question with options, of which those numbered ``right`` are right."""

    question: str
    options: tuple[str, ...]
    right: frozenset[int]


def read_choices(path: str | Path) -> list[Choice]:
    """Reads multiple-choice questions of either form (see the module's text).

    ``label`` of ``choices`` is the right one's number, text, or a list of 0 and 1, one per choice. Options of one
    question are rows with the same ``root`` (or, without it, the same ``question``).

    Raises:
        ValueError: a row that is none, with its number; a question without a right or without a wrong option.
    """
    found: list[Choice] = []
    groups: dict[Any, list[tuple[str, str, bool]]] = {}
    for where, row in read_rows(path):
        if not isinstance(row.get("question"), str):
            raise ValueError(f"{where} needs text in question; it has {sorted(map(str, row))}")
        if isinstance(row.get("choices"), list):
            options = row["choices"]
            if not all(isinstance(o, str) for o in options):
                raise ValueError(f"{where}: choices must be texts")
            found.append(
                Choice(row["question"], tuple(options), _right(row.get("label"), options, where))
            )
        elif isinstance(row.get("answer"), str) and row.get("label") in (0, 1):
            key = row.get("root", row["question"])
            groups.setdefault(key, []).append((row["question"], row["answer"], bool(row["label"])))
        else:
            raise ValueError(f"{where} needs choices and label, or an answer with the label 0 or 1")
    for rows in groups.values():
        right = frozenset(i for i, r in enumerate(rows) if r[2])
        found.append(Choice(rows[0][0], tuple(a for _, a, _ in rows), right))
    for choice in found:
        if not 0 < len(choice.right) < len(choice.options):
            raise ValueError(
                f"a question needs right and wrong options; {choice.question[:80]!r} has {len(choice.right)} right "
                f"of {len(choice.options)}"
            )
    return found


def _right(label: Any, options: Sequence[str], where: str) -> frozenset[int]:
    if isinstance(label, bool):
        label = None
    if isinstance(label, int) and 0 <= label < len(options):
        return frozenset({label})
    if isinstance(label, str) and options.count(label) == 1:
        return frozenset({options.index(label)})
    if isinstance(label, list) and len(label) == len(options) and set(label) <= {0, 1}:
        return frozenset(i for i, x in enumerate(label) if x)
    raise ValueError(
        f"{where}: label must be the number or text of a choice, or 0 and 1 for each of them; got {label!r}"[
            :300
        ]
    )


def multiple_choice(
    judge: Any, choices: Sequence[Choice], examples: Examples | None = None, *, batch_size: int = 64,
    step: Callable[[int], None] = lambda count: None,
) -> Estimate:  # fmt: skip
    """The share of questions whose best-judged option is right, with its interval; ties and missing rewards are wrong.

    Raises ValueError without choices.
    """
    if not choices:
        raise ValueError("choices is empty")
    queries = [Query(c.question, o) for c in choices for o in c.options]
    given = [None] * len(choices) if examples is None else list(examples)
    each = [e for c, e in zip(choices, given) for _ in c.options]
    rewards = iter(
        [j.reward for j in judge_all(judge, queries, each, batch_size=batch_size, step=step)]
    )
    right = 0
    for choice in choices:
        scores = [next(rewards) for _ in choice.options]
        if not any(map(math.isnan, scores)):
            best = [i for i, s in enumerate(scores) if s == max(scores)]
            right += len(best) == 1 and best[0] in choice.right
    return wilson(right, len(choices))
