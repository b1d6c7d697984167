# SPDX-License-Identifier: Apache-2.0
"""MA-RLHF's settings, published recipes and KL controllers."""

import warnings

import pytest

from tenfold import ma_rlhf
from tenfold.ma_rlhf import AdaptiveKL, FixedKL, MARLHFConfig, kl_controller
from tenfold.ma_rlhf.config import PRESETS
from tenfold.rlhf import recipes


class TestValidation:
    @pytest.mark.parametrize(
        ("name", "value", "text"),
        [
            ("termination", "ngram", "fixed, random, ppl, parsing, sentence, statement, turn, custom"),
            ("sigma", "mean", "equal, unit, position, position_early"),
            ("ratio", "sequence", "token, joint, geo_mean"),
            ("agg", "mean", "token_mean, seq_mean_token_mean"),
            ("weight", "tokens", "macro, length"),
            ("reward_reduce", "mean", "sum, sigma"),
            ("discount", "none", "per_macro, per_token"),
            ("whiten_adv", "batch", "none, token, macro, group"),
            ("kl", "k4", "k1, k2, k3"),
            ("kl_controller", "ziegler", "fixed, adaptive"),
            ("ppl_mode", "prefix", "macro_prefix, response_prefix, token_rise, token_rise_ref"),
            ("tail", "drop", "one_segment, recycle"),
            ("holes", "fill", "bridge, split, error"),
            ("on_mismatch", "skip", "fixed, error"),
            ("splitter", "nltk", "rule, pysbd"),
            ("critic_target", "both", "token, macro"),
            ("advantage", "ppo", "gae, rloo, grpo"),
            ("non_finite", "ignore", "error, drop"),
            ("schedule", "step", "linear, cosine, constant"),
            ("mixed_precision", "fp8", "no, bf16, fp16"),
            ("preset", "paper", "default, reference, small, summarize-2b"),
        ],
    )  # fmt: skip
    def test_names(self, name, value, text):
        with pytest.raises(ValueError, match=f"{name} must be one of {text}.*, got '{value}'"):
            MARLHFConfig(**{name: value})

    @pytest.mark.parametrize(
        ("settings", "error", "text"),
        [
            ({"n": 0}, ValueError, "n must be >= 1, got 0"),
            ({"n": 2.0}, TypeError, "n must be an integer, got 2.0"),
            ({"repeat": 0}, ValueError, "repeat must be >= 1, got 0"),
            ({"parsing_cutoff": 0}, ValueError, "parsing_cutoff must be >= 1, got 0"),
            ({"lengths": (2, 0)}, ValueError, "lengths must be integers of at least 1"),
            ({"lengths": ()}, ValueError, "lengths must be integers"),
            ({"lam": 1.1}, ValueError, r"lam must be in \[0, 1\], got 1.1"),
            ({"gamma": -0.1}, ValueError, r"gamma must be in \[0, 1\], got -0.1"),
            ({"gamma": float("nan")}, ValueError, r"gamma must be in \[0, 1\], got nan"),
            ({"eps_lo": 1.0}, ValueError, r"eps_lo must be in \[0, 1\), got 1.0"),
            ({"eps_lo": -0.1}, ValueError, "eps_lo must be in"),
            ({"eps_hi": -0.1}, ValueError, "eps_hi must be a number >= 0, got -0.1"),
            ({"score_clip": 0}, ValueError, "score_clip must be a positive number, got 0"),
            ({"beta": -0.01}, ValueError, "beta must be a number >= 0, got -0.01"),
            ({"dual_clip": 1.0}, ValueError, "dual_clip must be above 1, or None, got 1.0"),
            ({"value_clip": -1.0}, ValueError, "value_clip must be a number >= 0"),
            ({"top_p": 0.0}, ValueError, r"top_p must be in \(0, 1\], got 0.0"),
            ({"temperature": 0.0}, ValueError, "temperature must be a positive number"),
            ({"betas": (0.9, 1.0)}, ValueError, r"betas must be two numbers in \[0, 1\)"),
            ({"kl_target": 0.0}, ValueError, "kl_target must be a positive number"),
            ({"min_response": 0}, ValueError, "min_response must be >= 1"),
            ({"batch_size": 10, "minibatches": 4}, ValueError, "batch_size must be a multiple of minibatches"),
            ({"batch_size": 10, "group_size": 4}, ValueError, "batch_size must be a multiple of group_size"),
            ({"phantom_step": True}, ValueError, "phantom_step reproduces .* got .*isolate_last=False"),
            ({"phantom_step": True, "isolate_last": True, "termination": "ppl"}, ValueError, "phantom_step reproduces"),
            ({"phantom_step": True, "isolate_last": True, "discount": "per_token"}, ValueError, "per_macro"),
            ({"phantom_step": True, "isolate_last": True, "holes": "split"}, ValueError, "holes"),
            ({"advantage": "rloo"}, ValueError, "advantage='rloo' compares .* group_size must be at least 2, got 1"),
            ({"advantage": "grpo", "group_size": 4, "reward_reduce": "sigma"}, ValueError, "has no critic"),
            ({"advantage": "grpo", "group_size": 4, "bootstrap_truncated": True}, ValueError, "has no critic"),
            ({"advantage": "grpo", "group_size": 4, "isolate_last": True, "phantom_step": True}, ValueError,
             "phantom_step needs advantage='gae'"),
        ],
        ids=str,
    )  # fmt: skip
    def test_values(self, settings, error, text):
        with pytest.raises(error, match=text):
            MARLHFConfig(**settings)

    @pytest.mark.parametrize(
        ("settings", "warns"),
        [
            ({"reward_reduce": "sigma"}, True),
            ({"reward_reduce": "sigma", "isolate_last": True}, False),
            ({"reward_reduce": "sigma", "n": 1}, False),
            ({"reward_reduce": "sigma", "sigma": "unit"}, False),
            ({"reward_reduce": "sigma", "termination": "ppl", "n": 1}, True),
            ({"reward_reduce": "sigma", "termination": "ppl", "ppl_mode": "token_rise_ref"}, False),
            ({}, False),
        ],
        ids=str,
    )
    def test_a_diluted_score_warns(self, settings, warns):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            MARLHFConfig(**settings)
        assert [str(w.message)[:58] for w in seen] == [
            "reward_reduce='sigma' without isolate_last=True: the score"
        ] * warns
        assert all(w.filename == __file__ for w in seen)


class TestPresets:
    @pytest.mark.parametrize("name", PRESETS)
    def test_round_trip(self, name):
        config = MARLHFConfig.from_preset(name)
        assert config.preset == name and MARLHFConfig.from_json(config.to_json()) == config
        assert MARLHFConfig.from_preset(name, n=7).n == 7

    def test_default_is_the_papers(self):
        config = MARLHFConfig()
        assert MARLHFConfig.from_preset("default") == config
        assert (config.n, config.sigma, config.reward_reduce, config.ratio) == (
            5,
            "equal",
            "sum",
            "token",
        )
        assert (config.lengths, config.repeat, config.ppl_mode) == (
            (2, 3, 5, 10),
            3,
            "macro_prefix",
        )
        assert not config.isolate_last and not config.phantom_step and config.parsing_cutoff == 5

    def test_reference_is_the_published_codes(self):
        config = MARLHFConfig.from_preset("reference")
        changed = {k: v for k, v in config.to_json().items() if v != MARLHFConfig().to_json()[k]}
        assert changed == {"isolate_last": True, "reward_reduce": "sigma", "agg": "seq_mean_token_mean",
                           "lengths": [1, 2, 3, 5, 10], "ppl_mode": "token_rise_ref",
                           "preset": "reference"}  # fmt: skip
        assert (config.ratio, config.score_clip, config.whiten_adv) == ("token", 2.5, "none")
        assert not config.phantom_step

    @pytest.mark.parametrize(
        ("name", "policy", "critic", "beta", "n", "batch", "warmup", "prompt", "temperature", "top_k"),
        [
            ("summarize-2b", 1.5e-5, 1.5e-5, 0.05, 5, 256, 200, 512, 0.8, 50),
            ("hh-2b", 1.5e-5, 1.5e-5, 0.05, 5, 256, 200, 512, 0.8, 50),
            ("webgpt-2b", 1.5e-5, 1.5e-5, 0.05, 5, 256, 200, 512, 0.8, 50),
            ("summarize-7b", 1e-6, 1e-6, 0.05, 5, 256, 200, 512, 0.8, 50),
            ("hh-7b", 1e-6, 1e-6, 0.05, 5, 256, 200, 512, 0.8, 50),
            ("webgpt-7b", 1e-6, 1e-6, 0.1, 5, 256, 200, 512, 0.8, 50),
            ("summarize-27b", 7e-7, 1e-6, 0.1, 5, 256, 0, 512, 0.8, 50),
            ("apps-2b", 5e-7, 5e-5, 0.05, 10, 16, 20, 600, 1.0, 5),
            ("apps-7b", 5e-7, 5e-5, 0.05, 10, 16, 20, 600, 1.0, 5),
        ],
    )  # fmt: skip
    def test_published_runs(
        self, name, policy, critic, beta, n, batch, warmup, prompt, temperature, top_k
    ):
        c = MARLHFConfig.from_preset(name)
        assert (c.learning_rate, c.critic_learning_rate, c.beta, c.n) == (policy, critic, beta, n)
        assert (c.batch_size, c.warmup, c.max_prompt, c.max_response) == (
            batch,
            warmup,
            prompt,
            512,
        )
        assert (c.temperature, c.top_k, c.top_p) == (temperature, top_k, 1.0)
        assert (c.eps_lo, c.eps_hi, c.lam, c.gamma, c.ppo_epochs) == (0.2, 0.2, 0.95, 1.0, 1)
        assert (c.betas, c.weight_decay, c.max_grad_norm, c.value_clip) == (
            (0.9, 0.95),
            0.1,
            1.0,
            0.2,
        )
        assert c.mixed_precision == ("bf16" if "27b" in name else "fp16") and c.seed == 1234

    @pytest.mark.parametrize(
        ("name", "batch", "rate"),
        [("summarize-2b", 64, 1e-5), ("hh-2b", 64, 1e-5), ("webgpt-2b", 32, 2e-5), ("summarize-7b", 128, 1e-6),
         ("hh-7b", 64, 1e-6), ("webgpt-7b", 32, 1e-6), ("summarize-27b", 128, 8e-6)],
    )  # fmt: skip
    def test_reward_models(self, name, batch, rate):
        made = recipes.reward_model(name)
        assert (made["batch_size"], made["learning_rate"], made["epochs"]) == (batch, rate, 1)
        assert (made["schedule"], made["warmup"], made["sequence_length"]) == ("cosine", 0.1, 1024)
        assert recipes.reward_model("apps-7b") is None

    @pytest.mark.parametrize(
        ("name", "batch", "epochs", "rate", "warmup"),
        [("summarize-2b", 512, 3, 5e-5, 0.1), ("webgpt-2b", 64, 3, 1e-4, 0.1), ("hh-7b", 128, 1, 2e-5, 0.1),
         ("webgpt-7b", 128, 5, 2e-5, 0.1), ("summarize-27b", 128, 3, 5e-6, 0.1), ("apps-2b", 16, 1, 5e-6, 0.0),
         ("apps-7b", 32, 1, 2e-6, 0.0)],
    )  # fmt: skip
    def test_sft(self, name, batch, epochs, rate, warmup):
        made = recipes.sft(name)
        assert (made["batch_size"], made["epochs"], made["learning_rate"]) == (batch, epochs, rate)
        assert (made["warmup"], made["schedule"]) == (warmup, "cosine")


class TestControllers:
    def test_fixed(self):
        control = kl_controller(MARLHFConfig(beta=0.2))
        assert type(control) is FixedKL and control.update(100.0, 64) == 0.2 == control.beta

    @pytest.mark.parametrize(
        ("kl", "want"),
        [(6.0, 0.1), (6.6, 0.1 * 1.01), (60.0, 0.1 * 1.02), (5.4, 0.1 * 0.99), (-3.0, 0.1 * 0.98)],
    )
    def test_adaptive(self, kl, want):
        control = kl_controller(
            MARLHFConfig(beta=0.1, kl_controller="adaptive", kl_target=6.0, kl_horizon=1000)
        )
        assert isinstance(control, AdaptiveKL)
        assert control.update(kl, 100) == pytest.approx(want) == control.beta

    def test_a_huge_rollout_is_one_horizon(self):
        control = AdaptiveKL(0.1, 1.0, 10)
        assert control.update(0.0, 1000) == pytest.approx(0.08)

    def test_state(self):
        control, other = AdaptiveKL(0.1, 1.0, 10), AdaptiveKL(0.3, 1.0, 10)
        control.update(3.0, 5)
        other.load_state_dict(control.state_dict())
        assert other.update(2.0, 5) == control.update(2.0, 5)

    def test_it_finds_the_target(self):
        """A policy whose KL falls as the weight grows: KL = 0.6 / beta."""
        control = AdaptiveKL(0.01, 6.0, 100)
        for _ in range(200):
            control.update(0.6 / control.beta, 20)
        assert control.beta == pytest.approx(0.1, rel=0.02)

    def test_errors(self):
        with pytest.raises(ValueError, match="beta must be a number >= 0"):
            FixedKL(-1.0)
        with pytest.raises(ValueError, match="target must be a positive number"):
            AdaptiveKL(0.1, 0.0, 10)
        with pytest.raises(ValueError, match="horizon must be a positive number"):
            AdaptiveKL(0.1, 1.0, 0)
        with pytest.raises(ValueError, match="kl must be a finite number, got nan"):
            AdaptiveKL(0.1, 1.0, 10).update(float("nan"), 1)


def test_names_of_the_package():
    assert "MARLHFConfig" in dir(ma_rlhf) and all(
        hasattr(ma_rlhf, name) for name in ma_rlhf.__all__
    )
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = ma_rlhf.Nothing
