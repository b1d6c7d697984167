# SPDX-License-Identifier: Apache-2.0
"""Evaluation (MA-RLHF, spec section 3.11): reward-model scores, win rates, pass@k, and a judge as a callable.

The paper's GPT-4 and human judgements are out of scope: there are no prompts for them here and no client.
:func:`judge_pairs` takes any callable that compares two answers and sees to the rest: order at random, ties,
position bias, intervals.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, nn

from tenfold.rlhf.best_of import rm_scores, sample_answers

Judge = Callable[[str, str, str], str]
VERDICTS = ("first", "second", "tie")


def _quantile(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")
    return NormalDist().inv_cdf(0.5 + confidence / 2)


@dataclass(frozen=True)
class Estimate:
    """A value, the ends of its confidence interval, and the number of observations."""

    value: float
    low: float
    high: float
    count: int


def mean_estimate(values: Tensor | Sequence[float], confidence: float = 0.95) -> Estimate:
    """The mean with its normal interval; one value has an infinite one. ValueError without values."""
    x = torch.as_tensor(values, dtype=torch.float64).flatten()
    if x.numel() == 0:
        raise ValueError("values is empty")
    width = _quantile(confidence) * float(x.std()) / math.sqrt(len(x)) if len(x) > 1 else math.inf
    return Estimate(float(x.mean()), float(x.mean()) - width, float(x.mean()) + width, len(x))


def wilson(successes: float, count: int, confidence: float = 0.95) -> Estimate:
    """A proportion with Wilson's score interval; halves (ties) may be among the successes."""
    if count < 1 or not 0 <= successes <= count:
        raise ValueError(
            f"successes must be in [0, count] and count >= 1, got {successes} of {count}"
        )
    z, p = _quantile(confidence), successes / count
    middle = (p + z * z / (2 * count)) / (1 + z * z / count)
    width = z / (1 + z * z / count) * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return Estimate(p, max(0.0, middle - width), min(1.0, middle + width), count)


@dataclass(frozen=True)
class WinRate:
    """Comparisons of a with b.

    Attributes:
        wins, ties, losses: of a. rate: (wins + ties / 2) / all, with Wilson's interval.
        first: share of decided comparisons won by the answer shown first, None where there was no order.
    """

    wins: int
    ties: int
    losses: int
    rate: Estimate
    first: float | None = None


def _win_rate(
    wins: int, ties: int, losses: int, confidence: float, first: float | None = None
) -> WinRate:
    rate = wilson(wins + ties / 2, wins + ties + losses, confidence)
    return WinRate(wins, ties, losses, rate, first)


def win_rate(
    a: Tensor | Sequence[float],
    b: Tensor | Sequence[float],
    *,
    tie: float = 0.0,
    confidence: float = 0.95,
) -> WinRate:
    """How often policy a's answer scores higher than b's on the same prompt.

    Args:
        a, b: scores [N]. tie: differences of at most so much are ties.

    Raises:
        ValueError: shapes, scores that are not finite.
    """
    x, y = (torch.as_tensor(v, dtype=torch.float64) for v in (a, b))
    if x.ndim != 1 or x.shape != y.shape or x.numel() == 0:
        raise ValueError(
            f"a and b must be scores [N] of the same prompts, got {list(x.shape)} and {list(y.shape)}"
        )
    if tie < 0:
        raise ValueError(f"tie must be >= 0, got {tie}")
    gap = x - y
    if not bool(gap.isfinite().all()):
        raise ValueError(
            f"scores are not finite at {(~gap.isfinite()).nonzero().flatten().tolist()[:8]}"
        )
    wins, losses = int((gap > tie).sum()), int((gap < -tie).sum())
    return _win_rate(wins, len(gap) - wins - losses, losses, confidence)


def judge_pairs(
    judge: Judge,
    prompts: Sequence[str],
    a: Sequence[str],
    b: Sequence[str],
    *,
    seed: int = 42,
    both_orders: bool = False,
    confidence: float = 0.95,
) -> WinRate:
    """Lets a judge compare the answers of policies a and b.

    Args:
        judge: ``judge(prompt, first, second)`` -> ``"first"``, ``"second"`` or ``"tie"``.
        seed: of the order in which a pair's answers are shown. both_orders: each pair is judged twice, and
            verdicts that contradict each other are a tie.

    Raises:
        ValueError: lengths, another verdict.
    """
    if not len(prompts) == len(a) == len(b) or not prompts:
        raise ValueError(
            f"prompts, a and b must be equally many and not empty, got {len(prompts)}, {len(a)} and {len(b)}"
        )
    draw = random.Random(seed)
    totals = {1: 0, 0: 0, -1: 0}
    shown = {"first": 0, "second": 0, "tie": 0}

    def ask(prompt: str, one: str, two: str, swap: bool) -> int:
        verdict = judge(prompt, *((two, one) if swap else (one, two)))
        if verdict not in VERDICTS:
            raise ValueError(f"a judge must say one of {', '.join(VERDICTS)}, got {verdict!r}")
        shown[verdict] += 1
        return 0 if verdict == "tie" else 1 if (verdict == "second") == swap else -1

    for prompt, one, two in zip(prompts, a, b):
        swap = draw.random() < 0.5
        found = ask(prompt, one, two, swap)
        if both_orders and found != ask(prompt, one, two, not swap):
            found = 0
        totals[found] += 1
    decided = shown["first"] + shown["second"]
    first = shown["first"] / decided if decided else None
    return _win_rate(totals[1], totals[0], totals[-1], confidence, first)


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased probability that one of k samples is right: 1 - C(n - c, k) / C(n, k), c of n being right.

    As a product, so that nothing overflows. Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not 0 <= correct <= samples or not 1 <= k <= samples:
        raise ValueError(
            f"pass@k needs 0 <= correct <= samples and 1 <= k <= samples, got {correct}, {samples}, {k}"
        )
    if samples - correct < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(samples - correct + 1, samples + 1))


def pass_at_k_table(
    counts: Sequence[tuple[int, int]],
    ks: Sequence[int] = (1, 5),
    groups: Sequence[str] | None = None,
    confidence: float = 0.95,
) -> dict[str, dict[int, Estimate]]:
    """Mean pass@k over problems, for ``all`` and by group (APPS's difficulty).

    Args:
        counts: (samples, correct) of every problem. groups: of every problem.
    """
    if groups is not None and len(groups) != len(counts):
        raise ValueError(f"groups must be as many as counts, got {len(groups)} and {len(counts)}")
    names = list(groups or [])
    parts = {"all": list(counts)}
    for name in sorted(set(names)):
        parts[name] = [c for c, g in zip(counts, names) if g == name]
    return {
        name: {k: mean_estimate([pass_at_k(n, c, k) for n, c in part], confidence) for k in ks}
        for name, part in parts.items()
    }


@dataclass(frozen=True)
class Protocol:
    """How a policy is scored; the defaults are the published code's.

    Attributes:
        count: prompts. shuffle: whether they are the first of a shuffled order (WebGPT: False), by
            ``shuffle_seed``. max_new_tokens, temperature, top_k, top_p, seed: of sampling. length: tokens
            of prompt, answer and end that the reward model reads.
    """

    count: int = 2000
    shuffle: bool = True
    shuffle_seed: int = 1234
    max_prompt: int = 512
    max_new_tokens: int = 512
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    length: int = 1024
    seed: int = 1234

    def choose(self, prompts: Sequence[str]) -> list[str]:
        """The prompts that are used, in order."""
        order = list(prompts)
        if self.shuffle:
            random.Random(self.shuffle_seed).shuffle(order)
        return order[: self.count]


@dataclass(frozen=True)
class PolicyScore:
    """Answers of a policy and their scores [N]; ``mean`` with its interval."""

    prompts: list[str]
    answers: list[str]
    scores: Tensor
    mean: Estimate


def score_policy(
    policy: Any,
    tokenizer: Any,
    reward_model: nn.Module,
    prompts: Sequence[str],
    protocol: Protocol | None = None,
    *,
    reward_tokenizer: Any = None,
    batch_size: int = 32,
    confidence: float = 0.95,
) -> PolicyScore:
    """Samples an answer to each prompt of the protocol and scores it. Arguments as of ``best_of_n``."""
    protocol = protocol or Protocol()
    chosen = protocol.choose(prompts)
    answers = sample_answers(
        policy, tokenizer, chosen, 1, temperature=protocol.temperature, top_k=protocol.top_k,
        top_p=protocol.top_p, max_prompt=protocol.max_prompt, max_new_tokens=protocol.max_new_tokens,
        batch_size=batch_size, seed=protocol.seed,
    )  # fmt: skip
    flat = [row[0] for row in answers]
    scores = rm_scores(
        reward_model,
        reward_tokenizer or tokenizer,
        chosen,
        flat,
        length=protocol.length,
        batch_size=batch_size,
    )
    return PolicyScore(chosen, flat, scores, mean_estimate(scores, confidence))


def compare_policies(
    policies: Mapping[str, Any],
    tokenizer: Any,
    reward_model: nn.Module,
    prompts: Sequence[str],
    protocol: Protocol | None = None,
    *,
    tie: float = 0.0,
    **options: Any,
) -> tuple[dict[str, PolicyScore], dict[tuple[str, str], WinRate]]:
    """Scores of several policies on the same prompts, and the win rate of each over each other one named after it.

    Sampling uses the same random numbers for all. Options as of :func:`score_policy`.
    """
    if len(policies) < 2:
        raise ValueError(
            f"policies must be two or more to be compared, got {', '.join(policies) or 'none'}"
        )
    scored = {
        name: score_policy(p, tokenizer, reward_model, prompts, protocol, **options)
        for name, p in policies.items()
    }
    names = list(scored)
    rates = {
        (x, y): win_rate(scored[x].scores, scored[y].scores, tie=tie)
        for i, x in enumerate(names)
        for y in names[i + 1 :]
    }
    return scored, rates
