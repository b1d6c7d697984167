# SPDX-License-Identifier: Apache-2.0
"""How well a judge ranks pairs: accuracy by tool, what its calls did, how its traces end, calibration, best of n.

A tie or a missing reward counts as wrong (spec section 5). Judges are scorers, here or elsewhere, tool loops, reward
models without tools (:class:`PlainJudge`), or functions of queries that give numbers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from tenfold.rlhf.best_of import BestOfN
from tenfold.rlhf.evaluate import Estimate, wilson
from tenfold.themis.calibration import Calibration, calibration
from tenfold.themis.data import Pair
from tenfold.themis.judgement import CallRecord, Judgement
from tenfold.themis.traces import Query, Trace

Examples = Sequence[Mapping[str, Any] | None]


class PlainJudge:
    """A reward model that reads question and answer alone, as a judge.

    Args:
        model: a ``ThemisRewardModel``; put into eval mode. format: of its rows.
    """

    def __init__(self, model: Any, format: Any, batch_size: int = 16) -> None:
        self.model, self.format, self.batch_size = model.eval(), format, batch_size

    @torch.inference_mode()
    def judge(
        self, queries: Sequence[Query], examples: Examples | None = None, *, deadlines: Any = None, seed: int = 0
    ) -> list[Judgement]:  # fmt: skip
        """Judgements without a trace."""
        rows = [self.format.plain(q) for q in queries]
        made: list[Judgement] = []
        device = next(self.model.parameters()).device
        for at in range(0, len(rows), self.batch_size):
            part = rows[at : at + self.batch_size]
            ids = torch.zeros(len(part), max(map(len, part)), dtype=torch.int64)
            mask = torch.zeros(ids.shape, dtype=torch.bool)
            for i, row in enumerate(part):
                ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), True
            rewards = self.model.reward(ids.to(device), mask.to(device)).float().tolist()
            made += [
                Judgement(reward, row, self.format.decode(row), Trace(), (), "no_rationale", len(row), 0)
                for reward, row in zip(rewards, part)
            ]  # fmt: skip
        return made


def judge_all(
    judge: Any, queries: Sequence[Query], examples: Examples | None = None, *, batch_size: int = 64,
    step: Callable[[int], None] = lambda count: None,
) -> list[Judgement]:  # fmt: skip
    """Judgements of all queries, in their order.

    Args:
        judge: has ``score_many`` (scorers) or ``judge`` (tool loops), or is a function of queries that gives numbers
            or judgements. batch_size: queries handed over at a time, those of like length together.
        step: told after each batch how many it was.

    Raises:
        TypeError: no judge. ValueError: it gives another number of judgements.
    """
    examples = [None] * len(queries) if examples is None else list(examples)
    ask: Callable[[Sequence[Query], Examples], Sequence[Any]]
    if callable(getattr(judge, "score_many", None)):
        ask = judge.score_many
    elif callable(getattr(judge, "judge", None)):
        ask = judge.judge
    elif callable(judge):

        def ask(queries: Sequence[Query], examples: Examples) -> Sequence[Any]:
            return judge(queries)

    else:
        raise TypeError(
            f"judge must be a scorer, a tool loop or a function of queries, got {type(judge).__name__}"
        )
    order = sorted(range(len(queries)), key=lambda i: len(queries[i].question) + len(queries[i].answer)
                   + len(queries[i].context or ""))  # fmt: skip
    made: dict[int, Judgement] = {}
    for at in range(0, len(order), batch_size):
        part = order[at : at + batch_size]
        found = ask([queries[i] for i in part], [examples[i] for i in part])
        if len(found) != len(part):
            raise ValueError(f"the judge gave {len(found)} judgements of {len(part)} answers")
        made |= {i: _judgement(f) for i, f in zip(part, found)}
        step(len(part))
    return [made[i] for i in range(len(queries))]


def _judgement(found: Any) -> Judgement:
    if isinstance(found, Judgement):
        return found
    reward = math.nan if found is None else float(found)
    return Judgement(reward, [], "", Trace(), (), "no_rationale", 0, 0)


@dataclass(frozen=True)
class Accuracy:
    """Of some pairs: ``right`` of ``count``; ``ties`` and ``missing`` are among the wrong ones. ``estimate`` has
    Wilson's interval."""

    count: int
    right: int
    ties: int
    missing: int

    @property
    def estimate(self) -> Estimate:
        """The share that is right."""
        return wilson(self.right, self.count)

    @classmethod
    def of(cls, differences: Iterable[float]) -> Accuracy:
        """Of differences reward(preferred) - reward(other), NaN where one is missing."""
        found = list(differences)
        return cls(
            len(found), sum(d > 0 for d in found), found.count(0.0), sum(map(math.isnan, found))
        )


@dataclass(frozen=True)
class Calls:
    """Calls of a tool: how many, by status, how many from the cache, mean seconds."""

    count: int
    status: dict[str, int]
    cached: int
    seconds: float

    @classmethod
    def of(cls, calls: Sequence[CallRecord]) -> Calls:
        """Of some calls."""
        mean = math.fsum(c.seconds for c in calls) / len(calls) if calls else math.nan
        return cls(
            len(calls), dict(Counter(c.status for c in calls)), sum(c.cached for c in calls), mean
        )


@dataclass(frozen=True)
class Judged:
    """One pair: its id and source, both judgements, and the tools that its own traces call."""

    id: str
    source: str
    chosen: Judgement
    rejected: Judgement
    expected: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())

    @property
    def difference(self) -> float:
        """reward(chosen) - reward(rejected), NaN where one is missing."""
        pair = self.chosen.reward, self.rejected.reward
        return pair[0] - pair[1] if all(map(math.isfinite, pair)) else math.nan


@dataclass(frozen=True)
class Evaluation:
    """What a judge did on pairs. ``swapped``: share of pairs whose order was the same when they were judged again."""

    pairs: tuple[Judged, ...]
    swapped: float | None = None
    name: str = ""
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def judgements(self) -> list[Judgement]:
        """Two of each pair."""
        return [j for p in self.pairs for j in (p.chosen, p.rejected)]

    def accuracy(self) -> dict[str, Accuracy]:
        """By source, in alphabetical order, and of ``"all"`` pairs (micro average)."""
        sources = sorted({p.source for p in self.pairs})
        parts = {s: [p.difference for p in self.pairs if p.source == s] for s in sources}
        found = {s: Accuracy.of(d) for s, d in parts.items()}
        return found | {"all": Accuracy.of(p.difference for p in self.pairs)}

    def calibration(self, bins: int = 10) -> Calibration | None:
        """None where no pair has both rewards."""
        differences = [p.difference for p in self.pairs]
        return None if all(map(math.isnan, differences)) else calibration(differences, bins)

    def calls(self) -> dict[str, Calls]:
        """By tool name as written, the most frequent first."""
        made = [c for j in self.judgements for c in j.calls]
        names = Counter(c.tool for c in made)
        return {n: Calls.of([c for c in made if c.tool == n]) for n, _ in names.most_common()}

    def finishes(self) -> dict[str, int]:
        """How many traces ended for which reason."""
        return dict(Counter(j.finish for j in self.judgements).most_common())

    def call_agreement(self) -> float:
        """Share of traces that call the tools that the data's own traces call, in their order; NaN without pairs."""
        both = [(tuple(c.tool for c in j.calls), e) for p in self.pairs
                for j, e in zip((p.chosen, p.rejected), p.expected)]  # fmt: skip
        return sum(a == b for a, b in both) / len(both) if both else math.nan

    def call_rate(self) -> tuple[float, float]:
        """Calls per trace, and those of the data's own traces; NaN without pairs."""
        size = 2 * len(self.pairs)
        made = sum(len(j.calls) for j in self.judgements)
        expected = sum(len(e) for p in self.pairs for e in p.expected)
        return (made / size, expected / size) if size else (math.nan, math.nan)

    def samples(self) -> list[dict[str, Any]]:
        """The first pair of every source: both texts with their traces."""
        first = {p.source: p for p in reversed(self.pairs)}
        return [{"id": p.id, "source": p.source, "preferred": side == "chosen", "text": j.text,
                 "reward": _rounded(j), "finish": j.finish} for _, p in sorted(first.items())
                for side, j in (("chosen", p.chosen), ("rejected", p.rejected))]  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """Numbers, of every pair rewards and finish reasons, and a sample of every source."""
        found = self.calibration()
        rates = self.call_rate()
        return {
            "name": self.name, "notes": self.notes,
            "accuracy": {s: asdict(a) | asdict(a.estimate) for s, a in self.accuracy().items() if a.count},
            "calibration": None if found is None else found.to_json(), "swapped": self.swapped,
            "calls": {n: asdict(c) for n, c in self.calls().items()}, "finish": self.finishes(),
            "calls_per_trace": rates[0], "expected_calls_per_trace": rates[1],
            "call_agreement": self.call_agreement(),
            "new_tokens": math.fsum(j.new_tokens for j in self.judgements) / max(1, 2 * len(self.pairs)),
            "samples": self.samples(),
            "pairs": [{"id": p.id, "source": p.source, "rewards": [_rounded(p.chosen), _rounded(p.rejected)],
                       "finish": [p.chosen.finish, p.rejected.finish]} for p in self.pairs],
        }  # fmt: skip


def _rounded(found: Judgement) -> float | None:
    return round(found.reward, 6) if math.isfinite(found.reward) else None


def evaluate(
    judge: Any, pairs: Sequence[Pair], *, batch_size: int = 64, swap: bool = False, name: str = "",
    step: Callable[[int], None] = lambda count: None,
) -> Evaluation:  # fmt: skip
    """Lets a judge judge both answers of every pair.

    Args:
        judge, batch_size, step: of :func:`judge_all`.
        swap: judge all of it again, each pair's answers and all pairs in reverse order: a judge of single answers
            must come to the same, whatever stands beside them in a batch.

    Raises:
        ValueError: no pairs, or what :func:`judge_all` raises.
    """
    if not pairs:
        raise ValueError("pairs is empty")
    both = [(p, c.answer) for p in pairs for c in (p.chosen, p.rejected)]
    queries = [Query(p.question, answer, p.context) for p, answer in both]
    examples: Examples = [p.example(answer) for p, answer in both]
    found = judge_all(judge, queries, examples, batch_size=batch_size, step=step)
    judged = tuple(
        Judged(p.id, p.source, found[2 * i], found[2 * i + 1], tuple(
            tuple(s.tool for s in c.trace.steps) for c in (p.chosen, p.rejected)))  # type: ignore[arg-type]
        for i, p in enumerate(pairs)
    )  # fmt: skip
    swapped = None
    if swap:
        again = judge_all(judge, queries[::-1], examples[::-1], batch_size=batch_size, step=step)[
            ::-1
        ]
        second = [
            Judged("", "", again[2 * i], again[2 * i + 1]).difference for i in range(len(pairs))
        ]
        swapped = sum(_sign(p.difference) == _sign(d) for p, d in zip(judged, second)) / len(pairs)
    return Evaluation(judged, swapped, name)


def _sign(x: float) -> int | None:
    return None if math.isnan(x) else (x > 0) - (x < 0)


def best_of_n(
    judge: Any, prompts: Sequence[str], answers: Sequence[Sequence[str]], examples: Examples | None = None, *,
    batch_size: int = 64, step: Callable[[int], None] = lambda count: None,
) -> BestOfN:  # fmt: skip
    """Scores n answers to each prompt; ``best()`` and ``curve()`` of what it gives say which is best, and how good.

    An answer without a reward gets the lowest that its prompt's answers got, and so is never preferred.

    Args:
        answers: [P][n], as many for all prompts. examples: what tools may read, one per prompt.

    Raises:
        ValueError: lengths; a prompt none of whose answers got a reward.
    """
    sizes = {len(row) for row in answers}
    if len(prompts) != len(answers) or len(sizes) != 1 or 0 in sizes:
        raise ValueError(
            f"answers must be equally many for each of {len(prompts)} prompts, got {len(answers)} rows of "
            f"{sorted(sizes)}"
        )
    (n,) = sizes
    given = [None] * len(prompts) if examples is None else list(examples)
    queries = [Query(p, a) for p, row in zip(prompts, answers) for a in row]
    found = judge_all(
        judge, queries, [e for e in given for _ in range(n)], batch_size=batch_size, step=step
    )
    scores = torch.tensor([j.reward for j in found]).view(len(prompts), n)
    there = scores.isfinite()
    empty = (~there.any(1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"no answer to prompt {empty[0]} got a reward ({found[n * empty[0]].finish})"
        )
    lowest = scores.masked_fill(~there, math.inf).amin(1, keepdim=True)
    return BestOfN(
        list(prompts), [list(row) for row in answers], torch.where(there, scores, lowest)
    )
