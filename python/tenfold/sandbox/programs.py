# SPDX-License-Identifier: Apache-2.0
"""Programs as answers: tests in the usual forms, and what a program does on them, in :mod:`tenfold.sandbox`."""

from __future__ import annotations

import json
import math
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tenfold.sandbox.host import Run, Sandbox
from tenfold.training.checks import not_negative

OUTCOMES = ("pass", "fail", "raised", "timeout", "output", "syntax")


@dataclass(frozen=True)
class StdioTest:
    """The program reads ``stdin`` and must print ``stdout`` (white space at line ends and at both ends aside)."""

    stdin: str
    stdout: str


@dataclass(frozen=True)
class CallTest:
    """``function(*arguments)`` must equal one of ``accepted``, as JSON: what is right stays out of the sandbox."""

    function: str
    arguments: tuple[Any, ...]
    accepted: tuple[Any, ...]


@dataclass(frozen=True)
class AssertTest:
    """Statements that run after the program, in its namespace; an AssertionError of theirs is a failure."""

    code: str


Test = StdioTest | CallTest | AssertTest


def _text(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _apps(value: Mapping[str, Any]) -> list[Test]:
    inputs, outputs = value["inputs"], value["outputs"]
    if len(inputs) != len(outputs):
        raise ValueError(f"tests: {len(inputs)} inputs, but {len(outputs)} outputs")
    name = value.get("fn_name")
    if name is None:
        return [StdioTest(_text(i), _text(o)) for i, o in zip(inputs, outputs)]
    # APPS wraps some expected values in a list of one, and does not say which.
    return [
        CallTest(name, tuple(i), (o, o[0]) if isinstance(o, list) and len(o) == 1 else (o,))
        for i, o in zip(inputs, outputs)
    ]


def parse_tests(value: Any) -> list[Test]:
    """Tests in any of the usual forms.

    Args:
        value: tests; APPS's ``{"inputs", "outputs"}``, with ``fn_name`` for calls; a list of
            ``{"input", "output"}``; of ``assert`` statements (MBPP, HumanEval); or one of these as JSON text.

    Raises:
        ValueError: another form, or no test at all. TypeError: another type.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = [value]
    if isinstance(value, Mapping):
        if not {"inputs", "outputs"} <= set(value):
            raise ValueError(
                f"tests: a dict needs inputs and outputs, got {', '.join(map(str, value))}"
            )
        value = _apps(value)
    if not isinstance(value, Sequence):
        raise TypeError(f"tests must be a list, a dict or JSON text, got {type(value).__name__}")
    found: list[Test] = []
    for i, item in enumerate(value):
        if isinstance(item, StdioTest | CallTest | AssertTest):
            found.append(item)
        elif isinstance(item, str):
            found.append(AssertTest(item))
        elif isinstance(item, Mapping) and {"input", "output"} <= set(item):
            found.append(StdioTest(_text(item["input"]), _text(item["output"])))
        else:
            raise ValueError(
                f"tests: number {i} must be a test, an assert statement or a dict with input and output, "
                f"got {item!r}"[:500]
            )
    if not found:
        raise ValueError("tests: there are none, and a program without tests has no reward")
    return found


def extract_code(text: str) -> str:
    """The last fenced block of Python (or of no language) in a completion; all of it if there is no fence."""
    blocks = re.findall(
        r"^```(?:python3?|py)?[ \t]*\n(.*?)(?:^```|\Z)", text, re.MULTILINE | re.DOTALL
    )
    return blocks[-1] if blocks else text


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


def same_output(got: str, want: str, tolerance: float = 0.0) -> bool:
    """Do two outputs agree? With a tolerance, numbers may differ by so much, absolutely or relatively."""
    a, b = _lines(got), _lines(want)
    if a == b or tolerance == 0:
        return a == b
    words = [[word for line in lines for word in line.split()] for lines in (a, b)]
    return len(words[0]) == len(words[1]) and all(map(_close(tolerance), *words))


def _close(tolerance: float) -> Any:
    def close(a: str, b: str) -> bool:
        if a == b:
            return True
        try:
            return math.isclose(float(a), float(b), rel_tol=tolerance, abs_tol=tolerance)
        except ValueError:
            return False

    return close


def _same_value(got: Any, want: Any, tolerance: float) -> bool:
    if isinstance(got, list) and isinstance(want, list):
        return len(got) == len(want) and all(
            _same_value(a, b, tolerance) for a, b in zip(got, want)
        )
    if isinstance(got, dict) and isinstance(want, dict):
        return got.keys() == want.keys() and all(
            _same_value(got[k], want[k], tolerance) for k in got
        )
    if tolerance and isinstance(got, int | float) and isinstance(want, int | float):
        return math.isclose(got, want, rel_tol=tolerance, abs_tol=tolerance)
    return bool(got == want)


@dataclass(frozen=True)
class ProgramResult:
    """What a program did on its tests: an outcome of ``OUTCOMES`` and an error text for each.

    A program that does not compile has one outcome, ``syntax``.
    """

    outcomes: tuple[str, ...]
    errors: tuple[str, ...]
    seconds: float = 0.0

    @property
    def passed(self) -> int:
        """Tests passed."""
        return self.outcomes.count("pass")

    @property
    def syntax(self) -> bool:
        """Did it not compile?"""
        return self.outcomes == ("syntax",)

    @property
    def solved(self) -> bool:
        """Did it pass all tests?"""
        return self.passed == len(self.outcomes)


def _shown(value: Any) -> str:
    try:
        return repr(value)
    except RecursionError:
        return "a value too deep to print"


def _run_test(
    sandbox: Sandbox, source: str, test: Test, tolerance: float
) -> tuple[str, str, float]:
    """(outcome, error, seconds) of one test."""
    if isinstance(test, StdioTest):
        run = sandbox.run(source, "stdio", test.stdin)
        right = run.kind == "done" and same_output(run.stdout, test.stdout, tolerance)
        error = "" if right else f"printed {run.stdout[:200]!r}, not {test.stdout[:200]!r}"
    elif isinstance(test, CallTest):
        run = sandbox.run(source, "call", function=test.function, arguments=list(test.arguments))
        accepted = json.loads(
            json.dumps(test.accepted)
        )  # tuples as lists, keys as text: as the value is
        right = run.kind == "value" and any(_same_value(run.value, a, tolerance) for a in accepted)
        error = "" if right else f"returned {_shown(run.value)}, not {test.accepted[0]!r}"[:500]
    else:
        nonce = secrets.token_hex(16)
        run = sandbox.run(source, "assert", test=test.code, nonce=nonce)
        right = run.kind == "done" and secrets.compare_digest(run.nonce, nonce)
        error = "" if right else run.error
    return _outcome(run, right, test), run.error or error, run.seconds


def _outcome(run: Run, right: bool, test: Test) -> str:
    if right:
        return "pass"
    if run.kind in ("syntax", "raised", "timeout", "output"):
        return run.kind
    # A program that leaves before what was asked of it was done: sys.exit() in a function.
    if run.kind == "done" and not isinstance(test, StdioTest):
        return "raised"
    return "fail"


def run_program(
    source: str,
    tests: Any,
    sandbox: Sandbox | None = None,
    *,
    tolerance: float = 0.0,
    max_timeouts: int | None = None,
) -> ProgramResult:
    """Runs a program on its tests, each in a process and a folder of its own.

    Args:
        source: Python. tests: as :func:`parse_tests` takes them. sandbox: default one with its defaults.
        tolerance: of numbers, see :func:`same_output`.
        max_timeouts: after so many, the tests left count as timed out, too, without being run.

    Raises:
        SandboxError: programs cannot be confined here. ValueError: tests.
    """
    not_negative("tolerance", tolerance)
    if max_timeouts is not None and max_timeouts < 1:
        raise ValueError(f"max_timeouts must be >= 1 or None, got {max_timeouts}")
    sandbox = sandbox or Sandbox()
    outcomes: list[str] = []
    errors: list[str] = []
    spent = 0.0
    for test in parse_tests(tests):
        if max_timeouts is not None and outcomes.count("timeout") >= max_timeouts:
            outcomes.append("timeout")
            errors.append("not run")
            continue
        outcome, error, seconds = _run_test(sandbox, source, test, tolerance)
        spent += seconds
        if outcome == "syntax":
            return ProgramResult(("syntax",), (error,), spent)
        outcomes.append(outcome)
        errors.append(error)
    return ProgramResult(tuple(outcomes), tuple(errors), spent)
