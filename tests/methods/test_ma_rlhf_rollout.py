# SPDX-License-Identifier: Apache-2.0
"""Rollouts: sampling, ends and padding, log-probabilities and values where they belong, prompts."""

import copy

import ma_rlhf_models as small
import pytest
import torch
from tiny_models import make

from tenfold.ma_rlhf.critic import ActorCritic, Critic, value_head
from tenfold.ma_rlhf.prompts import Prompts
from tenfold.ma_rlhf.rollout import seeded
from tenfold.rlhf.generation import choose, hf_generate, response_tokens, sampler
from tenfold.rlhf.reward_model import RewardModel
from tenfold.rlhf.trunks import model_inputs, trunk_of

TOKENIZER = small.TOKENIZER


def padded(rows, width=None, pad=0):
    width = width or max(map(len, rows))
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for b, row in enumerate(rows):
        ids[b, width - len(row) :], mask[b, width - len(row) :] = torch.tensor(row), True
    return ids, mask


def random_rows(lengths, vocab=97, seed=1):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab, (n,), generator=g).tolist() for n in lengths]


class TestChoose:
    LOGITS = torch.tensor([[2.0, -1.0, 0.5, 1.0, float("-inf")]])

    def frequencies(self, **settings):
        draws = (torch.arange(20_000) + 0.5) / 20_000
        made = choose(self.LOGITS.expand(20_000, 5), draws, **settings)
        return torch.bincount(made, minlength=5) / 20_000

    @pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
    def test_temperature(self, temperature):
        want = (self.LOGITS[0] / temperature).softmax(-1)
        torch.testing.assert_close(
            self.frequencies(temperature=temperature), want, atol=2e-4, rtol=0
        )

    def test_top_k_and_top_p(self):
        p = self.LOGITS[0].softmax(-1)
        two = torch.where(torch.tensor([1, 0, 0, 1, 0]) > 0, p, 0.0)
        torch.testing.assert_close(self.frequencies(top_k=2), two / two.sum(), atol=2e-4, rtol=0)
        # 0.60 and 0.22 reach 0.7 together; 0.6 alone reaches 0.5
        torch.testing.assert_close(self.frequencies(top_p=0.7), two / two.sum(), atol=2e-4, rtol=0)
        assert self.frequencies(top_p=0.5)[0] == 1
        three = torch.where(torch.tensor([1, 0, 1, 1, 0]) > 0, p, 0.0)
        both = self.frequencies(top_k=3, top_p=0.99)
        torch.testing.assert_close(both, three / three.sum(), atol=2e-4, rtol=0)

    def test_edges(self):
        ends = torch.tensor([0.0, 1 - 2**-24])
        # the impossible last token is never chosen, whatever the rounding
        assert choose(self.LOGITS.expand(2, 5), ends).tolist() == [0, 3]
        first = torch.tensor([[float("-inf"), 0.0, 0.0]])
        assert choose(first.expand(2, 3), ends).tolist() == [1, 2]
        assert choose(self.LOGITS, torch.rand(1), temperature=0).tolist() == [0]


class TestSampler:
    @pytest.mark.parametrize("kind", ["Llama", "Gemma3", "Qwen3Next"])
    def test_greedy_is_transformers_greedy(self, kind):
        model = make(kind)
        ids, mask = padded(random_rows([5, 9, 2, 7]))
        draws = torch.zeros(4, 10)
        settings = {"eos": (11, 12), "pad": 0, "temperature": 0}
        want = hf_generate(**settings)(model, ids, mask, draws)
        got = sampler(**settings)(model, ids, mask, draws)
        on, _ = response_tokens(want, (11, 12))
        assert torch.equal(response_tokens(got, (11, 12))[0], on[:, : got.shape[1]])
        assert torch.equal(got[on[:, : got.shape[1]]], want[on])

    def test_a_row_is_the_same_alone_with_others_and_at_any_width(self):
        """Rows end at different places, so the cache is cut down on the way."""
        policy = small.tiny()
        rows = random_rows([4, 1, 7, 3, 5, 6], vocab=256)
        generate = sampler(eos=small.ENDS, pad=0, temperature=1.0, top_k=200, top_p=0.99)
        draws = torch.rand(6, 24, generator=torch.Generator().manual_seed(5))
        together = generate(policy, *padded(rows), draws)
        on, _ = response_tokens(together, small.ENDS)
        lengths = on.sum(1)
        assert len(set(lengths.tolist())) > 2 and lengths.min() < 8 < lengths.max()
        assert bool((together[~on] == 0).all())
        for b, row in enumerate(rows):
            alone = generate(policy, *padded([row], 11), draws[b : b + 1])
            assert torch.equal(alone[0], together[b, on[b]])

    def test_is_what_full_forwards_say(self):
        policy, draws = small.tiny(), torch.rand(1, 8)
        row = random_rows([5], vocab=256)[0]
        made = sampler(eos=(), pad=0, temperature=0.7, top_k=50)(policy, *padded([row]), draws)
        for t in range(8):
            with torch.no_grad():
                logits = policy(torch.tensor([row])).logits[:, -1]
            assert choose(logits, draws[:, t], 0.7, 50).item() == made[0, t]
            row = [*row, int(made[0, t])]

    def test_ends(self):
        ids = torch.tensor([[5, 3, 3, 3], [5, 6, 7, 8], [3, 9, 9, 9], [9, 4, 3, 0]])
        on, cut = response_tokens(ids, (3, 4))
        assert on.sum(1).tolist() == [2, 4, 1, 2] and cut.tolist() == [False, True, False, False]
        assert on.int().cummin(1).values.equal(on.int())


def reference_logp(policy, row, n, temperature):
    """Of the last n tokens of one row without padding, from the whole log-softmax."""
    with torch.no_grad():
        logits = policy(torch.tensor([row])).logits[0].double() / temperature
    logp = logits.log_softmax(-1)
    at = torch.arange(len(row) - n, len(row))
    chosen = logp[at - 1, torch.tensor(row)[at]]
    entropy = -(logp.exp() * logp).sum(-1)[at - 1]
    return chosen.float(), entropy.float()


class TestActorCritic:
    PROMPT, ANSWER = [3, 6, 1, 4], [5, 2, 7, 1]

    def rows(self, vocab):
        prompts, answers = random_rows(self.PROMPT, vocab), random_rows(self.ANSWER, vocab, 2)
        ids, mask = padded(prompts, 8)
        right, on = (x.flip(1) for x in padded([a[::-1] for a in answers], 9))
        return prompts, answers, torch.cat([ids, right], 1), torch.cat([mask, on], 1), on

    @pytest.mark.parametrize("kind", ["Llama", "Gemma3", "Qwen2"])
    @pytest.mark.parametrize("shared", [False, True])
    def test_every_number_is_where_it_belongs(self, kind, shared):
        policy = make(kind).requires_grad_(False)
        critic = value_head(trunk_of(policy)) if shared else Critic.from_policy(policy)
        head = critic if shared else critic.head
        torch.nn.init.normal_(head.weight)
        module = ActorCritic(policy, critic, 0.7)
        prompts, answers, ids, mask, on = self.rows(97)
        out = module(ids, mask, 8)
        assert all(x.shape == on.shape and x.dtype == torch.float32 for x in out)
        for b, (p, a) in enumerate(zip(prompts, answers)):
            logp, entropy = reference_logp(policy, p + a, len(a), 0.7)
            torch.testing.assert_close(out.logp[b, on[b]], logp, atol=2e-4, rtol=1e-4)
            torch.testing.assert_close(out.entropy[b, on[b]], entropy, atol=2e-4, rtol=1e-4)
            hidden = trunk_of(policy)(torch.tensor([p + a])).last_hidden_state[0]
            values = head(hidden)[:, 0]
            # the state before token j is at position P + j - 1
            want = values[len(p) - 1 : len(p) + len(a) - 1]
            torch.testing.assert_close(out.value[b, on[b]], want, atol=2e-4, rtol=1e-4)
            after = module.value_after(ids[b : b + 1], mask[b : b + 1])
            torch.testing.assert_close(after[0], values[-1], atol=2e-4, rtol=1e-4)

    def test_padding_does_not_matter(self):
        policy = make("Llama")
        module = ActorCritic(policy, Critic.from_policy(policy))
        torch.nn.init.normal_(module.critic.head.weight)
        _, _, ids, mask, on = self.rows(97)
        want = module(ids, mask, 8)
        other = torch.where(mask, ids, 55)
        wide = (
            torch.nn.functional.pad(other, (3, 4), value=7),
            torch.nn.functional.pad(mask, (3, 4)),
        )
        for got, n in ((module(other, mask, 8), 9), (module(*wide, 11), 13)):
            for x, y in zip(got, want):
                assert x.shape[1] == n
                torch.testing.assert_close(x[:, :9][on], y[on], atol=1e-5, rtol=1e-5)

    def test_only_what_is_asked_for(self):
        policy = make("Llama")
        _, _, ids, mask, _ = self.rows(97)
        module = ActorCritic(policy, Critic.from_policy(policy))
        assert module(ids, mask, 8, value=False).value is None
        assert module(ids, mask, 8, logp=False)[:2] == (None, None)
        assert ActorCritic(policy, None)(ids, mask, 8).value is None

    def test_frozen_parameters_are_not_in_its_state(self):
        policy = make("Llama")
        module = ActorCritic(policy, Critic.from_policy(policy))
        policy.model.requires_grad_(False)
        names = set(module.state_dict())
        assert "policy.lm_head.weight" in names and "critic.head.weight" in names
        assert not any(n.startswith("policy.model.") for n in names)


class TestCritic:
    def test_begins_at_zero_and_as_the_reward_model(self):
        policy = small.tiny()
        ids, mask = padded(random_rows([4, 7], 256))
        assert bool((Critic.from_policy(policy)(ids, mask) == 0).all())
        reward = RewardModel.from_model(policy, seed=3)
        critic = Critic.from_reward_model(reward)
        score = reward(ids, mask.long()).detach()
        torch.testing.assert_close(critic(ids, mask)[:, -1], score, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(critic(ids, mask, 2)[:, -1], score, atol=1e-6, rtol=1e-5)
        stock = Critic.from_reward_model(reward.model)  # transformers' own class
        assert torch.equal(stock(ids, mask), critic(ids, mask))
        with torch.no_grad():
            critic.head.weight.add_(1)
        assert not torch.equal(critic.head.weight, reward.head.weight)

    def test_refuses_what_is_no_reward_model(self):
        with pytest.raises(TypeError, match="sequence classifier; got LlamaForCausalLM"):
            Critic.from_reward_model(small.tiny())
        reward = RewardModel.from_model(small.tiny()).model
        reward.score = torch.nn.Linear(16, 2)
        with pytest.raises(TypeError, match="one number, its head gives 2"):
            Critic.from_reward_model(reward)

    def test_saved_and_loaded(self, tmp_path):
        critic = Critic.from_policy(small.tiny())
        torch.nn.init.normal_(critic.head.weight)
        critic.save_pretrained(tmp_path)
        again = Critic.from_pretrained(tmp_path)
        assert small.same(small.weights(critic), small.weights(again))


class TestPrompts:
    def test_batches(self):
        data = [{"prompt": p, "answer": i} for i, p in enumerate(small.PROMPTS)]
        prompts = Prompts(data, TOKENIZER, 10, seed=3)
        first, second = prompts.take("rollout", 0, 6), prompts.take("rollout", 1, 6)
        assert sorted(first.columns["answer"]) == list(range(6)) == sorted(second.columns["answer"])
        assert first.columns != second.columns and first.cut == 2 and first.ids.shape == (6, 10)
        for b, i in enumerate(first.columns["answer"]):
            text = small.PROMPTS[i]
            assert first.texts[b] == text == first.prompts[b]
            assert bytes(first.ids[b][first.mask[b]].tolist()).decode() == text[-10:]
            assert first.mask[b].int().diff().min() >= 0  # padding is at the left
        again = Prompts(data, TOKENIZER, 10, seed=3).take("rollout", 1, 6)
        assert (
            torch.equal(again.ids, second.ids)
            and prompts.digest() == Prompts(data, TOKENIZER, 9, 1).digest()
        )

    def test_groups(self):
        batch = Prompts(small.PROMPTS, TOKENIZER, 10, 0).take("rollout", 0, 8, group=4)
        assert batch.group.tolist() == [0] * 4 + [1] * 4 and len(set(batch.texts[:4])) == 1
        assert batch.texts[0] != batch.texts[4]

    def test_columns_and_chats(self):
        columns = {"prompt": ["a", "b"], "labels": [1, 2]}
        assert sorted(Prompts(columns, TOKENIZER, 4, 0).take("x", 0, 2).columns["labels"]) == [1, 2]
        chat = [[{"role": "user", "content": "Hi"}]]
        with pytest.raises(ValueError, match="no chat template"):
            Prompts(chat, TOKENIZER, 9, 0).take("x", 0, 1)
        tokenizer = copy.copy(TOKENIZER)
        tokenizer.chat_template = "yes"
        tokenizer.apply_chat_template = lambda m, tokenize, add_generation_prompt: (
            f"<{m[0]['content']}>"
        )
        batch = Prompts(chat, tokenizer, 9, 0).take("x", 0, 1)
        assert batch.texts == ["<Hi>"] and batch.prompts == chat

    @pytest.mark.parametrize(
        "data, error, message",
        [
            ([], ValueError, "prompts is empty"),
            ("text", TypeError, "prompts must be a list of texts"),
            ([{"text": "a"}], TypeError, r"row 0 needs 'prompt'.*NoneType \(columns text\)"),
            ([3], TypeError, "row 0 needs 'prompt', a text or a list of messages; got int"),
            (
                [{"prompt": "a"}, {"prompt": "b", "x": 1}],
                ValueError,
                r"row 1 has columns \['prompt', 'x'\]",
            ),
            ({"prompt": ["a"], "x": [1, 2]}, ValueError, "columns must be equally long"),
        ],
    )
    def test_bad_data(self, data, error, message):
        with pytest.raises(error, match=message):
            Prompts(data, TOKENIZER, 8, 0)

    def test_empty_prompt(self):
        with pytest.raises(ValueError, match="prompt 0 has no tokens"):
            Prompts([""], TOKENIZER, 8, 0).take("x", 0, 1)


class TestRollout:
    def test_one_rollout(self):
        trainer = small.trainer(
            batch_size=6, temperature=0.9, missing_eos_penalty=0.25, bootstrap_truncated=True
        )
        torch.nn.init.normal_(trainer.critic.head.weight)
        rollout = trainer.roller(trainer.module, 0)
        policy, on = trainer.policy, rollout.response_mask
        assert (
            rollout.response.shape == on.shape == rollout.logp_old.shape == rollout.value_old.shape
        )
        assert on.any(0).all() and bool((rollout.response[~on] == 0).all())
        assert 0 < rollout.truncated.sum() < 6 and rollout.bootstrap.shape == (6,)
        assert on.sum(1)[rollout.truncated].tolist() == [12] * int(rollout.truncated.sum())
        assert torch.equal(rollout.logp_old[on], rollout.logp_ref[on])
        for b in range(6):
            row, n = rollout.ids[b][rollout.mask[b]].tolist(), int(on[b].sum())
            logp, _ = reference_logp(policy, row, n, 0.9)
            torch.testing.assert_close(rollout.logp_old[b, on[b]], logp, atol=1e-4, rtol=1e-4)
            ids = row[-n:]
            want = sum(i < 128 for i in ids) / n - 0.25 * (ids[-1] not in small.ENDS)
            assert rollout.score[b].item() == pytest.approx(want)
            assert rollout.completions[b] == TOKENIZER.decode(ids)
            after = trainer.critic(
                *(x[b : b + 1, : rollout.prompt + n] for x in (rollout.ids, rollout.mask))
            )
            want = after[0, -1].item() if rollout.truncated[b] else 0.0
            assert rollout.bootstrap[b].item() == pytest.approx(want, abs=1e-4)

    def test_micro_batches_and_time_do_not_matter(self):
        whole = small.trainer(batch_size=6)
        parts = small.trainer(batch_size=6, micro_batch_size=2)
        torch.rand(17)
        a, b = whole.roller(whole.module, 3), parts.roller(parts.module, 3)
        assert torch.equal(a.ids, b.ids) and torch.equal(a.score, b.score)
        on = a.response_mask
        torch.testing.assert_close(a.logp_old[on], b.logp_old[on], atol=1e-5, rtol=1e-5)
        assert not torch.equal(a.ids, whole.roller(whole.module, 4).ids)

    def test_transformers_generate(self):
        generate = hf_generate(eos=small.ENDS, pad=0, temperature=1.0)
        trainer = small.trainer(generate=generate)
        rollout = trainer.roller(trainer.module, 0)
        assert torch.equal(rollout.ids, trainer.roller(trainer.module, 0).ids)
        assert not torch.equal(rollout.ids, trainer.roller(trainer.module, 1).ids)

    def test_pad_is_the_end(self):
        tokenizer = copy.copy(TOKENIZER)
        tokenizer.pad_token_id = 3
        a, b = small.trainer(), small.trainer(tokenizer=tokenizer)
        x, y = a.roller(a.module, 0), b.roller(b.module, 0)
        assert torch.equal(x.mask, y.mask) and torch.equal(x.ids[x.mask], y.ids[y.mask])
        torch.testing.assert_close(x.logp_old[x.response_mask], y.logp_old[y.response_mask])

    def test_bad_generate(self):
        trainer = small.trainer(generate=lambda model, ids, mask, draws: ids[:3])
        with pytest.raises(ValueError, match=r"generate must give responses \[8, 1..12\]"):
            trainer.roller(trainer.module, 0)

    def test_generators_belong_to_names(self):
        a, b, c = (torch.rand(3, generator=seeded(1, "x", i)) for i in (0, 0, 1))
        assert torch.equal(a, b) and not torch.equal(a, c)


def test_models_without_positions_get_none():
    class Bare(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            return input_ids

    assert set(model_inputs(Bare(), torch.ones(1, 2), torch.ones(1, 2))) == {
        "input_ids",
        "attention_mask",
    }
