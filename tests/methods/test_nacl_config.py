# SPDX-License-Identifier: Apache-2.0
"""NaclConfig: the integers of the specification's section 3.2, the presets, and the bad input of section 7.

Elsewhere: a wrong ``proxy_span`` at the press, unsupported models, attention and caches
(test_nacl_press.py), bad input of the ops (tests/ops).
"""

import re

import pytest

from tenfold import nacl
from tenfold.nacl import BudgetPlan, NaclConfig


def integers(config: NaclConfig, length: int) -> tuple[int, ...]:
    plan = config.budget(length)
    assert plan is not None and plan.length == length
    return plan.n_sink, plan.n_recent, plan.n_topk, plan.n_random, plan.num_proxies


class TestProjectArithmetic:
    """Every column worked out by hand: sinks, recents, PTE, RE, proxies."""

    @pytest.mark.parametrize(
        "settings, length, want",
        [
            # floor(0.2 L) = 51, 200, 819, 20000; a tenth of it protected, half of that sinks
            ({"compression_ratio": 0.8}, 257, (2, 3, 46, 0, 25)),
            ({"compression_ratio": 0.8}, 1000, (10, 10, 180, 0, 32)),
            ({"compression_ratio": 0.8}, 4096, (40, 41, 738, 0, 32)),
            ({"compression_ratio": 0.8}, 100_000, (64, 1936, 18_000, 0, 32)),
            ({"keep_tokens": 77}, 1000, (3, 4, 70, 0, 32)),
            ({"keep_tokens": 1}, 1000, (0, 1, 0, 0, 32)),  # at least one token is protected
            ({"keep_tokens": 999}, 1000, (49, 50, 900, 0, 32)),
            # the random part is cut to what is left; the remainder of rounding goes to PTE
            ({"keep_tokens": 100, "random_ratio": 0.9}, 1000, (5, 5, 0, 90, 32)),
            ({"keep_tokens": 100, "random_ratio": 0.29}, 1000, (5, 5, 61, 29, 32)),
            ({"keep_tokens": 7, "random_ratio": 0.5}, 1000, (0, 1, 3, 3, 32)),
            ({"keep_tokens": 100, "protect_ratio": 0.0}, 1000, (0, 1, 99, 0, 32)),
            ({"keep_tokens": 100, "protect_ratio": 1.0}, 1000, (50, 50, 0, 0, 32)),
            ({"keep_tokens": 100, "protect_ratio": 0.5, "sink_tokens": 4}, 1000, (4, 46, 50, 0, 32)),
            # W = clamp(floor(ratio L), 1, min(L, cap))
            ({"keep_tokens": 100, "proxy_ratio": 0.0}, 1000, (5, 5, 90, 0, 1)),
            ({"keep_tokens": 100, "max_proxy": 5000}, 1000, (5, 5, 90, 0, 100)),
            ({"keep_tokens": 100, "proxy_ratio": 1.0, "max_proxy": 5000}, 1000, (5, 5, 90, 0, 1000)),
            ({"keep_tokens": 100, "proxy_span": (-41, -1)}, 1000, (5, 5, 90, 0, 40)),
            # every proxy is kept
            ({"compression_ratio": 0.8, "protect": "proxies"}, 1000, (10, 32, 158, 0, 32)),
        ],
        ids=str,
    )  # fmt: skip
    def test_integers(self, settings, length, want):
        assert integers(NaclConfig(**settings), length) == want

    def test_budget_is_met_exactly_at_every_length(self):
        for ratio in (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.99):
            config = NaclConfig(compression_ratio=ratio, random_ratio=0.6, min_length=0)
            for length in range(2, 700):
                # in whole percent, so that no rounding of floats is in the expectation
                want = max(1, round(100 - 100 * ratio) * length // 100)
                plan = config.budget(length)
                assert plan.keep == want and min(plan.counts) >= 0
                assert 1 <= plan.num_proxies <= min(length, 32)

    def test_nothing_to_do(self):
        """Up to the minimum length, and from a budget of L on: None, which means untouched."""
        assert NaclConfig().budget(256) is None and NaclConfig().budget(257) is not None
        assert NaclConfig(min_length=10).budget(10) is None
        assert NaclConfig(min_length=0, keep_tokens=1).budget(1) is None
        assert NaclConfig(compression_ratio=0.0).budget(1000) is None
        assert NaclConfig(keep_tokens=1000).budget(1000) is None
        assert NaclConfig(keep_tokens=1001).budget(1000) is None
        assert nacl.FullPress().plan(1000) is None

    def test_explicit_proxies(self):
        config = NaclConfig(proxy_span=(-30, -10))
        assert config.proxies(1000, 20) == (970, 990)
        assert NaclConfig(proxy_span=(5, 9)).proxies(1000, 4) == (5, 9)
        assert NaclConfig(proxy_span=(-30, 0)).proxies(1000, 30) == (970, 1000)
        assert NaclConfig().proxies(1000, 32) == (968, 1000)

    def test_plan(self):
        plan = BudgetPlan(1000, 10, 20, 30, 40, 5)
        assert plan.keep == 100 and plan.counts == [10, 20, 30, 40]


class TestPresets:
    def test_paper_20_has_the_shares_of_table_4(self):
        """2 % protected, 6 % PTE, 12 % RE, 20 % scoring; the project's cap of 1024 proxies above."""
        config = NaclConfig.from_preset("paper_20")
        for length in (500, 1000, 5000):
            sink, recent, topk, drawn, proxies = integers(config, length)
            shares = (sink + recent, topk, drawn, proxies)
            assert shares == tuple(length * p // 100 for p in (2, 6, 12, 20))
        assert integers(config, 100_000) == (64, 1936, 6000, 12_000, 1024)
        assert config.causal and config.pool_kernel == 1 and config.re_logits == "score"
        assert config.re_temperature == 1.0

    def test_repo_is_the_published_arithmetic(self):
        """Truncation with int(), each share of L by itself, 256 sinks."""
        config = NaclConfig.from_preset("repo")
        assert (config.causal, config.min_length, config.pool_kernel) == (False, 2048, 1)
        for length in (*range(25_700, 27_000), 32_768, 65_536, 99_999, 127_000, 131_072, 10**6):
            want = (256, int(0.01 * length) - 256, int(0.12 * length), int(0.07 * length))
            proxies = min(int(0.01 * length), length)
            assert integers(config, length) == (*want, proxies), length

    @pytest.mark.parametrize(
        "length, n_recent, topk, drawn",
        [(2049, -236, 245, 143), (25_600, 0, 3072, 1792), (25_699, 0, 3083, 1798)],
    )
    def test_repo_refuses_what_its_slice_gets_wrong(self, length, n_recent, topk, drawn):
        numbers = (
            f"{length} tokens.*n_sink=256, n_recent={n_recent}, n_topk={topk}, n_random={drawn}, "
            f"num_proxies={int(0.01 * length)}, keep={256 + n_recent + topk + drawn}"
        )
        with pytest.raises(ValueError, match=numbers + r".*n_recent >= 1"):
            NaclConfig.from_preset("repo").budget(length)

    def test_repo_at_its_first_length(self):
        config = NaclConfig.from_preset("repo")
        assert integers(config, 25_700) == (256, 1, 3084, 1799, 257)
        assert config.budget(2048) is None
        assert integers(config.with_changes(sink_tokens=4), 2049) == (4, 16, 245, 143, 20)

    def test_repo_refuses_shares_that_do_not_fit(self):
        config = NaclConfig.from_preset("repo", compression_ratio=0.95)
        with pytest.raises(ValueError, match=r"n_topk=-\d+, n_random=2100, num_proxies=300, keep="):
            config.budget(30_000)

    def test_presets_take_changes(self):
        config = NaclConfig.from_preset("paper_20", compression_ratio=0.9, seed=3)
        assert (config.compression_ratio, config.random_ratio, config.seed) == (0.9, 0.60, 3)
        assert nacl.NaclPress(preset="paper_20").config == NaclConfig.from_preset("paper_20")
        assert nacl.NaclPress(config, seed=4).config == config.with_changes(seed=4)


RANGES = [
    ("compression_ratio", 1.0, "[0, 1)"), ("compression_ratio", -0.1, "[0, 1)"),
    ("compression_ratio", float("nan"), "[0, 1)"), ("keep_tokens", 0, ">= 1"),
    ("keep_tokens", -5, ">= 1"), ("protect_ratio", 1.5, "[0, 1]"), ("protect_ratio", -0.1, "[0, 1]"),
    ("random_ratio", -0.01, "[0, 1]"), ("random_ratio", 1.01, "[0, 1]"),
    ("proxy_ratio", 2.0, "[0, 1]"), ("head_floor", 1.1, "[0, 1]"), ("sink_tokens", -1, ">= 0"),
    ("min_length", -1, ">= 0"), ("max_proxy", 0, ">= 1"), ("re_temperature", 0.0, "positive"),
    ("re_temperature", -1.0, "positive"), ("re_temperature", float("nan"), "positive"),
    ("re_temperature", float("inf"), "positive"), ("pool_kernel", 4, "odd number >= 1"),
    ("pool_kernel", 0, "odd number >= 1"), ("pool_kernel", -3, "odd number >= 1"),
    ("decode_interval", 0, ">= 1"), ("reduce", "median", "mean, sum, max"),
    ("protect", "all", "ends, proxies"), ("re_logits", "raw", "score, log_score"),
    ("pool", "min", "max, avg"), ("head_budget", "ragged", "uniform, adaptive"),
]  # fmt: skip


class TestBadInput:
    @pytest.mark.parametrize("name, value, allowed", RANGES)
    def test_names_the_argument_the_range_and_the_value(self, name, value, allowed):
        said = re.escape(f"{name} must be ") + ".*" + re.escape(allowed)
        said += ".*got " + re.escape(repr(value))
        with pytest.raises(ValueError, match=said):
            NaclConfig(**{name: value})
        with pytest.raises(ValueError, match=said):
            NaclConfig().with_changes(**{name: value})
        for make in (nacl.NaclPress, nacl.H2OPress, nacl.SnapKVPress):
            with pytest.raises(ValueError, match=said):
                make(**{name: value})

    def test_parts_above_the_budget(self):
        with pytest.raises(ValueError, match=r"protect_ratio \+ random_ratio.*0\.5 \+ 0\.6"):
            NaclConfig(protect_ratio=0.5, random_ratio=0.6)

    def test_proxies_above_the_budget_prints_all_integers(self):
        config = NaclConfig(keep_tokens=40, protect="proxies", random_ratio=0.1)
        said = (
            "budget of 40 tokens cannot hold 2 sinks and 40 protected proxies: n_sink=2, "
            "n_recent=40, n_topk=0, n_random=-2, num_proxies=40, length=1000"
        )
        with pytest.raises(ValueError, match=said):
            config.with_changes(max_proxy=40).budget(1000)
        assert integers(config.with_changes(max_proxy=38), 1000) == (2, 38, 0, 0, 38)

    @pytest.mark.parametrize("span", [(10, 10), (20, 10), (990, 1001), (-1001, -1), (0, 0)])
    def test_proxy_span_empty_or_outside(self, span):
        said = r"proxy_span.*non-empty range inside the prompt of 1000 tokens.*" + re.escape(
            str(span)
        )
        for call in (lambda c: c.budget(1000), lambda c: c.proxies(1000, 5)):
            with pytest.raises(ValueError, match=said):
                call(NaclConfig(proxy_span=span))

    def test_names(self):
        with pytest.raises(ValueError, match="preset must be one of default, repo, paper_20, got"):
            nacl.NaclPress(preset="paper_30")
        with pytest.raises(ValueError, match="preset must be one of"):
            NaclConfig(preset="paper_30")
        with pytest.raises(ValueError, match="unknown eviction method 'h20'; known: full, nacl"):
            nacl.make_press("h20")
        with pytest.raises(TypeError, match="config must be a NaclConfig, got dict"):
            nacl.NaclPress({"compression_ratio": 0.5})
        with pytest.raises(TypeError, match="compresion_ratio"):
            nacl.NaclPress(compresion_ratio=0.5)

    def test_rules_have_their_own(self):
        for bad in ({"heavy_ratio": -1.0}, {"heavy_ratio": 0.0, "recent_ratio": 0.0}):
            with pytest.raises(ValueError, match="heavy_ratio and recent_ratio must be >= 0"):
                nacl.H2OPress(**bad)
        with pytest.raises(ValueError, match="window_size must be >= 1, got 0"):
            nacl.SnapKVPress(window_size=0)

    def test_settings_that_exclude_each_other(self):
        with pytest.raises(ValueError, match="rerotate needs head_budget='uniform'"):
            NaclConfig(rerotate=True, head_budget="adaptive")
        for again in ({"decode_interval": 8}, {"progressive": True}, {"evict_on_append": True}):
            said = f"{next(iter(again))} needs head_budget='uniform'.*evicts a cache once"
            with pytest.raises(ValueError, match=said):
                nacl.NaclPress(head_budget="adaptive", **again)


@pytest.mark.parametrize("length", [300, 1000])
@pytest.mark.parametrize("name", [n for n in nacl.METHODS if n != "full"])
def test_every_rule_keeps_the_same_number_of_tokens(name, length):
    """A comparison at one budget is one: no rule keeps more than another."""
    plan = nacl.make_press(name, compression_ratio=0.8).plan(length)
    assert plan.keep == length // 5 and min(plan.counts) >= 0 and plan.num_proxies >= 1


def test_heavy_and_recent_ratio_share_the_budget():
    plan = nacl.H2OPress(heavy_ratio=0.15, recent_ratio=0.05, keep_tokens=80).plan(400)
    assert plan.counts == [0, 20, 60, 0] and plan.num_proxies == 400


def test_config_is_immutable_and_compares_by_value():
    config = NaclConfig(seed=2)
    assert config == NaclConfig(seed=2) and hash(config) == hash(NaclConfig(seed=2))
    with pytest.raises(AttributeError):
        config.seed = 3
