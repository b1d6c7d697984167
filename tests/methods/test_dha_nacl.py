# SPDX-License-Identifier: Apache-2.0
"""NACL on a cache of shared heads (spec of DHA, check 14): one set of tokens per component of the maps.

A slot's key and value are shared by different query heads, so sets of single key heads are refused.
"""

import pytest
import torch
from test_dha_model import ATTENTION, DIM, HEADS, LAYOUT, tiny
from tiny_models import GREEDY, make, masked_reference, padded, prompt, run

from tenfold import nacl, ops
from tenfold.dha import HeadLayout, from_mha
from tenfold.integrations import transformers as hf
from tenfold.nacl.heads import SharedSets

# Layer 0: one component. Layer 1: two, with different head counts. Layer 2: GQA, one per group.
LAYERED = HeadLayout(
    HEADS, (2, 2, 4), (4, 5, 4),
    ((1, 0, 1, 0, 0, 1, 1, 0), (1, 0, 1, 0, 0, 1, 1, 0), (0, 0, 1, 1, 2, 2, 3, 3)),
    ((0, 1, 2, 3, 3, 2, 1, 0), (0, 1, 2, 3, 1, 2, 0, 4), (0, 0, 1, 1, 2, 2, 3, 3)),
)  # fmt: skip
SETS = [1, 2, 4]


def reference(model, layout, ids, kept, more, mask=None):
    """Logits of ``more`` if query head h sees only its component's kept tokens of the prompt."""
    length, total = ids.shape[1], torch.cat([ids, more], 1)
    b, n = total.shape
    valid = torch.ones(b, n, dtype=torch.bool)
    if mask is not None:
        valid[:, :length] = mask.bool()

    def hide(module, args, kwargs):
        index = module.layer_idx
        of_query, _, _ = layout.component_of_heads(index)
        allowed = torch.zeros(b, HEADS, n, dtype=torch.bool)
        for row in range(b):
            for head, part in enumerate(of_query):
                idx = kept[index][row, part]
                allowed[row, head, idx[idx >= 0]] = True
        allowed[..., length:] = True
        see = torch.ones(n, n).tril().bool() & valid[:, None, None]
        see = see.expand(b, HEADS, n, n).clone()
        see[:, :, length:] &= allowed[:, :, None]
        bias = torch.zeros(see.shape).masked_fill(~see, torch.finfo(torch.float32).min)
        return args, kwargs | {"attention_mask": bias}

    positions = (valid.cumsum(1) - 1).clamp(min=0)
    hooks = [
        m.register_forward_pre_hook(hide, with_kwargs=True) for m in hf.attention_layers(model)
    ]
    with torch.no_grad():
        logits = model(total, position_ids=positions, use_cache=False).logits[:, length:]
    for hook in hooks:
        hook.remove()
    return logits


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("pad", [False, True])
def test_decoding_equals_masked_full_attention(attention, pad):
    model = tiny(LAYERED, attention)
    ids, mask = padded([prompt(1, n, seed=n) for n in ((300, 270) if pad else (300, 300))])
    more = prompt(2, 4, seed=2)
    press = nacl.NaclPress(compression_ratio=0.8, random_ratio=0.3)
    got, cache = run(model, press, ids, more, mask)
    assert [press.kept[i].shape[1] for i in range(3)] == SETS
    for index, layer in enumerate(cache.layers):
        assert layer.keys.shape == (2, LAYERED.key_heads[index], 60 + 4, DIM)
        assert layer.values.shape == (2, LAYERED.value_heads[index], 60 + 4, DIM)
    want = reference(tiny(LAYERED, "sdpa"), LAYERED, ids, press.kept, more, mask)
    torch.testing.assert_close(got, want, atol=5e-4, rtol=1e-3)
    with torch.no_grad():
        everything = [torch.arange(300).expand(2, n, -1) for n in SETS]
        full = reference(model, LAYERED, ids, everything, more, mask)
    assert float((full - want).abs().max()) > 1e-3  # the kept set mattered


def test_sets_of_a_component_differ_from_each_other():
    model, ids = tiny(LAYERED), prompt(1, 300)
    press = nacl.NaclPress(compression_ratio=0.8)
    run(model, press, ids, ids[:, :1])
    for index in (1, 2):
        assert not torch.equal(press.kept[index][0, 0], press.kept[index][0, 1])


def test_maps_of_gqa_keep_what_gqa_keeps():
    """A stock GQA model and its lossless DHA form: the same sets, random draw included."""
    stock, ids, more = make(), prompt(2, 300), prompt(2, 3, seed=2)
    model = from_mha(stock, attn_implementation="sdpa")
    settings = {"compression_ratio": 0.8, "random_ratio": 0.3}
    presses = [nacl.NaclPress(**settings) for _ in range(2)]
    want, _ = run(stock, presses[0], ids, more)
    got, _ = run(model, presses[1], ids, more)
    for index in range(4):
        assert torch.equal(presses[0].kept[index], presses[1].kept[index])
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("reduce", ["mean", "sum", "max"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_scores_are_reduced_over_the_query_heads_of_a_component(layer, reduce):
    module = tiny(LAYERED).model.layers[layer].self_attn
    q, k = torch.randn(2, HEADS, 5, DIM), torch.randn(2, LAYERED.key_heads[layer], 40, DIM)
    scores, _ = ops.proxy_scores(q, k, reduce=reduce, causal=False, kmap=module.key_map)
    got = SharedSets.of(module).pool(scores, reduce)
    each = (q @ k[:, module.key_map.long()].transpose(-1, -2) * DIM**-0.5).softmax(-1).sum(2)
    for index, part in enumerate(LAYERED.components(layer)):
        mine = each[:, list(part.query_heads)]
        want = mine.amax(1) if reduce == "max" else getattr(mine, reduce)(1)
        torch.testing.assert_close(got[:, index], want, atol=1e-5, rtol=1e-4)


def test_a_key_head_that_nobody_reads_changes_no_score():
    layout = HeadLayout(4, (3,), (2,), ((2, 0, 0, 2),), ((0, 1, 1, 0),))
    module = tiny(layout).model.layers[0].self_attn
    q, k = torch.randn(1, 4, 5, DIM), torch.randn(1, 3, 40, DIM)
    scores, _ = ops.proxy_scores(q, k, causal=False, kmap=module.key_map)
    got = SharedSets.of(module).pool(scores, "mean")
    assert torch.equal(got, scores[:, [2, 0]])  # components (0, 3) and (1, 2)


def test_rerotation():
    """Keys move to slots 0..C-1, each by its own distance; values are those of the kept tokens."""
    model, ids = tiny(LAYERED), prompt(1, 300)
    caches = []
    for rerotate in (False, True):
        press = nacl.NaclPress(compression_ratio=0.8, rerotate=rerotate)
        cache = press.new_cache(model)
        with torch.no_grad(), press(model):
            hf.forward(model, ids, cache)
        caches.append(cache)
    freq = hf.inv_freq(model, caches[0].layers[0].keys)
    for index in range(3):
        plain, moved = (cache.layers[index] for cache in caches)
        assert torch.equal(plain.values, moved.values)
        _, of_key, _ = LAYERED.component_of_heads(index)
        angle = (torch.arange(60) - plain.kept[:, of_key])[..., None] * freq
        a, b = plain.keys.chunk(2, -1)
        want = torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)
        torch.testing.assert_close(moved.keys, want, atol=1e-4, rtol=1e-4)


class TestRefused:
    def prefilled(self):
        model, ids = tiny(LAYOUT), prompt(1, 300)
        return model, nacl.press.Prefill.run(model, ids)

    def test_sets_of_key_heads(self):
        """Layer 0 has 2 key heads, 4 value heads, one component: no set but the shared one fits."""
        model, prefill = self.prefilled()
        module = model.model.layers[0].self_attn
        layer = nacl.NaclCacheLayer()
        layer.update(prefill.cache.layers[0].keys, prefill.cache.layers[0].values)
        layer.shared = SharedSets.of(module)
        keys, values = layer.keys, layer.values
        per_key_head = torch.arange(0, 120, 2).expand(1, 2, -1)
        lens = torch.tensor([300])
        message = r"2 key heads and 4 value heads must keep one set .* \(1\), got idx for 2 heads"
        with pytest.raises(ValueError, match=message):
            layer.shrink(per_key_head, torch.tensor([60]), None, None, lens)
        assert layer.keys is keys and layer.values is values and not layer.evicted
        layer.shrink(per_key_head[:, :1], torch.tensor([60]), None, None, lens)
        assert layer.keys.shape == (1, 2, 60, DIM) and layer.values.shape == (1, 4, 60, DIM)

    def test_the_op_refuses_them_as_well(self):
        _, prefill = self.prefilled()
        layer = prefill.cache.layers[0]
        with pytest.raises(ValueError, match="idx"):
            ops.kv_gather(layer.keys, layer.values, torch.arange(60).expand(1, 2, -1).contiguous())

    def test_budgets_per_head(self):
        model, prefill = self.prefilled()
        press = nacl.NaclPress(compression_ratio=0.8, head_budget="adaptive")
        with pytest.raises(ValueError, match="one set per connected component"), press(model):
            pass
        with pytest.raises(ValueError, match="one set per connected component"):
            press.evict_prefilled(model, prefill)


@pytest.mark.parametrize("method", nacl.METHODS)
def test_every_rule_runs(method):
    model, ids = tiny(LAYERED, "tenfold"), prompt(2, 300)
    press = nacl.make_press(method, compression_ratio=0.8)
    how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, **GREEDY}
    with press(model):
        out = model.generate(ids, **how)
    if method == "full":
        assert not press.kept and torch.equal(out, model.generate(ids, **how))
        return
    assert [press.kept[i].shape[:2] for i in range(3)] == [(2, n) for n in SETS]
    want = reference(tiny(LAYERED), LAYERED, ids, press.kept, out[:, 300:-1])
    assert torch.equal(out[:, 301:], want.argmax(-1))


@pytest.mark.parametrize("head_budget", ["uniform", "adaptive"])
def test_stock_models_with_our_attention(head_budget):
    """attn_implementation="tenfold" under a press, on a model without maps of its own."""
    model, ids = make(attention="tenfold"), prompt(2, 300)
    press = nacl.NaclPress(compression_ratio=0.8, head_budget=head_budget)
    with press(model):
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, **GREEDY)
    assert model.config._attn_implementation == "tenfold"
    want = masked_reference(make(attention="eager"), ids, press.kept, out[:, 300:-1])
    assert torch.equal(out[:, 301:], want.argmax(-1))


def test_bytes_shrink_with_heads_and_with_tokens():
    model, ids = tiny(LAYERED), prompt(1, 300)
    press = nacl.NaclPress(compression_ratio=0.8)
    _, cache = run(model, press, ids, ids[:, :1])
    assert nacl.cache_bytes(cache) == 61 * LAYERED.kv_bytes_per_token(DIM, 4)
