# SPDX-License-Identifier: Apache-2.0
"""Check 6 and what surrounds it: draws, architectures, Plans, and what they refuse."""

import json
import re
from collections import Counter

import hft_models as tiny
import pytest
import torch
import transformers as tf
from torch import nn

from tenfold import hft
from tenfold.hft.architecture import CATEGORIES, describe
from tenfold.hft.plan import Part, Plan
from tenfold.hft.selection import (
    _by_category,
    _by_parameters,
    check_ratio,
    frozen_count,
    generator,
    select,
)

ROUNDS = 2000


def counted(plan, layers):
    """Frozen tensors per category and layer, of a Llama."""
    found = {"attn": Counter(), "mlp": Counter(), "norm": Counter()}
    for name in plan.frozen:
        layer = int(re.search(r"layers\.(\d+)\.", name)[1])
        kind = "norm" if "layernorm" in name else "attn" if "self_attn" in name else "mlp"
        found[kind][layer] += 1
    return {k: [c[i] for i in range(layers)] for k, c in found.items()}


class TestCategoryLevel:
    def test_32_layers(self):
        model = tiny.tiny(32)
        plan = select(model, 3, 7)
        found = counted(plan, 32)
        assert found["attn"] == [2] * 32 and found["norm"] == [1] * 32
        assert sorted(found["mlp"]) == [1] * 16 + [2] * 16
        assert plan.layer_fraction == 0.5
        outside = {n for n, _ in model.named_parameters() if "layers." not in n}
        assert outside <= set(plan.trained)

    def test_reproducible_and_different(self):
        model = tiny.tiny(8)
        plans = [select(model, r, s) for r in range(4) for s in range(2)]
        again = [select(tiny.tiny(8, seed=9), r, s) for r in range(4) for s in range(2)]
        assert plans == again and len({p.digest() for p in plans}) == 8

    def test_the_draw_is_this_one(self):
        """The order of the draws is part of the interface: a Plan can be made elsewhere from a seed."""
        import random

        rng = random.Random("5:2")
        layers = 4
        more = set(rng.sample(range(layers), 2))
        want = []
        for i in range(layers):
            want += [f"self_attn.{m}_proj {i}" for m in rng.sample(list("qkvo"), 2)]
            want += [
                f"mlp.{m}_proj {i}" for m in rng.sample(["gate", "up", "down"], 1 + (i in more))
            ]
            want += [f"{m}_layernorm {i}" for m in rng.sample(["input", "post_attention"], 1)]
        plan = select(tiny.tiny(layers), 2, 5)
        got = [re.sub(r"model\.layers\.(\d+)\.(.*)\.weight", r"\2 \1", n) for n in plan.frozen]
        assert sorted(got) == sorted(want)

    def test_every_matrix_is_frozen_half_of_the_time(self):
        model = tiny.tiny(4)
        made = describe(model)
        hits = Counter()
        for r in range(ROUNDS):
            hits.update(_by_category(made, 0.5, generator(0, r)))
        for unit in made.units():
            assert abs(hits[id(unit)] / ROUNDS - 0.5) <= 0.03, unit.label
        drawn = {p.name for u in made.units() for p in u.pieces
                 if id(u) in _by_category(made, 0.5, generator(0, 3))}  # fmt: skip
        assert drawn == set(select(model, 3).frozen)

    @pytest.mark.parametrize("layers", [1, 3, 5])
    def test_odd_layers(self, layers):
        found = counted(select(tiny.tiny(layers)), layers)
        assert sum(found["mlp"]) == layers + layers // 2
        assert found["attn"] == [2] * layers and found["norm"] == [1] * layers

    @pytest.mark.parametrize("ratio", [0, 0.25, 0.3, 0.6, 0.75, 1])
    def test_other_ratios(self, ratio):
        plan = select(tiny.tiny(10), ratio=ratio)
        found = counted(plan, 10)
        for kind, size in (("attn", 4), ("mlp", 3), ("norm", 2)):
            assert sum(found[kind]) == frozen_count(ratio, 10 * size)
            assert max(found[kind]) - min(found[kind]) <= 1

    def test_rounding(self):
        assert frozen_count(0.5, 3) == 1 and frozen_count(0.5, 96) == 48
        assert frozen_count(0.7, 10) == 3 and frozen_count(1, 8) == 0 and frozen_count(0, 8) == 8


class TestOtherStrategies:
    def test_layers(self):
        plan = select(tiny.tiny(8), strategy="layer")
        found = counted(plan, 8)
        assert sorted(found["attn"]) == [0] * 4 + [4] * 4
        assert [a * 3 // 4 for a in found["attn"]] == found["mlp"]
        assert plan.layer_fraction == 0.5

    def test_model(self):
        plan = select(tiny.tiny(8), strategy="model")
        assert len(plan.frozen) == 36
        assert len(set(counted(plan, 8)["attn"])) > 1

    def test_elements(self):
        model = tiny.tiny(2)
        plan = select(model, 1, strategy="element")
        masks = plan.masks(model)
        parameters = dict(model.named_parameters())
        assert set(plan.partial) == {n for n in parameters if "layers." in n}
        for p, (packed, kind) in masks.items():
            bits = sum(bin(b).count("1") for b in packed.tolist())
            assert kind == "element" and bits == p.numel() // 2
        other = select(model, 2, strategy="element").masks(model)
        assert any(not torch.equal(a[0], b[0]) for a, b in zip(masks.values(), other.values()))

    def test_importance_of_matrices(self):
        model = tiny.tiny(4)
        scores = {n: float("q_proj" in n or "o_proj" in n or "down" in n or "input" in n)
                  for n, _ in model.named_parameters()}  # fmt: skip
        plan = select(model, strategy="importance", scores=scores)
        assert all(not re.search("q_proj|o_proj|down|input", n) for n in plan.frozen)
        found = counted(plan, 4)
        assert found["attn"] == [2] * 4 and sorted(found["mlp"]) == [1, 1, 2, 2]

    def test_importance_of_elements(self):
        model = tiny.tiny(1)
        scores = {n: p.detach().abs() for n, p in model.named_parameters()}
        plan = select(model, strategy="importance", ratio=0.25, scores=scores)
        p = model.model.layers[0].mlp.down_proj.weight
        from tenfold import ops

        bits = ops.unpack_mask(plan.masks(model)[p][0], p.numel()).view(p.shape)
        assert bits.sum() == p.numel() // 4
        assert p.detach().abs()[bits].min() >= p.detach().abs()[~bits].max()

    def test_parameters_instead_of_matrices(self):
        model = tiny.tiny(8, heads=4, kv_heads=1)
        by_matrix = [select(model, r).layer_fraction for r in range(20)]
        by_size = [select(model, r, balance="params").layer_fraction for r in range(20)]
        assert max(abs(f - 0.5) for f in by_size) < 0.02 < max(abs(f - 0.5) for f in by_matrix)
        made = describe(model)
        hits = Counter()
        for r in range(400):
            hits.update(_by_parameters(made, 0.5, generator(0, r)))
        assert min(hits.values()) / 400 > 0.3 and max(hits.values()) / 400 < 0.7

    def test_embeddings(self):
        plan = select(tiny.tiny(2), freeze_embeddings=True)
        assert {"model.embed_tokens.weight", "lm_head.weight"} <= set(plan.frozen)
        assert "model.norm.weight" in plan.trained
        tied = tiny.tiny(2, tie_word_embeddings=True)
        assert "lm_head.weight" not in select(tied, freeze_embeddings=True).frozen


def meta(name, config, **changes):
    common = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "vocab_size": 50,
              "intermediate_size": 24, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}  # fmt: skip
    with torch.device("meta"):
        return getattr(tf, name)(getattr(tf, config)(**(common | changes)))


def labels(model):
    layer = describe(model).layers[0]
    return [[u.label for u in layer[c]] for c in CATEGORIES]


class TestArchitectures:
    def test_gqa_bias_and_true_fraction(self):
        model = meta("Qwen2ForCausalLM", "Qwen2Config", num_key_value_heads=2)
        plan = select(model)
        assert 0.4 < plan.layer_fraction < 0.6
        frozen = set(plan.frozen)
        for name in frozen:
            if name.endswith("q_proj.weight"):
                assert name.replace("weight", "bias") in frozen  # a bias follows its matrix

    def test_qwen3_norms_join(self):
        model = meta("Qwen3ForCausalLM", "Qwen3Config", num_key_value_heads=2, head_dim=4)
        for r in range(4):
            plan = select(model, r)
            norms = [n for n in plan.frozen if "norm" in n and "layers.0." in n]
            assert len(norms) == 2

    def test_three_norms(self):
        model = meta("Qwen3ForCausalLM", "Qwen3Config", num_key_value_heads=2, head_dim=4)
        for layer in model.model.layers:
            layer.self_attn.k_norm = nn.Identity()
        plan = select(model)
        assert (
            len([n for n in plan.trained if "layers.0." in n and "norm" in n]) == 2
        )  # ceil(3 / 2)

    def test_phi3_rows(self):
        model = meta("Phi3ForCausalLM", "Phi3Config", num_key_value_heads=2)
        made = describe(model)
        qkv, gate_up = Counter(), Counter()
        for layer in made.layers:
            for unit in layer["attention"] + layer["ffn"]:
                for piece in unit.pieces:
                    for r in piece.ranges or ():
                        (qkv if "qkv" in piece.name else gate_up).update(
                            (piece.name, i) for i in range(*r)
                        )
        # Each row belongs to exactly one part.
        assert set(qkv.values()) == {1} and len(qkv) == 2 * (16 + 8 + 8)
        assert set(gate_up.values()) == {1} and len(gate_up) == 2 * 48
        assert labels(model)[0][1:] == [f"self_attn.qkv_proj.weight:{c}" for c in "qkv"]
        for r in range(8):
            for name, part in select(model, r).partial.items():
                size = dict(model.named_parameters())[name].shape[0]
                assert part.kind == "row" and 0 < sum(len(range(*x)) for x in part.ranges) < size

    def test_gpt2_columns(self):
        with torch.device("meta"):
            model = tf.GPT2LMHeadModel(tf.GPT2Config(n_layer=2, n_head=4, n_embd=16))
        assert labels(model)[0] == [
            *(f"attn.c_attn.weight:{c}" for c in "qkv"),
            "attn.c_proj.weight",
        ]
        plans = [select(model, r) for r in range(6)]
        assert {abs(p.layer_fraction - 0.5) < 0.02 for p in plans} == {True}
        parts = {n: p for plan in plans for n, p in plan.partial.items()}
        weight = next(p for n, p in parts.items() if n.endswith("c_attn.weight"))
        assert weight.kind == "col"
        assert next(p for n, p in parts.items() if n.endswith("c_attn.bias")).kind == "element"

    def test_neox_heads_are_interleaved(self):
        model = meta("GPTNeoXForCausalLM", "GPTNeoXConfig")
        unit = describe(model).layers[0]["attention"][0]
        assert unit.label.endswith("query_key_value.weight:q")
        assert unit.pieces[0].ranges == tuple((h * 12, h * 12 + 4, 1) for h in range(4))

    def test_stacked_experts(self):
        model = meta(
            "MixtralForCausalLM", "MixtralConfig", num_key_value_heads=2, num_local_experts=4
        )
        assert labels(model)[1] == ["mlp.experts.gate_up_proj:gate", "mlp.experts.gate_up_proj:up",
                                    "mlp.experts.down_proj"]  # fmt: skip
        gate, up, _ = describe(model).layers[0]["ffn"]
        assert gate.pieces[0].ranges == tuple((e * 48, e * 48 + 24, 1) for e in range(4))
        assert gate.numel == up.numel == 4 * 24 * 16
        assert "model.layers.0.mlp.gate.weight" in select(model).trained  # the router

    def test_gpt_oss(self):
        model = meta("GptOssForCausalLM", "GptOssConfig", num_key_value_heads=2, head_dim=4,
                     num_local_experts=4)  # fmt: skip
        gate = describe(model).layers[0]["ffn"][0]
        assert [(p.kind, p.ranges) for p in gate.pieces] == [("col", ((0, 48, 2),))] * 2
        assert "model.layers.0.self_attn.sinks" in select(model).trained

    @pytest.mark.parametrize(
        "name, config, changes",
        [
            ("OPTForCausalLM", "OPTConfig", {"ffn_dim": 24, "word_embed_proj_dim": 16}),
            ("BertForMaskedLM", "BertConfig", {}),
            ("BloomForCausalLM", "BloomConfig", {}),
            ("T5ForConditionalGeneration", "T5Config",
             {"num_layers": 2, "d_model": 16, "num_heads": 4, "d_kv": 4, "d_ff": 24}),
            ("Gemma3ForCausalLM", "Gemma3TextConfig", {"num_key_value_heads": 2, "head_dim": 4}),
            ("Qwen3MoeForCausalLM", "Qwen3MoeConfig",
             {"num_key_value_heads": 2, "head_dim": 4, "num_experts": 4, "moe_intermediate_size": 8}),
            ("OlmoeForCausalLM", "OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2}),
        ],
    )  # fmt: skip
    def test_others(self, name, config, changes):
        model = meta(name, config, **changes)
        made = describe(model)
        assert len(made.layers) >= 2 and all(made.layers[0][c] for c in CATEGORIES)
        names = {p.name for u in made.units() for p in u.pieces} | set(made.outside)
        assert names == {n for n, _ in model.named_parameters()}
        assert 0.3 < select(model).layer_fraction < 0.7

    def test_tied_head_counts_once(self):
        plan = select(tiny.tiny(2, tie_word_embeddings=True))
        assert "lm_head.weight" not in plan.trained and "model.embed_tokens.weight" in plan.trained


class TestPlan:
    def test_json(self, tmp_path):
        for model, changes in ((tiny.tiny(3), {}), (tiny.tiny(3), {"strategy": "element"}),
                               (tiny.tiny(1), {"strategy": "importance"})):  # fmt: skip
            if changes.get("strategy") == "importance":
                changes = changes | {"scores": {n: p.detach() for n, p in model.named_parameters()}}
            plan = select(model, 1, 2, **changes)
            plan.write(tmp_path / "plan.json")
            again = Plan.read(tmp_path / "plan.json")
            assert again == plan and again.digest() == plan.digest()
            assert json.loads((tmp_path / "plan.json").read_text())["format"] == 1

    def test_another_model(self):
        plan = select(tiny.tiny(4))
        with pytest.raises(
            KeyError, match=r"(model\.layers\.[23]\S*, ){2}model\.layers\.[23]\S+ and 15 more"
        ):
            hft.apply(tiny.tiny(2), plan)
        with pytest.raises(KeyError, match="not in the Plan"):
            hft.apply(tiny.tiny(5), plan)
        with pytest.raises(ValueError, match="a Plan of format 7"):
            Plan.from_json(plan.to_json() | {"format": 7})
        with pytest.raises(ValueError, match="row range 0:99 in a tensor of 3 rows"):
            Part("row", ((0, 99, 1),)).mask(torch.zeros(3, 4))


class TestBadInput:
    @pytest.mark.parametrize("ratio", [-0.1, 1.01, float("nan"), "half", None, True])
    def test_ratio(self, ratio):
        with pytest.raises(
            ValueError,
            match=re.escape(f"ratio must be in [0, 1], the share that trains, got {ratio}"),
        ):
            check_ratio(ratio)

    @pytest.mark.parametrize(
        "changes, message",
        [
            (
                {"strategy": "random"},
                "strategy must be one of category, layer, model, element, importance",
            ),
            ({"balance": "bytes"}, "balance must be one of matrices, params, got 'bytes'"),
            ({"strategy": "importance"}, "scores are needed for strategy 'importance'"),
            ({"scores": {}}, "scores are needed for strategy 'importance', and only there"),
        ],
    )
    def test_choices(self, changes, message):
        with pytest.raises(ValueError, match=message):
            select(tiny.tiny(1), **changes)

    def test_nothing_left(self):
        model = nn.ModuleDict({"layers": nn.ModuleList([tiny.tiny(1).model.layers[0]])})
        with pytest.raises(
            ValueError, match=r"nothing is left to train: ratio 0\.0, embeddings none"
        ):
            select(model, ratio=0)

    def test_no_layers(self):
        with pytest.raises(
            ValueError, match=r"no layers with attention or FFN.*Sequential; found: 0.weight"
        ):
            select(nn.Sequential(nn.Linear(3, 3)))

    def test_unknown_matrices(self):
        model = tiny.tiny(1)
        model.model.layers[0].extra = nn.Linear(3, 3)
        with pytest.raises(ValueError, match=r"1 matrices.*no category.*layers.0.extra.weight"):
            select(model)

    def test_a_fused_matrix_that_cannot_be_read(self):
        model = meta("Phi3ForCausalLM", "Phi3Config", num_key_value_heads=2)
        model.config.num_key_value_heads = 3
        with pytest.raises(ValueError, match="cannot tell queries, keys and values apart"):
            select(model)

    def test_lora(self):
        model = tiny.tiny(1)
        model.model.layers[0].mlp.lora_A = nn.Linear(3, 3)
        with pytest.raises(ValueError, match="LoRA modules"):
            select(model)


class TestMetrics:
    """Check 8."""

    R = ((0.8, 0.2, 0.1), (0.6, 0.9, 0.3), (0.5, 0.7, 0.85))

    def test_numbers(self):
        assert hft.overall_performance(self.R) == pytest.approx(0.68333, abs=1e-5)
        assert hft.backward_transfer(self.R) == pytest.approx(-0.16667, abs=1e-5)
        assert hft.backward_transfer(self.R, "classic") == pytest.approx(-0.25)
        assert hft.backward_transfer([[0.3]]) == 0

    def test_errors(self):
        with pytest.raises(ValueError, match="square"):
            hft.overall_performance([[1, 2]])
        with pytest.raises(ValueError, match="square"):
            hft.backward_transfer([])
        with pytest.raises(ValueError, match="form must be one of trace, classic"):
            hft.backward_transfer(self.R, "mean")
        with pytest.raises(ValueError, match="two tasks or more"):
            hft.backward_transfer([[1.0]], "classic")
