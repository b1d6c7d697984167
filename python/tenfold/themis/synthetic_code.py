# SPDX-License-Identifier: Apache-2.0
"""Drafts of small functions: a right program, a subtly wrong one, and asserts that tell them apart."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tenfold.themis.synthetic import Draft, Judged, Recorder, Useless

_TESTS = 3


@dataclass(frozen=True)
class Task:
    """``right`` with ``slips`` (what, instead of what) in it; ``{k}`` is a number, ``{f}`` the function's name."""

    name: str
    text: str
    right: str
    slips: tuple[tuple[str, str], ...]
    inputs: Callable[[random.Random], tuple[Any, ...]]


def _numbers(
    low: int = -20, high: int = 40, most: int = 9
) -> Callable[[random.Random], tuple[Any, ...]]:
    return lambda draw: ([draw.randint(low, high) for _ in range(draw.randint(3, most))],)


def _number(low: int, high: int) -> Callable[[random.Random], tuple[Any, ...]]:
    return lambda draw: (draw.randint(low, high),)


def _words(draw: random.Random) -> tuple[Any, ...]:
    vocabulary = (
        "apple",
        "level",
        "noon",
        "tree",
        "banana",
        "queue",
        "radar",
        "sky",
        "oboe",
        "stats",
        "ant",
        "river",
    )
    return (" ".join(draw.choices(vocabulary, k=draw.randint(3, 7))),)


_TASKS = (
    Task(
        "count_multiples",
        "counts the numbers of a list that {k} divides",
        "def {f}(xs):\n    return sum(1 for x in xs if x % {k} == 0)",
        (("== 0", "== 1"), ("sum(1 for x", "sum(x for x"), ("% {k} ==", "// {k} ==")),
        _numbers(),
    ),
    Task(
        "sum_of_powers",
        "adds up the numbers from 1 to n, each to the power of {k}",
        "def {f}(n):\n    return sum(i ** {k} for i in range(1, n + 1))",
        (("n + 1)", "n)"), ("i ** {k}", "i * {k}"), ("range(1,", "range(2,")),
        _number(3, 12),
    ),
    Task(
        "largest_above",
        "returns the largest number of a list that is below {k}0, or None if there is none",
        "def {f}(xs):\n    below = [x for x in xs if x < {k}0]\n    return max(below) if below else None",
        (("max(below)", "min(below)"), ("x < {k}0", "x <= {k}0 + 5"), ("max(below)", "below[-1]")),
        _numbers(0, 130),
    ),
    Task(
        "digit_sum",
        "returns the sum of the digits of n, times {k}",
        "def {f}(n):\n    return {k} * sum(int(c) for c in str(n))",
        (
            ("sum(int(c) for c in str(n))", "sum(int(c) for c in str(n)[1:])"),
            ("{k} * sum", "{k} + sum"),
            ("sum(int(c) for c in str(n))", "len(str(n))"),
        ),
        _number(100, 99999),
    ),
    Task(
        "rotate",
        "moves the elements of a list {k} places to the left, those at the front to the end",
        "def {f}(xs):\n    at = {k} % len(xs)\n    return xs[at:] + xs[:at]",
        (
            ("xs[at:] + xs[:at]", "xs[-at:] + xs[:-at]"),
            ("{k} % len(xs)", "({k} + 1) % len(xs)"),
            ("+ xs[:at]", "+ xs[:at][::-1]"),
        ),
        _numbers(),
    ),
    Task(
        "every_nth",
        "returns every element of a list whose place, counted from 1, is a multiple of {k}",
        "def {f}(xs):\n    return [x for i, x in enumerate(xs, 1) if i % {k} == 0]",
        (("enumerate(xs, 1)", "enumerate(xs)"), ("== 0", "!= 0"), ("i % {k}", "x % {k}")),
        _numbers(most=14),
    ),
    Task(
        "long_words",
        "returns the words of a text that have more than {k} letters, in order",
        "def {f}(text):\n    return [w for w in text.split() if len(w) > {k}]",
        (("> {k}", ">= {k}"), ("text.split()", "sorted(text.split())"), ("> {k}", "< {k}")),
        _words,
    ),
    Task(
        "clip",
        "limits every number of a list to at least -{k} and at most {k}",
        "def {f}(xs):\n    return [max(-{k}, min({k}, x)) for x in xs]",
        (
            ("max(-{k}, min({k}, x))", "min({k}, x)"),
            ("max(-{k},", "max(0,"),
            ("min({k}, x)", "min({k} + 1, x)"),
        ),
        _numbers(),
    ),
    Task(
        "running",
        "returns the sums of every {k} neighbouring numbers of a list",
        "def {f}(xs):\n    return [sum(xs[i:i + {k}]) for i in range(len(xs) - {k} + 1)]",
        (("- {k} + 1)", "- {k})"), ("sum(", "max("), ("i:i + {k}]", "i:i + {k} - 1]")),
        _numbers(most=14),
    ),
    Task(
        "collatz",
        "counts the steps until n becomes 1, and stops at {k}00: an even n is halved, an odd one becomes 3n + 1",
        "def {f}(n):\n    steps = 0\n    while n != 1 and steps < {k}00:\n"
        "        n = n // 2 if n % 2 == 0 else 3 * n + 1\n"
        "        steps += 1\n    return steps",
        (("steps = 0", "steps = 1"), ("3 * n + 1", "3 * n - 1"), ("n % 2 == 0", "n % 2 == 1")),
        _number(5, 90),
    ),
    Task(
        "distinct",
        "returns the numbers of a list modulo {k}, each once, smallest first",
        "def {f}(xs):\n    return sorted({{x % {k} for x in xs}})",
        (
            ("sorted({{x % {k} for x in xs}})", "sorted(x % {k} for x in xs)"),
            ("% {k}", "// {k}"),
            ("for x in xs}})", "for x in xs[1:]}})"),
        ),
        _numbers(0, 60),
    ),
    Task(
        "pairs_with_sum",
        "counts the pairs of places i < j of a list whose numbers add up to {k}",
        "def {f}(xs):\n    n = len(xs)\n"
        "    return sum(xs[i] + xs[j] == {k} for i in range(n) for j in range(i + 1, n))",
        (
            ("range(i + 1, n)", "range(i, n)"),
            ("range(i + 1, n)", "range(n)"),
            ("+ xs[j] ==", "+ xs[j] <="),
        ),
        _numbers(0, 12, 12),
    ),
    Task(
        "vowels",
        "counts the vowels a, e, i, o, u of a text and adds {k}",
        "def {f}(text):\n    return sum(c in 'aeiou' for c in text) + {k}",
        (("'aeiou'", "'aeio'"), ("'aeiou'", "'aeiouy'"), ("for c in text)", "for c in text[:-1])")),
        _words,
    ),
    Task(
        "base",
        "writes n in base {k} as a list of digits, the highest first",
        "def {f}(n):\n    digits = []\n    while n:\n        digits.append(n % {k})\n        n //= {k}\n"
        "    return digits[::-1]",
        (("digits[::-1]", "digits"), ("while n:", "while n > 1:"), ("n % {k}", "(n + 1) % {k}")),
        _number(20, 5000),
    ),
)


def _run(source: str, name: str, values: tuple[Any, ...]) -> str | None:
    """``repr`` of what one of the functions above returns; None if it raises. They are this module's own text."""
    space: dict[str, Any] = {}
    try:
        exec(source, space)
        return repr(space[name](*values))
    except Exception:
        return None


def code(draw: random.Random) -> Draft:
    """A task, a right function and one with a slip, and three asserts of which the slip fails at least one."""
    task = draw.choice(_TASKS)
    what, instead = draw.choice(task.slips)
    if task.right.count(what) != 1:
        raise AssertionError(f"{task.name}: {what!r} must be in the program once")
    name, k = f"{task.name}_{draw.randint(2, 99)}", draw.randint(2, 16)
    right, wrong = (t.format(f=name, k=k) for t in (task.right, task.right.replace(what, instead)))
    calls = [task.inputs(draw) for _ in range(_TESTS)]
    results = [(_run(right, name, c), _run(wrong, name, c)) for c in calls]
    if any(r is None for r, _ in results) or all(r == w for r, w in results):
        raise Useless("the tests do not tell the programs apart")
    tests = [
        f"assert {name}({', '.join(map(repr, c))}) == {r}" for c, (r, _) in zip(calls, results)
    ]

    def judge(call: Recorder, answer: str, is_right: bool) -> Judged:
        said = call("I need to run the code on its tests.", "code_run", "The answer itself")
        rate = passed(said) / _TESTS
        verdict = "does what is asked for" if rate == 1 else "does not do what is asked for"
        return Judged(f"The tests say: {said} So the function {verdict}.", score=2 * rate - 1)

    question = (
        f"Write a Python function {name} that {task.text.format(k=k)}. For example: {tests[0]}"
    )
    return Draft(question, right, wrong, judge, extra={"test_list": tests}, asks=f"{task.name} {k}")


def passed(observation: str) -> int:
    """How many of the tests passed, from an observation of ``code_run``. Useless: it does not say."""
    if "All tests passed" in observation:
        return _TESTS
    if "None of" in observation:
        return 0
    found = re.search(r"(\d+) of \d+ tests passed", observation)
    if found is None:
        raise Useless(observation)
    return int(found[1])
