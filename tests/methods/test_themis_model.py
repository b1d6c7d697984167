# SPDX-License-Identifier: Apache-2.0
"""Themis's model: heads on one trunk, round trips, padding, and the plain reward model that it is without a trace."""

import copy
import json
from types import SimpleNamespace

import pytest
import themis_models as tiny
import tiny_models
import torch
import transformers
from torch.nn import functional as F

from tenfold.ma_rlhf.critic import Critic
from tenfold.rlhf.trunks import model_inputs
from tenfold.themis.collate import collate
from tenfold.themis.config import ThemisConfig
from tenfold.themis.model import ThemisRewardModel, check_embeddings
from tenfold.themis.objective import joint_loss
from tenfold.themis.steps import JointLoss
from tenfold.themis.traces import TraceFormat, prepare_tokenizer

FORMAT = tiny.format()
GREEDY = {"max_new_tokens": 5, "do_sample": False}


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=2, n_positions=64,
                                     bos_token_id=None, eos_token_id=5, pad_token_id=0)  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


def phi():
    torch.manual_seed(0)
    config = transformers.PhiConfig(vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                                    num_attention_heads=2, eos_token_id=5, bos_token_id=6, pad_token_id=0)  # fmt: skip
    model = transformers.PhiForCausalLM(config).eval()
    model.lm_head.bias.data.normal_()
    return model


ENDS = {"eos_token_id": 5, "bos_token_id": 6, "pad_token_id": 0}
MODELS = {
    "Llama": lambda: tiny_models.make("Llama", **ENDS),
    "tied": lambda: tiny_models.make("Llama", tie_word_embeddings=True, **ENDS),
    "Gemma3": lambda: tiny_models.make("Gemma3", **ENDS),
    "Cohere": lambda: tiny_models.make("Cohere", logit_scale=0.3, **ENDS),  # scaled logits
    "Granite": lambda: tiny_models.make("Granite", logits_scaling=4.0, **ENDS),
    "Phi": phi,  # an LM head with bias
    "GPT2": gpt2,  # learned positions
}


def batch(seed=1):
    ids = tiny_models.prompt(3, 12, seed)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    mask[2, 9:] = 0
    return ids, mask


class TestHeads:
    @pytest.mark.parametrize("kind", list(MODELS))
    def test_logits_are_the_causal_lms(self, kind):
        lm = MODELS[kind]()
        model = ThemisRewardModel.from_model(copy.deepcopy(lm), seed=1)
        assert isinstance(model, ThemisRewardModel) and isinstance(model, type(lm))
        ids, mask = batch()
        with torch.no_grad():
            want = lm(**model_inputs(lm, ids, mask)).logits[mask.bool()]
            out = model(ids, mask, logits_to_keep=0)
            torch.testing.assert_close(out.logits[mask.bool()], want, atol=1e-5, rtol=1e-5)
            hidden = model.hidden(ids, mask)
            x, weight, v = model.operands(hidden)
            torch.testing.assert_close((x @ weight.t())[mask.bool()], want, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(x @ v, hidden @ model.score.weight[0])
            last = torch.stack([hidden[0, 11], hidden[1, 11], hidden[2, 8]])
            torch.testing.assert_close(
                out.reward, last @ model.score.weight[0], atol=1e-5, rtol=1e-5
            )
            assert out.reward.dtype == torch.float32 and torch.equal(
                out.reward, model.reward(ids, mask)
            )
        assert (
            model(ids, mask).logits is None
            and model(ids, mask, logits_to_keep=2).logits.shape[1] == 2
        )

    @pytest.mark.parametrize("kind", ["Llama", "tied", "GPT2"])
    def test_round_trips(self, kind, tmp_path):
        lm = MODELS[kind]()
        lm.save_pretrained(tmp_path / "lm")
        made = ThemisRewardModel.from_pretrained(tmp_path / "lm", seed=1)
        assert tiny.same(made, ThemisRewardModel.from_model(copy.deepcopy(lm), seed=1))
        other = ThemisRewardModel.from_pretrained(tmp_path / "lm", seed=2)
        assert not torch.equal(other.score.weight, made.score.weight)
        made.config.themis["pooling"] = "mean"
        made.save_pretrained(tmp_path / "rm")
        assert (tmp_path / "rm" / "model.safetensors").exists()
        again = ThemisRewardModel.from_pretrained(tmp_path / "rm")
        assert tiny.same(again, made) and not again.training and again.pooling == "mean"
        assert ThemisRewardModel.from_pretrained(tmp_path / "rm", pooling="last").pooling == "last"
        tied = again.get_output_embeddings().weight is again.get_input_embeddings().weight
        assert tied == (kind != "Llama")
        narrow = ThemisRewardModel.from_pretrained(tmp_path / "rm", dtype=torch.bfloat16)
        assert (
            narrow.score.weight.dtype == torch.bfloat16
            and narrow(*batch()).reward.dtype == torch.float32
        )
        assert tiny.same(copy.deepcopy(made), made)
        assert type(ThemisRewardModel(made.config)) is type(made)

    @pytest.mark.parametrize("kind", ["Llama", "tied", "GPT2"])
    def test_stock_classes_read_it(self, kind, tmp_path):
        """A writer of traces for AutoModelForCausalLM, a scorer for AutoModelForSequenceClassification."""
        lm = MODELS[kind]()
        model = ThemisRewardModel.from_model(lm, seed=1)
        model.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [
            type(lm).__name__
        ]
        ids = batch()[0].clamp_min(1)
        writer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        torch.testing.assert_close(writer(ids).logits, model(ids, logits_to_keep=0).logits)
        made = model.generate(ids, **GREEDY)
        assert made.shape[1] == 17 and torch.equal(made, writer.generate(ids, **GREEDY))
        scorer = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
        torch.testing.assert_close(
            scorer(ids).logits[:, 0], model.reward(ids), atol=1e-5, rtol=1e-5
        )

    def test_labels_and_gradients(self):
        model = tiny.reward_model(tied=True)
        ids = torch.randint(0, 250, (2, 9))
        out = model(ids, labels=ids)
        stock = transformers.LlamaForCausalLM.forward(model, ids, labels=ids)
        torch.testing.assert_close(out.loss, stock.loss)
        (out.loss + out.reward.sum()).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())

    def test_new_tokens_keep_what_is_tied(self):
        for tied in (False, True):
            model = tiny.reward_model(tied=tied, vocab_size=258)
            with pytest.raises(
                ValueError, match=r"258 embeddings and 258 outputs.*'tool': 258.*prepare_tokenizer"
            ):
                check_embeddings(model, FORMAT)
            prepare_tokenizer(tiny.TOKENIZER, model)
            check_embeddings(model, FORMAT)
            assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
            assert model(torch.tensor([[260]]), logits_to_keep=1).logits.shape[-1] == len(
                tiny.TOKENIZER
            )

    def test_begins_a_critic(self):
        model = tiny.reward_model()
        ids, mask = batch()
        with torch.no_grad():
            values = Critic.from_reward_model(model)(ids, mask)
            torch.testing.assert_close(values[0, -1], model.reward(ids, mask)[0])

    def test_bad_input(self, tmp_path):
        model = tiny.reward_model()
        ids, mask = batch()
        with pytest.raises(ValueError, match=r"rows \[1\] of \[3, 12\] have no valid token"):
            model.reward(ids, mask * torch.tensor([[1], [0], [1]]))
        with pytest.raises(ValueError, match=r"attention_mask must be \[3, 12\] as input_ids"):
            model.hidden(ids, mask[:, 1:])
        model.config.pad_token_id = model.config.eos_token_id = 7
        with pytest.raises(ValueError, match="padding token 7 is the end token, too"):
            model.reward(ids.masked_fill(mask == 0, 7))
        assert torch.equal(
            model.reward(ids.masked_fill(mask == 0, 7), mask), model.reward(ids, mask)
        )
        with pytest.raises(
            ValueError, match="needs a causal LM; transformers has none for ViTConfig"
        ):
            ThemisRewardModel(transformers.ViTConfig())
        with pytest.raises(ValueError, match="pooling must be one of last, mean, got 'max'"):
            tiny.reward_model(pooling="max")
        model.model.save_pretrained(tmp_path)  # a trunk without LM head
        with pytest.raises(
            ValueError, match=r"no checkpoint of a causal LM with a value head: it lacks .*lm_head"
        ):
            ThemisRewardModel.from_pretrained(tmp_path)
        model.config.final_logit_softcapping = 30.0
        with pytest.raises(ValueError, match="caps its logits"):
            model.operands(model.hidden(ids, mask))
        assert model(ids, mask, logits_to_keep=0).logits.abs().max() <= 30


def loss_of(model, config, **options):
    made = collate(tiny.pairs(4, context=True), FORMAT, **options)
    with torch.no_grad():
        return JointLoss(model, config)(made)


class TestPadding:
    """Check 5, and what padding may hold."""

    @pytest.mark.parametrize("reduce", ["token_mean", "component_sum"])
    @pytest.mark.parametrize("pooling", ["last", "mean"])
    def test_sides_packing_and_more(self, reduce, pooling):
        model = tiny.reward_model(pooling=pooling, layers=2)
        config = ThemisConfig(lm_reduce=reduce, pooling=pooling)
        want = loss_of(model, config)
        for options in ({"padding_side": "left"}, {"packed": True}, {"multiple_of": 64}, {"multiple_of": 1},
                        {"padding_side": "left", "multiple_of": 128}):  # fmt: skip
            got = loss_of(model, config, **options)
            for name in ("loss", "rm", "lm", "rewards", "nll_sum"):
                torch.testing.assert_close(
                    getattr(got, name), getattr(want, name), atol=1e-5, rtol=1e-5
                )

    def test_a_batch_of_one_is_a_batch_of_eight(self):
        model = tiny.reward_model(layers=2)
        made = collate(tiny.pairs(4, context=True), FORMAT)
        with torch.no_grad():
            together = model.reward(made["ids"], made["mask"])
            for i in range(8):
                alone = model.reward(made["ids"][i : i + 1], made["mask"][i : i + 1])
                torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=1e-5)

    def test_junk_in_padding(self):
        model = tiny.reward_model()
        ids, mask = batch()
        want = model.reward(ids, mask)
        model.model.embed_tokens.weight.data[200] = torch.nan  # no row has it
        for junk in (-100, 10**9, 258, 200):
            assert torch.equal(model.reward(ids.masked_fill(mask == 0, junk), mask), want)

    @pytest.mark.parametrize("reduce", ["token_mean", "component_sum"])
    @pytest.mark.parametrize("pooling", ["last", "mean"])
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_nan_in_padded_hidden_does_not_leak(self, reduce, pooling, side):
        made = collate(tiny.pairs(3), FORMAT, padding_side=side, multiple_of=32)
        model = tiny.reward_model()
        config = ThemisConfig(lm_reduce=reduce, pooling=pooling)
        with torch.no_grad():
            hidden = model.hidden(made["ids"], made["mask"])
        found = []
        for fill in (0.0, torch.nan, torch.inf):
            leaves = [hidden.masked_fill(~made["mask"][..., None], fill).requires_grad_(),
                      model.lm_head.weight.detach().clone().requires_grad_(),
                      model.score.weight.detach().clone().requires_grad_()]  # fmt: skip
            loss = joint_loss(leaves[0], made, leaves[1], leaves[2], config).loss
            found.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
        for other in found[1:]:
            for a, b in zip(found[0], other):
                assert torch.equal(a, b)
        assert (found[0][1][~made["mask"]] == 0).all()


class TestPairLoss:
    """Checks 3 and 6."""

    @pytest.mark.parametrize("center", [0.0, 0.2])
    @pytest.mark.parametrize("pooling", ["last", "mean"])
    def test_without_lm_loss_it_is_a_plain_reward_model(self, center, pooling):
        model = tiny.reward_model(pooling=pooling, layers=2, hidden=16)
        config = ThemisConfig.from_preset("plain", center=center, pooling=pooling)
        made = collate(tiny.pairs(5), FORMAT, inputs="plain")
        ours = JointLoss(model, config)(made)
        grads = torch.autograd.grad(ours.loss, list(model.parameters()), allow_unused=True)
        # The same weights as transformers' own reward model, with the losses as TRL and OpenRLHF have them.
        hidden = transformers.LlamaModel.forward(
            model.model, **model_inputs(model.model, made["ids"], made["mask"].long())
        ).last_hidden_state
        values = hidden @ model.score.weight[0]
        if pooling == "last":
            scores = values.gather(1, made["mask"].sum(1, keepdim=True) - 1)[:, 0]
        else:
            scores = (values * made["mask"]).sum(1) / made["mask"].sum(1)
        chosen, rejected = scores.chunk(2)
        trl = -F.logsigmoid(chosen - rejected).mean() + center * torch.mean(
            (chosen + rejected) ** 2
        )
        torch.testing.assert_close(ours.loss, trl)
        if center == 0:
            torch.testing.assert_close(
                ours.loss, (-F.logsigmoid(chosen - rejected)).mean()
            )  # OpenRLHF
        for (name, p), a, b in zip(model.named_parameters(), grads,
                                   torch.autograd.grad(trl, list(model.parameters()), allow_unused=True)):  # fmt: skip
            if name == "lm_head.weight":
                assert a is None or not a.any()
                continue
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
            assert p.grad is None

    def test_swapping_and_shifting(self):
        model = tiny.reward_model()
        made = collate(tiny.pairs(4), FORMAT)
        swapped = {k: torch.cat([v[4:], v[:4]]) for k, v in made.items()}
        hidden = model.hidden(made["ids"], made["mask"]).detach()
        other = torch.cat([hidden[4:], hidden[:4]])

        def of(h, b, center=0.0):
            return joint_loss(
                h,
                b,
                None,
                model.score.weight.detach(),
                ThemisConfig.from_preset("plain", center=center),
            )

        torch.testing.assert_close(of(other, swapped).delta, -of(hidden, made).delta)
        # A hidden unit that is 1 everywhere adds a constant to all rewards.
        v = torch.cat([model.score.weight.detach(), torch.tensor([[3.0]])], 1)
        one = torch.cat([hidden, torch.ones_like(hidden[..., :1])], -1)
        for center, same in ((0.0, True), (0.1, False)):
            config = ThemisConfig.from_preset("plain", center=center)
            moved = joint_loss(one, made, None, v, config)
            torch.testing.assert_close(moved.rewards, of(hidden, made).rewards + 3)
            assert torch.allclose(moved.rm, of(hidden, made, center).rm, atol=1e-5) == same


def test_packed_rows_need_attention():
    model = SimpleNamespace(config=transformers.Lfm2Config(num_hidden_layers=2, full_attn_idxs=[1]))
    with pytest.raises(
        ValueError, match="packed rows need layers of full_attention and sliding_attention"
    ):
        ThemisRewardModel.packed_hidden(model, torch.zeros(1, 2).long(), torch.zeros(1, 2).long())


def test_format_names_missing_tokens():
    with pytest.raises(KeyError, match="<start_tool>"):
        TraceFormat(SimpleNamespace(get_vocab=dict, eos_token_id=1))
