# SPDX-License-Identifier: Apache-2.0
"""MA-RLHF's ``prepare``: whitening, no critic, cut-off responses, holes, dropped rows, ranks, and bad input."""

import threading
import warnings

import pytest
import torch
from ma_rlhf_cases import NAN, assert_same, experience, rollout, row_of, token_gae, token_rewards

from tenfold.ma_rlhf import MARLHFConfig, advantages, make_segmenter, prepare, response_mask


def white(x):
    return (x - x.mean()) * torch.rsqrt(x.var() + 1e-8)


class TestWhitening:
    def test_none_is_the_default(self):
        _, plain = experience()
        assert abs(plain.adv[plain.mask].mean()) > 1e-3

    @pytest.mark.parametrize("mode", ["token", "macro"])
    def test_formula(self, mode):
        data = rollout(rows=6, seed=1)
        _, plain = experience(data, n=3)
        _, made = experience(data, n=3, whiten_adv=mode)
        inside = torch.arange(13) < plain.nseg[:, None]
        there, x, got = (
            (plain.mask, plain.adv, made.adv)
            if mode == "token"
            else (inside, plain.adv_m, made.adv_m)
        )
        torch.testing.assert_close(got[there], white(x[there]))
        assert not made.adv[~made.mask].any() and not made.adv_m[~inside].any()
        at = made.seg.long().clamp_min(0)
        assert torch.equal(made.adv, torch.where(made.mask, made.adv_m.gather(1, at), 0.0))
        assert torch.equal(made.ret, plain.ret)

    def test_group(self):
        data, group = rollout(rows=6, seed=1), torch.tensor([2, 0, 2, 0, 2, 0])
        _, plain = experience(data, n=3)
        _, made = experience(data | {"group": group}, n=3, whiten_adv="group")
        inside = torch.arange(13) < plain.nseg[:, None]
        for g in (0, 2):
            there = inside & (group == g)[:, None]
            torch.testing.assert_close(made.adv_m[there], white(plain.adv_m[there]))

    @pytest.mark.parametrize("mode", ["token", "macro", "group"])
    def test_fewer_than_two_are_only_centred(self, mode):
        data = row_of(rollout(rows=2, lengths=[1, 1]), slice(0, 1)) | {"group": torch.tensor([0])}
        _, made = experience(data, whiten_adv=mode)
        assert made.adv[0].tolist() == [0.0] * 13
        empty = data | {"mask": torch.zeros_like(data["mask"])}
        _, made = experience(empty, whiten_adv=mode)
        assert not made.adv.any() and made.adv.isfinite().all()

    def test_constant_advantages_become_zero(self):
        data = rollout(rows=3, lengths=[4, 4, 4])
        data |= {
            "value_old": torch.zeros(3, 13),
            "logp_ref": data["logp_old"],
            "score": torch.full((3,), 0.3),
        }
        _, made = experience(data, n=None, whiten_adv="macro")
        assert not made.adv.any()


class TestRanks:
    """Statistics over ranks: two threads that sum their tables are two ranks."""

    @pytest.mark.parametrize(
        "settings",
        [{"whiten_adv": "token"}, {"whiten_adv": "macro"}, {"whiten_adv": "group"},
         {"advantage": "rloo", "group_size": 2}, {"advantage": "grpo", "group_size": 2},
         {"advantage": "grpo", "group_size": 2, "whiten_adv": "macro"}],
        ids=str,
    )  # fmt: skip
    @pytest.mark.parametrize("split", [0, 2, 5])
    def test_same_as_one(self, settings, split):
        data = rollout(rows=6, seed=2) | {"group": torch.tensor([0, 1, 2, 0, 1, 2])}
        _, want = experience(data, n=3, **settings)
        barrier, tables, made = threading.Barrier(2, timeout=30), {}, {}

        def rank(r, part):
            def summed(table):
                tables[r] = table
                barrier.wait()
                total = tables[0] + tables[1]
                barrier.wait()
                return total

            more = {"groups": 3, "reduce": summed}
            made[r] = experience(part | more, n=3, **settings)[1]

        parts = [row_of(data, slice(0, split)), row_of(data, slice(split, 6))]
        workers = [threading.Thread(target=rank, args=(r, p)) for r, p in enumerate(parts)]
        [w.start() for w in workers]
        [w.join() for w in workers]
        assert_same(made[0], want.rows(slice(0, split)), rtol=1e-6, atol=1e-7)
        assert_same(made[1], want.rows(slice(split, 6)), rtol=1e-6, atol=1e-7)


class TestWithoutCritic:
    def data(self):
        return rollout(rows=6, seed=4) | {"group": torch.tensor([0, 0, 0, 1, 1, 2])}

    def totals(self, data, beta=0.05):
        return torch.stack([token_rewards(data, row, beta).sum() for row in range(6)])

    def test_rloo_is_reward_less_the_others_mean(self):
        data = self.data()
        _, made = experience(data | {"value_old": None}, advantage="rloo", group_size=2, n=None)
        total = self.totals(data)
        want = [total[0] - total[1:3].mean(), total[1] - total[[0, 2]].mean(), total[2] - total[:2].mean(),
                total[3] - total[4], total[4] - total[3], torch.tensor(0.0)]  # fmt: skip
        for row, x in enumerate(want):
            assert made.adv[row, made.mask[row]].unique().numel() <= 1
            assert made.adv[row, 0].item() == pytest.approx(float(x), abs=2e-6)

    def test_grpo_divides_by_the_spread(self):
        data = self.data()
        _, made = experience(data | {"value_old": None}, advantage="grpo", group_size=2, n=None)
        total = self.totals(data)
        want = torch.cat([white(total[:3]), white(total[3:5]), torch.zeros(1)])
        torch.testing.assert_close(made.adv[:, 0].double(), want, rtol=1e-5, atol=1e-6)

    def test_advantage_does_not_depend_on_macro_actions(self):
        data = self.data()
        one, other = (experience(data, advantage="rloo", group_size=2, n=n)[1] for n in (None, 3))
        assert torch.equal(one.adv, other.adv)
        inside = torch.arange(13) < other.nseg[:, None]
        assert torch.equal(other.adv_m, torch.where(inside, other.adv[:, :1], 0.0))

    def test_dropped_rows_are_no_baseline(self):
        data = self.data()
        data["score"][1] = NAN
        _, made = experience(data, advantage="rloo", group_size=2, non_finite="drop")
        total = self.totals(data)
        assert made.adv[0, 0].item() == pytest.approx((total[0] - total[2]).item(), abs=2e-6)
        assert not made.adv[1].any()

    def test_errors(self):
        data = self.data()
        settings = {"advantage": "rloo", "group_size": 2}
        with pytest.raises(ValueError, match=r"advantage='rloo' needs group \[B\]"):
            experience({k: v for k, v in data.items() if k != "group"}, **settings)
        with pytest.raises(ValueError, match="group of at least two rows"):
            experience(data | {"group": torch.arange(6)}, **settings)
        with pytest.raises(ValueError, match="group must be at least 0, got -1 to 4"):
            experience(data | {"group": torch.arange(6) - 1}, **settings)
        with pytest.raises(ValueError, match="below groups = 2, got 0 to 2"):
            experience(data | {"groups": 2}, **settings)
        with pytest.raises(ValueError, match="needs groups, the number"):
            experience(data | {"reduce": lambda x: x}, **settings)
        with pytest.raises(TypeError, match="group must be int32 or int64"):
            experience(data | {"group": torch.zeros(6)}, **settings)
        with pytest.raises(ValueError, match="value_old is None, but advantage='gae'"):
            experience(data | {"value_old": None})


class TestTruncation:
    def test_future_of_a_cut_response(self):
        data = rollout(rows=4, seed=6, lengths=[13, 9, 13, 5])
        cut = torch.tensor([True, False, False, True])
        more = {"truncated": cut, "bootstrap": torch.tensor([0.7, NAN, NAN, -0.4])}
        _, made = experience(
            data | more, n=1, bootstrap_truncated=True, lam=0.9, gamma=0.8, beta=0.2
        )
        _, plain = experience(data, n=1, lam=0.9, gamma=0.8, beta=0.2)
        for row, last in enumerate((0.7, 0.0, 0.0, -0.4)):
            on = data["mask"][row]
            want = token_gae(
                data["value_old"][row, on].double(), token_rewards(data, row, 0.2), 0.9, 0.8, last
            )
            torch.testing.assert_close(made.adv[row, on].double(), want, rtol=0, atol=5e-6)
            assert torch.equal(made.adv[row], plain.adv[row]) == (not cut[row])

    def test_not_asked_for(self):
        data = rollout(rows=4, seed=6)
        more = {"truncated": torch.ones(4, dtype=torch.bool), "bootstrap": torch.full((4,), NAN)}
        assert_same(experience(data | more)[1], experience(data)[1], rtol=0, atol=0)

    def test_errors(self):
        data, cut = rollout(rows=4), torch.ones(4, dtype=torch.bool)
        with pytest.raises(ValueError, match=r"bootstrap_truncated=True needs truncated \[B\]"):
            experience(data, bootstrap_truncated=True)
        with pytest.raises(ValueError, match=r"bootstrap_truncated=True needs bootstrap \[B\]"):
            experience(data | {"truncated": cut}, bootstrap_truncated=True)
        with pytest.raises(ValueError, match=r"bootstrap must be \[4\] on cpu, got \[3\]"):
            experience(
                data | {"truncated": cut, "bootstrap": torch.zeros(3)}, bootstrap_truncated=True
            )
        with pytest.raises(ValueError, match=r"not finite in rows \[2\]"):
            future = torch.tensor([0.0, 0.0, NAN, 0.0])
            experience(data | {"truncated": cut, "bootstrap": future}, bootstrap_truncated=True)


class TestHoles:
    """Tool output inside a response: masked, numbered over, and crossed by GAE without decay."""

    def data(self):
        data = rollout(rows=2, lengths=[13, 13], seed=3)
        data["mask"][0, 4:7] = False
        for name in ("logp_old", "logp_ref", "value_old"):
            data[name][0, 4:7] = NAN
        return data

    @pytest.mark.parametrize("n", [1, 3, None])
    def test_bridged_as_if_it_were_not_there(self, n):
        data = self.data()
        _, made = experience(data, n=n, gamma=0.9, discount="per_token")
        keep = [0, 1, 2, 3, *range(7, 13)]
        short = {k: v[:1, keep] if v.dim() == 2 else v[:1] for k, v in data.items()}
        _, want = experience(short, n=n, gamma=0.9, discount="per_token")
        assert torch.equal(made.adv[0, keep], want.adv[0]) and torch.equal(
            made.seg[0, keep], want.seg[0]
        )
        assert not made.adv[0, 4:7].any() and (made.seg[0, 4:7] == -1).all()

    def test_split(self):
        _, made = experience(self.data(), n=3, holes="split")  # n counts on across the hole
        assert made.seg[0].tolist() == [0, 0, 0, 1, -1, -1, -1, 2, 2, 3, 3, 3, 4]

    def test_turns(self):
        _, made = experience(self.data(), termination="turn")
        assert made.seg[0].tolist() == [0, 0, 0, 0, -1, -1, -1, 1, 1, 1, 1, 1, 1]
        assert made.nseg.tolist() == [2, 1]

    def test_error(self):
        with pytest.raises(ValueError, match=r"holes in rows \[0\]"):
            experience(self.data(), holes="error")


class TestRowsLeftOut:
    def test_short_ones(self):
        data = rollout(rows=5, lengths=[0, 1, 2, 3, 9])
        _, made = experience(data, min_response=3)
        assert made.dropped.tolist() == [False, True, True, False, False]
        assert made.nseg.tolist() == [0, 0, 0, 1, 2] and made.counts() == {
            "tokens": 12,
            "sequences": 2,
            "macros": 3,
        }
        assert (
            MARLHFConfig().min_response == 2
        )  # the published code leaves out what is one token or none

    def test_others_do_not_notice(self):
        data = rollout(rows=5, lengths=[0, 1, 2, 3, 9])
        _, made = experience(data, min_response=3)
        _, alone = experience(row_of(data, slice(3, 5)), min_response=3)
        assert_same(made.rows([3, 4]), alone, rtol=0, atol=0)
        for x in (made.adv, made.ret, made.adv_m, made.ret_m, made.logp_old, made.kl_row[:, None]):
            assert not x[:3].any()

    def test_empty_rows_may_have_no_score(self):
        data = rollout(rows=3, lengths=[0, 4, 5])
        data["score"][0] = NAN
        _, made = experience(data)
        assert made.dropped.tolist() == [False] * 3 and made.score[0] == 0 and not made.adv[0].any()

    @pytest.mark.parametrize("name", ["score", "logp_old", "logp_ref", "value_old"])
    @pytest.mark.parametrize("value", [NAN, float("inf")])
    def test_not_finite(self, name, value):
        data = rollout(rows=4, lengths=[5, 6, 7, 8])
        data[name][2 if name == "score" else (2, 3)] = value
        with pytest.raises(
            ValueError, match=r"not finite in rows \[2\] \(1 rows\); non_finite='drop'"
        ):
            experience(data)
        _, made = experience(data, non_finite="drop")
        assert made.dropped.tolist() == [False, False, True, False] and made.nseg[2] == 0
        keep = [0, 1, 3]
        assert_same(made.rows(keep), experience(row_of(data, keep))[1], rtol=0, atol=0)

    def test_no_rows_and_no_columns(self):
        for rows, width in ((0, 7), (3, 0), (0, 0)):
            data = rollout(rows=rows, width=max(width, 1), lengths=[0] * rows)
            data = {k: v[:, :width] if v.dim() == 2 else v for k, v in data.items()}
            for more in ({}, {"isolate_last": True, "phantom_step": True}, {"whiten_adv": "macro"},
                         {"termination": "ppl", "isolate_last": True}):  # fmt: skip
                _, made = experience(data, **more)
                assert made.adv.shape == (rows, width) and made.nseg.tolist() == [0] * rows


class TestPhantom:
    def test_only_where_macro_actions_are_full(self):
        data = rollout(rows=6, seed=5, lengths=[2, 3, 4, 5, 7, 13])
        common = {"n": 2, "isolate_last": True, "lam": 0.6, "gamma": 0.9, "reward_reduce": "sigma"}
        _, plain = experience(data, **common)
        _, made = experience(data, phantom_step=True, **common)
        same = [torch.allclose(made.adv[r], plain.adv[r], rtol=1e-6, atol=1e-7) for r in range(6)]
        assert same == [True, False, True, False, False, False]  # 3, 5, 7, 13 less one are even
        assert torch.equal(made.seg, plain.seg) and torch.equal(made.kl_row, plain.kl_row)

    def test_is_nothing_at_gamma_and_lambda_one(self):
        data = rollout(rows=6, seed=5)
        common = {"n": 1, "isolate_last": True, "lam": 1.0}
        _, plain = experience(data, **common)
        _, made = experience(data, phantom_step=True, **common)
        torch.testing.assert_close(made.adv, plain.adv)

    def test_recurrence(self):
        """At n = 1: the step before the last one loses its bootstrap, and lambda counts once more."""
        data = rollout(rows=1, width=6, lengths=[6], seed=8)
        _, made = experience(
            data, n=1, isolate_last=True, phantom_step=True, lam=0.7, gamma=0.9, beta=0.1
        )
        value, reward = data["value_old"][0].double(), token_rewards(data, 0, 0.1)
        zero = torch.zeros(1, dtype=torch.double)
        want = token_gae(
            torch.cat([value[:5], zero, value[5:]]),
            torch.cat([reward[:5], zero, reward[5:]]),
            0.7,
            0.9,
        )
        torch.testing.assert_close(
            made.adv[0].double(), want[[0, 1, 2, 3, 4, 6]], rtol=0, atol=5e-6
        )


class TestEstimators:
    @pytest.mark.parametrize(
        ("kl", "f"),
        [
            ("k1", lambda k: k),
            ("k2", lambda k: 0.5 * k**2),
            ("k3", lambda k: torch.exp(-k) - 1 + k),
        ],
    )
    def test_kl(self, kl, f):
        data = rollout(rows=3, seed=2)
        config, made = experience(data, kl=kl, lam=1.0, beta=0.4)
        k = torch.where(data["mask"], f((data["logp_old"] - data["logp_ref"]).double()), 0.0)
        torch.testing.assert_close(made.kl_response.double(), k.sum(1), rtol=1e-5, atol=1e-5)
        want = data["score"].double() - 0.4 * k.sum(1)
        torch.testing.assert_close(made.ret[:, 0].double(), want, rtol=1e-5, atol=1e-5)
        del config

    def test_beta_of_a_controller(self):
        data = rollout(rows=3)
        assert_same(
            experience(data | {"beta": 0.7})[1], experience(data, beta=0.7)[1], rtol=0, atol=0
        )
        with pytest.raises(ValueError, match="beta must be a number >= 0, got -1"):
            experience(data | {"beta": -1})

    def test_score_is_clipped_in_the_reward_only(self):
        data = rollout(rows=2, lengths=[4, 4])
        data["score"] = torch.tensor([9.0, -9.0])
        _, made = experience(data, score_clip=2.5, beta=0.0, lam=1.0)
        torch.testing.assert_close(made.ret[:, 0], torch.tensor([2.5, -2.5]))
        assert made.score.tolist() == [9.0, -9.0]


def test_joint_ratios_of_long_macro_actions_warn_once():
    advantages._warn_once.cache_clear()
    data = rollout(rows=2, width=70, lengths=[65, 3])
    for n, many in ((64, 0), (None, 1), (None, 0)):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            experience(data, n=n, ratio="joint")
        assert len(seen) == many
    assert many == 0
    advantages._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="ratio='joint' with macro actions of more than 64 tokens"):
        experience(data, n=None, ratio="joint")


class TestBadInput:
    @pytest.mark.parametrize(
        ("change", "error", "text"),
        [
            ({"mask": torch.ones(13)}, ValueError, r"mask must be \[B, R\], got \[13\]"),
            ({"mask": torch.ones(5, 13)}, TypeError, "mask must be bool or integer, got torch.float32"),
            ({"logp_old": torch.zeros(5, 12)}, ValueError, r"logp_old must be \[5, 13\] as the mask, got \[5, 12\]"),
            ({"logp_ref": torch.zeros(4, 13)}, ValueError, r"logp_ref must be \[5, 13\]"),
            ({"value_old": torch.zeros(5, 13, 1)}, ValueError, r"value_old must be \[5, 13\]"),
            ({"score": torch.zeros(5, 1)}, ValueError, r"score must be \[5\] as the mask, got \[5, 1\]"),
            ({"score": torch.zeros(5, dtype=torch.long)}, TypeError, "score must be floating, got torch.int64"),
            ({"logp_old": torch.zeros(5, 13, dtype=torch.int32)}, TypeError, "logp_old must be floating"),
            ({"value_old": torch.zeros(5, 13, device="meta")}, ValueError, "value_old is on meta, the mask on cpu"),
            ({"ids": torch.zeros(5, 13)}, TypeError, "ids must be int32 or int64, got torch.float32"),
            ({"ids": torch.zeros(5, 20, dtype=torch.long)}, ValueError, r"ids must be \[5, 13\]"),
        ],
    )  # fmt: skip
    def test_tensors(self, change, error, text):
        with pytest.raises(error, match=text):
            experience(rollout() | change)

    @pytest.mark.parametrize(
        ("made", "error", "text"),
        [
            (lambda m: (m.float(), m.sum(1)), TypeError, "seg of the segmenter must be int32 or int64"),
            (lambda m: (m[:, 1:].int(), m.sum(1)), ValueError, r"seg of the segmenter must be \[5, 13\]"),
            (lambda m: (torch.where(m, 0, -1), m.float().sum(1)), TypeError, "nseg of the segmenter must be"),
            (lambda m: (torch.where(m, 0, -1), m.sum(1) * 0 + 2), ValueError, "without gaps, as many as nseg"),
            (lambda m: (torch.where(m, 1, -1), m.any(1).int() * 2), ValueError, "without gaps"),
            (lambda m: (torch.zeros(5, 13).int(), m.any(1).int()), ValueError, "seg must be -1 at masked tokens"),
            (lambda m: (torch.where(m & (m.cumsum(1) > 1), 0, -1), m.any(1).int()), ValueError, "must be -1 at masked"),
            (lambda m: (torch.where(m, (13 - m.cumsum(1)).int() % 2, -1), m.sum(1)), ValueError, "without gaps"),
        ],
    )  # fmt: skip
    def test_segmenters(self, made, error, text):
        data = rollout(lengths=[4, 5, 6, 7, 8])
        with pytest.raises(error, match=text):
            prepare(MARLHFConfig(), lambda mask, **_: made(mask), **data)

    def test_nothing_is_written(self):
        data = rollout()
        before = {k: v.clone() for k, v in data.items()}
        data["score"][0] = NAN
        with pytest.raises(ValueError, match="not finite"):
            experience(data)
        experience(data, non_finite="drop")
        for name in ("mask", "logp_old", "logp_ref", "value_old"):
            torch.testing.assert_close(data[name], before[name], rtol=0, atol=0, equal_nan=True)


class TestResponseMask:
    def test_up_to_the_first_end(self):
        ids = torch.tensor([[5, 6, 2, 0, 0], [5, 2, 6, 2, 0], [5, 6, 7, 8, 9], [5, 0, 7, 0, 0], [2, 2, 2, 2, 2],
                            [0, 0, 0, 0, 0]])  # fmt: skip
        made = response_mask(ids, eos=2, pad=0)
        assert made.sum(1).tolist() == [3, 2, 5, 3, 1, 0]
        assert (made == (torch.arange(5) < made.sum(1, keepdim=True))).all()

    def test_several_ends_and_no_padding(self):
        ids = torch.tensor([[5, 3, 2], [5, 6, 7], [2, 3, 3]])
        assert response_mask(ids, eos=(2, 3)).sum(1).tolist() == [2, 3, 1]

    def test_padding_that_is_the_end(self):
        ids = torch.tensor([[5, 2, 2]])
        for ends in (2, [1, 2]):
            with pytest.raises(
                ValueError, match="pad and eos are both token 2: the last valid token is ambiguous"
            ):
                response_mask(ids, eos=ends, pad=2)
        mask = torch.tensor([[1, 1, 0]])
        assert response_mask(ids, eos=2, pad=2, mask=mask).tolist() == [[True, True, False]]

    def test_errors(self):
        with pytest.raises(ValueError, match=r"ids must be \[B, R\]"):
            response_mask(torch.zeros(3, dtype=torch.long), eos=2)
        with pytest.raises(TypeError, match="ids must be integers"):
            response_mask(torch.zeros(3, 2), eos=2)
        with pytest.raises(ValueError, match=r"mask must be \[1, 3\] as ids"):
            response_mask(torch.zeros(1, 3, dtype=torch.long), eos=2, mask=torch.ones(1, 2))


def test_rows_and_devices():
    _, exp = experience(rollout() | {"ids": torch.arange(65).view(5, 13)})
    assert len(exp) == 5 and exp.length.tolist() == exp.mask.sum(1).tolist()
    for index in ([3, 1], torch.tensor([3, 1]), torch.tensor([False, True, False, True, False])):
        some = exp.rows(index)
        assert len(some) == 2 and some.ids.shape == (2, 13)
    assert exp.rows([3, 1]).ids[:, 0].tolist() == [39, 13]
    assert len(exp.rows([])) == 0 and len(exp.rows(slice(1, 4))) == 3
    assert exp.to("meta").adv.device.type == "meta" and experience()[1].to("cpu").ids is None


def test_reference_preset():
    config = MARLHFConfig.from_preset("reference", min_response=1)
    data = rollout(rows=4, lengths=[11, 8, 6, 1], seed=1)
    exp = prepare(config, make_segmenter(config), **data)
    lengths = [torch.bincount(row[row >= 0]).tolist() for row in exp.seg]
    assert lengths == [[5, 5, 1], [5, 2, 1], [5, 1], [1]]
    # the published code's mean rewards: the score at the last token is whole, the KL a mean
    k = (data["logp_old"] - data["logp_ref"])[0]
    value = data["value_old"][0]
    rewards = torch.stack(
        [-0.05 * k[:5].mean(), -0.05 * k[5:10].mean(), data["score"][0] - 0.05 * k[10]]
    )
    pooled = torch.stack([value[:5].mean(), value[5:10].mean(), value[10]])
    torch.testing.assert_close(exp.adv_m[0, :3], token_gae(pooled, rewards, 0.95, 1.0))
