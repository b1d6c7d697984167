# SPDX-License-Identifier: Apache-2.0
"""Training: settings, exact accumulation, resumption, the best checkpoint, LoRA, what is logged."""

import json
import os
import warnings
from dataclasses import replace

import pytest
import themis_models as tiny
import torch
from accelerate.state import AcceleratorState
from peft import PeftModel
from safetensors.torch import load_file

from tenfold.themis.config import PRESETS, ThemisConfig
from tenfold.themis.model import ThemisRewardModel
from tenfold.themis.steps import collated, score_gold
from tenfold.themis.training import ThemisRecord, train_themis
from tenfold.training.errors import TrainingError

FORMAT = tiny.format(256)
SETTINGS = {"steps": 4, "batch_size": 4, "max_length": 256, "learning_rate": 3e-3, "checkpoint_every": 1,
            "eval_every": 2, "obs_dropout": 0.3, "warmup": 0.0}  # fmt: skip


class Killed(Exception):
    pass


def train(model=None, data=None, callback=None, out=None, validation=True, **changes):
    model = model or tiny.reward_model(
        pooling=changes.get("pooling", "last"), tied=changes.pop("tied", False)
    )
    record = train_themis(
        model, data or tiny.pairs(14), FORMAT, ThemisConfig(**(SETTINGS | changes)),
        validation=tiny.pairs(6, 1) if validation else (), out=out, callback=callback,
        tokenizer=tiny.TOKENIZER if out else None,
    )  # fmt: skip
    return model, record


class TestConfig:
    def test_presets(self):
        default = ThemisConfig()
        assert (default.alpha, default.beta, default.omega, default.rm_coef) == (1, 1, 1, 1)
        assert (default.lm_reduce, default.lm_on_positive, default.obs_dropout) == (
            "token_mean",
            True,
            0.01,
        )
        assert (default.epochs, default.batch_size, default.learning_rate, default.warmup) == (
            5,
            64,
            1e-5,
            0.01,
        )
        assert (default.schedule, default.weight_decay, default.max_length, default.seed) == (
            "cosine",
            0.1,
            512,
            42,
        )
        reference = ThemisConfig.from_preset("reference")
        assert (reference.rm_coef, reference.lm_reduce) == (0.5, "token_mean")
        paper = ThemisConfig.from_preset("paper", batch_size=2)
        assert (paper.rm_coef, paper.lm_reduce, paper.batch_size) == (1.0, "component_sum", 2)
        lora = ThemisConfig.from_preset("lora")
        assert (lora.lora_rank, lora.lora_alpha, lora.lora_dropout, lora.learning_rate) == (
            8,
            16,
            0.05,
            1e-4,
        )
        assert lora.lora_targets == ("q_proj", "v_proj")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for name in PRESETS:
                made = ThemisConfig.from_preset(name)
                assert json.loads(json.dumps(made.to_json())) == made.to_json()

    @pytest.mark.parametrize("name", ["alpha", "beta", "omega", "rm_coef", "center"])
    def test_negative(self, name):
        with pytest.raises(ValueError, match=f"{name} must be a number >= 0, got -0.5"):
            ThemisConfig(**{name: -0.5})
        ThemisConfig(beta=3.5, omega=0.0)  # any value from 0 on

    @pytest.mark.parametrize("changes, message", [
        ({"obs_dropout": 1.5}, r"obs_dropout must be in \[0, 1\], got 1.5"),
        ({"obs_dropout": -0.1}, "obs_dropout must be in"),
        ({"lora_dropout": 2.0}, "lora_dropout must be in"),
        ({"lm_reduce": "sum"}, "lm_reduce must be one of token_mean, component_sum, got 'sum'"),
        ({"pooling": "max"}, "pooling must be one of last, mean"),
        ({"inputs": "plain"}, "inputs='plain' has no trace to train on; alpha must be 0, got 1.0"),
        ({"alpha": 0.0, "rm_coef": 0.0}, "rm_coef and alpha are both 0"),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"preset": "tiny"}, "preset must be one of default, reference, paper"),
    ])  # fmt: skip
    def test_bad_input(self, changes, message):
        with pytest.raises(ValueError, match=message):
            ThemisConfig(**changes)

    def test_nothing_left_for_traces(self):
        with pytest.warns(UserWarning, match="alpha, beta and omega are 0.*require_trace=False"):
            ThemisConfig(alpha=0.0, beta=0.0, omega=0.0)


@pytest.fixture(scope="module")
def whole():
    return train()


class TestSteps:
    def test_it_learns_and_says_so(self, whole):
        _, record = whole
        assert [round(c["loss"], 6) for c in record.curve] == [
            pytest.approx(c["loss/rm"] + c["loss/lm"], abs=1e-5) for c in record.curve
        ]
        assert (
            record.curve[-1]["loss"] < record.curve[0]["loss"]
            and record.after["loss"] < record.before["loss"]
        )
        names = {"loss", "loss/rm", "loss/lm", "accuracy", "margin",
                 *(f"loss/{c}" for c in ("answer", "tool", "observation", "rationale", "eos"))}  # fmt: skip
        assert all(c.keys() == names for c in record.curve) and record.before.keys() == names
        assert record.pairs == 14 and record.parameters == record.trained > 0

    @pytest.mark.parametrize(
        "changes", [{"micro_batch_size": 1}, {"micro_batch_size": 3}, {"packed": True}]
    )
    def test_pieces_and_packing_change_nothing(self, whole, changes):
        """Rows of all lengths, observations dropped: the loss is over the whole step."""
        model, record = train(**changes)
        assert tiny.close(model, whole[0], 1e-5)
        for a, b in zip(record.curve, whole[1].curve):
            assert a == pytest.approx(b, rel=1e-4, abs=1e-6)

    @pytest.mark.parametrize("changes", [
        {"lm_reduce": "component_sum"}, {"preset": "reference", "rm_coef": 0.5}, {"pooling": "mean", "tied": True},
        {"beta": 0.0, "omega": 0.0}, {"alpha": 0.0, "require_trace": False}, {"rm_coef": 0.0},
        {"alpha": 0.0, "inputs": "plain", "require_trace": False}, {"gradient_checkpointing": True},
        {"drop_rationale": True, "lm_on_positive": False},
    ])  # fmt: skip
    def test_every_form(self, whole, changes):
        model, record = train(steps=2, validation=False, **changes)
        first = record.curve[0]
        alpha, rm = changes.get("alpha", 1.0), changes.get("rm_coef", 1.0)
        assert first["loss"] == pytest.approx(
            rm * first["loss/rm"] + alpha * first["loss/lm"], rel=1e-4
        )
        assert ("loss/rationale" in first) == (
            alpha > 0 and changes.get("omega", 1.0) > 0 and "drop_rationale" not in changes
        )
        assert model.pooling == changes.get("pooling", "last") and not model.training
        assert all(p.requires_grad for p in model.parameters())
        head = tiny.reward_model(
            pooling=model.pooling, tied=changes.get("tied", False)
        ).lm_head.weight
        assert torch.equal(model.lm_head.weight, head) == (alpha == 0)

    def test_bfloat16(self, whole):
        AcceleratorState._reset_state(True)
        try:
            record = train(steps=2, validation=False, mixed_precision="bf16")[1]
        finally:
            AcceleratorState._reset_state(True)
        assert record.curve[1]["loss"] == pytest.approx(whole[1].curve[1]["loss"], rel=0.01)

    def test_dropping_depends_on_the_seed_alone(self):
        pairs, config = tiny.pairs(8), ThemisConfig(obs_dropout=0.5, max_length=256)
        whole = collated(pairs, FORMAT, config, "cpu", step=3)
        alone = [collated([p], FORMAT, config, "cpu", step=3) for p in pairs]
        for i, part in enumerate(alone):
            for row, other in ((i, 0), (i + 8, 1)):
                assert whole["ids"][row][whole["mask"][row]].equal(
                    part["ids"][other][part["mask"][other]]
                )
        later = collated(pairs, FORMAT, config, "cpu", step=4)["ids"]
        assert not (later.shape == whole["ids"].shape and later.equal(whole["ids"]))
        calm = collated(pairs, FORMAT, config, "cpu")  # not in training
        assert calm["mask"].sum() != whole["mask"].sum() and FORMAT.parse(
            calm["ids"][0][calm["mask"][0]].tolist()
        )

    def test_bad_input(self, tmp_path):
        with pytest.raises(ValueError, match="pairs is empty"):
            train_themis(tiny.reward_model(), [], FORMAT)
        with pytest.raises(
            ValueError, match="format cuts rows to max_length=256 tokens, the settings say 512"
        ):
            train_themis(tiny.reward_model(), tiny.pairs(2), FORMAT)
        long = [*tiny.pairs(6), tiny.pairs(1, 5, answer="9" * 300)[0]]
        with pytest.raises(ValueError, match=r"pair 's5-0': a row needs \d+ tokens"):
            train(data=long)
        with pytest.warns(UserWarning, match="1 of 7 pairs are left out"):
            assert train(data=long, on_bad="skip", steps=1)[1].pairs == 6
        with pytest.raises(ValueError, match=r"'tool': 258.*resize it with prepare_tokenizer"):
            train(tiny.reward_model(vocab_size=258))
        model = tiny.reward_model()
        model.score.weight.data.fill_(torch.nan)
        with pytest.raises(TrainingError, match="the loss became nan at step 1"):
            train(model, validation=False)


class TestBest:
    def test_best_weights_are_kept(self):
        """Held-out pairs that are the wrong way round get worse with every step."""
        turned = [replace(p, chosen=p.rejected, rejected=p.chosen) for p in tiny.pairs(6, 1)]
        config = ThemisConfig(**(SETTINGS | {"eval_every": 1, "alpha": 0.1}))
        model = tiny.reward_model()
        record = train_themis(model, tiny.pairs(14), FORMAT, config, validation=turned)
        assert [v["step"] for v in record.validation] == [1, 2, 3, 4]
        best = max(record.validation, key=lambda v: (v["accuracy"], -v["loss"]))
        assert record.best == best and best["step"] < 4
        found = score_gold(model, turned, FORMAT, config)
        assert found["loss"] == pytest.approx(best["loss"], rel=1e-5)
        assert record.after == {k: v for k, v in best.items() if k not in ("step", "epoch")}

    def test_a_tie_is_wrong(self):
        model = tiny.reward_model()
        model.score.weight.data.zero_()
        found = score_gold(
            model, tiny.pairs(6, 1), FORMAT, ThemisConfig(max_length=256), batch_size=4
        )
        assert found["accuracy"] == 0 and found["margin"] == 0
        assert found["loss/rm"] == pytest.approx(0.693147, abs=1e-5)


class TestResume:
    @pytest.mark.parametrize("stop, changes", [(1, {}), (2, {"lora_rank": 2, "tied": True}),
                                               (3, {"checkpoint_every": 2, "eval_every": 1})])  # fmt: skip
    def test_killed_and_resumed(self, tmp_path, stop, changes):
        """The same weights and numbers, bit by bit; of LoRA with its dropout."""
        want, record = train(out=tmp_path / "whole", **changes)

        def kill(progress):
            if progress.step == stop:
                raise Killed

        with pytest.raises(Killed):
            train(callback=kill, out=tmp_path / "out", **changes)
        steps = []
        model, again = train(
            callback=lambda p: steps.append(p.step), out=tmp_path / "out", **changes
        )
        begun = stop - stop % changes.get("checkpoint_every", 1)
        assert steps == list(range(begun + 1, 5))
        assert tiny.same(model, want)
        assert (again.curve, again.validation, again.best) == (
            record.curve,
            record.validation,
            record.best,
        )
        saved = ThemisRewardModel.from_pretrained(tmp_path / "out")
        assert tiny.same(saved, model)
        assert ThemisRecord.read(tmp_path / "out" / "themis.json") == again
        assert (
            not os.listdir(tmp_path / "out" / "training")
            and (tmp_path / "out" / "tokenizer.json").exists()
        )

    def test_other_runs(self, tmp_path):
        def kill(progress):
            raise Killed

        with pytest.raises(Killed):
            train(callback=kill, out=tmp_path)
        for changes in (
            {"alpha": 2.0},
            {"data": tiny.pairs(15)},
            {"model": tiny.reward_model(7)},
            {"validation": False},
        ):
            with pytest.raises(ValueError, match="belongs to another run"):
                train(out=tmp_path, **changes)
        steps = []
        train_themis(tiny.reward_model(), tiny.pairs(14), FORMAT, ThemisConfig(**SETTINGS), out=tmp_path, resume=False,
                     callback=lambda p: steps.append(p.step))  # fmt: skip
        assert steps == [1, 2, 3, 4]


class TestLora:
    @pytest.mark.parametrize("tied", [False, True])
    def test_what_trains_and_what_is_saved(self, tmp_path, tied):
        before = tiny.reward_model(tied=tied)
        model, record = train(tiny.reward_model(tied=tied), lora_rank=2, out=tmp_path)
        rank2 = 2 * (16 + 16) + 2 * (16 + 8)  # of q_proj [16, 16] and v_proj [8, 16]
        heads = (1 if tied else 2) * len(tiny.TOKENIZER) * 16 + 16
        assert record.trained == rank2 + heads < record.parameters
        assert type(model) is type(before) and not any(
            "lora" in n for n, _ in model.named_parameters()
        )
        changed = {
            n
            for (n, p), q in zip(model.named_parameters(), before.parameters())
            if not torch.equal(p, q)
        }
        assert changed == {"score.weight", "model.embed_tokens.weight", *(() if tied else ("lm_head.weight",)),
                           *(f"model.layers.0.self_attn.{k}_proj.weight" for k in "qv")}  # fmt: skip
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        assert all(p.requires_grad for p in model.parameters())
        assert tiny.same(ThemisRewardModel.from_pretrained(tmp_path), model)
        # The adapters alone, on the model that training began with.
        adapters = PeftModel.from_pretrained(tiny.reward_model(tied=tied), tmp_path / "adapter")
        ids = torch.randint(0, 250, (2, 9))
        with torch.no_grad():
            torch.testing.assert_close(adapters.get_base_model()(ids, logits_to_keep=0).logits,
                                       model(ids, logits_to_keep=0).logits, atol=1e-5, rtol=1e-5)  # fmt: skip
        names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        assert any("score" in n for n in names) and any("embed_tokens" in n for n in names)


def test_epochs_and_evaluations():
    config = ThemisConfig(
        **(SETTINGS | {"steps": None, "epochs": 2.0, "eval_every": None, "batch_size": 5})
    )
    record = train_themis(
        tiny.reward_model(), tiny.pairs(14), FORMAT, config, validation=tiny.pairs(3, 1)
    )
    assert len(record.curve) == 6 and [v["step"] for v in record.validation] == [3, 6]
    assert record.validation[1]["epoch"] == pytest.approx(30 / 14)
