# SPDX-License-Identifier: Apache-2.0
"""attn_implementation="tenfold" on stock models: equal to transformers' own attention, whatever the mask.

Judged against ``sdpa`` (``eager`` for soft-capped logits) on tiny random models of several families.
"""

import sys

import pytest
import torch
import transformers
from tiny_models import GREEDY, feed, make, padded, prompt
from transformers import DynamicCache, StaticCache
from transformers.masking_utils import (
    causal_mask_function,
    chunked_causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from tenfold import ops
from tenfold.integrations import attention
from tenfold.integrations import transformers as hf
from tenfold.testing import processes

TOL = {"atol": 2e-5, "rtol": 1e-4}
# What is special: windows, soft caps, biases, heads.
FAMILIES = {
    "Llama": {},
    "MHA": {"num_key_value_heads": 4},
    "MQA": {"num_key_value_heads": 1},
    "Mistral": {"sliding_window": 24},
    "Qwen2": {},
    "Gemma2": {"sliding_window": 24, "attn_logit_softcapping": 2.0},  # every other layer slides
    "Gemma3": {},
}


def build(family: str, attn: str, **changes):
    kind = "Llama" if family in ("MHA", "MQA") else family
    return make(kind, attn, **(FAMILIES[family] | changes))


def pair(family: str, **changes):
    """The same model twice: with transformers' attention and with ours."""
    theirs = build(family, "eager" if family == "Gemma2" else "sdpa", **changes)
    ours = build(family, "tenfold", **changes)
    return theirs, ours


@pytest.fixture
def calls(monkeypatch):
    """Which ops ran: a list of (name, keyword arguments)."""
    seen = []
    for name in ("dha_attention", "dha_decode"):
        real = getattr(ops, name)

        def spy(*args, _real=real, _name=name, **kwargs):
            seen.append((_name, kwargs))
            return _real(*args, **kwargs)

        monkeypatch.setattr(ops, name, spy)
    return seen


class TestLogits:
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("length", [1, 9, 16, 17, 61])
    def test_prompt(self, family, length):
        theirs, ours = pair(family)
        ids = prompt(2, length)
        with torch.no_grad():
            torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, **TOL)

    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding(self, family, side):
        theirs, ours = pair(family)
        ids, mask = padded([prompt(1, n, seed=n) for n in (53, 40, 3)], side)
        with torch.no_grad():
            want = feed(theirs, DynamicCache(config=theirs.config), ids, mask)
            got = feed(ours, DynamicCache(config=ours.config), ids, mask)
        for b in range(3):
            keep = mask[b].bool()
            torch.testing.assert_close(got[b, keep], want[b, keep], **TOL)

    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("steps", [1, 5, 20])
    @pytest.mark.parametrize("pad", [False, True])
    def test_turns_on_a_cache(self, family, steps, pad):
        """Prompt, then several tokens at once, then one: decode steps and chunks see what they must."""
        theirs, ours = pair(family)
        rows = [prompt(1, n, seed=n) for n in ((40, 29) if pad else (40, 40))]
        ids, mask = padded(rows)
        more = prompt(2, steps + 1, seed=9)
        caches = [DynamicCache(config=m.config) for m in (theirs, ours)]
        with torch.no_grad():
            for chunk in (ids, more[:, :steps], more[:, steps:]):
                if chunk is not ids:
                    mask = torch.cat([mask, torch.ones_like(chunk)], 1)
                want, got = (feed(m, c, chunk, mask) for m, c in zip((theirs, ours), caches))
                keep = mask[:, -chunk.shape[1] :].bool()
                torch.testing.assert_close(got[keep], want[keep], **TOL)

    def test_holes_in_the_mask(self):
        """Tokens masked in the middle of a row are no padding; they must still not be seen."""
        theirs, ours = pair("Llama")
        ids, mask = prompt(2, 40), torch.ones(2, 40, dtype=torch.long)
        mask[0, 10:15] = 0
        caches = [DynamicCache(config=m.config) for m in (theirs, ours)]
        keep = mask.bool()
        with torch.no_grad():
            want, got = (feed(m, c, ids, mask) for m, c in zip((theirs, ours), caches))
            torch.testing.assert_close(got[keep], want[keep], **TOL)
            mask = torch.cat([mask, torch.ones(2, 2, dtype=torch.long)], 1)
            want, got = (feed(m, c, ids[:, :2], mask) for m, c in zip((theirs, ours), caches))
        torch.testing.assert_close(got, want, **TOL)

    @pytest.mark.parametrize("length", [12, 40])
    def test_packed_sequences(self, length):
        theirs, ours = pair("Llama")
        ids = prompt(1, length)
        positions = torch.cat([torch.arange(5), torch.arange(length - 5)])[None]
        with torch.no_grad():
            want, got = (
                m(ids, position_ids=positions, use_cache=False).logits for m in (theirs, ours)
            )
            alone = theirs(ids[:, 5:]).logits
        torch.testing.assert_close(got, want, **TOL)
        torch.testing.assert_close(got[:, 5:], alone, **TOL)

    @pytest.mark.parametrize("length", [12, 40])
    @pytest.mark.parametrize("kind", ["bool", "float", "prefix"])
    def test_own_4d_masks_are_taken_as_they_are(self, length, kind):
        theirs, ours = pair("Llama")
        see = torch.ones(length, length).tril().bool()
        see[:, 3] = False
        see[3, 3] = True
        if kind == "prefix":  # bidirectional start
            see[:6, :6] = True
        mask = see[None, None].expand(2, 1, -1, -1)
        if kind == "float":
            mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        ids = prompt(2, length)
        with torch.no_grad():
            want, got = (m(ids, attention_mask=mask).logits for m in (theirs, ours))
        torch.testing.assert_close(got, want, **TOL)

    def test_bfloat16(self):
        """At most twice as wrong as sdpa in bfloat16, against the same weights in float64."""
        from tenfold.testing import assert_close_to_ref

        theirs, ours = (m.to(torch.bfloat16) for m in pair("Llama"))
        exact = build("Llama", "sdpa").double()
        exact.load_state_dict(ours.state_dict())
        ids = prompt(2, 60)
        with torch.no_grad():
            assert_close_to_ref(ours(ids).logits, exact(ids).logits, theirs(ids).logits)

    def test_autocast(self):
        theirs, ours = pair("Llama")
        ids = prompt(2, 40)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            want, got = theirs(ids).logits, ours(ids).logits
        torch.testing.assert_close(got, want, atol=0.1, rtol=0.1)


class TestGenerate:
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("cache", ["dynamic", "static"])
    @pytest.mark.parametrize("lengths", [(40, 40), (40, 27)], ids=["even", "left padded"])
    def test_greedy(self, family, cache, lengths):
        theirs, ours = pair(family)
        ids, mask = padded([prompt(1, n, seed=n) for n in lengths])
        how = {"attention_mask": mask, "max_new_tokens": 12, "disable_compile": True, **GREEDY}
        want = theirs.generate(ids, **how)
        if cache == "static":
            how["cache_implementation"] = "static"
        assert torch.equal(ours.generate(ids, **how), want)

    def test_beams(self):
        theirs, ours = pair("Llama")
        ids, mask = padded([prompt(1, n, seed=n) for n in (40, 27)])
        how = {"attention_mask": mask, "max_new_tokens": 8, "num_beams": 3, **GREEDY}
        assert torch.equal(ours.generate(ids, **how), theirs.generate(ids, **how))

    def test_prompt_lookup(self):
        theirs, ours = pair("Llama")
        ids = prompt(1, 20).repeat(1, 3)
        how = {"max_new_tokens": 12, "prompt_lookup_num_tokens": 4, **GREEDY}
        assert torch.equal(ours.generate(ids, **how), theirs.generate(ids, **how))

    def test_a_chunked_prompt(self):
        theirs, ours = pair("Llama")
        ids, mask = padded([prompt(1, n, seed=n) for n in (70, 40)])
        how = {"attention_mask": mask, "max_new_tokens": 5, "disable_compile": True, **GREEDY}
        want = theirs.generate(ids, **how)
        assert torch.equal(ours.generate(ids, prefill_chunk_size=32, **how), want)

    def test_new_tokens_decode_and_prompts_do_not(self, calls):
        _, ours = pair("Llama")
        ids, mask = padded([prompt(1, n, seed=n) for n in (40, 27)])
        ours.generate(ids, attention_mask=mask, max_new_tokens=3, **GREEDY)
        names = [name for name, _ in calls]
        assert names == ["dha_attention"] * 4 + ["dha_decode"] * 8
        assert all(kwargs["kv_start"].tolist() == [0, 13] for _, kwargs in calls[4:])

    def test_a_plain_prompt_needs_no_mask(self, calls):
        _, ours = pair("Llama")
        with torch.no_grad():
            ours(prompt(2, 40), attention_mask=torch.ones(2, 40, dtype=torch.long))
        assert all(kwargs.get("attn_bias") is None and kwargs["causal"] for _, kwargs in calls)


class TestTraining:
    @pytest.mark.parametrize("family", ["Llama", "Mistral", "Gemma2"])
    @pytest.mark.parametrize("length", [12, 40])
    @pytest.mark.parametrize("pad", [False, True])
    def test_gradients(self, family, length, pad):
        theirs, ours = pair(family)
        ids, mask = padded([prompt(1, n, seed=n) for n in (length, length - 5 * pad)], "right")
        labels = torch.where(mask.bool(), ids, -100)
        for model in (theirs, ours):
            model.train()
            model(ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
        for (name, want), got in zip(theirs.named_parameters(), ours.parameters()):
            torch.testing.assert_close(got.grad, want.grad, atol=1e-5, rtol=1e-3, msg=name)

    def test_a_step_on_a_cache_with_gradients(self):
        """Few queries that need gradients cannot use the decode op; static caches are cut by the mask."""
        theirs, ours = pair("Llama")
        ids, more = prompt(2, 20), prompt(2, 3, seed=5)
        grads = []
        for model in (theirs, ours):
            cache = StaticCache(config=model.config, max_cache_len=40)
            with torch.no_grad():
                hf.forward(model, ids, cache)
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
            hf.forward(model, more, cache).logits.square().mean().backward()
            grads.append(model.model.layers[0].self_attn.q_proj.weight.grad)
        torch.testing.assert_close(grads[1], grads[0], atol=1e-6, rtol=1e-3)

    def test_dropout_is_refused(self):
        model = build("Llama", "tenfold", attention_dropout=0.1)
        ids = prompt(1, 20)
        with torch.no_grad():
            model(ids)  # no dropout in evaluation
        with pytest.raises(ValueError, match=r"no attention dropout, got dropout=0\.1"):
            model.train()(ids)


class TestCompile:
    @pytest.mark.parametrize("length", [12, 40])
    def test_fullgraph(self, length):
        theirs, ours = pair("Llama")
        ids = prompt(2, length)
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            want = theirs(ids).logits
            torch.testing.assert_close(compiled(ids).logits, want, **TOL)

    def test_decode_with_a_static_cache_compiles_once(self):
        theirs, ours = pair("Llama")
        ids, mask = padded([prompt(1, n, seed=n) for n in (30, 21)])
        more = prompt(2, 4, seed=7)
        graphs = []

        def count(graph, inputs):
            graphs.append(graph)
            return graph.forward

        step = torch.compile(ours, fullgraph=True, backend=count, dynamic=False)
        want_cache = DynamicCache(config=theirs.config)
        cache = StaticCache(config=ours.config, max_cache_len=64)
        with torch.no_grad():
            feed(theirs, want_cache, ids, mask)
            feed(ours, cache, ids, mask)
            for i in range(4):
                mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
                new = more[:, i : i + 1]
                want = feed(theirs, want_cache, new, mask)
                # As generate() does: the mask is made outside of the compiled forward.
                made = attention.attention_mask(
                    2, 1, 64, cache.get_seq_length(), 0, attention_mask=mask.bool()
                )
                positions = (mask.sum(1) - 1)[:, None]
                got = hf.forward(step, new, cache, attention_mask=made, position_ids=positions)
                torch.testing.assert_close(got.logits, want, **TOL)
        assert len(graphs) == 1


def shown(mask, q_length, kv_length, q_end=None):
    """The boolean [B, Sq, Sk] that a mask of ours stands for, written out from its definition."""
    q_end = kv_length if q_end is None else q_end
    row = torch.arange(q_length)[:, None] + q_end - q_length
    slot = torch.arange(kv_length)
    causal = slot <= row
    if mask is None:
        return causal[None]
    if mask.dtype == torch.bool:
        return mask[:, 0]
    if mask.dtype == torch.uint8:
        return causal & mask[:, 0, 0, None].bool()
    start, lens = mask[:, 0, 0, 0, None, None], mask[:, 0, 0, 1, None, None]
    assert mask.shape[2] == 1 or mask.shape[2] - 1 == q_end
    row = torch.arange(q_length)[:, None] + start + lens - q_length
    see = (slot >= start) & (slot <= row)
    return see & (slot > row - (mask.shape[1] - 1)) if mask.shape[1] > 1 else see


class TestMask:
    """The least masks stand for transformers' full ones; only rows of pads may differ."""

    @pytest.mark.parametrize("function", ["causal", "sliding", "chunked"])
    @pytest.mark.parametrize("sizes", [(1, 1), (1, 30), (16, 30), (17, 17), (17, 30), (30, 30)])
    @pytest.mark.parametrize("room", [0, 7])
    @pytest.mark.parametrize("padding", ["none", "ones", "left", "right", "holes"])
    @pytest.mark.parametrize("offset", [0, 4])
    def test_against_the_full_mask(self, function, sizes, room, padding, offset):
        (q_length, end), batch = sizes, 3
        functions = {
            "causal": causal_mask_function,
            "sliding": sliding_window_causal_mask_function(9),
            "chunked": chunked_causal_mask_function(8, torch.zeros(batch, dtype=torch.long)),
        }
        given = torch.ones(batch, offset + end, dtype=torch.bool)
        if padding == "left":
            given[1, : offset + end // 2] = False
        elif padding == "right":
            given[1, offset + (end + 1) // 2 :] = False
        elif padding == "holes":
            given[1, offset + end // 3 : offset + end // 2] = False
        how = {
            "batch_size": batch, "q_length": q_length, "kv_length": end + room,
            "q_offset": offset + end - q_length, "kv_offset": offset,
            "mask_function": functions[function],
            "attention_mask": None if padding == "none" else given,
        }  # fmt: skip
        want = sdpa_mask(**how, allow_is_causal_skip=False)[:, 0]
        mask = attention.attention_mask(**how, dtype=torch.float32)
        got = shown(mask, q_length, end + room, end).expand_as(want)
        valid = given[:, offset + end - q_length : offset + end]
        assert torch.equal(got[valid], want[valid])
        if function == "chunked":
            assert mask.dtype == torch.bool
        elif function == "causal" and padding in ("none", "ones") and q_length > 16 and not room:
            assert mask is None

    def test_a_mask_passes_through_a_second_time(self):
        _, ours = pair("Llama")
        mask = attention.attention_mask(2, 1, 30, 29)
        again = transformers.masking_utils.create_causal_mask(
            config=ours.config,
            inputs_embeds=torch.zeros(2, 1, 64),
            attention_mask=mask,
            **_no_cache(),
        )
        assert again is mask

    def test_masks_cost_no_memory(self):
        mask = attention.attention_mask(
            2, 100, 5000, 4900, mask_function=sliding_window_causal_mask_function(4096)
        )
        assert mask.shape == (2, 4097, 1, 2) and mask.untyped_storage().nbytes() == 2 * 2 * 4


def _no_cache():
    import inspect

    names = inspect.signature(transformers.masking_utils.create_causal_mask).parameters
    return {"cache" if "cache" in names else "past_key_values": None}


class TestSurface:
    @pytest.mark.parametrize("name", attention.NAMES)
    def test_from_pretrained(self, tmp_path, name):
        model = build("Llama", "sdpa")
        model.save_pretrained(tmp_path)
        again = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, attn_implementation=name
        )
        ids = prompt(1, 30)
        with torch.no_grad():
            torch.testing.assert_close(again(ids).logits, model(ids).logits, **TOL)

    def test_encoders_are_not_causal(self):
        """A module that says is_causal=False sees both sides."""
        torch.manual_seed(0)
        q, k = torch.randn(2, 20, 4, 16).transpose(1, 2), torch.randn(2, 2, 20, 16)
        module = torch.nn.Linear(1, 1)
        module.is_causal = False
        out, weights = attention.attention_forward(module, q, k, k, None)
        want = torch.nn.functional.scaled_dot_product_attention(q, k, k, enable_gqa=True)
        torch.testing.assert_close(out, want.transpose(1, 2), **TOL)
        assert weights is None and out.is_contiguous()

    @pytest.mark.parametrize("name", ["s_aux", "position_bias"])
    def test_what_it_cannot_do_is_said(self, name):
        q = torch.randn(1, 4, 20, 16)
        with pytest.raises(ValueError, match=f"does not support '{name}'"):
            attention.attention_forward(torch.nn.Linear(1, 1), q, q, q, None, **{name: q})

    def test_heads_that_do_not_divide(self):
        q, k = torch.randn(1, 4, 20, 16), torch.randn(1, 3, 20, 16)
        with pytest.raises(
            ValueError, match="must divide the 4 query heads or come with maps, got 3"
        ):
            attention.attention_forward(torch.nn.Linear(1, 1), q, k, k, None)

    def test_importing_tenfold_leaves_transformers_alone(self):
        code = (
            "import sys, tenfold, tenfold.integrations\n"
            "assert 'transformers' not in sys.modules\n"
            "tenfold.integrations.register_attention()\n"
            "from transformers import AttentionInterface\n"
            "assert 'tenfold' in AttentionInterface() and 'dha' in AttentionInterface()\n"
        )
        processes.python("-c", code, loaded=("torch",)).check_returncode()

    def test_an_old_transformers_is_named(self, monkeypatch):
        found = sys.modules["transformers"]  # its loader may have put a new module there
        monkeypatch.setattr(found, "__version__", "5.4.1.dev0")
        with pytest.raises(ImportError, match=r"x needs transformers >= 5\.5, found 5\.4\.1"):
            hf.require("x", 5, 5)
        monkeypatch.setattr(found, "__version__", "5.10.0")
        hf.require("x", 5, 5)


class TestPatch:
    def test_puts_back_what_each_part_had(self):
        model = make("Llama", "eager")
        ids = prompt(2, 20)
        with torch.no_grad():
            before = model(ids).logits
            with attention.patch(model):
                assert model.config._attn_implementation == "tenfold"
                patched = model(ids).logits
            torch.testing.assert_close(patched, before, **TOL)
            assert not torch.equal(patched, before)  # another kernel has run
            assert model.config._attn_implementation == "eager"
            assert torch.equal(model(ids).logits, before)
            handle = attention.patch(model)
            attention.unpatch(model)
            handle.remove()  # a second time: nothing
            assert torch.equal(model(ids).logits, before)

    def test_refusals(self):
        model = make("Llama", "sdpa")
        with pytest.raises(RuntimeError, match="attention of this LlamaForCausalLM is not patched"):
            attention.unpatch(model)
        with attention.patch(model), pytest.raises(RuntimeError, match="is patched already"):
            attention.patch(model)
        assert model.config._attn_implementation == "sdpa"
        with pytest.raises(TypeError, match="a model of transformers, got Linear"):
            attention.patch(torch.nn.Linear(2, 2))

    def test_a_model_with_its_own_attention(self, monkeypatch):
        model = make("Llama", "eager")
        monkeypatch.setattr(type(model), "_can_set_attn_implementation", lambda *_: False)
        monkeypatch.setattr(type(model.model), "_can_set_attn_implementation", lambda *_: False)
        with pytest.raises(TypeError, match="LlamaForCausalLM computes its attention by itself"):
            attention.patch(model)
        assert model.config._attn_implementation == "eager"

    def test_registration_is_undone(self):
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        model = make("Llama", "sdpa")
        try:
            attention.unregister()
            attention.unregister()
            assert not {"tenfold", "dha"} & set(ALL_ATTENTION_FUNCTIONS.valid_keys())
            with pytest.raises(ValueError, match="tenfold"):
                model.set_attn_implementation("tenfold")
            with attention.patch(model):  # registers anew
                assert model.config._attn_implementation == "tenfold"
        finally:
            attention.register()
