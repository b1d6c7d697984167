# SPDX-License-Identifier: Apache-2.0
"""Presses and cache layers on tiny random models: positions, padding, turns, chunks, memory."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from tenfold import nacl
from tenfold.nacl.press import Prefill

VOCAB = 97


def tiny(kind: str = "llama", attention: str = "sdpa"):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
        "head_dim": 16,
    }  # fmt: skip
    config, cls = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }[kind]
    model = cls(config(**sizes)).eval()
    # Random attention is almost uniform; sharper queries make the kept set matter.
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= 8
    model.set_attn_implementation(attention)
    return model


def prompt(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def masked_reference(model, ids, kept, more):
    """Logits of ``more`` after ``ids`` when only ``kept[layer]`` of the prompt may be attended."""
    length = ids.shape[1]
    total = torch.cat([ids, more], 1)

    def hide(module, args, kwargs):
        layer_kept = kept.get(module.layer_idx)
        b, n = total.shape
        see = torch.ones(n, n).tril().bool().expand(b, module.config.num_attention_heads, n, n)
        see = see.clone()
        if layer_kept is not None:
            groups = module.num_key_value_groups
            allowed = torch.zeros(b, layer_kept.shape[1], n, dtype=torch.bool)
            for row in range(b):
                for head in range(layer_kept.shape[1]):
                    idx = layer_kept[row, head]
                    allowed[row, head, idx[idx >= 0]] = True
            allowed[..., length:] = True
            see[:, :, length:] &= allowed.repeat_interleave(groups, 1)[:, :, None]
        mask = torch.zeros(see.shape).masked_fill(~see, torch.finfo(torch.float32).min)
        return args, kwargs | {"attention_mask": mask}

    hooks = [
        layer.self_attn.register_forward_pre_hook(hide, with_kwargs=True)
        for layer in model.model.layers
    ]
    with torch.no_grad():
        logits = model(total, use_cache=False).logits[:, length:]
    for hook in hooks:
        hook.remove()
    return logits


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("name", ["nacl", "streaming_llm", "h2o", "tova", "snapkv", "random"])
def test_decode_equals_full_attention_with_evicted_columns_masked(kind, attention, name):
    model, ids, more = tiny(kind, attention), prompt(2, 300), prompt(2, 5, seed=2)
    press = nacl.make_press(name, compression_ratio=0.8)
    cache = press.new_cache(model)
    with torch.no_grad(), press(model):
        model(ids, past_key_values=cache)
        steps = [model(more[:, i : i + 1], past_key_values=cache).logits for i in range(5)]
    assert set(press.kept) == {0, 1, 2}
    assert all(k.shape[-1] == 60 for k in press.kept.values())
    want = masked_reference(model, ids, press.kept, more)
    torch.testing.assert_close(torch.cat(steps, 1), want, atol=2e-4, rtol=1e-4)


def test_several_tokens_at_once_equal_one_by_one():
    model, ids, more = tiny(), prompt(1, 300), prompt(1, 7, seed=2)
    results = []
    for step in (1, 7):
        press = nacl.NaclPress(compression_ratio=0.7)
        cache = press.new_cache(model)
        with torch.no_grad(), press(model):
            model(ids, past_key_values=cache)
            parts = [
                model(more[:, i : i + step], past_key_values=cache).logits
                for i in range(0, 7, step)
            ]
        results.append(torch.cat(parts, 1))
        assert cache.get_seq_length() == 307
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


def test_turns_continue_after_the_context_is_closed():
    model, ids, more = tiny(), prompt(1, 300), prompt(1, 6, seed=2)
    press = nacl.NaclPress(compression_ratio=0.5)
    cache = press.new_cache(model)
    with torch.no_grad():
        with press(model):
            model(ids, past_key_values=cache)
        kept = dict(press.kept)
        outside = model(more, past_key_values=cache).logits
    want = masked_reference(model, ids, kept, more)
    torch.testing.assert_close(outside, want, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("head_budget", ["uniform", "adaptive"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_equals_single_runs(side, head_budget):
    model = tiny()
    lengths = (400, 290)
    rows = [prompt(1, n, seed=n) for n in lengths]
    ids = torch.zeros(2, 400, dtype=torch.long)
    mask = torch.zeros(2, 400, dtype=torch.long)
    for b, row in enumerate(rows):
        at = slice(400 - row.shape[1], 400) if side == "left" else slice(0, row.shape[1])
        ids[b, at], mask[b, at] = row[0], 1
    more = prompt(2, 4, seed=9)
    settings = {"compression_ratio": 0.6, "random_ratio": 0.3, "head_budget": head_budget}

    def run(ids, mask, more):
        press = nacl.NaclPress(**settings)
        cache = press.new_cache(model)
        logits = []
        with torch.no_grad(), press(model):
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
            for i in range(more.shape[1]):
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
                step = model(more[:, i : i + 1], attention_mask=mask, past_key_values=cache,
                             position_ids=mask.sum(1, keepdim=True) - 1)  # fmt: skip
                logits.append(step.logits)
        return torch.cat(logits, 1), press.kept

    both, kept = run(ids, mask, more)
    for b, row in enumerate(rows):
        alone, mine = run(row, torch.ones_like(row), more[b : b + 1])
        torch.testing.assert_close(both[b : b + 1], alone, atol=2e-4, rtol=1e-4)
        offset = 400 - row.shape[1] if side == "left" else 0
        for layer, want in mine.items():
            for head in range(2):
                got = kept[layer][b, head]
                want_row = want[0, head]
                assert torch.equal(got[got >= 0] - offset, want_row[want_row >= 0])


def test_generate_with_left_padding_gives_the_single_answers():
    model = tiny()
    rows = [prompt(1, n, seed=n) for n in (360, 300)]
    ids = torch.zeros(2, 360, dtype=torch.long)
    mask = torch.zeros(2, 360, dtype=torch.long)
    for b, row in enumerate(rows):
        ids[b, 360 - row.shape[1] :], mask[b, 360 - row.shape[1] :] = row[0], 1
    press = nacl.NaclPress(compression_ratio=0.75)
    kwargs = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with press(model):
        both = model.generate(ids, attention_mask=mask, **kwargs)
    for b, row in enumerate(rows):
        with press(model):
            alone = model.generate(row, attention_mask=torch.ones_like(row), **kwargs)
        assert both[b, 360:].tolist() == alone[0, row.shape[1] :].tolist()


def test_chunked_prefill_evicts_once_with_all_proxies():
    model, ids, more = tiny(), prompt(1, 330), prompt(1, 3, seed=2)
    whole = nacl.NaclPress(compression_ratio=0.6)
    parts = nacl.NaclPress(compression_ratio=0.6, chunked=True)
    answers = []
    for press, chunks in ((whole, [ids]), (parts, ids.split(100, 1))):
        cache = press.new_cache(model)
        with torch.no_grad(), press(model):
            for chunk in chunks:
                model(chunk, past_key_values=cache)
            steps = [model(more[:, i : i + 1], past_key_values=cache).logits for i in range(3)]
        answers.append(torch.cat(steps, 1))
        assert press.stats.evictions == 3
    for layer in whole.kept:
        assert torch.equal(whole.kept[layer], parts.kept[layer])
    torch.testing.assert_close(*answers, atol=1e-4, rtol=1e-4)


def test_progressive_keeps_the_cache_small_all_the_way():
    model, ids = tiny(), prompt(1, 900)
    press = nacl.NaclPress(keep_tokens=100, progressive=True)
    cache = press.new_cache(model)
    with torch.no_grad(), press(model):
        for chunk in ids.split(300, 1):
            model(chunk, past_key_values=cache)
            assert all(layer.keys.shape[2] == 100 for layer in cache.layers)
    assert cache.get_seq_length() == 900
    assert int(press.kept[0].max()) == 899


def test_decode_interval_returns_to_the_budget():
    model, ids, more = tiny(), prompt(1, 300), prompt(1, 20, seed=3)
    press = nacl.NaclPress(keep_tokens=60, decode_interval=8)
    cache = press.new_cache(model)
    sizes = []
    with torch.no_grad(), press(model):
        model(ids, past_key_values=cache)
        for i in range(20):
            model(more[:, i : i + 1], past_key_values=cache)
            sizes.append(cache.layers[0].keys.shape[2])
    assert max(sizes) < 68 and sizes[7] == 60 and sizes[15] == 60
    assert cache.get_seq_length() == 320


def test_evict_on_append():
    model, ids, turn = tiny(), prompt(1, 300), prompt(1, 50, seed=4)
    for again, size in ((False, 110), (True, 60)):
        press = nacl.NaclPress(keep_tokens=60, evict_on_append=again)
        cache = press.new_cache(model)
        with torch.no_grad(), press(model):
            model(ids, past_key_values=cache)
            model(turn, past_key_values=cache)
            assert cache.layers[1].keys.shape[2] == size
            if not again:
                with pytest.raises(RuntimeError, match="evict_on_append"):
                    press.finish(cache)


def test_rerotated_cache_is_a_shorter_prompt():
    """Keys at slots 0..C-1 and queries from C on: positions as if only the kept tokens had been."""
    model, ids, more = tiny(), prompt(1, 300), prompt(1, 4, seed=5)
    press = nacl.StreamingLLMPress(keep_tokens=60, sink_tokens=4, rerotate=True)
    cache = press.new_cache(model)
    seen = []

    def spy(module, args, kwargs):
        seen.append(kwargs["position_ids"])

    hook = model.model.register_forward_pre_hook(spy, with_kwargs=True)
    with torch.no_grad(), press(model):
        model(ids, past_key_values=cache)
        for i in range(4):
            model(more[:, i : i + 1], past_key_values=cache)
    hook.remove()
    full = Prefill.run(model, ids)
    assert [int(p[0, 0]) for p in seen[-4:]] == [60, 61, 62, 63]
    kept = press.kept[0][0, 0]
    key = full.cache.layers[0].keys[0, 0, kept]
    freq = model.model.rotary_emb.inv_freq
    angle = (torch.arange(60) - kept)[:, None] * freq
    turned = torch.cat(
        [key[:, :8] * angle.cos() - key[:, 8:] * angle.sin(),
         key[:, 8:] * angle.cos() + key[:, :8] * angle.sin()], -1)  # fmt: skip
    torch.testing.assert_close(cache.layers[0].keys[0, 0, :60], turned, atol=1e-4, rtol=1e-4)


def test_adaptive_heads_free_memory_and_decode_exactly():
    model, ids, more = tiny(), prompt(1, 600), prompt(1, 100, seed=6)
    press = nacl.NaclPress(compression_ratio=0.8, head_budget="adaptive")
    cache = press.new_cache(model)
    with torch.no_grad(), press(model):
        model(ids, past_key_values=cache)
        logits = [model(more[:, :20], past_key_values=cache).logits]
        logits += [model(more[:, i : i + 1], past_key_values=cache).logits for i in range(20, 100)]
    lens = {layer: (kept >= 0).sum(-1) for layer, kept in press.kept.items()}
    assert all(int(n.sum()) == 2 * 120 for n in lens.values())
    assert any(int(n.min()) != int(n.max()) for n in lens.values())
    want = masked_reference(model, ids, press.kept, more)
    torch.testing.assert_close(torch.cat(logits, 1), want, atol=3e-4, rtol=1e-3)
    assert press.stats.bytes_after < 0.35 * press.stats.bytes_before


def test_cache_holds_the_budget_and_no_view_of_the_rest():
    model, ids = tiny(), prompt(1, 500)
    press = nacl.NaclPress(compression_ratio=0.8)
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), press(model):
        model(ids, past_key_values=cache)
    assert nacl.cache_bytes(cache) == 3 * 2 * 2 * 100 * 16 * 4
    assert press.stats.bytes_after == pytest.approx(0.2 * press.stats.bytes_before)


def test_short_prompts_and_full_budget_are_left_alone():
    model, ids = tiny(), prompt(1, 200)
    for press in (nacl.NaclPress(compression_ratio=0.8), nacl.NaclPress(keep_tokens=500),
                  nacl.FullPress()):  # fmt: skip
        cache = press.new_cache(model)
        with torch.no_grad(), press(model):
            model(ids, past_key_values=cache)
        assert not press.kept and cache.layers[0].keys.shape[2] == 200


def test_prefill_once_equals_running_the_press():
    model, ids, more = tiny(), prompt(1, 300), prompt(1, 3, seed=2)
    prefill = Prefill.run(model, ids)
    for name in ("nacl", "h2o", "snapkv", "tova", "streaming_llm"):
        press = nacl.make_press(name, compression_ratio=0.7)
        with torch.no_grad(), press(model):
            cache = press.new_cache(model)
            model(ids, past_key_values=cache)
            want = model(more, past_key_values=cache).logits
            kept = dict(press.kept)
        cache = press.evict_prefilled(model, prefill)
        assert all(torch.equal(kept[i], press.kept[i]) for i in kept)
        with torch.no_grad(), press(model):
            got = model(more, past_key_values=cache).logits
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert prefill.cache.layers[0].keys.shape[2] == 300


def test_proxy_span_inside_the_prompt():
    model, ids = tiny(), prompt(1, 300)
    with torch.no_grad():
        press = nacl.NaclPress(compression_ratio=0.5, proxy_span=(-40, -10))
        with press(model):
            model(ids, past_key_values=press.new_cache(model))
        for bad in ((10, 10), (290, 310), (-400, -1)):
            press = nacl.NaclPress(compression_ratio=0.5, proxy_span=bad)
            with pytest.raises(ValueError, match="proxy_span"), press(model):
                model(ids, past_key_values=press.new_cache(model))


def test_unsupported_models_and_caches_are_named():
    from transformers import GPT2Config, GPT2LMHeadModel, StaticCache

    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_head=2, n_layer=1, vocab_size=50))
    with pytest.raises(TypeError, match="supported"), nacl.NaclPress()(gpt2):
        pass
    model = tiny()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(TypeError, match="sdpa, eager"), nacl.NaclPress()(model):
        pass
    model.set_attn_implementation("sdpa")
    static = StaticCache(config=model.config, max_cache_len=400)
    with pytest.raises(TypeError, match="DynamicCache"), nacl.NaclPress()(model):
        model(prompt(1, 300), past_key_values=static)


def test_hooks_and_settings_are_gone_after_the_context():
    model = tiny()
    for budget in ("uniform", "adaptive"):
        with nacl.NaclPress(head_budget=budget)(model):
            pass
    assert model.config._attn_implementation == "sdpa"
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
