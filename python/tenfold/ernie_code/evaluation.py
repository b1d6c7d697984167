# SPDX-License-Identifier: Apache-2.0
"""Summaries, code, repairs and translations of held-out rows against their references; and ranking of candidates."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tenfold.ernie_code.generation import Row, generate, log_likelihoods
from tenfold.ernie_code.languages import name_of
from tenfold.ernie_code.metrics import TASKS, scores
from tenfold.training.checks import one_of


@dataclass
class Evaluation:
    """What was generated, and how it scores.

    Attributes:
        task: of ``TASKS``. scores: of all rows. by_pair: of each pair of languages. rows: source, target, languages and
            ``output`` of each.
    """

    task: str
    scores: dict[str, float]
    by_pair: dict[str, dict[str, float]] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)


def pair_of(row: Row) -> str:
    """``German-French``."""
    return f"{name_of(row['source_language'])}-{name_of(row['target_language'])}"


def evaluate(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    task: str,
    *,
    step: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> Evaluation:
    """Generates for all rows and scores what comes.

    Args:
        rows: with ``source``, ``target``, ``source_language``, ``target_language``: of any reader, as
            ``[dataclasses.asdict(p) for p in read_pairs(...)]``.
        task: ``summarise``, ``text-to-code``, ``repair`` or ``translate``: which scores (specification, section 5).
        options: of :func:`~tenfold.ernie_code.generate`.

    Raises ValueError for no rows, or another task.
    """
    one_of("task", task, tuple(TASKS))
    if not rows:
        raise ValueError("there are no rows to evaluate on")
    outputs = generate(model, tokenizer, rows, step=step, **options)
    groups: dict[str, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        groups[pair_of(row)].append(i)

    def scored(some: Sequence[int]) -> dict[str, float]:
        return scores([outputs[i] for i in some], [rows[i]["target"] for i in some], task)

    keep = ("source", "target", "source_language", "target_language")
    kept = [{k: r[k] for k in keep} | {"output": o} for r, o in zip(rows, outputs)]
    by_pair = {name: scored(some) | {"rows": float(len(some))} for name, some in groups.items()}
    return Evaluation(task, scored(range(len(rows))), by_pair, kept)


def with_distractors(
    rows: Sequence[Row], candidates: int = 16, seed: int = 0, pool: Sequence[Row] | None = None
) -> list[list[str]]:
    """For each row its target, first, and others' targets of the same pair of languages, no text twice.

    ``pool`` are the rows that others are taken from: default ``rows``. Raises ValueError where they are too few.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for row in rows if pool is None else pool:
        if row["target"] not in groups[pair_of(row)]:
            groups[pair_of(row)].append(row["target"])
    draw, made = random.Random(seed), []
    for row in rows:
        others = [t for t in groups[pair_of(row)] if t != row["target"]]
        if len(others) < candidates - 1:
            raise ValueError(
                f"{pair_of(row)} has {len(others) + 1} different targets; {candidates} candidates need as many"
            )
        made.append([row["target"], *draw.sample(others, candidates - 1)])
    return made


def ranking(
    model: Any, tokenizer: Any, rows: Sequence[Row], *, candidates: int = 16, seed: int = 0,
    pool: Sequence[Row] | None = None, **options: Any,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """How often the right target is the likeliest of several, by pair of languages, and over ``all`` rows.

    Args:
        candidates, seed, pool: for each row, the right one among others (chance 1 / candidates):
            :func:`with_distractors`.
        options: of :func:`~tenfold.ernie_code.log_likelihoods`.

    Returns:
        ``{"German-French": {"top1": share, "mrr": mean of 1 / rank, "rows": n}, ..., "all": ...}``. A tie is wrong.
    """
    others = with_distractors(rows, candidates, seed, pool)
    found = log_likelihoods(model, tokenizer, rows, others, **options)
    rank = 1 + (found[:, 1:] >= found[:, :1]).sum(1)
    groups: dict[str, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        groups[pair_of(row)].append(int(rank[i]))
    groups["all"] = rank.tolist()
    return {
        name: {"top1": sum(r == 1 for r in own) / len(own), "mrr": sum(1 / r for r in own) / len(own),
               "rows": float(len(own))}
        for name, own in groups.items()
    }  # fmt: skip
