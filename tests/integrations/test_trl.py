# SPDX-License-Identifier: Apache-2.0
"""Macro actions inside TRL: real GRPO training with (B, T) advantages, and the advantages of TRL's real PPO.

Nothing is stubbed. TRL has PPO up to 1.12; its tests run in an environment of that version (host_trl_ppo).
"""

import importlib.metadata
import importlib.util
import sys

import macro_cases as cases
import pytest
import torch

from tenfold.integrations.trl import MacroActions, MacroAdvantages

WORDS = ["<pad>", "<eos>", "<unk>", *"abcdefghijklm"]
LENGTH = 8


@pytest.fixture
def trl():
    if importlib.util.find_spec("trl") is None:
        pytest.skip("needs trl (make test-hosts)")
    import trl

    return trl


def word_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )  # fmt: skip


@pytest.fixture
def tokenizer(trl):
    return word_tokenizer()


def tiny(kind: str = "LlamaForCausalLM", **extra):
    import transformers

    torch.manual_seed(0)
    return getattr(transformers, kind)(transformers.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=2, pad_token_id=0,
        num_attention_heads=4, num_key_value_heads=2, eos_token_id=1, bos_token_id=None, **extra,
    ))  # fmt: skip


def length_reward(completions, **_):
    return [float(len(c.split())) for c in completions]


@pytest.fixture
def grpo(trl, tokenizer, tmp_path):
    """Trains a tiny model by a class of trainers; gives the trainer, its batches and its losses."""
    from datasets import Dataset

    def train(*bases, settings=None, body=None, **arguments):
        batches, losses = [], []

        class Recording(trl.GRPOTrainer):
            def _compute_loss(self, model, inputs):
                batches.append({k: v.clone() for k, v in inputs.items() if torch.is_tensor(v)})
                loss = super()._compute_loss(model, inputs)
                losses.append(loss.detach().clone())
                return loss

        cls = type("Trainer", (*bases, Recording), body or {})
        config = trl.GRPOConfig(**({
            "output_dir": str(tmp_path), "per_device_train_batch_size": 8, "num_generations": 4,
            "max_completion_length": LENGTH, "max_steps": 3, "learning_rate": 1e-2, "report_to": [],
            "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "seed": 0, "num_iterations": 2,
            "logging_steps": 1, "bf16": False,
        } | (settings or {})))  # fmt: skip
        trainer = cls(
            tiny(), length_reward, args=config, processing_class=tokenizer,
            train_dataset=Dataset.from_dict({"prompt": ["a b", "c", "d e f", "g"] * 4}), **arguments,
        )  # fmt: skip
        trainer.train()
        return trainer, batches, losses

    return train


@pytest.mark.host_trl
@pytest.mark.host_trl_ppo
class TestGRPO:
    @pytest.mark.parametrize("n", [1, 3, None])
    @pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
    def test_without_discount_it_is_grpo(self, grpo, n, loss_type):
        """(B, T) advantages that are GRPO's at every token: the same losses and weights, bit for bit."""
        settings = {"loss_type": loss_type}
        plain, before, wants = grpo(settings=settings)
        macro, batches, losses = grpo(MacroAdvantages, settings=settings, macro=MacroActions(n))
        assert before[0]["advantages"].dim() == 1
        for batch, want in zip(batches, before, strict=True):
            adv, mask = batch["advantages"], batch["completion_mask"]
            assert adv.shape == mask.shape and torch.equal(
                batch["completion_ids"], want["completion_ids"]
            )
            assert torch.equal(adv, want["advantages"][:, None] * mask)
        assert any(b["advantages"].any() for b in batches)
        assert all(torch.equal(a, b) for a, b in zip(losses, wants, strict=True))
        for a, b in zip(macro.model.parameters(), plain.model.parameters()):
            assert torch.equal(a, b)

    def test_discount(self, grpo):
        """The group's advantage, discounted per macro action from the end."""
        _, before, wants = grpo(settings={"max_steps": 1})
        _, batches, losses = grpo(MacroAdvantages, settings={"max_steps": 1}, macro=MacroActions(3),
                                  macro_gamma=0.5)  # fmt: skip
        mask = batches[0]["completion_mask"]
        lengths = mask.sum(1)
        assert len(set(lengths.tolist())) > 1 and int(lengths.max()) > 6
        for b, length in enumerate(lengths.tolist()):
            last = (length - 1) // 3
            powers = torch.tensor([0.5 ** (last - j // 3) for j in range(length)])
            want = before[0]["advantages"][b] * powers
            torch.testing.assert_close(batches[0]["advantages"][b, :length], want)
        assert not batches[0]["advantages"][mask == 0].any()
        # TRL's loss is linear in the advantages where the policy has not moved.
        total = (batches[0]["advantages"] * mask).sum() / mask.sum()
        torch.testing.assert_close(losses[0], -total, rtol=1e-4, atol=1e-6)
        assert not torch.equal(losses[0], wants[0])

    def test_token_rewards_and_values(self, grpo):
        def token_rewards(self, inputs, batch):
            assert len(inputs) == len(batch["completion_ids"])
            ids, mask = batch["completion_ids"], batch["completion_mask"]
            return torch.where(ids > 8, 0.25, -0.5).masked_fill(mask == 0, float("nan"))

        def token_values(self, inputs, batch):
            return batch["completion_ids"].sin()

        _, before, _ = grpo(settings={"max_steps": 1})
        body = {"token_rewards": token_rewards, "token_values": token_values}
        _, batches, _ = grpo(MacroAdvantages, settings={"max_steps": 1}, body=body,
                             macro=MacroActions(2), macro_gamma=0.9, macro_lam=0.8)  # fmt: skip
        ids, mask = batches[0]["completion_ids"], batches[0]["completion_mask"].bool()
        assert torch.equal(ids, before[0]["completion_ids"])
        rewards = torch.where(ids > 8, 0.25, -0.5)
        rewards[torch.arange(len(ids)), mask.sum(1) - 1] += before[0]["advantages"]
        want, _ = cases.by_hand(rewards, ids.sin(), mask, 0.9, 0.8, 2)
        got = batches[0]["advantages"].double()
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)

    def test_wrong_shapes(self, grpo):
        body = {"token_rewards": lambda self, inputs, batch: torch.zeros(3, 2)}
        with pytest.raises(
            ValueError, match=r"token_rewards must give \[B, T\] = \[8, 8\]; got \[3, 2\]"
        ):
            grpo(MacroAdvantages, body=body)
        body = {"token_values": lambda self, inputs, batch: torch.zeros(8)}
        with pytest.raises(ValueError, match=r"values is \[8\]"):
            grpo(MacroAdvantages, body=body)

    def test_tool_tokens(self, grpo):
        """A rollout with tool output, by TRL's rollout_func: no advantage there, no discount for it."""

        def rollout(prompts, trainer):
            lengths = [3 + k % 4 for k in range(len(prompts))]
            return {
                "prompt_ids": [[3, 4] for _ in prompts],
                "completion_ids": [
                    [5 + k % 7, 8, 9, 9, *[7] * n, 1] for k, n in enumerate(lengths)
                ],
                "env_mask": [[1, 1, 0, 0, *[1] * n, 0] for n in lengths],
                "logprobs": None,
            }

        settings = {"max_steps": 1, "max_completion_length": 16}
        _, before, _ = grpo(settings=settings, rollout_func=rollout)
        _, batches, _ = grpo(MacroAdvantages, settings=settings, rollout_func=rollout,
                             macro=MacroActions(3), macro_gamma=0.5)  # fmt: skip
        adv, group = batches[0]["advantages"], before[0]["advantages"]
        own = (batches[0]["completion_mask"] * batches[0]["tool_mask"]).bool()
        assert torch.equal(batches[0]["completion_ids"], before[0]["completion_ids"])
        assert own[:, :4].tolist() == [[True, True, False, False]] * len(own)
        assert group.abs().min() > 0 and not adv[~own].any()
        for b in range(len(own)):
            places = own[b].nonzero()[:, 0]
            last = (len(places) - 1) // 3
            want = torch.tensor([0.5 ** (last - q // 3) for q in range(len(places))]) * group[b]
            torch.testing.assert_close(adv[b, places], want)

    def test_refusals(self, trl, grpo, monkeypatch):
        with pytest.raises(
            TypeError, match=r"must derive from \(MacroAdvantages, trl.GRPOTrainer\)"
        ):
            MacroAdvantages()
        cls = type("Trainer", (MacroAdvantages, trl.GRPOTrainer), {})
        for name in ("macro_gamma", "macro_lam"):
            with pytest.raises(ValueError, match=rf"{name} must be in \[0, 1\]; got 1\.5"):
                cls(**{name: 1.5})
        own = importlib.metadata.version
        monkeypatch.setattr(
            importlib.metadata, "version", lambda name: "0.42.0" if name == "trl" else own(name)
        )
        said = r"tested with trl 1\.12\.0, 1\.16\.0; found 0\.42\.0"
        with pytest.raises(ImportError, match=said):
            grpo(MacroAdvantages)
        _, batches, _ = grpo(MacroAdvantages, settings={"max_steps": 1}, allow_untested=True)
        assert batches[0]["advantages"].dim() == 2


@pytest.mark.host_trl_ppo
class TestPPO:
    """The specification's check 17: TRL puts the score one token behind the end of a response."""

    @pytest.fixture
    def inside(self, trl, tokenizer, tmp_path, monkeypatch):
        """What TRL's PPO has at hand when it is done with GAE, from a real training step."""
        if importlib.util.find_spec("trl.experimental.ppo") is None:
            pytest.skip("needs trl with PPO (make test-hosts)")
        from datasets import Dataset
        from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

        found, own = {}, ppo_trainer.masked_whiten

        def whiten(values, mask, shift_mean=True):
            frame = sys._getframe(1).f_locals
            if not found:
                names = ("rewards", "values", "scores", "advantages", "returns", "non_score_reward",
                         "sequence_lengths", "padding_mask", "padding_mask_p1")  # fmt: skip
                found.update({name: frame[name].clone() for name in names})
                found["whitened"] = own(values, mask, shift_mean).masked_fill(~mask, 0)
            return own(values, mask, shift_mean)

        monkeypatch.setattr(ppo_trainer, "masked_whiten", whiten)
        config = PPOConfig(
            output_dir=str(tmp_path), per_device_train_batch_size=8, total_episodes=8, num_mini_batches=1,
            gradient_accumulation_steps=1, response_length=LENGTH, stop_token="eos", report_to=[],
            use_cpu=True, bf16=False, num_sample_generations=0, gamma=0.99, lam=0.9, seed=3,
            save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        ids = [tokenizer(t).input_ids for t in ("a b c", "d e f", "g h i", "j k l") * 4]
        scorer = "LlamaForSequenceClassification"
        PPOTrainer(
            config, tokenizer, tiny(), tiny(), tiny(scorer, num_labels=1), Dataset.from_dict({"input_ids": ids}),
            tiny(scorer, num_labels=1), eval_dataset=Dataset.from_dict({"input_ids": ids}),
        ).train()  # fmt: skip
        return found

    def test_agrees_when_the_score_is_moved(self, inside):
        x = inside
        mask = ~x["padding_mask"]
        full = mask.all(1)
        assert full.any() and not full.all()
        macro = MacroActions(1)
        # TRL's own placement, its extra token included: the same advantages and returns.
        wide = ~x["padding_mask_p1"]
        adv, ret = macro.advantages(x["rewards"], x["values"], wide, 0.99, 0.9)
        torch.testing.assert_close(adv[mask], x["advantages"][mask], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ret[mask], x["returns"][mask], rtol=1e-5, atol=1e-5)
        got = cases.whitened(adv, mask).float()
        torch.testing.assert_close(got, x["whitened"], rtol=1e-4, atol=1e-4)
        # The score at the last token: the same only where a response fills the width.
        rewards = x["non_score_reward"].clone()
        rewards[torch.arange(len(mask)), mask.sum(1) - 1] += x["scores"]
        adv, _ = macro.advantages(rewards, x["values"], mask, 0.99, 0.9)
        torch.testing.assert_close(adv[full], x["advantages"][full], rtol=1e-5, atol=1e-5)
        gap = (adv - x["advantages"])[~full].abs() * mask[~full]
        assert bool((gap.max(1).values > 1e-4).all())
