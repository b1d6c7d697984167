# SPDX-License-Identifier: Apache-2.0
"""DhaLlamaForCausalLM: equal to MHA with expanded weights (check 15), round trips, caches, bad input."""

import warnings

import pytest
import torch
from tiny_models import GREEDY, LAYERS, VOCAB, feed, make, padded, prompt
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache, StaticCache

from tenfold.dha import (
    DhaLlamaConfig,
    DhaLlamaForCausalLM,
    DhaLlamaModel,
    DhaStaticCache,
    HeadLayout,
    dha_to_mha,
)
from tenfold.integrations import transformers as hf
from tenfold.nacl import cache_bytes

ATTENTION = ["sdpa", "eager", "tenfold"]
HEADS, DIM = 8, 16
# Section 8, check 15: (HK, HV) = (2, 4), (4, 1) with maps in no order.
LAYOUT = HeadLayout(
    HEADS, (2, 4), (4, 1), ((1, 0, 1, 0, 0, 1, 1, 0), (3, 2, 1, 0, 0, 1, 2, 3)),
    ((0, 1, 2, 3, 3, 2, 1, 0), (0,) * HEADS),
)  # fmt: skip
TOL = {"atol": 1e-5, "rtol": 1e-4}


def tiny(layout: HeadLayout = LAYOUT, attention: str = "sdpa", **changes) -> DhaLlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "head_dim": DIM,
        "num_hidden_layers": layout.num_layers, "num_attention_heads": layout.num_heads,
        "max_position_embeddings": 512, "pad_token_id": 0,
    }  # fmt: skip
    config = DhaLlamaConfig(**(sizes | layout.config_fields() | changes))
    config._attn_implementation = attention
    model = DhaLlamaForCausalLM(config).eval()
    for name, weight in model.named_parameters():
        if "q_proj.weight" in name:  # sharper attention: else every map gives much the same
            weight.data *= 8
        elif name.endswith("bias"):
            torch.nn.init.normal_(weight)
    return model


def to_dtype(model, dtype: torch.dtype):
    """As loaded in that dtype: ``model.to`` would round the rotary frequencies, too."""
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    return model


@pytest.mark.parametrize("attention", ATTENTION)
class TestAgainstExpandedMha:
    """Everything a user of the model sees equals stock Llama with one head each."""

    def both(self, attention, **changes):
        model = tiny(attention=attention, **changes)
        return model, dha_to_mha(model)

    @pytest.mark.parametrize("changes", [{}, {"attention_bias": True}, {"mlp_bias": True}])
    @pytest.mark.parametrize("length", [1, 11, 40])
    def test_prompt(self, attention, length, changes):
        model, mha = self.both(attention, **changes)
        ids = prompt(2, length)
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, mha(ids).logits, **TOL)

    def test_left_padding_and_decoding(self, attention):
        model, mha = self.both(attention)
        ids, mask = padded([prompt(1, n, seed=n) for n in (40, 23)])
        caches = [DynamicCache(config=m.config) for m in (model, mha)]
        with torch.no_grad():
            got, want = (feed(m, c, ids, mask) for m, c in zip((model, mha), caches))
            torch.testing.assert_close(got[mask.bool()], want[mask.bool()], **TOL)
            for step in prompt(2, 3, seed=4).split(1, 1):
                mask = torch.cat([mask, torch.ones_like(step)], 1)
                got, want = (feed(m, c, step, mask) for m, c in zip((model, mha), caches))
                torch.testing.assert_close(got, want, **TOL)

    def test_decoding_equals_prompt_rows(self, attention):
        model, ids, cache = tiny(attention=attention), prompt(2, 30), DynamicCache()
        with torch.no_grad():
            whole = model(ids).logits
            parts = [feed(model, cache, ids[:, :10])]
            parts += [feed(model, cache, ids[:, i : i + 1], seen=i) for i in range(10, 30)]
        torch.testing.assert_close(torch.cat(parts, 1), whole, **TOL)

    @pytest.mark.parametrize("lengths", [(30, 30), (30, 17)], ids=["even", "left padded"])
    @pytest.mark.parametrize("how", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
    def test_generate(self, attention, lengths, how):
        model, mha = self.both(attention)
        ids, mask = padded([prompt(1, n, seed=n) for n in lengths])
        how = {"attention_mask": mask, "max_new_tokens": 10, **how, **GREEDY}
        want = mha.generate(ids, **how)
        assert torch.equal(model.generate(ids, **how), want)

    def test_gradients(self, attention):
        """Shared heads get the sum of what their copies get."""
        model, mha = self.both(attention)
        ids = prompt(2, 30)
        for m in (model, mha):
            m.train()(ids, labels=ids).loss.backward()
        tol = {"atol": 1e-6, "rtol": 1e-3}
        for index, (ours, theirs) in enumerate(zip(model.model.layers, mha.model.layers)):
            ours, theirs = ours.self_attn, theirs.self_attn
            torch.testing.assert_close(ours.q_proj.weight.grad, theirs.q_proj.weight.grad, **tol)
            for name, rows in (("k_proj", LAYOUT.key_head_map), ("v_proj", LAYOUT.value_head_map)):
                got = getattr(ours, name).weight.grad.view(-1, DIM, 64)
                each = getattr(theirs, name).weight.grad.view(HEADS, DIM, 64)
                want = torch.zeros_like(got).index_add_(0, torch.tensor(rows[index]), each)
                torch.testing.assert_close(got, want, **tol)


class TestCaches:
    @pytest.mark.parametrize("attention", ATTENTION)
    @pytest.mark.parametrize("lengths", [(30, 30), (30, 17)], ids=["even", "left padded"])
    def test_static_cache(self, attention, lengths):
        model = tiny(attention=attention)
        ids, mask = padded([prompt(1, n, seed=n) for n in lengths])
        how = {"attention_mask": mask, "max_new_tokens": 8, "disable_compile": True, **GREEDY}
        want = model.generate(ids, **how)
        cache = DhaStaticCache(model.config, max_cache_len=48)
        assert torch.equal(model.generate(ids, past_key_values=cache, **how), want)
        for index, layer in enumerate(cache.layers):
            assert layer.keys.shape == (2, LAYOUT.key_heads[index], 48, DIM)
            assert layer.values.shape == (2, LAYOUT.value_heads[index], 48, DIM)
        got = model.generate(ids, cache_implementation="static", **how)
        assert torch.equal(got, want)
        cache.reset()
        assert torch.equal(model.generate(ids, past_key_values=cache, **how), want)

    def test_a_chunked_prompt(self):
        model = tiny(attention="tenfold")
        ids, mask = padded([prompt(1, n, seed=n) for n in (50, 33)])
        how = {"attention_mask": mask, "max_new_tokens": 5, "disable_compile": True, **GREEDY}
        want = model.generate(ids, **how)
        for more in ({}, {"cache_implementation": "static"}):
            assert torch.equal(model.generate(ids, prefill_chunk_size=20, **more, **how), want)

    def test_early_initialization(self):
        cache = DhaStaticCache(tiny().config, max_cache_len=20)
        cache.early_initialization(3, None, DIM, torch.bfloat16, "cpu")
        assert [x.keys.shape[1] for x in cache.layers] == [2, 4]
        assert [x.values.shape for x in cache.layers] == [(3, 4, 20, DIM), (3, 1, 20, DIM)]
        assert cache.layers[0].values.dtype == torch.bfloat16

    def test_the_stock_static_cache_is_refused(self):
        """It would give values the head count of keys."""
        model = tiny()
        cache = StaticCache(config=model.config, max_cache_len=20)
        with pytest.raises(TypeError, match=r"2 key heads and 4 value heads.*DhaStaticCache"):
            hf.forward(model, prompt(1, 5), cache)

    def test_the_stock_static_cache_serves_equal_counts(self):
        layout = HeadLayout(4, (2, 1), (2, 1), ((1, 0, 0, 1), (0,) * 4), ((0, 1, 0, 1), (0,) * 4))
        model, ids = tiny(layout), prompt(1, 12)
        cache = StaticCache(config=model.config, max_cache_len=20)
        with torch.no_grad():
            want = model(ids).logits
            torch.testing.assert_close(hf.forward(model, ids, cache).logits, want, **TOL)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_bytes_are_those_of_the_shared_heads(self, dtype):
        """Check 13: reported bytes equal those of the cache's tensors."""
        model, cache = tiny().to(dtype), DynamicCache()
        with torch.no_grad():
            hf.forward(model, prompt(3, 25), cache)
        per_token = LAYOUT.kv_bytes_per_token(DIM, dtype.itemsize)
        assert per_token == (2 + 4 + 4 + 1) * DIM * dtype.itemsize
        assert cache_bytes(cache) == 3 * 25 * per_token

    def test_compiled_decoding_with_a_static_cache(self):
        model, ids = tiny(attention="tenfold"), prompt(2, 20)
        more = prompt(2, 3, seed=3)
        graphs = []

        def count(graph, inputs):
            graphs.append(graph)
            return graph.forward

        step = torch.compile(model, fullgraph=True, backend=count, dynamic=False)
        plain, cache = DynamicCache(), DhaStaticCache(model.config, max_cache_len=40)
        with torch.no_grad():
            for m, c in ((model, plain), (model, cache)):
                hf.forward(m, ids, c)
            for new in more.split(1, 1):
                want, got = hf.forward(model, new, plain), hf.forward(step, new, cache)
                torch.testing.assert_close(got.logits, want.logits, **TOL)
        assert len(graphs) == 1

    @pytest.mark.parametrize("attention", ["sdpa", "tenfold"])
    def test_compiled_prompt(self, attention):
        model, ids = tiny(attention=attention), prompt(2, 20)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            want = model(ids).logits
            torch.testing.assert_close(compiled(ids).logits, want, **TOL)


class TestRoundTrips:
    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_save_and_load(self, tmp_path, tied, dtype):
        model = to_dtype(tiny(tie_word_embeddings=tied), dtype)
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
        assert type(again) is DhaLlamaForCausalLM and again.dtype == dtype
        assert AutoConfig.from_pretrained(tmp_path).head_layout == LAYOUT
        for index, layer in enumerate(again.model.layers):
            attention = layer.self_attn
            assert attention.key_map.tolist() == list(LAYOUT.key_head_map[index])
            assert attention.value_map.tolist() == list(LAYOUT.value_head_map[index])
            assert attention.key_map.dtype == torch.int32
        ids = prompt(1, 20)
        with torch.no_grad():
            assert torch.equal(again(ids).logits, model(ids).logits)
        shared = again.lm_head.weight is again.model.embed_tokens.weight
        assert shared is tied

    def test_base_model(self, tmp_path):
        model = tiny()
        model.save_pretrained(tmp_path)
        base = AutoModel.from_pretrained(tmp_path, attn_implementation="sdpa")
        assert type(base) is DhaLlamaModel
        ids = prompt(1, 20)
        with torch.no_grad():
            want = model.model(ids).last_hidden_state
            assert torch.equal(base(ids).last_hidden_state, want)

    def test_the_saved_files_name_no_buffers(self, tmp_path):
        model = tiny()
        names = set(model.state_dict())
        assert not any("map" in name for name in names)
        model.save_pretrained(tmp_path)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            _, info = DhaLlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]

    def test_ours_is_the_default_attention(self):
        config = tiny().config
        fresh = DhaLlamaConfig(**{k: v for k, v in config.to_dict().items() if k != "model_type"})
        assert DhaLlamaForCausalLM(fresh).config._attn_implementation == "tenfold"
        model = DhaLlamaForCausalLM(fresh)
        model.set_attn_implementation("eager")
        assert model.config._attn_implementation == "eager"

    def test_dtype_moves_leave_the_maps_alone(self):
        model = tiny().to(torch.bfloat16)
        assert model.model.layers[0].self_attn.key_map.dtype == torch.int32

    def test_attention_weights_and_checkpointing(self):
        model, ids = tiny(attention="eager"), prompt(1, 12)
        with torch.no_grad():
            out = model(ids, output_attentions=True)
        assert [a.shape for a in out.attentions] == [(1, HEADS, 12, 12)] * 2
        model.train()
        model(ids, labels=ids).loss.backward()
        want = model.model.layers[0].self_attn.k_proj.weight.grad.clone()
        model.zero_grad()
        model.gradient_checkpointing_enable()
        model(ids, labels=ids).loss.backward()
        torch.testing.assert_close(model.model.layers[0].self_attn.k_proj.weight.grad, want)


FIELDS = LAYOUT.config_fields()
BAD = {
    "map entry": (
        {"key_head_map": [FIELDS["key_head_map"][0], [0, 1, 2, 3, 4, 0, 0, 0]]},
        r"key_head_map must be in \[0, 4\) \(key_heads\), got 4 at layer 1, position 4",
    ),
    "map length": (
        {"value_head_map": [[0] * 7, [0] * 8]},
        r"value_head_map of layer 0 must have one entry per query head \(8\), got 7",
    ),
    "map type": (
        {"key_head_map": [[0.5] * 8, [0] * 8]},
        r"key_head_map must be integers, got 0\.5 at layer 0, position 0|field 'key_head_map'",
    ),
    "query heads": (
        {"num_attention_heads": 4}, r"key_head_map of layer 0 must have .* \(4\), got 8",
    ),
    "layers": ({"num_hidden_layers": 3}, r"one entry per layer \(3\), got 2"),
    "part of the fields": ({"value_heads": None}, "must be given together, missing: value_heads"),
}  # fmt: skip


class TestConfig:
    @pytest.mark.parametrize("case", BAD)
    def test_bad_input(self, case):
        changes, message = BAD[case]
        sizes = {"num_hidden_layers": 2, "num_attention_heads": 8, "hidden_size": 64}
        with pytest.raises(ValueError, match=message):
            DhaLlamaConfig(**(sizes | FIELDS | changes))

    def test_without_maps_it_is_llama(self):
        config = DhaLlamaConfig(
            num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2, hidden_size=64
        )
        assert config.head_layout == HeadLayout.gqa(LAYERS, 4, 2)

    def test_position_of_the_new_fields(self):
        assert AutoConfig.for_model("dha_llama", **FIELDS, num_hidden_layers=2,
                                    num_attention_heads=8).head_layout == LAYOUT  # fmt: skip
        assert not hasattr(make().config, "key_heads")
