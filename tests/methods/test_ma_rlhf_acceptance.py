# SPDX-License-Identifier: Apache-2.0
"""MA-RLHF's acceptance checks (section 9 of its specification) on the package; fixture F's numbers.

The ops' own numbers are in test_ma_rlhf_numbers.py, programs in test_ma_rlhf_programs.py, peers' real functions in
tests/integrations.
"""

import itertools

import pytest
import torch
from ma_rlhf_cases import (
    assert_same,
    experience,
    moved,
    rollout,
    row_of,
    token_gae,
    token_rewards,
    wider,
)

from tenfold import ops
from tenfold.ma_rlhf import MARLHFConfig, make_segmenter, policy_loss, prepare, value_loss
from tenfold.ma_rlhf.config import SIGMAS

V = [0.2, 0.4, 0.6, 0.8, 1.0]
K = [0.1, 0.3, -0.2, 0.4, 0.0]
KINDS = {
    "fixed": {},
    "bandit": {"n": None},
    "tokens": {"n": 1},
    "isolated": {"isolate_last": True, "n": 3},
    "phantom": {"isolate_last": True, "phantom_step": True, "n": 2, "lam": 0.7},
    "ppl": {"termination": "ppl", "isolate_last": True},
    "sigma": {"reward_reduce": "sigma", "sigma": "unit"},
    "discounted": {"discount": "per_token", "gamma": 0.9, "kl": "k3"},
    "late": {"sigma": "position", "kl": "k2", "n": 4},
}


def fixture(dtype=torch.float32, **settings):
    one = torch.tensor([K], dtype=dtype)
    data = {"mask": torch.ones(1, 5, dtype=torch.bool), "logp_old": one, "logp_ref": torch.zeros_like(one),
            "value_old": torch.tensor([V], dtype=dtype), "score": torch.tensor([2.0], dtype=dtype)}  # fmt: skip
    return experience(data, **({"n": 2, "beta": 0.5, "lam": 0.5} | settings))


def close(got, want, atol=2e-6):
    torch.testing.assert_close(
        got.flatten().double(), torch.tensor(want).double(), rtol=0, atol=atol
    )


class TestFixture:
    @pytest.mark.parametrize(
        ("sigma", "want"),
        [("equal", [0.3, 0.7, 1]), ("unit", [0.4, 0.8, 1]), ("position", [1 / 3, 0.73333, 1]),
         ("position_early", [0.26667, 0.66667, 1])],
    )  # fmt: skip
    def test_1_pooled_values(self, sigma, want):
        _, exp = fixture(sigma=sigma)
        assert exp.seg.tolist() == [[0, 0, 1, 1, 2]] and exp.nseg.tolist() == [3]
        close((exp.ret_m - exp.adv_m)[:, :3], want, atol=1e-5)

    def test_2_sum_rewards(self):
        _, exp = fixture()
        close(exp.adv_m, [0.55, 0.7, 1, 0, 0])
        close(exp.ret_m, [0.85, 1.4, 2, 0, 0])
        close(exp.adv, [0.55, 0.55, 0.7, 0.7, 1])
        close(exp.ret, [0.85, 0.85, 1.4, 1.4, 2])
        close(exp.kl_row, [0.12])
        close(exp.kl_response, [0.6])

    def test_3_sigma_rewards(self):
        _, exp = fixture(reward_reduce="sigma", isolate_last=True)
        assert exp.seg.tolist() == [[0, 0, 1, 1, 2]]
        close(exp.adv_m, [0.675, 0.75, 1, 0, 0])
        _, exp = fixture(reward_reduce="sigma", isolate_last=True, phantom_step=True)
        close(exp.adv, [0.3, 0.3, 0, 0, 1])  # and 1.5 of the empty step itself
        close(exp.ret, [0.6, 0.6, 0.7, 0.7, 2])
        assert exp.seg.tolist() == [[0, 0, 1, 1, 2]] and exp.nseg.tolist() == [3]

    def test_4_tokens(self):
        _, exp = fixture(n=1)
        close(exp.adv, [0.3125, 0.325, 0.55, 0.5, 1])
        close(exp.ret, [0.5125, 0.725, 1.15, 1.3, 2])

    @pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
    def test_5_one_macro_action(self, lam):
        _, exp = fixture(n=None, lam=lam)
        close(exp.adv, [1.1] * 5)
        close(exp.ret, [1.7] * 5)

    def test_6_discount_per_token(self):
        _, exp = fixture(discount="per_token", gamma=0.9)
        close(exp.adv_m[:, :3], [0.258175, 0.435, 1])
        _, rewards = fixture(discount="per_token", gamma=0.9, lam=0.0)
        later = torch.tensor([0.9**2 * 0.7, 0.9**2 * 1.0, 0.0])  # lengths 2, 2, 1
        close(rewards.ret_m[0, :3] - later, [-0.185, -0.08, 2])

    @pytest.mark.parametrize(
        ("ratio", "weight", "want"),
        [("token", "macro", -0.67700), ("joint", "macro", -0.70033), ("joint", "length", -0.64040),
         ("geo_mean", "length", -0.68533)],
    )  # fmt: skip
    def test_7_policy_loss(self, ratio, weight, want):
        config, exp = fixture(ratio=ratio, weight=weight)
        new = exp.logp_old + torch.tensor([[1.1, 1.3, 0.9, 0.7, 1.0]]).log()
        assert policy_loss(config, exp, new)[0].item() == pytest.approx(want, abs=6e-6)

    def test_8_value_loss(self):
        config, exp = fixture()
        new = torch.tensor([[0.3, 0.4, 0.6, 1.2, 0.5]])
        assert value_loss(config, exp, new)[0].item() == pytest.approx(0.35550, abs=1e-6)
        macro = config.with_changes(critic_target="macro")
        assert value_loss(macro, exp, new)[0].item() == pytest.approx(0.45833, abs=4e-6)


class TestTokenLevel:
    """Check 4 for random inputs: n = 1 is ordinary PPO, whatever sigma and reward mode."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
    @pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
    def test_gae(self, lam, gamma, dtype):
        data = rollout(rows=6, seed=3, dtype=dtype)
        modes = itertools.product(SIGMAS, ("sum", "sigma"), ("per_macro", "per_token"))
        made = [
            experience(
                data, n=1, lam=lam, gamma=gamma, sigma=s, reward_reduce=r, discount=d, beta=0.3
            )[1]
            for s, r, d in modes
        ]
        for row in range(6):
            on = data["mask"][row]
            value = data["value_old"][row, on].double()
            want = token_gae(value, token_rewards(data, row, 0.3), lam, gamma)
            for exp in made:
                for got, right in ((exp.adv, want), (exp.ret, want + value)):
                    assert (got[row, on] - right).abs().max() <= 1e-6 * right.abs().max().clamp_min(
                        1
                    )
                    assert not got[row, ~on].any()

    def test_ratios(self):
        config, exp = experience(rollout(rows=6, seed=4), n=1)
        made = []
        for ratio, weight in itertools.product(("token", "joint", "geo_mean"), ("macro", "length")):
            new = moved(exp).requires_grad_()
            loss, _ = policy_loss(config.with_changes(ratio=ratio, weight=weight), exp, new)
            loss.backward()
            made.append((loss.detach(), new.grad))
        d = moved(exp) - exp.logp_old
        q = d.exp()
        terms = torch.maximum(-exp.adv * q, -exp.adv * q.clamp(0.8, 1.2))[exp.mask]
        for loss, grad in made:
            torch.testing.assert_close(loss, terms.mean(), rtol=0, atol=1e-6)
            torch.testing.assert_close(grad, made[0][1], rtol=1e-5, atol=1e-8)
            assert not grad[~exp.mask].any()


class TestRewardsToGo:
    """Check 9: with gamma = lam = 1 values cancel."""

    @pytest.mark.parametrize("kind", ["fixed", "bandit", "tokens", "isolated", "ppl", "late"])
    def test_first_return_is_the_sum(self, kind):
        data = rollout(rows=4, seed=5)
        settings = {k: v for k, v in KINDS[kind].items() if k != "kl"}
        _, exp = experience(data, **(settings | {"lam": 1.0, "beta": 0.4}))
        for row in range(4):
            rewards = token_rewards(data, row, 0.4)
            to_go = rewards.flip(0).cumsum(0).flip(0)
            on = data["mask"][row]
            seg = exp.seg[row, on]
            begins = torch.cat([torch.tensor([True]), seg[1:] != seg[:-1]])
            count = exp.nseg[row]
            got = exp.ret_m[row, :count].double()
            torch.testing.assert_close(got, to_go[begins], rtol=0, atol=5e-6)
            assert abs(got[0] - rewards.sum()) < 5e-6


class TestLengths:
    @pytest.mark.parametrize(
        ("n", "length", "isolate", "want"),
        [(5, 8, True, [5, 2, 1]), (5, 11, True, [5, 5, 1]), (6, 6, True, [5, 1]), (5, 11, False, [5, 5, 1]),
         (5, 10, False, [5, 5]), (100, 7, False, [7])],
    )  # fmt: skip
    def test_10_fixed(self, n, length, isolate, want):
        cut = make_segmenter(MARLHFConfig(n=n, isolate_last=isolate))
        seg, nseg = cut(torch.arange(12)[None] < length)
        assert torch.bincount(seg[seg >= 0]).tolist() == want and nseg.tolist() == [len(want)]

    @pytest.mark.parametrize(
        ("mode", "want"),
        [("macro_prefix", [2, 4]), ("response_prefix", [2, 4]), ("token_rise", [2, 3, 1]),
         ("token_rise_ref", [1, 3, 1, 1])],
    )  # fmt: skip
    def test_11_perplexity(self, mode, want):
        cut = make_segmenter(MARLHFConfig(termination="ppl", ppl_mode=mode))
        logp = -torch.tensor([[5, 4, 6, 3, 2, 2.5]]).log()
        seg, _ = cut(torch.ones(1, 6, dtype=torch.bool), logp_ref=logp)
        assert torch.bincount(seg[0]).tolist() == want


@pytest.mark.parametrize("kind", KINDS)
class TestInvariances:
    """Check 14."""

    def settings(self, kind):
        return {"beta": 0.3, "lam": 0.8} | KINDS[kind]

    def test_batch_is_its_rows(self, kind):
        data = rollout(seed=7)
        _, whole = experience(data, **self.settings(kind))
        for row in range(5):
            _, one = experience(row_of(data, slice(row, row + 1)), **self.settings(kind))
            assert_same(one, whole.rows(slice(row, row + 1)), rtol=0, atol=0)

    def test_padding_means_nothing(self, kind):
        data = rollout(seed=8)
        _, narrow = experience({k: torch.where(data["mask"], v, 0.0) if v.dim() == 2 and v.is_floating_point() else v
                                for k, v in data.items()}, **self.settings(kind))  # fmt: skip
        config, wide = experience(wider(data, 6), **self.settings(kind))
        for name in ("seg", "adv", "ret", "adv_m", "ret_m"):
            here = getattr(wide, name)
            assert torch.equal(here[:, :13], getattr(narrow, name))
            assert (here[:, 13:] == (-1 if name == "seg" else 0)).all()
        for f in (policy_loss, value_loss):
            news = [moved(wide), torch.where(wide.mask, moved(wide), 7.0)[:, :13].contiguous()]
            losses, grads = [], []
            for exp, new in zip((wide, narrow), news):
                new.requires_grad_()
                loss, _ = f(config, exp, new)
                loss.backward()
                losses.append(loss.item())
                grads.append(new.grad[:, :13])
            assert losses[0] == losses[1] and torch.equal(*grads)

    def test_rows_permute(self, kind):
        data = rollout(seed=9)
        order = torch.tensor([3, 0, 4, 1, 2])
        _, plain = experience(data, **self.settings(kind))
        _, mixed = experience(row_of(data, order), **self.settings(kind))
        assert_same(mixed, plain.rows(order), rtol=0, atol=0)

    @pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64])
    def test_masks(self, kind, dtype):
        data = rollout(seed=10)
        _, want = experience(data, **self.settings(kind))
        _, got = experience(data | {"mask": data["mask"].to(dtype)}, **self.settings(kind))
        assert_same(got, want, rtol=0, atol=0)

    def test_bf16(self, kind):
        data = rollout(rows=8, width=40, seed=11, scale=0.5)
        if (
            kind == "ppl"
        ):  # cuts are decided by comparisons: the same ones, of numbers that bf16 holds
            data["logp_ref"] = data["logp_ref"].bfloat16().float()
        config, want = experience(data, **self.settings(kind))
        low = {k: v.bfloat16() if v.is_floating_point() else v for k, v in data.items()}
        _, got = experience(low, **self.settings(kind))
        assert got.adv.dtype == torch.float32
        for name in ("adv", "ret", "adv_m", "ret_m"):
            a, b = getattr(got, name), getattr(want, name)
            assert (a - b).norm() <= 1e-2 * b.norm(), name
        new = moved(want, size=0.1)
        for f in (policy_loss, value_loss):
            full, half = f(config, want, new)[0], f(config, want, new.bfloat16())[0]
            assert half.dtype == torch.float32 and abs(half - full) <= 1e-2 * abs(full)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_constant_values_pool_to_themselves(sigma):
    seg, _ = ops.macro_segment_fixed(torch.ones(2, 11, dtype=torch.bool), 4)
    made = ops.macro_pool(torch.full((2, 11), 0.7), seg, 3, sigma)
    torch.testing.assert_close(made, torch.full((2, 3), 0.7))


class TestGradients:
    """Check 15, through prepared experiences, in float64."""

    @pytest.mark.parametrize("agg", ["token_mean", "seq_mean_token_mean"])
    @pytest.mark.parametrize("weight", ["macro", "length"])
    @pytest.mark.parametrize("ratio", ["token", "joint", "geo_mean"])
    @pytest.mark.parametrize("dual", [None, 1.3])
    def test_policy(self, ratio, weight, agg, dual):
        config, exp = experience(rollout(rows=3, width=7, dtype=torch.float64), n=3, ratio=ratio, weight=weight,
                                 agg=agg, dual_clip=dual)  # fmt: skip
        assert exp.adv.dtype == torch.float64
        new = torch.where(exp.mask, moved(exp), 0.0).requires_grad_()
        assert torch.autograd.gradcheck(lambda x: policy_loss(config, exp, x)[0], (new,))

    @pytest.mark.parametrize("agg", ["token_mean", "seq_mean_token_mean"])
    @pytest.mark.parametrize("target", ["token", "macro"])
    @pytest.mark.parametrize("sigma", SIGMAS)
    @pytest.mark.parametrize("clip", [0.2, None])
    def test_value(self, target, sigma, agg, clip):
        config, exp = experience(rollout(rows=3, width=7, dtype=torch.float64), n=3, critic_target=target, sigma=sigma,
                                 agg=agg, value_clip=clip)  # fmt: skip
        new = torch.where(
            exp.mask, exp.value_old + 0.3 * torch.randn_like(exp.value_old), 0.0
        ).requires_grad_()
        assert torch.autograd.gradcheck(lambda x: value_loss(config, exp, x)[0], (new,))

    @pytest.mark.parametrize("ratio", ["token", "joint", "geo_mean"])
    def test_zero_where_clipped(self, ratio):
        config, exp = experience(rollout(rows=4, seed=2), n=2, ratio=ratio)
        for sign in (1, -1):  # far outside, on the side where the clip is active
            new = (exp.logp_old + sign * 3.0 * exp.adv.sign()).requires_grad_()
            policy_loss(config, exp, new)[0].backward()
            assert not new.grad.any() if sign > 0 else new.grad[exp.adv != 0].abs().min() > 0

    def test_zero_beyond_the_bound(self):
        config, exp = experience(rollout(rows=2))
        new = (exp.logp_old - 25.0 * exp.adv.sign()).requires_grad_()
        policy_loss(config, exp, new)[0].backward()
        assert not new.grad.any()

    def test_values_zero_where_clipped(self):
        config, exp = experience(rollout(rows=4, seed=2))
        toward = torch.where(exp.mask, (exp.ret - exp.value_old).sign(), 0.0)
        gap = (exp.ret - exp.value_old).abs()
        new = (exp.value_old + toward * torch.minimum(gap, torch.tensor(1.0))).requires_grad_()
        value_loss(config, exp, new)[0].backward()
        assert not new.grad[exp.mask & (gap > 0.2)].any()


def test_no_gradient_leaks_into_the_rollout():
    data = rollout()
    for name in ("logp_old", "logp_ref", "value_old", "score"):
        data[name].requires_grad_()
    config = MARLHFConfig()
    exp = prepare(config, make_segmenter(config), **data)
    assert not any(
        getattr(exp, n).requires_grad for n in ("adv", "ret", "logp_old", "value_old", "score")
    )
    assert exp.logp_old.isfinite().all() and data["logp_old"].isnan().any()
