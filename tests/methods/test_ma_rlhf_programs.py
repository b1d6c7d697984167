# SPDX-License-Identifier: Apache-2.0
"""Programs as answers: the reward's table (check 16). What runs them is tested in test_sandbox_programs.py."""

import pytest
import torch

from tenfold.ma_rlhf.rewards import Answers, Rewards
from tenfold.rlhf.programs import ProgramReward, program_reward
from tenfold.sandbox import Limits, ProgramResult, Sandbox, run_program

SANDBOX = Sandbox(Limits(cpu_seconds=1, wall_seconds=5.0, memory_bytes=256 << 20, processes=4))
DOUBLE = [{"input": f"{i}\n", "output": f"{2 * i}\n"} for i in range(1, 5)]


def result(*outcomes):
    return ProgramResult(outcomes, ("",) * len(outcomes))


class TestReward:
    def test_check_16(self):
        """Syntax error -1; exception -.6; 0/4, 1/4, 4/4 tests -> -.3, .025, 1.0."""
        reward = ProgramReward(SANDBOX, workers=2)
        programs = [
            "print(2 * int(input())", "raise ValueError", "input(); print(-1)",
            "n = int(input()); print(2 if n == 1 else 0)", "print(2 * int(input()))",
        ]  # fmt: skip
        made = reward([""] * 5, programs, tests=[DOUBLE] * 5)
        assert made == pytest.approx([-1.0, -0.6, -0.3, 0.025, 1.0], abs=1e-12)
        assert [r.passed for r in reward.last] == [0, 0, 0, 1, 4]
        assert reward.metrics() == pytest.approx({
            "tests/pass": 5 / 16, "tests/fail": 7 / 16, "tests/raised": 4 / 16, "tests/timeout": 0.0,
            "tests/output": 0.0, "solved": 0.2, "syntax": 0.2,
        })  # fmt: skip

    @pytest.mark.parametrize(
        "outcomes, want",
        [
            (("raised", "fail"), {"none_passed": -0.6, "any": -0.6, "all": -0.3, "never": -0.3}),
            (("raised", "pass"), {"none_passed": 0.35, "any": -0.6, "all": 0.35, "never": 0.35}),
            (("raised", "raised"), {"none_passed": -0.6, "any": -0.6, "all": -0.6, "never": -0.3}),
            (("timeout", "output"), dict.fromkeys(("none_passed", "any", "all", "never"), -0.3)),
            (("syntax",), dict.fromkeys(("none_passed", "any", "all", "never"), -1.0)),
        ],
    )
    def test_precedence(self, outcomes, want):
        for rule, value in want.items():
            assert program_reward(result(*outcomes), rule) == pytest.approx(value, abs=1e-12)

    def test_timeouts_are_failed_tests(self):
        assert program_reward(result("timeout", "timeout", "timeout")) == pytest.approx(-0.3)

    def test_chat(self):
        chat = [{"role": "assistant", "content": "```python\nprint(2 * int(input()))\n```"}]
        assert ProgramReward(SANDBOX)([""], [chat], tests=[DOUBLE[:2]]) == [1.0]

    def test_order_is_kept_by_parallel_workers(self):
        programs = [f"import time; time.sleep({0.02 * (8 - i)}); print({i})" for i in range(8)]
        tests = [[{"input": "", "output": str(i)}] for i in range(8)]
        assert ProgramReward(SANDBOX, workers=8)([""] * 8, programs, tests=tests) == [1.0] * 8

    def test_in_the_trainers_hands(self):
        """As one reward of several, its tests from a column of the data set."""
        rewards = Rewards([ProgramReward(SANDBOX), lambda completions: [0.5] * len(completions)])
        assert rewards.names[0] == "program_reward"
        none = torch.zeros(2, 2, dtype=torch.int64)
        answers = Answers(["a", "b"], ["a", "b"], ["print(2 * int(input()))", "1 +"], none, none.bool(), 1,
                          {"tests": [DOUBLE[:1]] * 2})  # fmt: skip
        made = rewards(answers)
        assert made.score.tolist() == [1.5, -0.5] and made.parts[:, 0].tolist() == [1.0, -1.0]

    def test_bad_input(self):
        reward = ProgramReward(SANDBOX)
        with pytest.raises(ValueError, match="column `tests`"):
            reward(["a"], ["b"])
        with pytest.raises(ValueError, match="equally many, got 1, 2 and 1"):
            reward(["a"], ["b", "c"], tests=[DOUBLE])
        with pytest.raises(ValueError, match="a program without tests has no reward"):
            reward(["a"], ["b"], tests=[[]])
        with pytest.raises(TypeError, match="a completion must be text or a list of chat messages"):
            reward(["a"], [3], tests=[DOUBLE])
        with pytest.raises(ValueError, match="precedence must be one of none_passed, any"):
            ProgramReward(SANDBOX, precedence="some")
        with pytest.raises(ValueError, match="workers must be >= 1, got 0"):
            ProgramReward(SANDBOX, workers=0)
        with pytest.raises(ValueError, match="max_timeouts must be >= 1"):
            run_program("", DOUBLE, SANDBOX, max_timeouts=0)
