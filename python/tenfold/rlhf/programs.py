# SPDX-License-Identifier: Apache-2.0
"""The reward for programs that pass their tests (MA-RLHF's APPS task, spec section 3.10).

    the program does not compile                           -1.0
    no test passes and at least one raises                 -0.6   (``precedence`` says when exactly)
    otherwise                                              -0.3 + 1.3 * passed / (passed + failed)

Programs run in :mod:`tenfold.sandbox`, never in this process; what it protects from stands there.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tenfold.sandbox import Sandbox
from tenfold.sandbox.programs import (
    OUTCOMES,
    AssertTest,
    CallTest,
    ProgramResult,
    StdioTest,
    Test,
    extract_code,
    parse_tests,
    run_program,
)
from tenfold.training.checks import one_of

__all__ = [
    "AssertTest",
    "CallTest",
    "ProgramReward",
    "StdioTest",
    "completion_text",
    "program_reward",
    "run_program",
]

SYNTAX_REWARD, RUNTIME_REWARD, BASE_REWARD, PASS_REWARD = -1.0, -0.6, -0.3, 1.3
PRECEDENCES = ("none_passed", "any", "all", "never")


def program_reward(result: ProgramResult, precedence: str = "none_passed") -> float:
    """The table of section 3.10.

    ``precedence``: a runtime error is what gives -0.6 if it happens in ``"any"`` test, in ``"all"``, in any
    with ``"none_passed"`` (the default), or ``"never"`` (then it is a failed test like others). Time-outs and
    too much output are failed tests.
    """
    one_of("precedence", precedence, PRECEDENCES)
    if result.syntax:
        return SYNTAX_REWARD
    raised, total = result.outcomes.count("raised"), len(result.outcomes)
    counts = {"none_passed": raised > 0 and result.passed == 0, "any": raised > 0,
              "all": raised == total, "never": False}  # fmt: skip
    if counts[precedence]:
        return RUNTIME_REWARD
    return BASE_REWARD + PASS_REWARD * result.passed / total


def completion_text(completion: Any) -> str:
    """A completion as text: itself, or what the assistant says in a list of chat messages."""
    if isinstance(completion, str):
        return completion
    if isinstance(completion, Sequence) and all(
        isinstance(m, Mapping) and isinstance(m.get("content"), str) for m in completion
    ):
        return "".join(
            m["content"] for m in completion if m.get("role", "assistant") == "assistant"
        )
    raise TypeError(
        f"a completion must be text or a list of chat messages, got {completion!r}"[:300]
    )


class ProgramReward:
    """A reward function in TRL's style: ``reward(prompts, completions, tests=...)`` -> list of floats.

    Args:
        sandbox: where programs run. workers: at a time, default one per core (at most 16).
        precedence, tolerance, max_timeouts: see :func:`program_reward` and :func:`run_program`.
        extract: completions hold the program in a fenced block (:func:`extract_code`).

    ``last``: the results of the last call, one per completion; ``metrics()`` sums them up.
    """

    __name__ = "program_reward"  # what TRL logs

    def __init__(
        self,
        sandbox: Sandbox | None = None,
        *,
        workers: int | None = None,
        precedence: str = "none_passed",
        tolerance: float = 0.0,
        max_timeouts: int | None = None,
        extract: bool = True,
    ) -> None:
        one_of("precedence", precedence, PRECEDENCES)
        if workers is not None and workers < 1:
            raise ValueError(f"workers must be >= 1, got {workers}")
        self.sandbox = sandbox or Sandbox()
        self.workers = workers or min(16, os.cpu_count() or 1)
        self.precedence, self.extract = precedence, extract
        self._options: dict[str, Any] = {"tolerance": tolerance, "max_timeouts": max_timeouts}
        self.last: list[ProgramResult] = []

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], tests: Sequence[Any] | None = None,
        **columns: Any,
    ) -> list[float]:  # fmt: skip
        """Rewards, one per completion; ``tests[i]`` are those of completion i.

        Raises:
            ValueError: tests are missing, or not as many as completions. SandboxError: see ``Sandbox``.
        """
        if tests is None:
            raise ValueError("the reward of programs needs the column `tests`")
        if not len(prompts) == len(completions) == len(tests):
            raise ValueError(
                f"prompts, completions and tests must be equally many, got {len(prompts)}, "
                f"{len(completions)} and {len(tests)}"
            )
        parsed = [parse_tests(t) for t in tests]
        sources = [completion_text(c) for c in completions]
        if self.extract:
            sources = [extract_code(s) for s in sources]

        def one(source: str, its: list[Test]) -> ProgramResult:
            return run_program(source, its, self.sandbox, **self._options)

        # Threads only wait here: the programs are processes.
        with ThreadPoolExecutor(self.workers) as pool:
            self.last = list(pool.map(one, sources, parsed))
        return [program_reward(r, self.precedence) for r in self.last]

    def metrics(self) -> dict[str, float]:
        """Of the last call: shares of programs ``solved`` and ``syntax``; of tests, each outcome's."""
        if not self.last:
            return {}
        counts = Counter(o for r in self.last for o in r.outcomes if o != "syntax")
        total = max(1, sum(counts.values()))
        shares = {f"tests/{o}": counts[o] / total for o in OUTCOMES if o != "syntax"}
        size = len(self.last)
        return shares | {"solved": sum(r.solved for r in self.last) / size,
                         "syntax": sum(r.syntax for r in self.last) / size}  # fmt: skip
