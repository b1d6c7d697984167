# SPDX-License-Identifier: Apache-2.0
"""Evaluation: intervals, win rates, judges, pass@k, the protocol of the reward-model score."""

import itertools
import math

import ma_rlhf_reward_ranks as tiny
import pytest
import torch

from tenfold.rlhf.best_of import rm_scores, sample_answers
from tenfold.rlhf.evaluate import (
    Protocol,
    compare_policies,
    judge_pairs,
    mean_estimate,
    pass_at_k,
    pass_at_k_table,
    score_policy,
    wilson,
    win_rate,
)
from tenfold.rlhf.small import ByteTokenizer, make_policy

TOKENIZER = ByteTokenizer()


class TestIntervals:
    def test_wilson(self):
        """Newcombe (1998), table I, method 3: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
        for successes, count, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605),
                                            (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)):  # fmt: skip
            made = wilson(successes, count)
            assert (made.low, made.high) == pytest.approx((low, high), abs=5e-5)
        # "With 50 pairs these win rates carry about +-14 points" (spec, section 6).
        half = wilson(25, 50)
        assert 0.13 < half.high - 0.5 < 0.14 and half.value == 0.5
        with pytest.raises(ValueError, match="got 3 of 2"):
            wilson(3, 2)
        with pytest.raises(ValueError, match=r"confidence must be in \(0, 1\), got 95"):
            wilson(1, 2, 95)

    def test_mean(self):
        made = mean_estimate([1.0, 2.0, 3.0, 4.0])
        width = 1.959964 * math.sqrt(5 / 3) / 2
        assert (made.value, made.low, made.high) == pytest.approx(
            (2.5, 2.5 - width, 2.5 + width), abs=1e-5
        )
        assert mean_estimate([1.0]).high == math.inf
        with pytest.raises(ValueError, match="values is empty"):
            mean_estimate([])

    def test_coverage(self):
        """Intervals at 95 % hold the truth about that often."""
        made = torch.Generator().manual_seed(0)
        hits = 0
        for _ in range(400):
            x = torch.rand(60, generator=made)
            estimate = wilson(int((x < 0.7).sum()), 60)
            hits += estimate.low <= 0.7 <= estimate.high
        assert 0.92 < hits / 400 < 0.98


class TestWinRate:
    def test_counts(self):
        made = win_rate([1.0, 2.0, 3.0, 0.0], [0.0, 2.0, 4.0, -1.0])
        assert (made.wins, made.ties, made.losses, made.rate.value) == (2, 1, 1, 0.625)
        assert made.rate == wilson(2.5, 4) and made.first is None
        close = win_rate(torch.tensor([1.0, 2.0]), torch.tensor([0.9, 1.0]), tie=0.2)
        assert (close.wins, close.ties, close.losses) == (1, 1, 0)
        narrow = win_rate([1.0] * 50, [0.0] * 50, confidence=0.5)
        assert narrow.rate.low > win_rate([1.0] * 50, [0.0] * 50).rate.low

    def test_bad_input(self):
        with pytest.raises(ValueError, match=r"same prompts, got \[2\] and \[1\]"):
            win_rate([1.0, 2.0], [1.0])
        with pytest.raises(ValueError, match=r"not finite at \[1\]"):
            win_rate([1.0, math.nan], [1.0, 1.0])
        with pytest.raises(ValueError, match="tie must be >= 0"):
            win_rate([1.0], [1.0], tie=-1)


def longer(prompt, first, second):
    return "tie" if len(first) == len(second) else "first" if len(first) > len(second) else "second"


class TestJudge:
    def test_a_fair_judge(self):
        a, b = ["xx", "x", "xx", "xxx"], ["x", "xx", "xx", "x"]
        made = judge_pairs(longer, ["p"] * 4, a, b)
        assert (made.wins, made.ties, made.losses) == (2, 1, 1)
        twice = judge_pairs(longer, ["p"] * 4, a, b, both_orders=True)
        assert (twice.wins, twice.ties, twice.losses, twice.first) == (2, 1, 1, 0.5)

    def test_order_is_random_and_seeded(self):
        shown = []

        def judge(prompt, first, second):
            shown.append((prompt, first, second))
            return "tie"

        prompts = [str(i) for i in range(200)]
        for seed in (1, 1, 2):
            judge_pairs(judge, prompts, ["a"] * 200, ["b"] * 200, seed=seed)
        one, again, other = (shown[i : i + 200] for i in (0, 200, 400))
        assert one == again != other and [p for p, _, _ in one] == prompts
        assert 70 < sum(first == "a" for _, first, _ in one) < 130

    def test_a_biased_judge_is_seen_and_decides_nothing(self):
        always = lambda prompt, first, second: "first"  # noqa: E731
        made = judge_pairs(always, ["p"] * 400, ["a"] * 400, ["b"] * 400)
        assert made.first == 1.0 and 0.4 < made.rate.value < 0.6
        both = judge_pairs(always, ["p"] * 40, ["a"] * 40, ["b"] * 40, both_orders=True)
        assert (both.ties, both.rate.value, both.first) == (40, 0.5, 1.0)
        ties = judge_pairs(lambda *words: "tie", ["p"], ["a"], ["b"])
        assert ties.first is None

    def test_bad_input(self):
        with pytest.raises(ValueError, match="a judge must say one of first, second, tie, got 'A'"):
            judge_pairs(lambda *words: "A", ["p"], ["a"], ["b"])
        with pytest.raises(ValueError, match="equally many and not empty, got 1, 1 and 0"):
            judge_pairs(longer, ["p"], ["a"], [])


class TestPassAtK:
    def test_is_the_share_of_subsets_with_a_right_one(self):
        for n, c in itertools.product(range(1, 8), range(8)):
            for k in range(1, n + 1):
                if c > n:
                    continue
                subsets = list(itertools.combinations(range(n), k))
                want = sum(any(i < c for i in s) for s in subsets) / len(subsets)
                assert pass_at_k(n, c, k) == pytest.approx(want, abs=1e-12)
                assert pass_at_k(n, c, k) == pytest.approx(
                    1 - math.comb(n - c, k) / math.comb(n, k), abs=1e-12
                )

    def test_stable(self):
        assert pass_at_k(10**6, 1, 1) == pytest.approx(1e-6, rel=1e-9)
        assert pass_at_k(2000, 3, 1000) == pytest.approx(
            1 - 1000 * 999 * 998 / (2000 * 1999 * 1998), rel=1e-12
        )
        assert pass_at_k(10**5, 5 * 10**4, 5 * 10**4) == 1.0

    def test_table(self):
        made = pass_at_k_table([(5, 0), (5, 5), (5, 1)], (1, 5), ["hard", "easy", "hard"])
        assert {name: {k: e.value for k, e in row.items()} for name, row in made.items()} == {
            "all": {1: pytest.approx(0.4), 5: pytest.approx(2 / 3)},
            "easy": {1: 1.0, 5: 1.0},
            "hard": {1: pytest.approx(0.1), 5: 0.5},
        }
        assert made["hard"][1].count == 2

    def test_bad_input(self):
        for arguments in ((5, 6, 1), (5, -1, 1), (5, 1, 0), (5, 1, 6)):
            with pytest.raises(ValueError, match="pass@k needs"):
                pass_at_k(*arguments)
        with pytest.raises(ValueError, match="groups must be as many as counts, got 1 and 2"):
            pass_at_k_table([(5, 1), (5, 2)], groups=["a"])


class TestProtocol:
    def test_published(self):
        protocol = Protocol()
        assert (protocol.count, protocol.shuffle_seed, protocol.max_new_tokens, protocol.temperature,
                protocol.length) == (2000, 1234, 512, 0.8, 1024)  # fmt: skip
        prompts = [str(i) for i in range(3000)]
        chosen = protocol.choose(prompts)
        assert (
            len(set(chosen)) == 2000
            and chosen != prompts[:2000]
            and chosen == protocol.choose(prompts)
        )
        assert Protocol(shuffle=False, count=5).choose(prompts) == prompts[:5]

    def test_score_and_compare(self):
        model, prompts = tiny.model(), [f"prompt {i}" for i in range(10)]
        protocol = Protocol(count=6, max_new_tokens=8)
        policies = {"a": make_policy(0, 1, 2, 8), "b": make_policy(1, 1, 2, 8)}
        made = score_policy(policies["a"], TOKENIZER, model, prompts, protocol)
        assert made.prompts == protocol.choose(prompts) and made.mean.count == 6
        want = sample_answers(
            policies["a"], TOKENIZER, made.prompts, 1, temperature=0.8, max_new_tokens=8
        )
        assert made.answers == [row[0] for row in want]
        torch.testing.assert_close(
            made.scores, rm_scores(model, TOKENIZER, made.prompts, made.answers)
        )
        assert made.mean.value == pytest.approx(float(made.scores.mean()), abs=1e-6)
        scores, rates = compare_policies(policies, TOKENIZER, model, prompts, protocol)
        assert list(rates) == [("a", "b")] and torch.equal(scores["a"].scores, made.scores)
        assert rates["a", "b"] == win_rate(scores["a"].scores, scores["b"].scores)
        _, same = compare_policies(
            {"a": policies["a"], "c": policies["a"]}, TOKENIZER, model, prompts, protocol
        )
        assert (same["a", "c"].ties, same["a", "c"].rate.value) == (
            6,
            0.5,
        )  # the same random numbers
        with pytest.raises(ValueError, match="two or more to be compared, got a"):
            compare_policies({"a": policies["a"]}, TOKENIZER, model, prompts)
