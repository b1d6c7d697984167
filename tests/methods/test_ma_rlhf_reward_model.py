# SPDX-License-Identifier: Apache-2.0
"""Reward models: what is read where, round trips, losses against plain formulas, training, resumption, ranks."""

import itertools
import json
from pathlib import Path

import ma_rlhf_reward_ranks as tiny
import pytest
import tiny_models
import torch
import transformers
from ranks import MODES

from tenfold.data import Document, long_documents
from tenfold.ma_rlhf.critic import Critic
from tenfold.ma_rlhf.rewards import Answers, Rewards
from tenfold.rlhf import preferences as prefs
from tenfold.rlhf import recipes
from tenfold.rlhf.reward_config import PRESETS, RewardConfig
from tenfold.rlhf.reward_losses import (
    RM_LOSSES,
    align_left,
    bradley_terry_loss,
    pair_metrics,
    span_mask,
    token_span_loss,
)
from tenfold.rlhf.reward_model import RewardModel, last_index
from tenfold.rlhf.reward_training import (
    RewardRecord,
    reward_step,
    score_pairs,
    train_reward_model,
)
from tenfold.rlhf.small import ByteTokenizer, make_policy
from tenfold.testing import processes
from tenfold.training.errors import TrainingError

HERE = Path(__file__).resolve().parent


class Killed(Exception):
    pass


TOKENIZER = ByteTokenizer()


def batch(count=4, length=9, vocab=97):
    made = torch.Generator().manual_seed(3)
    ids = torch.randint(3, vocab, (count, length), generator=made)
    mask = torch.arange(length) < torch.tensor([[length], [4], [1], [7]])[:count]
    return ids, mask.long()


def shifted(ids, mask, extra=3):
    """The same rows, padded on the left, and wider."""
    rows, width = ids.shape[0], ids.shape[1] + extra
    left, seen = torch.full((rows, width), 2), torch.zeros(rows, width, dtype=torch.long)
    for i in range(rows):
        n = int(mask[i].sum())
        left[i, width - n :], seen[i, width - n :] = ids[i, :n], 1
    return left, seen


def gpt2():
    """Learned positions: wrong ones would show."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=2, n_positions=64,
                                     bos_token_id=None, eos_token_id=5)  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


MODELS = {
    "Llama": lambda: tiny_models.make("Llama"),
    "Gemma": lambda: tiny_models.make("Gemma"),
    "GPT2": gpt2,
    # transformers has no sequence classifier of this one.
    "Cohere": lambda: tiny_models.make("Cohere", eos_token_id=5, bos_token_id=6),
}


class TestModel:
    @pytest.mark.parametrize("kind", list(MODELS))
    def test_last_token_and_padding(self, kind):
        policy = MODELS[kind]()
        model = RewardModel.from_model(policy, seed=1)
        ids, mask = batch()
        scores = model(ids, mask)
        assert scores.shape == (4,) and scores.dtype == torch.float32
        alone = [model(ids[i : i + 1, : int(mask[i].sum())])[0] for i in range(4)]
        torch.testing.assert_close(scores, torch.stack(alone), atol=2e-5, rtol=1e-5)
        hidden = policy.base_model(ids[:1], use_cache=False).last_hidden_state
        torch.testing.assert_close(
            scores[0], hidden[0, -1] @ model.head.weight[0], atol=1e-5, rtol=1e-5
        )
        # What stands in the padding changes no bit, however absurd; the side and the width only rounding.
        for junk in (-100, 10**9, 5):
            assert torch.equal(model(ids.masked_fill(mask == 0, junk), mask), scores)
        assert torch.equal(model(ids, mask.bool()), scores)
        torch.testing.assert_close(model(*shifted(ids, mask)), scores, atol=2e-5, rtol=1e-5)
        values = model.values(ids, mask)
        assert torch.equal(values.gather(1, last_index(mask)[:, None])[:, 0], scores)

    @pytest.mark.parametrize("kind", list(MODELS))
    def test_round_trips(self, kind, tmp_path):
        policy = MODELS[kind]()
        model = RewardModel.from_model(policy, seed=1)
        assert model.trunk is not policy.base_model
        model.save_pretrained(tmp_path / "rm")
        assert (tmp_path / "rm" / "model.safetensors").exists()
        again = RewardModel.from_pretrained(tmp_path / "rm")
        assert not again.training and same(again.state_dict(), model.state_dict())
        policy.save_pretrained(tmp_path / "lm")
        made = RewardModel.from_pretrained(tmp_path / "lm", seed=1)
        assert same(made.state_dict(), model.state_dict())
        other = RewardModel.from_pretrained(tmp_path / "lm", seed=2)
        assert not torch.equal(other.head.weight, made.head.weight)
        narrow = RewardModel.from_pretrained(tmp_path / "rm", dtype=torch.bfloat16)
        assert (
            narrow.head.weight.dtype == torch.bfloat16 and narrow(*batch()).dtype == torch.float32
        )

    @pytest.mark.parametrize("kind", ["Llama", "GPT2"])
    def test_stock_checkpoints_both_ways(self, kind, tmp_path):
        """AutoModelForSequenceClassification with one label is the same model, where it can tell padding."""
        base = MODELS[kind]()
        config = base.config
        config.num_labels, config.pad_token_id = 1, 0
        stock = transformers.AutoModelForSequenceClassification.from_config(config).eval()
        ids, mask = batch()
        ids = ids.masked_fill(mask == 0, 0)
        want = stock(ids, attention_mask=mask).logits[:, 0]
        stock.save_pretrained(tmp_path / "stock")
        ours = RewardModel.from_pretrained(tmp_path / "stock")
        torch.testing.assert_close(ours(ids, mask), want, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours(ids), want, atol=1e-5, rtol=1e-5)
        ours.save_pretrained(tmp_path / "ours")
        back = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours")
        torch.testing.assert_close(
            back(ids, attention_mask=mask).logits[:, 0], want, atol=1e-5, rtol=1e-5
        )
        assert back.config.architectures == [type(stock).__name__]

    def test_head_is_small_and_unbiased(self):
        model = tiny.model()
        assert model.head.bias is None and model.head.weight.shape == (1, 16)
        wide = RewardModel.from_model(make_policy(0, layers=1, heads=16, head_dim=32))
        assert float(wide.head.weight.detach().std()) == pytest.approx(513**-0.5, rel=0.15)

    def test_pad_that_is_eos(self):
        """The mask says where rows end; without one, pad == eos is an error and not a guess."""
        model = tiny.model()
        model.config.pad_token_id = model.config.eos_token_id = 3
        ids, mask = batch(vocab=250)
        ids[0, 4] = 3  # an end token inside is a token
        scores = model(ids, mask)
        assert torch.equal(model(ids.masked_fill(mask == 0, 3), mask), scores)
        with pytest.raises(ValueError, match="padding token 3 is the end token, too"):
            model(ids.masked_fill(mask == 0, 3))
        assert torch.equal(model(ids[:1]), model(ids[:1], mask[:1]))  # no padding at the ends
        ends = torch.cat([ids[:1], torch.tensor([[3]])], 1)
        with pytest.raises(ValueError, match="give attention_mask"):
            model(ends)

    def test_mask_from_the_padding_token(self):
        model = tiny.model()
        ids, mask = batch(vocab=250)
        ids = ids.masked_fill(mask == 0, 0)
        ids[0, 4] = 0  # inside a row it is a token
        assert torch.equal(model(ids), model(ids, mask))
        left, seen = shifted(ids, mask)
        assert torch.equal(model(left.masked_fill(seen == 0, 0)), model(left, seen))

    def test_bad_input(self):
        model = tiny.model()
        ids, mask = batch(vocab=250)
        with pytest.raises(ValueError, match=r"rows \[1\] of \[4, 9\] have no valid token"):
            model(ids, mask * torch.tensor([[1], [0], [1], [1]]))
        with pytest.raises(
            ValueError, match=r"attention_mask must be \[4, 9\] as input_ids, got \[4, 8\]"
        ):
            model(ids, mask[:, 1:])
        with pytest.raises(
            ValueError, match=r"input_ids must be integers \[B, S\], got torch.float32"
        ):
            model(ids.float(), mask)
        two = transformers.LlamaForSequenceClassification(
            transformers.LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                     num_attention_heads=1, num_labels=2, bos_token_id=None,
                                     eos_token_id=None))  # fmt: skip
        with pytest.raises(
            ValueError, match="one output and no bias; LlamaForSequenceClassification has"
        ):
            RewardModel(two)

    def test_as_reward_and_as_critic(self):
        """The trainer's two uses: scores of the policy's tokens, and values that begin as these scores."""
        model = tiny.model()
        ids, mask = batch(vocab=250)
        left, seen = shifted(ids[:, :3], mask[:, :3])
        whole, held = torch.cat([left, ids[:, 3:]], 1), torch.cat([seen, mask[:, 3:]], 1)
        answers = Answers(["p"] * 4, ["p"] * 4, ["c"] * 4, whole, held.bool(), left.shape[1])
        with torch.no_grad():
            want = model(ids, mask)
            torch.testing.assert_close(Rewards(model)(answers).score, want, atol=1e-5, rtol=1e-5)
            values = Critic.from_reward_model(model)(ids, mask)
        torch.testing.assert_close(values.gather(1, last_index(mask)[:, None])[:, 0], want)

    def test_gradients_reach_everything(self):
        model = tiny.model()
        model(*batch(vocab=250)).sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def by_hand(values, ids, mask, rule):
    """The losses row by row, in plain Python over plain torch."""
    losses = []
    for b in range(ids.shape[1]):
        rows = [[int(t) for t, on in zip(ids[s, b], mask[s, b]) if on] for s in range(2)]
        scores = [values[s, b][mask[s, b]] for s in range(2)]
        if rule == "bradley_terry":
            margin = scores[0][-1:] - scores[1][-1:]
        else:
            short = min(map(len, rows))
            first = next((j for j in range(short) if rows[0][j] != rows[1][j]), short)
            stop = short
            if rule == "token_span_padded":
                stop = max(map(len, rows))
                # Right-padded rows: what follows a row's end is its padding.
                scores = [values[s, b] for s in range(2)]
            first = first if first < stop else short - 1
            margin = scores[0][first:stop] - scores[1][first:stop]
        losses.append((1 + (-margin).exp()).log().mean())
    return torch.stack(losses).mean()


class TestLosses:
    def inputs(self):
        made = torch.Generator().manual_seed(5)
        ids = torch.randint(0, 3, (2, 6, 8), generator=made)
        ids[1, :, :2] = ids[0, :, :2]
        lengths = torch.tensor([[8, 5, 3, 8, 4, 6], [6, 8, 3, 8, 7, 6]])
        mask = torch.arange(8) < lengths[..., None]
        ids[1, 3] = ids[0, 3]  # equal
        ids[1, 4, :4] = ids[0, 4, :4]  # one is the beginning of the other
        values = torch.randn(2, 6, 8, generator=made, dtype=torch.float64)
        return values, ids, mask

    @pytest.mark.parametrize("rule", RM_LOSSES)
    def test_plain_formulas(self, rule):
        values, ids, mask = self.inputs()
        want = by_hand(values, ids, mask, rule)
        if rule == "bradley_terry":
            last = mask.sum(-1, keepdim=True) - 1
            made = bradley_terry_loss(*values.gather(2, last)[..., 0])
        else:
            made = token_span_loss(*values, *ids, *mask, padded=rule == "token_span_padded")
        torch.testing.assert_close(made, want)

    def test_numbers(self):
        """One pair, differing from position 2 on, lengths 5 and 4: spans [2, 4) and [2, 5)."""
        ids = torch.tensor([[[7, 7, 1, 1, 1]], [[7, 7, 2, 1, 0]]])
        mask = torch.tensor([[[1, 1, 1, 1, 1]], [[1, 1, 1, 1, 0]]])
        assert span_mask(ids, mask)[0].tolist() == [False, False, True, True, False]
        assert span_mask(ids, mask, padded=True)[0].tolist() == [False, False, True, True, True]
        values = torch.tensor([[[9.0, 9, 1, 2, 3]], [[-9.0, 9, 0, 2, 5]]])
        made = token_span_loss(*values, *ids, *mask)
        assert float(made) == pytest.approx((0.313262 + 0.693147) / 2, abs=1e-6)
        made = token_span_loss(*values, *ids, *mask, padded=True)
        assert float(made) == pytest.approx((0.313262 + 0.693147 + 2.126928) / 3, abs=1e-6)
        assert float(bradley_terry_loss(torch.tensor([3.0]), torch.tensor([2.0]))) == pytest.approx(
            0.313262, abs=1e-6
        )
        centred = bradley_terry_loss(torch.tensor([3.0]), torch.tensor([2.0]), center=0.1)
        assert float(centred) == pytest.approx(0.313262 + 2.5, abs=1e-6)

    def test_padding_has_no_part(self):
        values, ids, mask = self.inputs()
        want = token_span_loss(*values, *ids, *mask)
        junk = values.masked_fill(~mask, torch.nan).requires_grad_()
        made = token_span_loss(*junk, *ids.masked_fill(~mask, 77), *mask)
        assert torch.equal(made, want)
        made.backward()
        assert junk.grad.isfinite().all() and (junk.grad[~mask] == 0).all()

    def test_sides(self):
        values, ids, mask = self.inputs()
        left = [torch.stack([align_left(x[s].flip(1), mask[s].flip(1)).flip(1) for s in range(2)])
                for x in (values, ids, mask)]  # fmt: skip
        # Rows are now at the right end, in order.
        assert bool(left[2][..., -1].all()) and not torch.equal(left[2], mask)
        torch.testing.assert_close(token_span_loss(*left[0], *left[1], *left[2]),
                                   token_span_loss(*values, *ids, *mask))  # fmt: skip

    def test_metrics(self):
        made = pair_metrics(torch.tensor([1.0, 2.0, 0.0, 4.0]), torch.tensor([0.0, 2.0, 1.0, 1.0]))
        assert {k: float(v) for k, v in made.items()} == {
            "accuracy": 0.625, "margin": 0.75, "chosen": 1.75, "rejected": 1.0}  # fmt: skip

    def test_bad_input(self):
        with pytest.raises(ValueError, match=r"rejected must be \[2\] as chosen, got \[3\]"):
            bradley_terry_loss(torch.zeros(2), torch.zeros(3))
        with pytest.raises(ValueError, match=r"chosen must be scores \[B\] of at least one pair"):
            bradley_terry_loss(torch.zeros(0), torch.zeros(0))
        x = torch.zeros(2, 3)
        with pytest.raises(
            ValueError, match=r"rejected_mask must be \[2, 3\] as chosen, got \[2, 2\]"
        ):
            token_span_loss(x, x, x, x, x, x[:, 1:])


class TestTraining:
    @pytest.mark.parametrize("rule", RM_LOSSES)
    def test_learns(self, rule):
        model, held = tiny.model(), tiny.pairs(seed=2)
        record = train_reward_model(model, tiny.pairs(128), tiny.config(steps=40, batch_size=16, rm_loss=rule),
                                    held_out=held)  # fmt: skip
        assert record.after["accuracy"] >= 0.9 > record.before["accuracy"] and not model.training
        assert record.after["loss"] < 0.5 * record.before["loss"] and record.after["margin"] > 1
        assert len(record.curve) == 40 and set(record.curve[0]) == {
            "loss", "accuracy", "margin", "chosen", "rejected"}  # fmt: skip
        assert (record.pairs, record.parameters) == (
            128,
            sum(p.numel() for p in model.parameters()),
        )

    def test_padding_content_and_width_change_no_step(self):
        rows = tiny.pairs()
        wide = {k: torch.nn.functional.pad(v, (0, 5)) for k, v in rows.items()}
        for name in ("", "rejected_"):
            wide[f"{name}input_ids"].masked_fill_(wide[f"{name}attention_mask"] == 0, -7)
        models = [tiny.model(), tiny.model()]
        for model, data in zip(models, (rows, wide)):
            train_reward_model(model, data, tiny.config(steps=3))
        assert same(models[0].state_dict(), models[1].state_dict())

    def test_micro_batches_are_the_batch(self):
        models = [tiny.model(), tiny.model()]
        curves = [
            train_reward_model(m, tiny.pairs(), tiny.config(micro_batch_size=size)).curve
            for m, size in zip(models, (None, 3))
        ]
        for a, b in zip(*curves):
            assert a == pytest.approx(b, abs=1e-4)

    @pytest.mark.parametrize("stop", [1, 3, 5])
    def test_killed_and_resumed(self, tmp_path, stop):
        def kill(progress):
            if progress.step == stop:
                raise Killed

        whole = tiny.model()
        record = train_reward_model(whole, tiny.pairs(), tiny.config())
        with pytest.raises(Killed):
            train_reward_model(
                tiny.model(), tiny.pairs(), tiny.config(), work_dir=tmp_path, callback=kill
            )
        steps, model = [], tiny.model()
        again = train_reward_model(model, tiny.pairs(), tiny.config(), work_dir=tmp_path,
                                   callback=lambda p: steps.append(p.step))  # fmt: skip
        assert steps == list(range(stop + 1, 7)) and same(model.state_dict(), whole.state_dict())
        assert again.curve == record.curve and not list(tmp_path.iterdir())

    def test_a_folder_of_another_run(self, tmp_path):
        def kill(progress):
            raise Killed

        with pytest.raises(Killed):
            train_reward_model(
                tiny.model(), tiny.pairs(), tiny.config(), work_dir=tmp_path, callback=kill
            )
        with pytest.raises(ValueError, match="belongs to another run"):
            train_reward_model(tiny.model(), tiny.pairs(seed=5), tiny.config(), work_dir=tmp_path)
        with pytest.raises(ValueError, match="rm_loss 'bradley_terry' there, 'token_span' here"):
            train_reward_model(
                tiny.model(), tiny.pairs(), tiny.config(rm_loss="token_span"), work_dir=tmp_path
            )

    def test_dropout_and_checkpointing(self):
        torch.manual_seed(0)
        config = transformers.GPT2Config(vocab_size=256, n_embd=16, n_layer=1, n_head=2, n_positions=32,
                                         bos_token_id=None, eos_token_id=None)  # fmt: skip
        curves = []
        for changes in ({}, {"gradient_checkpointing": True}, {"dropout": True}):
            torch.manual_seed(0)
            model = RewardModel.from_model(transformers.GPT2LMHeadModel(config))
            curves.append(
                train_reward_model(model, tiny.pairs(), tiny.config(steps=2, **changes)).curve
            )
        assert curves[0][1]["loss"] == pytest.approx(curves[1][1]["loss"], abs=1e-6)
        assert abs(curves[0][0]["loss"] - curves[2][0]["loss"]) > 1e-3

    def test_caller_state_and_data_function(self):
        torch.manual_seed(1)
        want = torch.rand(1)
        torch.manual_seed(1)
        train_reward_model(
            tiny.model(), lambda stage, step, size: tiny.pairs(size, seed=step), tiny.config()
        )
        assert torch.equal(torch.rand(1), want)
        with pytest.raises(ValueError, match="say how many steps"):
            train_reward_model(tiny.model(), lambda *a: tiny.pairs(8), tiny.config(steps=None))

    def test_bad_data_and_losses(self):
        rows = tiny.pairs()
        rows.pop("rejected_attention_mask")
        with pytest.raises(ValueError, match="a dict that has rejected_attention_mask"):
            train_reward_model(tiny.model(), rows, tiny.config())
        broken = tiny.model()
        with torch.no_grad():
            broken.head.weight.fill_(torch.nan)
        with pytest.raises(TrainingError, match="the loss became nan at step 1"):
            train_reward_model(broken, tiny.pairs(), tiny.config())

    def test_score_pairs_is_the_mean_whatever_the_batch(self):
        model, rows = tiny.model(), tiny.pairs(10)
        whole, parts = (
            score_pairs(model, rows, batch_size=10),
            score_pairs(model, rows, batch_size=3),
        )
        assert whole == pytest.approx(parts, abs=1e-5)
        with torch.no_grad():
            loss, _ = reward_step(model, rows)
        assert whole["loss"] == pytest.approx(float(loss), abs=1e-6)

    def test_record(self, tmp_path):
        record = RewardRecord({"seed": 1}, [{"loss": 0.5}], {"loss": 1.0}, {"loss": 0.2}, 1.5, 3, 7)
        record.write(tmp_path / "record.json")
        assert RewardRecord.read(tmp_path / "record.json") == record

    @pytest.mark.parametrize("mode", MODES)
    def test_two_ranks(self, tmp_path, mode):
        """One of two ranks is killed, and the run goes on; one process with other pieces agrees."""
        killed = processes.ranks(HERE / "ma_rlhf_reward_ranks.py", tmp_path, "3", env=MODES[mode])
        assert killed.returncode and "killed" in killed.stdout, killed.stderr[-3000:]
        assert not (tmp_path / "record.json").exists() and any(tmp_path.glob("*-3"))
        done = processes.ranks(HERE / "ma_rlhf_reward_ranks.py", tmp_path, env=MODES[mode])
        assert done.returncode == 0, done.stderr[-3000:]
        model = tiny.model()
        record = train_reward_model(model, tiny.pairs(), tiny.config(), held_out=tiny.pairs(seed=2))
        made = torch.load(tmp_path / "model.pt")
        for name, want in model.state_dict().items():
            torch.testing.assert_close(made[name], want, atol=2e-3, rtol=2e-2)
        again = RewardRecord.read(tmp_path / "record.json")
        for a, b in zip(again.curve, record.curve, strict=True):
            assert a == pytest.approx(b, abs=2e-3)
        assert again.after == pytest.approx(record.after, abs=5e-3)


class TestConfig:
    def test_presets_are_the_recipes(self):
        assert {n for n in recipes.NAMES if not n.startswith("apps")} < set(PRESETS)
        made = RewardConfig.from_preset("webgpt-2b", steps=3)
        assert (made.batch_size, made.learning_rate, made.schedule, made.warmup, made.weight_decay) == (
            32, 2e-5, "cosine", 0.1, 0.1)  # fmt: skip
        assert RewardConfig.from_preset("summarize-7b").batch_size == 128
        assert json.loads(json.dumps(made.to_json()))["preset"] == "webgpt-2b"

    @pytest.mark.parametrize(
        "changes, text",
        [
            (
                {"rm_loss": "hinge"},
                "rm_loss must be one of bradley_terry, token_span, token_span_padded",
            ),
            ({"learning_rate": 0}, "learning_rate must be a positive number"),
            ({"warmup": 2}, r"warmup must be in \[0, 1\], got 2"),
            ({"betas": (0.9, 1.0)}, "betas must be two numbers"),
            ({"batch_size": 0}, "batch_size must be >= 1"),
            ({"center": 0.1, "rm_loss": "token_span"}, "center needs rm_loss='bradley_terry'"),
            ({"preset": "apps-2b"}, "preset must be one of default, small, summarize-2b"),
            ({"schedule": "step"}, "schedule must be one of linear, cosine, constant"),
        ],
    )
    def test_bad(self, changes, text):
        with pytest.raises(ValueError, match=text):
            RewardConfig(**changes)


def _bigrams(text):
    words = text.split()
    return list(itertools.pairwise(words))


def documents(count=12, paragraphs=6):
    words = [[f"d{d}p{p}w{w}" for w in range(40)] for d in range(count) for p in range(paragraphs)]
    return [
        Document(
            f"doc {d}",
            "docs",
            "\n\n".join(" ".join(words[d * paragraphs + p]) for p in range(paragraphs)),
        )
        for d in range(count)
    ]


class TestPreferences:
    def test_packaged(self):
        train, held = prefs.packaged_preferences(documents=documents(), seed=3)
        assert {p.kind for p in train} == set(prefs.CORRUPTIONS) and len(train) > 3 * len(held) > 0
        home = lambda text: text.split()[0].split("p")[0]  # noqa: E731
        assert not {home(p.prompt) for p in train} & {home(p.prompt) for p in held}
        for p in train + held:
            chosen, rejected = p.chosen.split(), p.rejected.split()
            assert (
                len(p.prompt.split()) == 8
                and len(chosen) == len(rejected) == 16
                and chosen != rejected
            )
            assert home(p.chosen) == home(p.prompt)
            assert (home(p.rejected) != home(p.prompt)) == (p.kind == "other")
            if p.kind == "shuffled":
                assert sorted(chosen) == sorted(rejected)
            if p.kind == "repeated":
                assert set(rejected) == set(chosen[:3])

    def test_packaged_is_a_function_of_the_seed(self):
        make = lambda **o: prefs.packaged_preferences(documents=documents(), **o)  # noqa: E731
        assert make(seed=3) == make(seed=3) != make(seed=4)
        assert [len(part) for part in make(limit=5)] == [5, 5]
        assert {p.kind for p in make(corruptions=("shuffled",))[0]} == {"shuffled"}

    def test_packaged_bad(self):
        with pytest.raises(
            ValueError, match="corruptions must be one of other, shuffled, repeated, got 'x'"
        ):
            prefs.packaged_preferences(corruptions=("x",))
        with pytest.raises(ValueError, match="held_out in"):
            prefs.packaged_preferences(held_out=1.0)
        with pytest.raises(ValueError, match="1 documents do not give pairs"):
            prefs.packaged_preferences(documents=documents(1))

    def test_from_the_standard_library(self):
        """Real text: what makes an answer the worse one can be read off it, in documents never seen."""
        texts = long_documents(("docs",), limit=40, min_chars=2000)
        train, held = prefs.packaged_preferences(documents=texts)
        assert len(train) > 200 and len(held) > 50
        assert not {p.chosen for p in train} & {p.chosen for p in held}
        known = {pair for p in train for pair in _bigrams(p.chosen)}
        fluent = lambda text: sum(pair in known for pair in _bigrams(text))  # noqa: E731
        for kind, better in (
            ("repeated", lambda p: len(set(p.chosen.split())) > len(set(p.rejected.split()))),
            ("shuffled", lambda p: fluent(p.chosen) >= fluent(p.rejected)),
        ):
            found = [better(p) for p in held if p.kind == kind]
            assert len(found) > 15 and sum(found) > 0.9 * len(found), kind
        rows = prefs.encode_preferences(TOKENIZER, held, 512)
        assert (rows["input_ids"][:, :8] == rows["rejected_input_ids"][:, :8]).float().mean() > 0.99

    def test_files(self, tmp_path):
        pairs = [prefs.Preference("a", "b", "ü"), prefs.Preference("", "x\n", "y", "kind")]
        prefs.save_preferences(tmp_path / "p.jsonl", pairs)
        assert prefs.load_preferences(tmp_path / "p.jsonl") == pairs

    @pytest.mark.parametrize(
        "text, error",
        [
            ("{", "line 2 is not JSON"),
            ("[]", "line 2 must be an object, got list"),
            ('{"prompt": "a", "chosen": 3}', "line 2 needs text in chosen, rejected"),
            (
                '{"prompt": "a", "chosen": "x", "rejected": "x"}',
                "line 2: chosen and rejected are equal",
            ),
        ],
    )
    def test_bad_files(self, tmp_path, text, error):
        good = '{"prompt": "a", "chosen": "x", "rejected": "y"}\n'
        (tmp_path / "p.jsonl").write_text(good + text + "\n")
        with pytest.raises(ValueError, match=error):
            prefs.load_preferences(tmp_path / "p.jsonl")
        (tmp_path / "p.jsonl").write_text("\n")
        with pytest.raises(ValueError, match="holds no pairs"):
            prefs.load_preferences(tmp_path / "p.jsonl")

    def test_encode(self):
        pairs = [prefs.Preference("ab", "cd", "c"), prefs.Preference("ab", "cdef", "cdxx")]
        data = prefs.encode_preferences(TOKENIZER, pairs, 100)
        assert data["input_ids"].tolist() == [
            [97, 98, 99, 100, 3, 0, 0],
            [97, 98, 99, 100, 101, 102, 3],
        ]
        assert data["rejected_attention_mask"].sum(1).tolist() == [4, 7]
        with pytest.warns(UserWarning, match="1 of 2 pairs are equal in their first 4 tokens"):
            assert prefs.encode_preferences(TOKENIZER, pairs, 4)["input_ids"].shape == (1, 4)
        with pytest.raises(ValueError, match="all 1 pairs are equal in their first 4 tokens"):
            prefs.encode_preferences(TOKENIZER, pairs[1:], 4)
        with pytest.raises(ValueError, match="pairs is empty"):
            prefs.encode_preferences(TOKENIZER, [])
