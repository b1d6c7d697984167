# SPDX-License-Identifier: Apache-2.0
"""The worked numbers of MA-RLHF's specification (section 9, checks 1 to 13): fixture F."""

import math

import pytest
import torch

from tenfold.ops import rl as ops_rl
from tenfold.reference import rl

V = torch.tensor([[0.2, 0.4, 0.6, 0.8, 1.0]])
K = torch.tensor([[0.1, 0.3, -0.2, 0.4, 0.0]])
SCORE = torch.tensor([2.0])
MASK = torch.ones(1, 5, dtype=torch.bool)
MODULES = [pytest.param(rl, id="reference"), pytest.param(ops_rl, id="ops")]
each = pytest.mark.parametrize("m", MODULES)


def close(got, want, atol=2e-5):
    torch.testing.assert_close(got.flatten()[: len(want)], torch.tensor(want), rtol=0, atol=atol)


def prepared(m, n=2, **settings):
    seg, nseg = m.macro_segment_fixed(MASK, n)
    settings = {"beta": 0.5, "gamma": 1.0, "lam": 0.5, "score_clip": 100.0} | settings
    return seg, m.ma_ppo_prepare(K, torch.zeros_like(K), V, SCORE, seg, nseg, **settings)


@each
@pytest.mark.parametrize(
    ("weight", "want"),
    [("equal", [0.3, 0.7, 1]), ("unit", [0.4, 0.8, 1]), ("position", [1 / 3, 0.73333, 1]),
     ("position_early", [0.26667, 0.66667, 1]), ("sum", [0.6, 1.4, 1])],
)  # fmt: skip
def test_pooling(m, weight, want):
    seg, _ = m.macro_segment_fixed(MASK, 2)
    assert seg.tolist() == [[0, 0, 1, 1, 2]]
    close(m.macro_pool(V, seg, 3, weight), want)


@each
def test_position_weights_of_three(m):
    seg = torch.zeros(1, 3, dtype=torch.int32)
    for i, late in enumerate((2 / 11, 3 / 11, 6 / 11)):
        one = torch.eye(3)[i : i + 1]
        close(m.macro_pool(one, seg, 1, "position"), [late])
        close(m.macro_pool(one.flip(1), seg, 1, "position_early"), [late])


@each
def test_sum_rewards(m):
    _, (adv, _, adv_m, ret_m, kl_row) = prepared(m)
    close(adv_m, [0.55, 0.7, 1, 0, 0])
    close(ret_m, [0.85, 1.4, 2, 0, 0])
    close(adv, [0.55, 0.55, 0.7, 0.7, 1])
    close(kl_row, [0.12])


@each
def test_sigma_rewards(m):
    seg, (_, _, adv_m, _, _) = prepared(m, reward_reduce="sigma")
    assert m.macro_segment_fixed(MASK, 2, isolate_last=True)[0].tolist() == seg.tolist()
    close(adv_m, [0.675, 0.75, 1])


@each
def test_phantom_step(m):
    """The reference code's empty macro action before the last one: a step of value and reward 0."""
    adv, _ = m.macro_gae(torch.tensor([[0.3, 0.7, 0.0, 1.0]]), torch.tensor([[-0.1, -0.05, 0.0, 2.0]]),
                         torch.tensor([4]), None, 1.0, 0.5)  # fmt: skip
    close(adv, [0.3, 0.0, 1.5, 1.0])


@each
def test_tokens(m):
    _, (adv, ret, *_) = prepared(m, n=1)
    close(adv, [0.3125, 0.325, 0.55, 0.5, 1])
    close(ret, [0.5125, 0.725, 1.15, 1.3, 2])
    reward = -0.5 * K + torch.tensor([0, 0, 0, 0, 2.0])
    assert torch.allclose(m.gae(V, reward, MASK, 1.0, 0.5)[0], adv)


@each
@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_one_macro_action(m, lam):
    _, (adv, _, _, ret_m, _) = prepared(m, n=100, lam=lam)
    close(adv, [1.1] * 5)
    close(ret_m, [1.7])


@each
def test_discount_per_token(m):
    _, (_, _, adv_m, _, _) = prepared(m, discount="per_token", gamma=0.9)
    close(adv_m, [0.25820, 0.43500, 1], atol=5e-5)  # 0.258175


@each
@pytest.mark.parametrize(
    ("ratio", "weight", "want"),
    [("token", "macro", -0.67700), ("joint", "macro", -0.70033), ("joint", "length", -0.64040),
     ("geo_mean", "length", -0.68533)],
)  # fmt: skip
def test_policy_loss(m, ratio, weight, want):
    seg, (adv, *_) = prepared(m)
    new = torch.tensor([[1.1, 1.3, 0.9, 0.7, 1.0]]).log()
    loss, _ = m.ma_ppo_policy_loss(new, torch.zeros_like(new), adv, seg, 0.2, 0.2, ratio, "token_mean",
                                   0.0, weight=weight)  # fmt: skip
    assert math.isclose(float(loss), want, abs_tol=1e-5)


@each
def test_value_loss(m):
    seg, (_, ret, _, ret_m, _) = prepared(m)
    new = torch.tensor([[0.3, 0.4, 0.6, 1.2, 0.5]])
    loss, _ = m.ma_ppo_value_loss(new, V, ret, MASK, 0.2)
    assert math.isclose(float(loss), 0.35550, abs_tol=1e-5)
    pooled = [m.macro_pool(x, seg, 3, "equal") for x in (new, V)]
    loss, _ = m.ma_ppo_value_loss(*pooled, ret_m[:, :3], torch.ones(1, 3, dtype=torch.bool), 0.2)
    assert math.isclose(float(loss), 0.45833, abs_tol=1e-5)


@each
@pytest.mark.parametrize("n", [1, 2, 3, 5, 100])
def test_rewards_to_go(m, n):
    made = torch.Generator().manual_seed(n)
    k, value = torch.randn(3, 11, generator=made), torch.randn(3, 11, generator=made)
    mask = torch.arange(11) < torch.tensor([[11], [7], [1]])
    seg, nseg = m.macro_segment_fixed(mask, n)
    score = torch.randn(3, generator=made)
    *_, ret_m, _ = m.ma_ppo_prepare(
        k, torch.zeros_like(k), value, score, seg, nseg, 0.5, 1.0, 1.0, 100.0
    )
    close(ret_m[:, 0], (-0.5 * (k * mask).sum(1) + score).tolist(), atol=1e-5)


def lengths_of(seg):
    return torch.bincount(seg[seg >= 0]).tolist()


@each
@pytest.mark.parametrize(
    ("n", "length", "isolated", "want"),
    [(5, 8, True, [5, 2, 1]), (5, 11, True, [5, 5, 1]), (6, 6, True, [5, 1]), (5, 11, False, [5, 5, 1]),
     (5, 10, False, [5, 5]), (100, 7, False, [7]), (100, 7, True, [6, 1]), (3, 1, True, [1])],
)  # fmt: skip
def test_fixed_lengths(m, n, length, isolated, want):
    mask = torch.arange(12)[None] < length
    seg, nseg = m.macro_segment_fixed(mask, n, isolated)
    assert lengths_of(seg[0]) == want and nseg.tolist() == [len(want)]
    assert (seg[0, length:] == -1).all() and seg.dtype == torch.int32


@each
@pytest.mark.parametrize(
    ("mode", "want"),
    [("macro_prefix", [2, 4]), ("response_prefix", [2, 4]), ("token_rise", [2, 3, 1]),
     ("token_rise_ref", [1, 3, 1, 1])],
)  # fmt: skip
def test_perplexity(m, mode, want):
    nll = torch.tensor([[5, 4, 6, 3, 2, 2.5]]).log()
    seg, _ = m.macro_segment_ppl(nll, torch.ones(1, 6, dtype=torch.bool), mode)
    assert lengths_of(seg[0]) == want


@each
def test_lengths_leave_a_tail(m):
    """The paper's set {2, 3, 5, 10} three times covers 60 tokens."""
    made = torch.Generator().manual_seed(0)
    base = torch.tensor([2, 3, 5, 10] * 3, dtype=torch.int32)
    drawn = base[torch.randperm(12, generator=made)][None]
    seg, nseg = m.macro_segment_lengths(torch.ones(1, 100, dtype=torch.bool), drawn)
    assert lengths_of(seg[0]) == [*drawn[0].tolist(), 40] and nseg.tolist() == [13]
    seg, _ = m.macro_segment_lengths(torch.ones(1, 100, dtype=torch.bool), drawn, "recycle")
    whole = drawn[0].repeat(2)
    ends = whole.cumsum(0).clamp_max(100).unique()
    assert lengths_of(seg[0]) == ends.diff(prepend=torch.zeros(1, dtype=ends.dtype)).tolist()


@each
def test_starts_and_holes(m):
    mask = torch.tensor([[0, 1, 1, 0, 1, 1, 0]]).bool()
    starts = torch.tensor([[1, 0, 0, 1, 0, 1, 1]]).bool()
    assert m.macro_segment_starts(starts, mask)[0].tolist() == [[-1, 0, 0, -1, 0, 1, -1]]
    assert m.macro_segment_starts(starts, mask, holes="split")[0].tolist() == [
        [-1, 0, 0, -1, 1, 2, -1]
    ]
    with pytest.raises(ValueError, match="holes"):
        m.macro_segment_starts(starts, mask, holes="error")
