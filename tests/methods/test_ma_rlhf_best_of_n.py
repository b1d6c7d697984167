# SPDX-License-Identifier: Apache-2.0
"""Best-of-n: samples that belong to their place, unbiased curves, the best answer."""

import itertools
import math

import ma_rlhf_reward_ranks as tiny
import pytest
import torch

from tenfold.rlhf.best_of import (
    SIZES,
    BestOfN,
    best_of_n,
    best_of_n_kl,
    end_tokens,
    expected_max,
    rm_scores,
    sample_answers,
)
from tenfold.rlhf.preferences import encode_texts
from tenfold.rlhf.small import EOS, ByteTokenizer, make_policy

TOKENIZER = ByteTokenizer()
PROMPTS = ["The", "A longer prompt than that", "x", "def f"]


@pytest.fixture(scope="module")
def policy():
    return make_policy(0, layers=1, heads=2, head_dim=8)


def sample(policy, n=3, **options):
    return sample_answers(
        policy, TOKENIZER, PROMPTS, n, **({"max_new_tokens": 12, "batch_size": 3} | options)
    )


class TestSampling:
    def test_belongs_to_prompt_and_number(self, policy):
        whole = sample(policy, 4)
        assert [len(row) for row in whole] == [4] * 4
        assert len({a for row in whole for a in row}) > 12  # they differ
        # Whatever the batch size, the global generator, n, and the prompts that follow.
        torch.manual_seed(9)
        assert sample(policy, 4, batch_size=16) == whole == sample(policy, 4, batch_size=1)
        assert sample(policy, 2) == [row[:2] for row in whole]
        first = sample_answers(policy, TOKENIZER, PROMPTS[:2], 4, max_new_tokens=12)
        assert first == whole[:2]
        assert sample(policy, 4, seed=5) != whole

    def test_caller_state(self, policy):
        torch.manual_seed(1)
        want = torch.rand(1)
        torch.manual_seed(1)
        policy.train()
        sample(policy)
        assert torch.equal(torch.rand(1), want) and policy.training
        policy.eval()

    def test_temperature_zero_is_greedy(self, policy):
        made = sample(policy, 2, temperature=0)
        assert all(a == b for a, b in made)
        ids = torch.tensor([TOKENIZER("The")["input_ids"]])
        with torch.no_grad():
            for _ in range(12):
                following = policy(ids).logits[:, -1].argmax(-1, keepdim=True)
                ids = torch.cat([ids, following], 1)
                if int(following) == EOS:
                    break
        assert made[0][0] == TOKENIZER.decode(ids[0, 3:].tolist())

    def test_ends(self):
        """An answer stops at its end token, which is not part of the text."""
        model = make_policy(0, layers=1, heads=2, head_dim=8)
        with torch.no_grad():
            model.lm_head.weight.zero_()
            model.lm_head.weight[[EOS, 65]] = 0  # all tokens are equally likely
        made = sample_answers(model, TOKENIZER, ["a"] * 200, 1, max_new_tokens=40, batch_size=200)
        lengths = [len(row[0].encode()) for row in made]
        assert min(lengths) < 40 and all("\x03" not in row[0] for row in made)
        assert end_tokens(model, TOKENIZER) == (EOS,)
        model.generation_config.eos_token_id = [7, 8]
        assert end_tokens(model, TOKENIZER) == (7, 8)

    def test_bad_input(self, policy):
        with pytest.raises(ValueError, match="must be >= 1, got 0, 3, 12 and 512"):
            sample(policy, 0)
        with pytest.raises(ValueError, match="temperature must be a positive number"):
            sample(policy, temperature=-1)
        with pytest.raises(ValueError, match="prompts is empty"):
            sample_answers(policy, TOKENIZER, [])
        with pytest.raises(ValueError, match="prompt 1 has no tokens"):
            sample_answers(policy, TOKENIZER, ["a", ""])


class TestScores:
    def test_prompt_answer_end(self):
        """Read on prompt + answer + end token, cut to the length (spec 3.11)."""
        model = tiny.model().requires_grad_(False)
        prompts, answers = ["ab", "a", "abc"], ["cdefgh", "", "x"]
        made = rm_scores(model, TOKENIZER, prompts, answers, batch_size=2)
        for i in range(3):
            ids = torch.tensor([[*prompts[i].encode(), *answers[i].encode(), EOS]])
            assert float(made[i]) == pytest.approx(
                float(model(ids, torch.ones_like(ids))), abs=1e-5
            )
        cut = rm_scores(model, TOKENIZER, prompts, answers, length=4)
        ids = torch.tensor([list(b"abcd")])
        assert float(cut[0]) == pytest.approx(float(model(ids, torch.ones_like(ids))), abs=1e-5)
        assert torch.allclose(
            made, rm_scores(model, TOKENIZER, prompts, answers, batch_size=3), atol=1e-5
        )

    def test_bad_input(self):
        with pytest.raises(ValueError, match="equally many, got 1 and 2"):
            encode_texts(TOKENIZER, ["a"], ["b", "c"], 9)
        with pytest.raises(ValueError, match="row 0 has no tokens"):
            encode_texts(TOKENIZER, [""], [""], 9, end=False)


class TestCurves:
    def test_expected_max_is_the_mean_over_all_subsets(self):
        scores = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
        for n in range(1, 7):
            subsets = list(itertools.combinations(range(6), n))
            want = torch.stack([scores[:, list(s)].double().amax(1) for s in subsets]).mean(0)
            torch.testing.assert_close(expected_max(scores, n), want)

    def test_large_counts_and_ties(self):
        made = expected_max(torch.arange(2000.0)[None].flip(1), 1000)
        # The maximum of n of N numbers 0..N-1 drawn without replacement: n (N + 1) / (n + 1) - 1.
        assert float(made) == pytest.approx(1000 * 2001 / 1001 - 1, rel=1e-9)
        assert expected_max(torch.full((2, 5), 3.0), 4).tolist() == pytest.approx([3.0, 3.0])

    def test_curve(self):
        scores = torch.randn(50, 32, generator=torch.Generator().manual_seed(1))
        made = BestOfN(["p"] * 50, [[str(i) for i in range(32)]] * 50, scores)
        curve = made.curve()
        assert tuple(curve) == SIZES
        means = [mean for mean, _ in curve.values()]
        assert means == sorted(means)
        assert curve[1][0] == pytest.approx(float(scores.mean()), abs=1e-6)
        assert curve[32][0] == pytest.approx(float(scores.amax(1).mean()), abs=1e-6)
        assert curve[32][1] == pytest.approx(float(scores.amax(1).std()) / math.sqrt(50), abs=1e-6)
        prefix = made.curve((1, 4), "prefix")
        assert prefix[4][0] == pytest.approx(float(scores[:, :4].amax(1).mean()), abs=1e-6)
        assert prefix[1][1] > 1.5 * curve[1][1]  # the unbiased one uses all samples
        short = BestOfN(["p"], [["a"] * 5], scores[:1, :5]).curve()
        assert tuple(short) == (1, 4) and math.isnan(short[1][1])

    def test_best(self):
        scores = torch.tensor([[1.0, 3.0, 3.0, 4.0], [0.0, -1.0, -2.0, -3.0]])
        made = BestOfN(["p", "q"], [list("abcd"), list("efgh")], scores)
        assert made.best() == [("d", 4.0), ("e", 0.0)] and made.best(3) == [("b", 3.0), ("e", 0.0)]
        with pytest.raises(ValueError, match="n must be between 1 and 4, got 5"):
            made.best(5)
        with pytest.raises(ValueError, match="estimate must be one of unbiased, prefix"):
            made.curve(estimate="all")
        with pytest.raises(ValueError, match="between 1 and the number of samples, got 5"):
            expected_max(scores, 5)

    def test_kl(self):
        assert best_of_n_kl(1) == 0 and best_of_n_kl(4) == pytest.approx(math.log(4) - 0.75)
        with pytest.raises(ValueError, match="n must be >= 1"):
            best_of_n_kl(0)

    def test_all_of_it(self, policy):
        model = tiny.model()
        made = best_of_n(policy, TOKENIZER, model, PROMPTS, 8, max_new_tokens=12)
        assert made.answers == sample(policy, 8) and made.scores.shape == (4, 8)
        one = rm_scores(model, TOKENIZER, [PROMPTS[1]], [made.answers[1][5]])
        assert float(one) == pytest.approx(float(made.scores[1, 5]), abs=1e-5)
        curve = made.curve()
        assert curve[8][0] > curve[1][0]
        best = made.best()
        assert [score for _, score in best] == made.scores.amax(1).tolist()


class TestReport:
    def test_page(self, tmp_path):
        from tenfold.ma_rlhf.reward_report import COLUMNS, add_section, table_rows
        from tenfold.report import Page
        from tenfold.rlhf.reward_training import RewardRecord

        config = {"rm_loss": "bradley_terry", "seed": 1}
        curve = [{"loss": 0.7, "accuracy": 0.5}, {"loss": 0.5, "accuracy": 0.75}]
        before, after = {"accuracy": 0.5, "margin": 0.0}, {"accuracy": 0.875, "margin": 1.25}
        full = RewardRecord(config, curve, before, after, 2.0, 16, 100)
        bare = RewardRecord({**config, "rm_loss": "token_span"}, curve)
        rows = table_rows([full, bare])
        assert rows[0] == ["bradley_terry", "1", "2", "16", "50.0 %", "87.5 %", "1.250", "2.0"]
        assert rows[1][3:7] == ["–"] * 4 and len(rows[0]) == len(COLUMNS)
        scores = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
        samples = BestOfN(["p"] * 5, [["a"] * 8] * 5, scores)
        page = Page("Reward")
        drawn = add_section([full, bare], page, "Reward models", {"SFT": samples})
        assert [name for name, _ in drawn] == ["reward-training", "best-of-n"]
        assert all(png.startswith(b"\x89PNG") for _, png in drawn)
        text = page.write(tmp_path / "index.html").read_text()
        assert "87.5 %" in text and "of held-out pairs ranked right" in text


def test_names_of_the_package():
    import tenfold.ma_rlhf as package

    for name in (
        "BestOfN",
        "best_of_n",
        "RewardModel",
        "train_reward_model",
        "ProgramReward",
        "pass_at_k",
    ):
        assert callable(getattr(package, name)) and name in dir(package)
