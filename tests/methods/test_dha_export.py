# SPDX-License-Identifier: Apache-2.0
"""In and out of DHA: lossless from MHA and GQA, token-identical back, and which maps GQA can express."""

import pytest
import torch
from test_dha_layout import random_layout
from test_dha_model import LAYOUT, tiny, to_dtype
from tiny_models import GREEDY, make, padded, prompt
from transformers import LlamaForCausalLM

from tenfold.dha import HeadLayout, dha_to_gqa, dha_to_mha, from_mha
from tenfold.dha.export import gqa_heads

TOL = {"atol": 1e-5, "rtol": 1e-4}
SOURCES = {
    "MHA": ("Llama", {"num_key_value_heads": 4}),
    "GQA": ("Llama", {}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "Mistral": ("Mistral", {}),
    "Qwen2": ("Qwen2", {}),  # biases of q, k and v only
}


def source(name: str, dtype=torch.float32):
    kind, changes = SOURCES[name]
    model = make(kind, **changes)
    for key, weight in model.named_parameters():
        if key.endswith("bias"):
            torch.nn.init.normal_(weight)
    return to_dtype(model, dtype)


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


class TestFromMha:
    @pytest.mark.parametrize("name", SOURCES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_lossless(self, name, dtype):
        model, ids = source(name, dtype), prompt(2, 30)
        dha = from_mha(model, attn_implementation="sdpa")
        assert torch.equal(logits(dha, ids), logits(model, ids))
        assert dha.dtype == dtype and not dha.training
        assert dha.config.head_layout == HeadLayout.from_config(model.config)
        assert from_mha(model).config._attn_implementation == "tenfold"

    @pytest.mark.parametrize("name", ["GQA", "Qwen2"])
    def test_there_and_back(self, name, tmp_path):
        model, ids = source(name), prompt(2, 30)
        dha = from_mha(model)
        dha.save_pretrained(tmp_path)
        dha = type(dha).from_pretrained(tmp_path)
        how = {"max_new_tokens": 8, **GREEDY}
        want = model.generate(ids, **how)
        for other in (dha, dha_to_mha(dha), dha_to_gqa(dha)):
            assert torch.equal(other.generate(ids, **how), want)
        assert dha_to_gqa(dha).config.num_key_value_heads == 2

    def test_no_memory_is_shared(self):
        model, ids = source("tied"), prompt(1, 20)
        want = logits(model, ids)
        dha = from_mha(model)
        mha = dha_to_mha(dha)
        for weight in dha.parameters():
            weight.data.zero_()
        assert torch.equal(logits(model, ids), want)
        torch.testing.assert_close(logits(mha, ids), want, **TOL)

    def test_settings_go_along(self):
        model = source("GQA").train()
        model.generation_config.max_new_tokens = 77
        dha = from_mha(model)
        assert dha.training and dha.generation_config.max_new_tokens == 77
        for name in ("rms_norm_eps", "rope_parameters", "head_dim", "vocab_size"):
            assert getattr(dha.config, name) == getattr(model.config, name)

    @pytest.mark.parametrize("kind, changes", [("Mistral", {"sliding_window": 16}), ("Gemma", {})])
    def test_other_models_are_refused(self, kind, changes):
        with pytest.raises(TypeError, match="supported"):
            from_mha(make(kind, **changes))


class TestCollapse:
    """Key and value weights given per layer: the end of a conversion."""

    def weights(self, model, layout):
        """Weights of the layout's heads, drawn at random."""
        width, dim = model.config.hidden_size, model.config.head_dim
        return [
            [torch.randn(n, dim, width) / 8 for n in counts]
            for counts in (layout.key_heads, layout.value_heads)
        ]

    def test_function(self):
        """Equals the source with those weights put into each query head's own projection."""
        model, ids = source("MHA"), prompt(2, 25)
        layout = random_layout(4, 4, seed=3)
        keys, values = self.weights(model, layout)
        dha = from_mha(model, layout, keys, values, attn_implementation="sdpa")
        for index, layer in enumerate(model.model.layers):
            for name, heads, rows in (
                ("k_proj", keys, layout.key_head_map), ("v_proj", values, layout.value_head_map),
            ):  # fmt: skip
                own = heads[index][torch.tensor(rows[index])]
                getattr(layer.self_attn, name).weight.data = own.flatten(0, 1)
        torch.testing.assert_close(logits(dha, ids), logits(model, ids), **TOL)
        assert dha.config.head_layout == layout

    def test_biases(self):
        model, layout = source("Qwen2"), random_layout(4, 4, seed=5)
        keys, values = self.weights(model, layout)
        with pytest.raises(ValueError, match="biases in k_proj, so key_biases are needed"):
            from_mha(model, layout, keys, values)
        biases = [[torch.randn(w.shape[:2]) for w in weights] for weights in (keys, values)]
        dha = from_mha(model, layout, keys, values, key_biases=biases[0], value_biases=biases[1])
        assert torch.equal(dha.model.layers[2].self_attn.v_proj.bias, biases[1][2].flatten())
        assert dha.model.layers[2].self_attn.o_proj.bias is None

    def test_bad_weights(self):
        model = source("MHA")
        layout = HeadLayout.gqa(4, 4, [4, 4, 2, 1])
        keys, values = self.weights(model, layout)
        with pytest.raises(ValueError, match=r"value_weights of layer 2 must be \[2, 16, 64\]"):
            from_mha(model, layout, keys, [*values[:2], values[0], values[3]])
        with pytest.raises(ValueError, match="must have one tensor per layer, got 3"):
            from_mha(model, layout, keys[:3], values)
        with pytest.raises(ValueError, match="a layout needs value_weights"):
            from_mha(model, layout, keys)
        with pytest.raises(ValueError, match="need a layout"):
            from_mha(model, None, keys, values)


class TestToMha:
    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("bias", [False, True])
    def test_generation_is_token_identical(self, seed, bias):
        model = tiny(random_layout(3, 6, seed), hidden_size=96, attention_bias=bias)
        mha = dha_to_mha(model)
        assert type(mha) is LlamaForCausalLM and mha.config.num_key_value_heads == 6
        ids, mask = padded([prompt(1, n, seed=n) for n in (30, 21)])
        how = {"attention_mask": mask, "max_new_tokens": 8, **GREEDY}
        assert torch.equal(mha.generate(ids, **how), model.generate(ids, **how))

    def test_loads_without_tenfold(self, tmp_path):
        mha = dha_to_mha(tiny())
        mha.save_pretrained(tmp_path)
        again = LlamaForCausalLM.from_pretrained(tmp_path)
        assert again.config.model_type == "llama" and not hasattr(again.config, "key_heads")
        assert torch.equal(logits(again, prompt(1, 9)), logits(mha, prompt(1, 9)))

    def test_only_dha_models(self):
        with pytest.raises(TypeError, match="supported: DhaLlamaForCausalLM"):
            dha_to_mha(make())


class TestToGqa:
    @pytest.mark.parametrize("seed", range(3))
    def test_query_heads_out_of_order(self, seed):
        """Equal groups of keys and values, in any order and under any names: GQA after sorting."""
        gen = torch.Generator().manual_seed(seed)
        layout = HeadLayout.gqa(3, 8, 4)
        names = [torch.randperm(4, generator=gen).tolist() for _ in range(3)]
        renamed = [[row[n] for n in m] for row, m in zip(names, layout.value_head_map)]
        layout = HeadLayout.from_maps(layout.key_head_map, renamed)
        order = [torch.randperm(8, generator=gen).tolist() for _ in range(3)]
        model, ids = tiny(layout.permuted(order), attention_bias=True), prompt(2, 25)
        gqa = dha_to_gqa(model)
        assert gqa.config.num_key_value_heads == 4
        assert gqa.model.layers[0].self_attn.k_proj.weight.shape == (4 * 16, 64)
        torch.testing.assert_close(logits(gqa, ids), logits(model, ids), **TOL)

    @pytest.mark.parametrize("kmaps, vmaps, message, heads", [
        ([[0, 0, 1, 1]] * 2, [[0, 0, 1, 1], [0, 1, 0, 1]], "layer 1 has 2 key heads and 2 value", 4),
        ([[0, 0, 1, 1]] * 2, [[0, 0, 1, 1], [0, 1, 2, 3]], "layer 1 has 2 key heads and 4 value", 4),
        ([[0, 0, 0, 1]], [[1, 1, 1, 0]], r"layer 0 has groups of \[1, 3\] query heads", 4),
        ([[0, 0, 1, 1], [0, 0, 0, 0]], [[0, 0, 1, 1], [0, 0, 0, 0]], "layer 1 has 1 groups, layer 0", 2),
    ])  # fmt: skip
    def test_maps_that_gqa_cannot_express(self, kmaps, vmaps, message, heads):
        layout = HeadLayout.from_maps(kmaps, vmaps)
        model, ids = tiny(layout), prompt(2, 20)
        with pytest.raises(ValueError, match=message):
            dha_to_gqa(model)
        gqa = dha_to_gqa(model, expand=True)  # repeats heads instead
        assert gqa.config.num_key_value_heads == heads == gqa_heads(layout, expand=True)
        torch.testing.assert_close(logits(gqa, ids), logits(model, ids), **TOL)

    def test_expansion_of_anything_is_at_worst_mha(self):
        model, ids = tiny(), prompt(1, 20)
        gqa = dha_to_gqa(model, expand=True)
        assert gqa.config.num_key_value_heads <= LAYOUT.num_heads
        torch.testing.assert_close(logits(gqa, ids), logits(model, ids), **TOL)
