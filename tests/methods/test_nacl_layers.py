# SPDX-License-Identifier: Apache-2.0
"""Presses on other kinds of models, and under all that generate() does.

Sections 3.5 to 3.7 of the specification beyond test_nacl_press.py: sliding-window and hybrid models,
bfloat16, beams, turns, padding, drafts. What happens to an evicted cache: test_nacl_cache.py.
"""

import pytest
import torch
from tiny_models import (
    GREEDY,
    KINDS,
    LAYERS,
    feed,
    make,
    masked_reference,
    padded,
    prompt,
    run,
)
from transformers import AttentionInterface, DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tenfold import nacl
from tenfold.integrations import transformers as hf
from tenfold.testing import assert_close_to_ref


class TestModels:
    @pytest.mark.parametrize("kind", KINDS)
    def test_queries_are_those_that_the_attention_gets(self, kind):
        model, real, ours = make(kind), {}, {}
        layers = hf.attention_layers(model)

        def spy(module, query, key, value, mask, **kwargs):
            real[module.layer_idx] = query
            return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **kwargs)

        def ask(module, args, kwargs, output):
            hidden = hf.hidden_states(args, kwargs)
            ours[module.layer_idx] = hf.queries(module, hidden[:, -7:], kwargs, 7)

        AttentionInterface.register("tenfold_spy", spy)
        AttentionMaskInterface.register("tenfold_spy", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
        hooks = [m.register_forward_hook(ask, with_kwargs=True) for m in layers]
        model.set_attn_implementation("tenfold_spy")
        with torch.no_grad():
            model(prompt(2, 40))
        for hook in hooks:
            hook.remove()
        assert set(ours) == {m.layer_idx for m in layers}
        for index, query in ours.items():
            torch.testing.assert_close(query, real[index][:, :, -7:], atol=1e-5, rtol=1e-5)
        assert model.config is layers[0].config

    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    @pytest.mark.parametrize("kind", KINDS)
    def test_decoding_equals_masked_full_attention(self, kind, attention):
        model, ids, more = make(kind, attention), prompt(2, 300), prompt(2, 4, seed=2)
        press = nacl.NaclPress(compression_ratio=0.8, random_ratio=0.3)
        got, _ = run(model, press, ids, more)
        layers = {m.layer_idx for m in hf.attention_layers(model)}
        assert set(press.kept) == layers and len(layers) >= 2
        want = masked_reference(model, ids, press.kept, more)
        torch.testing.assert_close(got, want, atol=5e-4, rtol=1e-3)
        with torch.no_grad():
            full = model(torch.cat([ids, more], 1), use_cache=False).logits[:, 300:]
        assert float((full - want).abs().max()) > 1e-3  # the kept set mattered

    @pytest.mark.parametrize("kind", ["Gemma3", "Cohere2"])
    def test_sliding_window_layers_are_left_alone(self, kind):
        model, ids, more = make(kind), prompt(2, 300), prompt(2, 3, seed=2)
        press = nacl.NaclPress(compression_ratio=0.8)
        _, cache = run(model, press, ids, more)
        plain = DynamicCache(config=model.config)
        with torch.no_grad():
            feed(model, plain, ids)
        assert set(press.kept) == {1, 3}
        for index in (0, 2):
            assert type(cache.layers[index]) is type(plain.layers[index])
            assert cache.layers[index].keys.shape[2] == 31
            want = plain.layers[index].keys[:, :, 3:]
            torch.testing.assert_close(cache.layers[index].keys[:, :, :28], want)
        for index in (1, 3):
            assert cache.layers[index].keys.shape[2] == 63
        assert cache.get_seq_length() == 303

    @pytest.mark.parametrize("kind", ["Lfm2", "Qwen3Next"])
    def test_hybrid_layers_are_left_alone(self, kind):
        model, ids, more = make(kind), prompt(1, 300), prompt(1, 3, seed=2)
        press = nacl.NaclPress(compression_ratio=0.8)
        _, cache = run(model, press, ids, more)
        plain = DynamicCache(config=model.config)
        assert set(press.kept) == {1, 3} and press.stats.evictions == 2
        for index in (0, 2):
            assert type(cache.layers[index]) is type(plain.layers[index])

    @pytest.mark.parametrize("head_budget", ["uniform", "adaptive"])
    @pytest.mark.parametrize("kind", ["Gemma3", "Lfm2", "SmolLM3"])
    def test_generate(self, kind, head_budget):
        """What generate() says is what greedy decoding over the masked prompt says."""
        model, ids = make(kind), prompt(2, 300)
        press = nacl.NaclPress(compression_ratio=0.8, head_budget=head_budget)
        with press(model):
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6,
                                 do_sample=False, pad_token_id=0, eos_token_id=None)  # fmt: skip
        want = masked_reference(model, ids, press.kept, out[:, 300:-1])
        assert torch.equal(out[:, 301:], want.argmax(-1))

    def test_bfloat16(self):
        """Judged by the house rule: at most twice as wrong as plain bfloat16 with the same mask."""
        exact, model = make(), make().to(torch.bfloat16)
        ids, more = prompt(2, 300), prompt(2, 5, seed=2)
        press = nacl.NaclPress(compression_ratio=0.8, random_ratio=0.3)
        got, cache = run(model, press, ids, more)
        assert all(layer.keys.dtype == torch.bfloat16 for layer in cache.layers)
        exact.load_state_dict(model.state_dict())  # the same rounded weights
        ref = masked_reference(exact.double(), ids, press.kept, more)
        assert_close_to_ref(got, ref, masked_reference(model, ids, press.kept, more))

    def test_gradients_enabled(self):
        """Parameters that require grad and no no_grad() around: eviction is inference all the same."""
        model, ids = make(), prompt(1, 300)
        press = nacl.NaclPress(keep_tokens=60, decode_interval=2)
        cache = press.new_cache(model)
        with press(model):
            feed(model, cache, ids)
            for i in range(2):
                feed(model, cache, ids[:, i : i + 1], seen=300 + i)
        assert cache.layers[0].keys.shape[2] == 60 and not cache.layers[0].keys.requires_grad


class TestGenerate:
    @pytest.mark.parametrize("head_budget", ["uniform", "adaptive"])
    @pytest.mark.parametrize("lengths", [(300, 300), (340, 290)], ids=["even", "left padded"])
    def test_beams(self, lengths, head_budget):
        """Reordered caches: each beam's score is that of its tokens over its own kept set."""
        model, rows = make(), [prompt(1, n, seed=n) for n in lengths]
        ids, mask = padded(rows)
        settings = {"compression_ratio": 0.8, "random_ratio": 0.3, "head_budget": head_budget}
        press = nacl.NaclPress(**settings)
        with press(model):
            out = model.generate(
                ids, attention_mask=mask, num_beams=4, num_return_sequences=3, max_new_tokens=6,
                return_dict_in_generate=True, output_scores=True, length_penalty=0.0, **GREEDY,
            )  # fmt: skip
        new = out.sequences[:, ids.shape[1] :]
        assert len({tuple(x.tolist()) for x in new[:3]}) == 3
        for b, row in enumerate(rows):
            for i in range(3):
                tokens = new[3 * b + i][None]
                alone = nacl.NaclPress(**settings)
                logits, _ = run(model, alone, row, tokens)
                with torch.no_grad():
                    first = model(row).logits[:, -1:]
                logp = torch.cat([first, logits[:, :-1]], 1).log_softmax(-1)
                want = float(logp.gather(-1, tokens[..., None]).sum())
                assert float(out.sequences_scores[3 * b + i]) == pytest.approx(want, abs=2e-3)

    def test_beams_with_rerotation_and_padding(self):
        """Rows whose keys moved by different amounts swap places only within a prompt's beams."""
        model, rows = make(), [prompt(1, n, seed=n) for n in (340, 290)]
        ids, mask = padded(rows)
        press = nacl.NaclPress(compression_ratio=0.8, rerotate=True)
        how = {"num_beams": 3, "max_new_tokens": 6, **GREEDY}
        with press(model):
            both = model.generate(ids, attention_mask=mask, **how)
            for b, row in enumerate(rows):
                alone = model.generate(row, attention_mask=torch.ones_like(row), **how)
                assert both[b, 340:].tolist() == alone[0, row.shape[1] :].tolist()

    def test_sampled_sequences_of_one_prompt(self):
        model, ids = make(), prompt(1, 300)
        press = nacl.NaclPress(compression_ratio=0.8)
        with press(model):
            torch.manual_seed(3)
            out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True,
                                 num_return_sequences=3, max_new_tokens=6, pad_token_id=0,
                                 eos_token_id=None, return_dict_in_generate=True,
                                 output_logits=True)  # fmt: skip
        new = out.sequences[:, 300:]
        assert len({tuple(x.tolist()) for x in new}) == 3
        for layer in range(LAYERS):
            assert bool((press.kept[layer] == press.kept[layer][:1]).all())
        want = masked_reference(model, ids.expand(3, -1), press.kept, new[:, :-1])
        torch.testing.assert_close(torch.stack(out.logits[1:], 1), want, atol=5e-4, rtol=1e-3)

    @pytest.mark.parametrize("head_budget", ["uniform", "adaptive"])
    def test_a_second_turn_on_the_same_cache(self, head_budget):
        """generate() gets the whole conversation and the cache; the new turn is not evicted."""
        model, ids, turn = make(), prompt(1, 300), prompt(1, 40, seed=7)
        press = nacl.NaclPress(compression_ratio=0.8, head_budget=head_budget)
        cache = press.new_cache(model)
        with press(model):
            first = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5,
                                   past_key_values=cache, **GREEDY)  # fmt: skip
            kept = dict(press.kept)
            talk = torch.cat([first, turn], 1)
            second = model.generate(talk, attention_mask=torch.ones_like(talk), max_new_tokens=6,
                                    past_key_values=cache, **GREEDY)  # fmt: skip
        assert press.stats.evictions == LAYERS and cache.get_seq_length() == 350
        assert all(cache.layers[i].physical >= 60 + 50 for i in range(LAYERS))
        want = masked_reference(model, ids, kept, second[:, 300:-1])
        assert torch.equal(first[:, 301:], want[:, :4].argmax(-1))
        assert torch.equal(second[:, 345:], want[:, 44:].argmax(-1))

    @pytest.mark.parametrize("head_budget", ["uniform", "adaptive"])
    def test_a_prompt_below_the_minimum_beside_a_long_one(self, head_budget):
        """Each row by its own length: the short one keeps everything, as it does alone."""
        model, rows = make(), [prompt(1, n, seed=n) for n in (400, 200)]
        ids, mask = padded(rows)
        settings = {"compression_ratio": 0.8, "random_ratio": 0.3, "head_budget": head_budget}
        press = nacl.NaclPress(**settings)
        with press(model):
            both = model.generate(ids, attention_mask=mask, max_new_tokens=6, **GREEDY)
        counts = (press.kept[0] >= 0).sum(-1)
        assert counts[0].sum() == 2 * 80 and counts[1].tolist() == [200, 200]
        assert int(press.kept[0][1].clamp(min=200).min()) == 200
        for b, row in enumerate(rows):
            alone = nacl.NaclPress(**settings)
            with alone(model):
                out = model.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=6,
                                     **GREEDY)  # fmt: skip
            assert both[b, 400:].tolist() == out[0, row.shape[1] :].tolist()
            assert bool(alone.kept) == (b == 0)

    @pytest.mark.parametrize("head_budget", ["uniform", "adaptive"])
    def test_right_padding_keeps_no_pad(self, head_budget):
        """generate() itself reads the pad's logits here; what the press keeps must be right still."""
        model, rows = make(), [prompt(1, n, seed=n) for n in (400, 290)]
        ids, mask = padded(rows, "right")
        press = nacl.NaclPress(compression_ratio=0.8, random_ratio=0.3, head_budget=head_budget)
        with press(model):
            model.generate(ids, attention_mask=mask, max_new_tokens=3, **GREEDY)
        kept = dict(press.kept)
        for b, row in enumerate(rows):
            with torch.no_grad(), press(model):
                feed(model, press.new_cache(model), row)
            for layer, alone in press.kept.items():
                for head in range(2):
                    got = kept[layer][b, head]
                    want = alone[0, head]
                    assert torch.equal(got[got >= 0], want[want >= 0])

    def test_chunks_of_generate(self):
        """generate(prefill_chunk_size=...) with chunked=True keeps and says what one forward does."""
        model, ids = make(), prompt(2, 330)
        how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, **GREEDY}
        whole = nacl.NaclPress(compression_ratio=0.8)
        with whole(model):
            want = model.generate(ids, **how)
        parts = nacl.NaclPress(compression_ratio=0.8, chunked=True)
        with parts(model):
            got = model.generate(ids, prefill_chunk_size=100, **how)
        assert torch.equal(got, want)
        assert all(torch.equal(parts.kept[i], whole.kept[i]) for i in range(LAYERS))

    def test_prompt_lookup(self):
        """Assisted decoding drafts tokens, some of them with the prompt, and crops the wrong ones."""
        model, ids = make(), prompt(1, 100).repeat(1, 4)
        press = nacl.NaclPress(compression_ratio=0.7)
        with press(model):
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12,
                                 prompt_lookup_num_tokens=4, **GREEDY)  # fmt: skip
        kept = {i: torch.where(k < 400, k, -1) for i, k in press.kept.items()}
        want = masked_reference(model, ids, kept, out[:, 400:-1])
        assert torch.equal(out[:, 401:], want.argmax(-1))
