# SPDX-License-Identifier: Apache-2.0
"""MA-RLHF's training sanity (check 18 of its specification): macro actions learn a table faster than tokens."""

import pytest

from tenfold.ma_rlhf import MARLHFConfig
from tenfold.ma_rlhf.tabular import TabularTask, train


@pytest.mark.parametrize(
    "seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)]
)
def test_training(seed):
    made = {n: train(MARLHFConfig(n=n), seed) for n in (1, 4, 16)}
    assert all(run.probability[0] == pytest.approx(0.125) for run in made.values())
    last = {n: run.probability[-1] for n, run in made.items()}
    assert last[1] > 0.40 and last[4] > 0.55 and last[16] > 0.55
    assert last[4] > last[1]
    assert made[4].score[-1] == pytest.approx(2 * last[4], abs=0.2)


@pytest.mark.parametrize(
    "settings",
    [{"termination": "random"}, {"ratio": "joint", "n": 4}, {"critic_target": "macro", "n": 4},
     {"whiten_adv": "macro", "n": 4, "dual_clip": 3.0}, {"sigma": "unit", "n": 4}],
    ids=str,
)  # fmt: skip
def test_other_settings_learn_too(settings):
    run = train(MARLHFConfig(**settings), 0, TabularTask(updates=50))
    assert len(run.probability) == len(run.score) == 51
    assert run.probability[-1] > 0.17


def test_same_seed_same_run():
    task = TabularTask(updates=5)
    one, two, other = (train(MARLHFConfig(termination="random"), seed, task) for seed in (1, 1, 2))
    assert one == two and one.score != other.score


def test_errors():
    with pytest.raises(ValueError, match="good must be one of 8 tokens, got 8"):
        TabularTask(good=8)
    with pytest.raises(ValueError, match="updates must be >= 1"):
        TabularTask(updates=0)
