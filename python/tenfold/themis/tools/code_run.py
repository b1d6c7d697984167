# SPDX-License-Identifier: Apache-2.0
"""``code_run``: runs the program that an answer is, on the tests of its example, in :mod:`tenfold.sandbox`."""

from __future__ import annotations

import builtins
import json
from collections.abc import Mapping
from typing import Any

from tenfold.sandbox import (
    AssertTest,
    Limits,
    ProgramResult,
    Sandbox,
    SandboxError,
    extract_code,
    parse_tests,
    run_program,
)
from tenfold.themis.tools.base import Refused, Tool, field_of

LIMITS = Limits(
    cpu_seconds=2, wall_seconds=4.0, memory_bytes=256 << 20, processes=4, output_bytes=1 << 16
)
_MAX_TIMEOUTS = 2  # then the tests that are left count as timed out, too
_MAX_TESTS = 32
_MAX_REASONS = 3


def pass_rate(result: ProgramResult, tests: int) -> float:
    """Share of ``tests`` that passed; none of a program that does not compile."""
    return result.passed / tests


def pass_label(rate: float) -> float:
    """A pass rate as a score in [-1, 1]: 2 rate - 1."""
    return 2.0 * rate - 1.0


class CodeRun(Tool):
    """Pass rate, how many tests passed, and why others did not. The input is a fixed phrase and says nothing.

    Needs ``answer`` of the example (the program, or a text with it in a fenced block) and ``test_list`` (assert
    statements, each run on its own; ``test_setup_code`` before each where there is one). Refused where no
    isolation can be had. A program that looks for its tests can cheat them: see :mod:`tenfold.sandbox`.

    Args:
        sandbox: where programs run, default one with ``LIMITS``, made at the first call.
        messages: also tell what an error said. The program chooses these words, and the model will read them.
    """

    names = ("code_run",)
    timeout = 60.0

    def __init__(self, sandbox: Sandbox | None = None, *, messages: bool = False) -> None:
        self._sandbox = sandbox
        self.messages = messages

    def run(self, example: Mapping[str, Any]) -> tuple[ProgramResult, int]:
        """(what came of the program, number of tests). ValueError: no tests. Refused: no isolation."""
        answer = str(field_of(example, "answer"))
        tests = parse_tests(field_of(example, "test_list"))
        if len(tests) > _MAX_TESTS:
            raise ValueError(f"test_list may have {_MAX_TESTS} tests, got {len(tests)}")
        setup = str(example.get("test_setup_code") or "")
        if setup:
            tests = [
                AssertTest(f"{setup}\n{t.code}") if isinstance(t, AssertTest) else t for t in tests
            ]
        try:
            # Made here, not in the constructor: a machine without isolation may have a toolbox all the same.
            sandbox = self._sandbox = self._sandbox or Sandbox(LIMITS)
            made = run_program(extract_code(answer), tests, sandbox, max_timeouts=_MAX_TIMEOUTS)
        except SandboxError as error:
            raise Refused(str(error)) from error
        return made, len(tests)

    def call(self, name: str, arguments: str, example: Mapping[str, Any]) -> str:
        """``The pass rate is ...`` and so on."""
        made, total = self.run(example)
        passed = made.passed
        if passed == total:
            count = "All tests passed."
        elif passed == 0:
            count = f"None of {total} tests passed."
        else:
            count = f"{passed} of {total} tests passed, {total - passed} failed."
        text = f"The pass rate is {pass_rate(made, total):.2f}. {count}"
        reasons = list(dict.fromkeys(filter(None, map(self._reason, made.outcomes, made.errors))))
        return text + (f" Reasons: {'; '.join(reasons[:_MAX_REASONS])}." if reasons else "")

    def _reason(self, outcome: str, error: str) -> str:
        if outcome == "pass":
            return ""
        told = {"timeout": "out of time", "output": "too much output", "fail": "wrong result"}
        if outcome in told:
            return told[outcome]
        kind, _, message = error.partition(":")
        known = getattr(builtins, kind, None)
        # An exception's class may have any name, too.
        if not (isinstance(known, type) and issubclass(known, BaseException)):
            kind = "an error of its own"
        if self.messages and message.strip():
            return f"{kind} ({' '.join(message.split())[:100]!r})"
        return kind

    def key(self, name: str, arguments: str, example: Mapping[str, Any]) -> str:
        """Program and tests."""
        return json.dumps([str(field_of(example, "answer")), field_of(example, "test_list"),
                           str(example.get("test_setup_code") or "")])  # fmt: skip
