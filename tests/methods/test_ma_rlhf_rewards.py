# SPDX-License-Identifier: Apache-2.0
"""Rewards: TRL's and OpenRLHF's signatures, reward models, sums of them, and what they refuse."""

import copy
import math

import ma_rlhf_models as small
import pytest
import torch

from tenfold.ma_rlhf.rewards import Answers, ModelReward, Rewards
from tenfold.rlhf.reward_model import RewardModel

TOKENIZER = small.TOKENIZER


def answers(completions=("yes", "no", "maybe"), prompts=("q1", "q two", "q3"), **columns):
    """Left-padded prompts and right-padded completions, as a rollout has them."""
    texts = [p if isinstance(p, str) else p[0]["content"] for p in prompts]
    p, r = max(map(len, texts)), max(map(len, completions))
    ids, mask = torch.full((len(texts), p + r), 9), torch.zeros(len(texts), p + r, dtype=torch.bool)
    for b, (text, completion) in enumerate(zip(texts, completions)):
        both = TOKENIZER(text + completion)["input_ids"]
        at = slice(p - len(text), p + len(completion))
        ids[b, at], mask[b, at] = torch.tensor(both), True
    return Answers(list(prompts), texts, list(completions), ids, mask, p, columns)


def lengths(completions, **kwargs):
    return [float(len(c)) for c in completions]


class TestTrl:
    def test_all_columns(self):
        seen = {}

        def reward(prompts, completions, completion_ids, answer, **kwargs):
            seen.update(prompts=prompts, completions=completions, ids=completion_ids, kwargs=kwargs)
            return [float(c == a) for c, a in zip(completions, answer)]

        made = Rewards(reward)(answers(answer=["yes", "yes", "maybe"], other=[1, 2, 3]))
        assert made.score.tolist() == [1, 0, 1] and made.parts.shape == (3, 1)
        assert seen["prompts"] == ["q1", "q two", "q3"] and seen["kwargs"] == {"other": [1, 2, 3]}
        assert (
            [bytes(i).decode() for i in seen["ids"]]
            == seen["completions"]
            == ["yes", "no", "maybe"]
        )

    def test_only_what_it_names(self):
        assert Rewards(lambda completions: [1, 2, 3])(answers(x=[1, 2, 3])).score.tolist() == [
            1,
            2,
            3,
        ]
        assert Rewards(lambda prompts, x: x)(answers(x=[4, 5, 6])).score.tolist() == [4, 5, 6]

    def test_none_is_no_judgement(self):
        def sometimes(completions):
            return [None, 2.0, None]

        def once(completions):
            return [1.0, None, None]

        made = Rewards([sometimes, once], [0.5, 3.0])(answers())
        assert made.score[:2].tolist() == [3.0, 1.0] and math.isnan(made.score[2])
        assert made.parts.isnan().tolist() == [[True, False], [False, True], [True, True]]

    def test_coroutines(self):
        async def judge(completions, **kwargs):
            return lengths(completions)

        assert Rewards(judge)(answers()).score.tolist() == [3, 2, 5]

    def test_chats(self):
        chats = tuple([{"role": "user", "content": t}] for t in ("a", "bc", "d"))

        def reward(prompts, completions):
            assert prompts == list(chats)
            assert completions[0] == [{"role": "assistant", "content": "yes"}]
            return [len(c[0]["content"]) for c in completions]

        assert Rewards(reward)(answers(prompts=chats)).score.tolist() == [3, 2, 5]

    def test_tensors(self):
        made = Rewards(lambda completions: torch.tensor([[1], [2], [3]], dtype=torch.bfloat16))(
            answers()
        )
        assert made.score.tolist() == [1, 2, 3] and made.score.dtype == torch.float32


class TestOpenRlhf:
    def test_signature_and_dict(self):
        def reward_func(queries, prompts, labels):
            assert queries == ["q1yes", "q twono", "q3maybe"] and prompts == ["q1", "q two", "q3"]
            rewards = torch.tensor([float(q.endswith(x)) for q, x in zip(queries, labels)])
            return {
                "rewards": rewards,
                "scores": rewards,
                "extra_logs": {"hits": rewards, "one": 1.0},
            }

        made = Rewards(reward_func)(answers(labels=["yes", "x", "be"]))
        assert made.score.tolist() == [1, 0, 1]
        assert made.logs == {
            "rewards/reward_func/hits": pytest.approx(2 / 3),
            "rewards/reward_func/one": 1.0,
        }
        assert Rewards(reward_func)(answers(label=["yes", "no", "x"])).score.tolist() == [1, 1, 0]

    def test_without_labels(self):
        def reward_func(queries, prompts, labels, **kwargs):
            assert labels == [None] * 3 and not kwargs
            return torch.ones(3)

        assert Rewards(reward_func)(answers()).score.tolist() == [1, 1, 1]


class TestModels:
    def model(self):
        return RewardModel.from_model(small.tiny(), seed=1)

    def alone(self, model, text, tokenizer=TOKENIZER):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            return model(ids, torch.ones_like(ids)).item()

    def test_reads_prompt_and_response(self):
        model, asked = self.model(), answers()
        want = [self.alone(model, t + c) for t, c in zip(asked.texts, asked.completions)]
        for reward in (model, ModelReward(model, micro_batch_size=2)):
            made = Rewards(reward)(asked)
            assert made.score.tolist() == pytest.approx(want, abs=1e-4)
        assert len({round(w, 3) for w in want}) == 3

    def test_transformers_classifier_with_an_ambiguous_pad(self):
        """transformers finds the end by the pad token; right-padded rows end before it."""
        model = self.model()
        stock = copy.deepcopy(model.model)
        stock.config.pad_token_id = 0
        asked = answers()
        torch.testing.assert_close(
            Rewards(stock)(asked).score, Rewards(model)(asked).score, atol=1e-4, rtol=1e-4
        )

    def test_with_its_own_tokenizer_and_a_limit(self):
        class Shifted:
            def __call__(self, text):
                return {"input_ids": [i + 1 for i in text.encode()]}

        model, asked = self.model(), answers()
        made = Rewards(ModelReward(model, Shifted(), limit=4))(asked)
        ids = torch.tensor([[i + 1 for i in b"aybe"]])
        assert made.score[2].item() == pytest.approx(
            model(ids, torch.ones_like(ids)).item(), abs=1e-4
        )

    def test_may_begin_a_critic(self):
        model = self.model()
        assert Rewards(model).initial_critic() is model
        assert Rewards([model, lengths]).initial_critic() is None
        assert Rewards(ModelReward(model, TOKENIZER)).initial_critic() is None
        assert Rewards(lengths).initial_critic() is None
        assert Rewards([model, lengths]).modules() == [model]

    def test_one_number_per_row(self):
        class Wide(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = torch.nn.Parameter(torch.ones(1))

            def forward(self, input_ids, attention_mask):
                return self.weight * input_ids

        with pytest.raises(
            ValueError, match=r"reward model Wide must give one score per row, \[3\]"
        ):
            Rewards(Wide())(answers())


class TestSums:
    def test_names_and_weights(self):
        other = lambda completions: [1.0, 1.0, 1.0]  # noqa: E731
        rewards = Rewards([lengths, other, lengths], [1, -2, 0.5])
        assert rewards.names == ["lengths", "<lambda>", "lengths_2"]
        assert rewards(answers()).score.tolist() == [2.5, 1.0, 5.5]

    @pytest.mark.parametrize(
        "functions, weights, error, message",
        [
            ([], None, ValueError, "at least one function"),
            (
                3,
                None,
                TypeError,
                "must be a callable, an nn.Module, a ModelReward, or a list of these; got int",
            ),
            (
                [lengths],
                [1, 2],
                ValueError,
                r"reward_weights must be 1 finite numbers, got \[1, 2\]",
            ),
            ([lengths], [math.nan], ValueError, "reward_weights must be 1 finite numbers"),
        ],
    )
    def test_bad_rewards(self, functions, weights, error, message):
        with pytest.raises(error, match=message):
            Rewards(functions, weights)

    @pytest.mark.parametrize(
        "made, got",
        [([1.0], "1 numbers"), (None, "NoneType"), (2.0, "float"), ({"scores": [1]}, "NoneType")],
    )
    def test_bad_results(self, made, got):
        def odd(completions):
            return made

        with pytest.raises(
            ValueError,
            match=rf"reward odd must give one number \(or None\) per response, 3; got {got}",
        ):
            Rewards(odd)(answers())
