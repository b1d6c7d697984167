# SPDX-License-Identifier: Apache-2.0
"""MAPPOTrainer: one step against a plain one, what must not matter, every setting, records and reports."""

import copy
import json
import math

import ma_rlhf_models as small
import pytest
import torch

from tenfold.ma_rlhf import MARLHFConfig
from tenfold.ma_rlhf.critic import Critic
from tenfold.ma_rlhf.metrics import bin_names
from tenfold.ma_rlhf.record import PPORecord
from tenfold.ma_rlhf.report import run_name, smoothed, write_report
from tenfold.ma_rlhf.samples import segment_texts
from tenfold.ma_rlhf.update import make_optimizer, rate_factor, shares
from tenfold.rlhf.reward_model import RewardModel
from tenfold.rlhf.small import ByteTokenizer, make_policy
from tenfold.rlhf.trunks import plain_face
from tenfold.training.errors import TrainingError

# What TRL's PPO trainer logs.
TRL_NAMES = (
    "objective/kl", "objective/entropy", "objective/non_score_reward", "objective/rlhf_reward",
    "objective/scores", "policy/approxkl_avg", "policy/clipfrac_avg", "loss/policy_avg", "loss/value_avg",
    "val/clipfrac_avg", "policy/entropy_avg", "val/ratio", "val/ratio_var", "val/num_eos_tokens", "lr", "episode",
)  # fmt: skip


def plain_step(policy, critic, rollout, config, n):
    """One PPO step of one minibatch in plain autograd: fixed macro actions of n tokens, GAE, two losses, AdamW."""
    ref = copy.deepcopy(policy)
    rows = []
    for b in range(len(rollout.ids)):
        p = rollout.ids[b, : rollout.prompt][rollout.mask[b, : rollout.prompt]].tolist()
        a = rollout.response[b][rollout.response_mask[b]].tolist()
        if len(a) >= config.min_response:
            rows.append((p, a, float(rollout.score[b])))

    def read(model, p, a):
        logits = model(torch.tensor([p + a])).logits[0] / config.temperature
        at = torch.arange(len(p) - 1, len(p) + len(a) - 1)
        return logits.log_softmax(-1)[at, torch.tensor(a)]

    def values(p, a):
        hidden = critic.trunk(torch.tensor([p + a])).last_hidden_state[0]
        return critic.head(hidden)[len(p) - 1 : len(p) + len(a) - 1, 0]

    policy_terms, value_terms = [], []
    for p, a, score in rows:
        new, v = read(policy, p, a), values(p, a)
        k = new.detach() - read(ref, p, a).detach()
        old = v.detach()
        parts = [slice(i, min(i + n, len(a))) for i in range(0, len(a), n)]
        reward = [-config.beta * k[s].sum() for s in parts]
        reward[-1] = reward[-1] + max(-config.score_clip, min(config.score_clip, score))
        value = [old[s].mean() for s in parts]
        advantage, running = [0.0] * len(parts), torch.tensor(0.0)
        for t in reversed(range(len(parts))):
            following = value[t + 1] if t + 1 < len(parts) else 0.0
            running = (
                reward[t]
                + config.gamma * following
                - value[t]
                + config.gamma * config.lam * running
            )
            advantage[t] = running
        for s, x, w in zip(parts, advantage, value):
            ratio = (new[s] - new[s].detach()).exp()
            policy_terms.append(-x * ratio)
            value_terms.append(0.5 * (v[s] - (x + w)) ** 2)
    loss = torch.cat(policy_terms).mean() + config.vf_coef * torch.cat(value_terms).mean()
    loss.backward()
    for model, rate in ((policy, config.learning_rate), (critic, config.critic_learning_rate)):
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        decay = [p for p in model.parameters() if p.ndim > 1]
        rest = [p for p in model.parameters() if p.ndim <= 1]
        torch.optim.AdamW(
            [{"params": decay, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}],
            lr=rate, betas=config.betas,
        ).step()  # fmt: skip
    return float(loss.detach())


class TestOneStep:
    @pytest.mark.parametrize("n", [1, 3, 100])
    def test_is_a_plain_step(self, n):
        """Values that are not 0, another gamma, and responses of one token, which are dropped."""
        reward = RewardModel.from_model(small.tiny(), seed=2)
        config = small.settings(
            steps=1, minibatches=1, ppo_epochs=1, n=n, gamma=0.9, lam=0.8, temperature=0.7, vf_coef=0.5,
            batch_size=12, learning_rate=1e-2, score_clip=0.5,
        )  # fmt: skip
        trainer = small.trainer(reward=reward, config=config)
        policy, critic = copy.deepcopy(trainer.policy), copy.deepcopy(trainer.critic)
        rollout = trainer.roller(trainer.module, 0)
        assert (rollout.response_mask.sum(1) == 1).any() and (rollout.score.abs() > 0.5).any()
        loss = plain_step(policy, critic, rollout, config, n)
        record = trainer.train()
        assert record.curve[0]["loss"] == pytest.approx(loss, rel=1e-3)
        assert record.curve[0]["rows/dropped"] == int((rollout.response_mask.sum(1) < 2).sum())
        # AdamW's first step is lr * sign(g): where g is nearly 0 rounding decides, so compare all but few
        for got, want in ((trainer.policy, policy), (trainer.critic, critic)):
            a, b = (torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (got, want))
            assert ((a - b).abs() > 1e-4).float().mean() < 5e-3
        assert not small.same(small.weights(trainer.policy), small.weights(small.tiny()))

    def test_ratio_is_one_and_kl_zero(self):
        record = small.trainer(steps=1, ppo_epochs=1, minibatches=1).train()
        first = record.curve[0]
        assert first["val/ratio"] == pytest.approx(1, abs=1e-5) and first["objective/kl"] == 0
        assert first["policy/clipfrac_avg"] == 0 and first["policy/approxkl_avg"] < 1e-9

    def test_learns(self):
        config = MARLHFConfig.from_preset(
            "small", steps=40, batch_size=32, max_response=8, learning_rate=1e-2, critic_learning_rate=1e-2,
            n=3, schedule="constant",
        )  # fmt: skip
        record = small.trainer(config=config).train()
        scores = record.series("objective/scores")
        assert sum(scores[:3]) / 3 < 0.65 and record.last("objective/scores", 3) > 0.9


class TestWhatMustNotMatter:
    def run(self, **changes):
        trainer = small.trainer(
            **({"batch_size": 12, "minibatches": 3, "ppo_epochs": 2, "steps": 3} | changes)
        )
        record = trainer.train()
        return small.weights(trainer.module), record

    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"ratio": "joint", "weight": "macro", "critic_target": "macro"},
            {"agg": "seq_mean_token_mean", "whiten_adv": "macro", "bootstrap_truncated": True},
        ],
    )
    def test_micro_batches(self, changes):
        # SGD-like: with AdamW's sign rounding would be amplified where gradients are nearly 0
        whole, record = self.run(learning_rate=1e-4, critic_learning_rate=1e-4, **changes)
        parts, again = self.run(
            learning_rate=1e-4, critic_learning_rate=1e-4, micro_batch_size=1, **changes
        )
        small.close(whole, parts, atol=2e-5, rtol=1e-3)
        for a, b in zip(record.curve, again.curve):
            assert a.keys() == b.keys()
            for name in a:
                assert a[name] == pytest.approx(b[name], rel=2e-3, abs=1e-5), name

    def test_the_callers_random_state(self):
        torch.manual_seed(5)
        want = torch.rand(3)
        torch.manual_seed(5)
        a, _ = self.run()
        assert torch.equal(torch.rand(3), want)
        b, _ = self.run()
        assert small.same(a, b)

    def test_gradient_checkpointing(self):
        a, _ = self.run(steps=1)
        b, _ = self.run(steps=1, gradient_checkpointing=True)
        small.close(a, b, atol=1e-6, rtol=1e-5)

    def test_dropout_is_off(self):
        policy = small.tiny()
        plain_face(policy).config.attention_dropout = 0.5
        for layer in policy.model.layers:
            layer.self_attn.attention_dropout = 0.5
        first = small.trainer(policy, steps=1, ppo_epochs=1, minibatches=1).train().curve[0]
        assert first["policy/approxkl_avg"] < 1e-9

    def test_shares(self):
        rows = torch.arange(7)
        made = [shares(rows, r, 3).tolist() for r in range(3)]
        assert (
            sorted(i for part in made for i in part) == list(range(7))
            and max(map(len, made)) - min(map(len, made)) <= 1
        )


class TestCritics:
    def test_shared_trunk(self):
        trainer = small.trainer(critic="shared")
        before = small.weights(trainer.module)
        record = trainer.train()
        after = small.weights(trainer.module)
        assert trainer.module.shared and record.curve[-1]["critic/error"] > 0
        assert not torch.equal(before["critic.weight"], after["critic.weight"])
        assert record.parameters == sum(p.numel() for p in small.tiny().parameters()) + 16

    def test_own_and_given(self):
        critic = Critic.from_policy(small.tiny(1))
        trainer = small.trainer(critic=critic)
        assert trainer.critic is critic
        trainer.train()
        assert bool((critic.head.weight != 0).any())

    def test_reward_model_is_not_trained(self):
        reward = RewardModel.from_model(small.tiny(), seed=2)
        before = small.weights(reward)
        trainer = small.trainer(reward=reward)
        assert torch.equal(trainer.critic.head.weight, reward.head.weight)
        trainer.train()
        assert small.same(small.weights(reward), before)

    @pytest.mark.parametrize("advantage", ["rloo", "grpo"])
    def test_none(self, advantage):
        trainer = small.trainer(advantage=advantage, group_size=4)
        record = trainer.train()
        assert trainer.critic is None and record.curve[-1]["policy/grad_norm"] > 0
        names = record.curve[0].keys()
        assert (
            not {"loss/value_avg", "critic/lr", "critic/error", "critic/explained_variance"} & names
        )
        with pytest.raises(ValueError, match="has no critic"):
            small.trainer(critic="shared", advantage=advantage, group_size=4)

    def test_rates_are_their_own(self):
        trainer = small.trainer(learning_rate=1e-3, critic_learning_rate=5e-3)
        groups = make_optimizer(trainer.module, trainer.config).param_groups
        found = {(g["part"], g["peak"], g["weight_decay"]) for g in groups}
        assert found == {
            ("policy", 1e-3, 0.1),
            ("policy", 1e-3, 0.0),
            ("critic", 5e-3, 0.1),
            ("critic", 5e-3, 0.0),
        }
        count = sum(p.numel() for g in groups for p in g["params"])
        assert count == sum(p.numel() for p in trainer.module.parameters())


class TestReference:
    def test_is_the_policy_at_the_start(self):
        trainer = small.trainer(beta=0.1)
        record = trainer.train()
        assert record.curve[-1]["objective/kl"] != 0
        assert small.same(small.weights(trainer.reference), small.weights(small.tiny()))

    def test_another(self):
        other = small.tiny(7)
        record = small.trainer(ref=other, steps=1).train()
        assert abs(record.curve[0]["objective/kl_per_token"]) > 0.1

    def test_none(self):
        record = small.trainer(ref=False, beta=0.0).train()
        assert record.curve[-1]["objective/kl"] == 0
        with pytest.raises(ValueError, match=r"ref=False needs beta=0.*beta=0.05"):
            small.trainer(ref=False)
        with pytest.raises(ValueError, match="termination='ppl' looks at the reference"):
            small.trainer(ref=False, beta=0.0, termination="ppl")
        with pytest.raises(TypeError, match="ref must be a model, None or False, got str"):
            small.trainer(ref="policy")

    def test_adaptive(self):
        record = small.trainer(
            kl_controller="adaptive", kl_target=1e-6, kl_horizon=20, beta=0.1
        ).train()
        betas = record.series("objective/beta")
        kls = record.series("objective/kl")
        assert betas[0] == 0.1 and betas[1] == pytest.approx(0.1 * (1 - 0.2 * 8 / 20), rel=0.3)
        for i in range(1, 3):
            assert (betas[i + 1] > betas[i]) == (kls[i] > 1e-6)


class TestLora:
    def test_trains_adapters_only(self):
        policy = small.tiny(layers=2)
        before = small.weights(policy)
        trainer = small.trainer(policy, lora_rank=2, lora_alpha=4, learning_rate=1e-2)
        assert trainer.reference is None
        record = trainer.train()
        assert record.curve[0]["objective/kl"] == 0 and record.curve[-1]["objective/kl"] != 0
        after = small.weights(trainer.policy)
        for name, weight in before.items():
            kept = [n for n in after if n.replace(".base_layer", "").endswith(name)]
            assert len(kept) == 1 and torch.equal(after[kept[0]], weight)
        moved = [n for n, p in after.items() if "lora_B" in n and bool((p != 0).any())]
        assert moved and record.trained_parameters < record.parameters

    def test_targets_and_a_shared_critic(self):
        trainer = small.trainer(critic="shared", lora_rank=2, lora_targets=("q_proj",))
        assert {n.split(".")[-4] for n in small.weights(trainer.policy) if "lora_A" in n} == {
            "q_proj"
        }
        trainer.train()


class TestSettings:
    @pytest.mark.parametrize(
        "changes",
        [
            {"termination": "random", "lengths": (1, 2, 3)},
            {"termination": "ppl"},
            {"termination": "sentence"},
            {"n": None, "ratio": "geo_mean"},
            {"kl": "k3", "sigma": "unit", "discount": "per_token", "gamma": 0.95},
            {"dual_clip": 2.0, "whiten_adv": "token", "eps_hi": 0.3},
            {"top_k": 5, "top_p": 0.9, "warmup": 2.0, "schedule": "linear"},
        ],
    )
    def test_runs(self, changes):
        before = small.weights(small.tiny())
        trainer = small.trainer(**changes)
        record = trainer.train()
        assert len(record.curve) == 4 and not small.same(before, small.weights(trainer.policy))
        for metrics in record.curve:
            assert all(math.isfinite(v) for v in metrics.values())

    def test_mixed_precision(self):
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state()  # accelerate has one precision per process
        try:
            whole = small.trainer(mixed_precision="bf16", steps=2, ppo_epochs=1, minibatches=1)
            record = whole.train()
        finally:
            AcceleratorState._reset_state()
        assert all(p.dtype == torch.float32 for p in whole.module.parameters())
        first = record.curve[0]
        assert first["objective/kl"] == 0 and first["val/ratio"] == pytest.approx(1, abs=1e-2)

    def test_reference_preset(self):
        config = MARLHFConfig.from_preset(
            "reference", steps=2, batch_size=4, max_response=10, max_prompt=8
        )
        record = small.trainer(config=config).train()
        assert record.curve[0]["macro/length_1"] > 0  # the last token is alone

    def test_custom_starts(self):
        def starts(mask, **kwargs):
            made = torch.zeros_like(mask)
            made[:, ::4] = True
            return made

        record = small.trainer(termination="custom", callback_starts=starts).train()
        assert record.curve[0]["macro/length_max"] == 4

    def test_missing_end(self):
        trainer = small.trainer(
            steps=1, missing_eos_penalty=1.5, reward=lambda completions: [0.0] * len(completions)
        )
        first = trainer.train().curve[0]
        assert first["objective/scores"] == pytest.approx(
            -1.5 * first["response/truncated"], abs=0.3
        )

    def test_rates(self):
        config = small.settings(steps=10, warmup=0.2, schedule="linear")
        assert [rate_factor(s, config) for s in (0, 1, 2, 6)] == [0.5, 1.0, 1.0, 0.5]
        assert rate_factor(1, config.with_changes(warmup=4.0)) == 0.5

    @pytest.mark.parametrize(
        "make, error, message",
        [
            (
                lambda: small.trainer(critic="own"),
                TypeError,
                "critic must be a Critic, 'shared' or None, got 'own'",
            ),
            (lambda: small.trainer(termination="custom"), ValueError, "custom"),
            (lambda: small.trainer(prompts=[]), ValueError, "prompts is empty"),
            (lambda: small.trainer(reward=None), TypeError, "reward must be a callable"),
        ],
    )
    def test_bad_arguments(self, make, error, message):
        with pytest.raises(error, match=message):
            make()

    def test_no_end_token(self):
        policy, tokenizer = small.tiny(), copy.copy(small.TOKENIZER)
        policy.generation_config.eos_token_id = tokenizer.eos_token_id = None
        with pytest.raises(ValueError, match="has an eos_token_id, so no response could end"):
            small.trainer(policy, tokenizer=tokenizer)


class TestRows:
    def test_scores_that_are_not_finite(self):
        def reward(completions):
            return [math.nan, math.inf, *[0.5] * (len(completions) - 2)]

        with pytest.raises(ValueError, match=r"not finite in rows \[0, 1\]"):
            small.trainer(reward=reward, steps=1).train()
        record = small.trainer(reward=reward, steps=1, non_finite="drop", samples=0).train()
        assert record.curve[0]["rows/dropped"] >= 2 and record.curve[0]["objective/scores"] == 0.5
        assert record.samples and all(s["dropped"] for s in record.samples)
        reasons = {s["row"]: s["dropped"] for s in record.samples}
        assert reasons[0] == reasons[1] == "not finite"
        assert record.samples[0]["score"] is None and json.dumps(record.samples, allow_nan=False)

    def test_short_rows_are_recorded(self):
        trainer = small.trainer(steps=3, samples=0, batch_size=12)
        record = trainer.train()
        dropped = sum(record.series("rows/dropped"))
        assert 0 < dropped == len(record.samples)
        assert all(s["dropped"] == "short" and len(s["segments"]) <= 1 for s in record.samples)

    def test_nothing_is_left(self):
        trainer = small.trainer(min_response=12, steps=2, max_response=11)
        before = small.weights(trainer.module)
        record = trainer.train()
        assert small.same(before, small.weights(trainer.module))
        assert record.curve[0]["rows/dropped"] == 8 and "loss" not in record.curve[0]

    def test_loss_that_is_no_number(self):
        trainer = small.trainer(steps=1)
        with torch.no_grad():
            trainer.critic.head.weight.fill_(1e30)
        with pytest.raises(TrainingError, match=r"the loss became .* at step 1"):
            trainer.train()


class TestRecords:
    def test_metrics(self):
        trainer = small.trainer(
            steps=2, reward=[small.low_bytes, small.vowels], reward_weights=[1, 2]
        )
        record = trainer.train()
        for metrics in record.curve:
            assert set(TRL_NAMES) <= set(metrics)
            assert sum(metrics[n] for n in bin_names()) == pytest.approx(1)
            assert metrics["macro/length_max"] <= 3
            per, length = metrics["macro/per_response"], metrics["macro/length_mean"]
            assert per * length == pytest.approx(metrics["response/length_mean"])
            both = metrics["rewards/low_bytes/mean"] + 2 * metrics["rewards/vowels/mean"]
            assert metrics["rows/dropped"] or metrics["objective/scores"] == pytest.approx(
                both, abs=1e-5
            )
            total = metrics["objective/scores"] + metrics["objective/non_score_reward"]
            assert metrics["objective/rlhf_reward"] == pytest.approx(total)
        assert [m["episode"] for m in record.curve] == [8, 16]
        assert record.seconds[0].keys() >= {
            "generate",
            "reference",
            "reward",
            "advantages",
            "update",
        }

    def test_callback_and_bar(self, capsys):
        seen = []
        small.trainer(steps=2, callback=seen.append, quiet=False).train()
        assert [(p.stage, p.step, p.steps) for p in seen] == [("ppo", 1, 2), ("ppo", 2, 2)]
        assert "time/update" in seen[0].metrics and not capsys.readouterr().out

    def test_samples(self):
        trainer = small.trainer(steps=3, samples=2, sample_every=2, min_response=1)
        record = trainer.train()
        assert [s["step"] for s in record.samples] == [1, 1, 3, 3]
        first = small.trainer(min_response=1)
        rollout = first.roller(first.module, 0)
        for s in record.samples[:2]:
            assert s["prompt"] == rollout.batch.texts[s["row"]]
            assert "".join(s["segments"]) == rollout.completions[s["row"]]
            assert (
                len(s["segments"])
                == len(s["advantages"])
                == -(-int(rollout.response_mask[s["row"]].sum()) // 3)
            )

    def test_segments_of_text(self):
        tokenizer = ByteTokenizer()
        text = "aé€b"
        ids = list(text.encode())
        for cut in range(1, len(ids)):
            seg = [0] * cut + [1] * (len(ids) - cut)
            parts = segment_texts(tokenizer, ids, seg)
            assert len(parts) == 2 and "".join(parts) == text
        assert segment_texts(tokenizer, [], []) == []

    def test_record_and_report(self, tmp_path):
        runs = [small.trainer(steps=3, seed=s, n=n).train() for s in (0, 1) for n in (1, 3)]
        runs[0].write(tmp_path / "record.json")
        assert PPORecord.read(tmp_path / "record.json") == runs[0]
        page = write_report(runs, tmp_path / "page" / "index.html").read_text()
        assert "PPO (n = 1)" in page and "MA-PPO, n = 3" in page and "samples of step 3" in page
        names = {p.stem for p in page_images(tmp_path)}
        assert {"objective-scores", "objective-kl", "macro-lengths", "time"} <= names
        other = PPORecord(small.settings(lam=0.5, termination="ppl").to_json())
        assert run_name(other) == "MA-PPO, ppl, λ = 0.5"
        assert smoothed([1.0, math.nan, 3.0], 2) == [1.0, 1.0, 3.0]

    def test_saved_models(self, tmp_path):
        from transformers import AutoModelForCausalLM

        trainer = small.trainer(steps=1)
        trainer.train()
        trainer.save_pretrained(tmp_path)
        policy = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
        assert small.same(small.weights(policy), small.weights(trainer.policy))
        critic = Critic.from_pretrained(tmp_path / "critic")
        assert small.same(small.weights(critic), small.weights(trainer.critic))


def page_images(folder):
    return list((folder / "page").glob("*.png"))


def test_small_policy():
    policy = make_policy(0, 1, 2, 8)
    assert policy.generation_config.eos_token_id == 3 and not policy.training
    tokenizer = ByteTokenizer()
    assert tokenizer.decode([*tokenizer("né")["input_ids"], 3, 0]) == "né"
    assert tokenizer.decode([65, 3], skip_special_tokens=False) == "A\x03"
