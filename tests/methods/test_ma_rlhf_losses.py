# SPDX-License-Identifier: Apache-2.0
"""MA-RLHF's losses of an experience: denominators of shards, dual clipping, empty batches, bad input."""

import itertools
import math
import warnings

import pytest
import torch
from ma_rlhf_cases import NAN, experience, moved, rollout

from tenfold.ma_rlhf import policy_loss, value_loss

MODES = list(itertools.product(("token", "joint", "geo_mean"), ("macro", "length"),
                               ("token_mean", "seq_mean_token_mean")))  # fmt: skip


def graded(f, config, exp, new, **counts):
    new = new.clone().requires_grad_()
    loss, metrics = f(config, exp, new, **counts)
    loss.backward()
    return loss.detach(), new.grad, metrics


class TestShards:
    """Losses of shards with the counts of the whole add up to the loss of the whole, gradients too."""

    SPLITS = (
        [slice(0, 6)],
        [slice(0, 1), slice(1, 6)],
        [slice(0, 2), slice(2, 2), slice(2, 4), slice(4, 6)],
    )

    def check(self, f, config, exp):
        new = moved(exp)
        loss, grad, _ = graded(f, config, exp, new)
        counts = exp.counts()
        for split in self.SPLITS:
            parts = [exp.rows(s) for s in split]
            found = {k: sum(p.counts()[k] for p in parts) for k in counts}
            assert found == counts
            made = [graded(f, config, p, new[s], **counts) for p, s in zip(parts, split)]
            torch.testing.assert_close(sum(m[0] for m in made), loss, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(torch.cat([m[1] for m in made]), grad, rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize(("ratio", "weight", "agg"), MODES)
    def test_policy(self, ratio, weight, agg):
        data = rollout(rows=6, seed=3, lengths=[13, 0, 4, 7, 1, 9])
        self.check(
            policy_loss, *experience(data, n=3, ratio=ratio, weight=weight, agg=agg, dual_clip=1.5)
        )

    @pytest.mark.parametrize("agg", ["token_mean", "seq_mean_token_mean"])
    @pytest.mark.parametrize("target", ["token", "macro"])
    def test_value(self, target, agg):
        data = rollout(rows=6, seed=3, lengths=[13, 0, 4, 7, 1, 9])
        self.check(value_loss, *experience(data, n=3, critic_target=target, agg=agg))

    def test_missing_and_negative_counts(self):
        config, exp = experience(n=3)
        new = moved(exp)
        with pytest.raises(
            ValueError,
            match="mean over tokens of the whole batch: pass tokens=, got only sequences",
        ):
            policy_loss(config, exp, new, sequences=4)
        with pytest.raises(ValueError, match="mean over macros"):
            policy_loss(config.with_changes(ratio="joint"), exp, new, tokens=4)
        with pytest.raises(ValueError, match="mean over sequences"):
            policy_loss(config.with_changes(agg="seq_mean_token_mean"), exp, new, tokens=4)
        with pytest.raises(ValueError, match="mean over macros"):
            value_loss(config.with_changes(critic_target="macro"), exp, new, tokens=4)
        with pytest.raises(ValueError, match="tokens must be >= 0, got -1"):
            value_loss(config, exp, new, tokens=-1)


class TestAggregation:
    def test_sequences_count_alike(self):
        data = rollout(rows=3, lengths=[13, 2, 5])
        config, exp = experience(data, agg="seq_mean_token_mean")
        new = moved(exp)
        rows = [policy_loss(config, exp.rows([r]), new[r : r + 1])[0] for r in range(3)]
        torch.testing.assert_close(policy_loss(config, exp, new)[0], sum(rows) / 3)

    def test_terms_by_hand(self):
        """Joint and geometric ratios, weights by macro action and by length, of one random batch."""
        config, exp = experience(rollout(rows=4, seed=6), n=4)
        new = moved(exp)
        for ratio, weight in itertools.product(("joint", "geo_mean"), ("macro", "length")):
            terms, weights = [], []
            for b in range(4):
                for m in range(int(exp.nseg[b])):
                    at = exp.seg[b] == m
                    d = (new - exp.logp_old)[b, at]
                    q = (d.sum() if ratio == "joint" else d.mean()).exp()
                    a = exp.adv_m[b, m]
                    terms.append(torch.maximum(-a * q, -a * q.clamp(0.9, 1.3)))
                    weights.append(float(at.sum()) if weight == "length" else 1.0)
            w = torch.tensor(weights)
            want = (torch.stack(terms) * w).sum() / w.sum()
            changed = config.with_changes(ratio=ratio, weight=weight, eps_lo=0.1, eps_hi=0.3)
            torch.testing.assert_close(
                policy_loss(changed, exp, new)[0], want, rtol=1e-5, atol=1e-6
            )


class TestDualClip:
    @pytest.mark.parametrize("ratio", ["token", "joint", "geo_mean"])
    def test_formula(self, ratio):
        """min(clipped surrogate, -A c) where A < 0, per term."""
        config, exp = experience(
            rollout(rows=5, seed=2), n=3, ratio=ratio, weight="length", dual_clip=1.5
        )
        new = moved(exp, size=1.0)
        got, grad, metrics = graded(policy_loss, config, exp, new)
        terms, weights, bounded = [], [], torch.zeros_like(exp.mask)
        for b in range(5):
            for j in exp.mask[b].nonzero()[:, 0].tolist():
                at = (exp.seg[b] == exp.seg[b, j]) if ratio != "token" else torch.arange(13) == j
                d = (new - exp.logp_old)[b, at]
                q, a = (d.mean() if ratio == "geo_mean" else d.sum()).exp(), exp.adv[b, j]
                plain = torch.maximum(-a * q, -a * q.clamp(0.8, 1.2))
                bounded[b, j] = a < 0 and q > 1.5
                terms.append(torch.minimum(plain, -1.5 * a) if a < 0 else plain)
                weights.append(1.0)
        torch.testing.assert_close(got, torch.stack(terms).mean(), rtol=1e-5, atol=1e-6)
        assert bounded.any() and not grad[bounded].any()
        free, want, _ = graded(policy_loss, config.with_changes(dual_clip=None), exp, new)
        torch.testing.assert_close(grad[~bounded], want[~bounded], rtol=1e-5, atol=1e-8)
        assert free > got
        share = bounded.sum() / exp.mask.sum()
        torch.testing.assert_close(metrics["dual_clip"], share)

    def test_without_reach_nothing_changes(self):
        config, exp = experience(rollout(rows=5, seed=2), n=3)
        new = moved(exp)
        one, two = (policy_loss(config.with_changes(dual_clip=c), exp, new)[0] for c in (None, 1e6))
        assert torch.equal(one, two)


class TestMetrics:
    def test_policy(self):
        config, exp = experience(rollout(rows=5, seed=2), eps_lo=0.1, eps_hi=0.25)
        new = moved(exp)
        _, metrics = policy_loss(config, exp, new)
        on, d = exp.mask, new - exp.logp_old
        q, a = d[on].exp(), exp.adv[on]
        want = {"clip_high": ((a > 0) & (q > 1.25)).float().mean(), "clip_low": ((a < 0) & (q < 0.9)).float().mean(),
                "ratio_mean": q.mean(), "ratio_max": q.max(), "kl_old_new": -d[on].mean(),
                "count": on.sum().float()}  # fmt: skip
        assert metrics.keys() == want.keys()
        for name, value in want.items():
            torch.testing.assert_close(metrics[name], value, rtol=1e-5, atol=1e-6, msg=name)
            assert not metrics[name].requires_grad

    def test_value(self):
        config, exp = experience(rollout(rows=5, seed=2))
        new = moved(exp)
        _, metrics = value_loss(config, exp, new)
        error = (new - exp.ret)[exp.mask].square().mean()
        torch.testing.assert_close(metrics["error"], error)
        assert metrics["count"] == exp.mask.sum() and 0 <= metrics["clip"] <= 1

    def test_unclipped_values(self):
        config, exp = experience(rollout(rows=5, seed=2), value_clip=None)
        new = moved(exp, size=5.0)
        loss, metrics = value_loss(config, exp, new)
        torch.testing.assert_close(loss, 0.5 * (new - exp.ret)[exp.mask].square().mean())
        assert metrics["clip"] == 0


class TestEmpty:
    @pytest.mark.parametrize("f", [policy_loss, value_loss])
    @pytest.mark.parametrize("target", ["token", "macro"])
    def test_no_valid_token(self, f, target):
        config, exp = experience(
            rollout(rows=3, lengths=[0, 0, 0]), dual_clip=2.0, critic_target=target
        )
        new = torch.full((3, 13), NAN, requires_grad=True)
        with pytest.warns(UserWarning, match="no valid token in the batch: the loss is 0"):
            loss, metrics = f(config, exp, new)
        loss.backward()
        assert loss == 0 and torch.equal(new.grad, torch.zeros(3, 13))
        assert all(math.isfinite(x) for x in metrics.values())

    def test_an_empty_shard_is_nothing_special(self):
        config, exp = experience(rollout(rows=2, lengths=[0, 0]))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loss, _ = policy_loss(config, exp, torch.zeros(2, 13), tokens=7)
        assert loss == 0


class TestBadInput:
    @pytest.mark.parametrize("f", [policy_loss, value_loss])
    def test_tensors(self, f):
        config, exp = experience()
        with pytest.raises(ValueError, match=r"must be \[5, 13\] as the experience, got \[5, 12\]"):
            f(config, exp, torch.zeros(5, 12))
        with pytest.raises(TypeError, match=r"_new must be floating, got torch.int64"):
            f(config, exp, torch.zeros(5, 13, dtype=torch.long))
        with pytest.raises(ValueError, match="_new is on meta, the experience on cpu"):
            f(config, exp, torch.zeros(5, 13, device="meta"))

    def test_no_critic(self):
        data = rollout() | {"value_old": None, "group": torch.zeros(5, dtype=torch.long)}
        config, exp = experience(data, advantage="rloo", group_size=2)
        assert policy_loss(config, exp, moved(exp))[0].isfinite()
        with pytest.raises(ValueError, match="advantage='rloo' has no critic to train"):
            value_loss(config, exp, moved(exp))
