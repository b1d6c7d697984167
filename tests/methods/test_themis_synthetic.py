# SPDX-License-Identifier: Apache-2.0
"""Pairs made by rules: true traces, no cue but the value, parts that share no question."""

import functools
import random
import re
import sys

import pytest

from tenfold.data.models import MissingData
from tenfold.themis import synthetic, synthetic_texts
from tenfold.themis.collate import encode_pairs
from tenfold.themis.data import Candidate, read_tara, write_tara
from tenfold.themis.synthetic import (
    KINDS,
    Draft,
    Judged,
    part_of,
    synthetic_mixture,
    synthetic_pairs,
    synthetic_tools,
)
from tenfold.themis.synthetic_code import _TASKS, _run
from tenfold.themis.tokens import byte_tokenizer
from tenfold.themis.tools import Calculator
from tenfold.themis.traces import NO_TOOL, Trace, TraceFormat

COUNT = {"code": 2, "none": 6, "search": 10}
CALLS = {"multi": 2, "none": 0}


kinds = pytest.mark.parametrize("kind", KINDS)


@functools.cache
def tools():
    """By name; not made at import, since reading the texts that are searched takes seconds."""
    return {name: tool for tool in synthetic_tools() for name in tool.names}


def make(kind, count=None, seed=0, **options):
    return synthetic_pairs(kind, count or COUNT.get(kind, 30), seed, **options)


def shape(text):
    """Numbers and names of days left out."""
    return re.sub(r"\w+day\b", "D", re.sub(r"(?<= is )-?[\d.]*\d|[\d.]*\d", "N", text))


def facts(question):
    return shape(question)[0] + " ".join(re.findall(r"[\d-]+", question))


@kinds
def test_pairs(kind, tmp_path):
    pairs = make(kind)
    assert (
        len(pairs)
        == COUNT.get(kind, 30)
        == len({p.question for p in pairs})
        == len({p.id for p in pairs})
    )
    form = TraceFormat(byte_tokenizer(), max_length=None)
    assert len(encode_pairs(pairs, form)) == len(pairs)
    rows = [row for pair in pairs for row in pair.rows()]
    assert [form.parse(made.ids) for made in form.assemble_all(rows)] == rows
    for pair in pairs:
        assert pair.source == kind and pair.chosen.score > pair.rejected.score
        for side in (pair.chosen, pair.rejected):
            trace = side.trace
            assert len(trace.steps) == CALLS.get(kind, 1)
            assert trace.closing == (NO_TOOL if kind == "none" else None)
            good = side is pair.chosen
            assert bool(re.search(r"not (correct|good)|does not do", trace.rationale)) != good
            for step in trace.steps if kind != "code" or pair is pairs[0] else ():
                # Traces are true: the tools say so again.
                example = pair.example(side.answer)
                assert (
                    tools()[step.tool].call(step.tool, step.arguments, example) == step.observation
                )
    write_tara(pairs, tmp_path / "x.jsonl")
    assert read_tara(tmp_path / "x.jsonl") == pairs


@kinds
def test_function_of_the_arguments(kind):
    if kind == "code":  # two runs of the sandbox are enough above
        return
    first = make(kind, 5)
    assert make(kind, 5) == first == make(kind, 6)[:5]
    assert [p.question for p in make(kind, 5, 1)] != [p.question for p in first]


@kinds
def test_parts_share_no_question(kind, monkeypatch):
    def no_tools(draft, right, name, tools):
        return Candidate(draft.good if right else draft.bad, Trace(), 1.0 if right else -1.0)

    monkeypatch.setattr(synthetic, "_judged", no_tools)
    train = [p for seed in range(3) for p in make(kind, 40, seed)]
    test = [p for seed in range(3) for p in make(kind, 20, seed, split="test")]
    asked = [{(p.question, p.context) for p in part} for part in (train, test)]
    assert asked[0] and asked[1] and not asked[0] & asked[1]
    if kind == "calendar":  # nor another wording of one
        days = [{facts(p.question) for p in x} for x in (train, test)]
        assert not days[0] & days[1]


def test_shares_of_the_parts():
    names = [part_of(f"question {i}") for i in range(4000)]
    assert 850 < names.count("test") < 1150


@pytest.mark.parametrize("kind", ["calendar", "weather", "multi", "calculator"])
def test_answers_differ_in_their_values_alone(kind):
    larger = total = 0
    for pair in make(kind, 150):
        good, bad = pair.chosen.answer, pair.rejected.answer
        assert good != bad
        if "overall weather" not in good:
            assert shape(good) == shape(bad)
        a, b = (
            [float(n) for n in re.findall(r"(?<= is )-?\d+\.?\d*|\d+\.?\d*", x)]
            for x in (good, bad)
        )
        differ = [(x, y) for x, y in zip(a, b) if x != y]
        if differ:
            larger, total = larger + (differ[-1][1] > differ[-1][0]), total + 1
    assert total > 80 and 0.36 < larger / total < 0.64  # neither is the larger one more often


def test_every_kind_of_wrong_calculation():
    tool = Calculator()
    found = set()
    for pair in make("calculator", 60):
        (step,) = pair.chosen.trace.steps
        assert tool.check(step.arguments, pair.chosen.answer).case == "right"
        (step,) = pair.rejected.trace.steps
        found.add(tool.check(step.arguments, pair.rejected.answer).case)
    assert found == {"differs", "matches", "wrong"}


def test_kinds_of_calendar_questions_and_contexts():
    tools = {s.tool for p in make("calendar") for s in p.chosen.trace.steps}
    assert tools == {"Calendar.week_day", "Calendar.target_day", "Calendar.day_difference"}
    contexts = [p.context for p in make("translator")]
    assert None in contexts and any(contexts)
    for pair in make("translator"):
        if pair.context:
            assert pair.chosen.answer in pair.context and pair.rejected.answer in pair.context


def test_code_tells_programs_apart():
    for pair in make("code"):
        assert len(pair.extra["test_list"]) == 3 and pair.chosen.score == 1.0
        assert pair.rejected.score in (
            pytest.approx(-1),
            pytest.approx(-1 / 3),
            pytest.approx(1 / 3),
        )
        assert "All tests passed" in pair.chosen.trace.steps[0].observation


def test_every_slip_makes_a_pair():
    """No program and no slip of the table is dead text: tests can tell them apart."""

    def told_apart(task, what, instead, seed):
        draw = random.Random(seed)
        k = draw.randint(2, 9)
        right, wrong = (
            t.format(f="f", k=k) for t in (task.right, task.right.replace(what, instead))
        )
        value = task.inputs(draw)
        return _run(right, "f", value) != _run(wrong, "f", value)

    for task in _TASKS:
        for what, instead in task.slips:
            assert task.right.count(what) == 1
            assert any(told_apart(task, what, instead, seed) for seed in range(60)), (
                task.name,
                instead,
            )


def test_mixture():
    counts = {"calculator": 20, "calendar": 10, "weather": 5}
    made = synthetic_mixture(counts, 3)
    assert {k: sum(p.source == k for p in made) for k in counts} == counts
    assert [p.source for p in made] != sorted(p.source for p in made)
    assert made == synthetic_mixture(counts, 3) != synthetic_mixture(counts, 4)


def test_bad_input(monkeypatch):
    with pytest.raises(ValueError, match=r"kind must be one of calculator, calendar, .*got 'x'"):
        synthetic_pairs("x", 1)
    with pytest.raises(ValueError, match="split must be one of train, test, got 'x'"):
        synthetic_pairs("calendar", 1, split="x")
    with pytest.raises(ValueError, match="count must be >= 0, got -1"):
        synthetic_pairs("calendar", -1)
    assert synthetic_pairs("calendar", 0) == []
    one = Draft("always the same", "a", "b", lambda call, answer, right: Judged("r"))
    monkeypatch.setattr(synthetic, "_maker", lambda kind, split: lambda draw: one)
    part = part_of(one.question)
    with pytest.raises(
        ValueError, match=f"only 1 of 3 pairs of 'calendar' were found for the {part} part"
    ):
        synthetic_pairs("calendar", 3, split=part)


def test_catalogues_are_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "django", None)
    synthetic_texts._translated.cache_clear()
    try:
        with pytest.raises((MissingData, ValueError), match="django"):
            synthetic_pairs("translator", 1)
    finally:
        synthetic_texts._translated.cache_clear()
