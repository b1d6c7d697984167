# SPDX-License-Identifier: Apache-2.0
"""The acceptance checks of /methods/nacl.md, section 8, with the numbers printed there.

| check | what | where |
|---|---|---|
| 1 | scores of a query head sum to W | here (any padding); test_proxy_scores.py (inactive proxies) |
| 2 | K = 0 gives the counting formula | tests/ops/test_proxy_scores.py `test_zero_keys_...` |
| 3 | budget >= L is bit-exact; no random part, no seed | here; test_nacl_select.py (`n_random = 0`) |
| 4 | idx increasing, ends in, exactly C, no pad | here (press, padding); test_nacl_select.py `test_contract` |
| 5 | worked case, 20k seeds | tests/ops/test_nacl_select.py `test_worked_case_...` |
| 6 | inclusion probabilities of two draws | tests/ops/test_nacl_select.py `test_two_draws_...` |
| 7 | seeds, devices, layers, heads, batch order | here; test_nacl_select.py `test_draws_do_not_...` |
| 8 | fused against naive | here; element by element in tests/ops/test_proxy_scores.py |
| 9 | coverage over 32 heads | tests/ops/test_nacl_select.py `test_equal_scores_...` |
| 10 | decoding equals masked full attention | tests/methods/test_nacl_press.py `test_decode_equals_...` |
| 11 | padded batch equals single runs | test_nacl_press.py `test_padded_batch_...`, `test_generate_with_...` |
| 12 | retrieval of a trained model | tests/methods/test_nacl_recall.py |
"""

import math

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from tenfold import nacl, ops, reference
from tenfold.reference.random import gumbel, philox4x32_10
from tenfold.testing import fill

VOCAB = 97


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096, head_dim=16,
        )
    ).eval()  # fmt: skip
    # Random attention is almost uniform; sharper queries make the kept set matter.
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= 8
    return model


def prompt(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(lengths: tuple[int, ...], side: str) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """A batch of prompts (the same whatever the padding), its mask, each one's first slot."""
    width = max(lengths)
    ids, mask, starts = torch.zeros(2, len(lengths), width, dtype=torch.long), None, []
    ids, mask = ids
    for b, n in enumerate(lengths):
        start = width - n if side == "left" else 0
        ids[b, start : start + n], mask[b, start : start + n] = prompt(1, n, seed=n)[0], 1
        starts.append(start)
    return ids, mask, starts


def prefill(model, press, ids, mask=None):
    mask = torch.ones_like(ids) if mask is None else mask
    cache = press.new_cache(model)
    with torch.no_grad(), press(model):
        model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0),
              past_key_values=cache)  # fmt: skip
    return cache


class TestSumRule:
    """Check 1: a row of attention sums to 1, so the scores of a query head sum to W."""

    @pytest.mark.parametrize("causal", [True, False])
    @pytest.mark.parametrize("start, lens", [(0, 70), (13, 57), (0, 41), (9, 40)])
    def test_with_padding(self, causal, start, lens, device):
        w = 11
        q = fill((2, 6, w, 64), torch.float32, seed=1).to(device)
        k = fill((2, 3, 70, 64), torch.float32, seed=2).to(device)
        where = {
            "kv_start": torch.tensor([start, 0]), "kv_lens": torch.tensor([lens, 70]),
            "q_positions": torch.stack([torch.arange(start + lens - w, start + lens),
                                        torch.arange(70 - w, 70)]),
        }  # fmt: skip
        where = {name: x.to(device) for name, x in where.items()}
        # one key head per query head: every query head by itself
        single, _ = ops.proxy_scores(q, k.repeat_interleave(2, 1), causal=causal, **where)
        torch.testing.assert_close(single.sum(-1).cpu(), torch.full((2, 6), float(w)), atol=1e-4,
                                   rtol=0)  # fmt: skip
        mean, _ = ops.proxy_scores(q, k, causal=causal, **where)
        torch.testing.assert_close(mean.sum(-1).cpu(), torch.full((2, 3), float(w)), atol=1e-4,
                                   rtol=0)  # fmt: skip


class TestFullBudget:
    """Check 3: nothing is to be evicted, so not a bit may change."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("parts", [(1, 2, 30, 17), (50, 0, 0, 0), (0, 0, 0, 50), (0, 0, 50, 0)])
    def test_ops(self, parts, dtype, device):
        q, k, v = (
            fill((2, h, n, 64), dtype, seed=h).to(device) for h, n in ((6, 9), (3, 50), (3, 50))
        )
        names = ("n_sink", "n_recent", "n_topk", "n_random")
        k_new, v_new, idx, lens = ops.nacl_evict(q, k, v, **dict(zip(names, parts)))
        assert torch.equal(k_new, k) and torch.equal(v_new, v)
        assert torch.equal(idx.cpu(), torch.arange(50).expand(2, 3, 50)) and lens.tolist() == [
            50,
            50,
        ]
        kept = k.clone(), v.clone()
        ops.kv_compact_(*kept, idx)
        assert torch.equal(kept[0], k) and torch.equal(kept[1], v)

    def test_ops_with_a_sequence_below_the_budget(self, device):
        """A shorter row of the batch keeps all of its tokens, in order."""
        q, k, v = (fill((2, 2, n, 16), torch.float32, seed=n).to(device) for n in (4, 60, 60))
        where = {"kv_start": torch.tensor([7, 0], device=device)}
        where["kv_lens"] = torch.tensor([20, 60], device=device)
        k_new, v_new, idx, lens = ops.nacl_evict(
            q, k, v, n_sink=2, n_recent=3, n_topk=15, n_random=10, **where
        )
        assert lens.tolist() == [20, 30]
        assert torch.equal(k_new[0, :, :20], k[0, :, 7:27]) and not k_new[0, :, 20:].any()
        assert torch.equal(v_new[0, :, :20], v[0, :, 7:27]) and (idx[0, :, 20:] == -1).all()

    @pytest.mark.parametrize(
        "settings",
        [{"compression_ratio": 0.0}, {"keep_tokens": 300}, {"keep_tokens": 5000},
         {"min_length": 300, "compression_ratio": 0.8}], ids=str,
    )  # fmt: skip
    @pytest.mark.parametrize("head_budget", ["uniform", "adaptive"])
    def test_press(self, settings, head_budget):
        model, ids, more = tiny(), prompt(2, 300), prompt(2, 3, seed=2)
        steps = (ids, *more.split(1, 1))
        plain = DynamicCache(config=model.config)
        with torch.no_grad():
            want = [model(x, past_key_values=plain).logits for x in steps]
        press = nacl.NaclPress(head_budget=head_budget, random_ratio=0.5, **settings)
        cache = press.new_cache(model)
        with torch.no_grad(), press(model):
            got = [model(x, past_key_values=cache).logits for x in steps]
        assert all(torch.equal(a, b) for a, b in zip(got, want))
        for mine, theirs in zip(cache.layers, plain.layers):
            assert torch.equal(mine.keys, theirs.keys) and torch.equal(mine.values, theirs.values)
        assert not press.kept and press.stats.evictions == 0 and not cache.evicted

    def test_press_without_a_random_part_ignores_the_seed(self):
        model, ids = tiny(), prompt(2, 300)
        kept = []
        for seed in (0, 1, 2**40):
            press = nacl.NaclPress(compression_ratio=0.8, random_ratio=0.0, seed=seed)
            prefill(model, press, ids)
            kept.append(press.kept)
        for layer in (0, 1):
            assert all(torch.equal(kept[0][layer], k[layer]) for k in kept)


class TestKeptSet:
    """Check 4 where it matters: at the press, every row by its own length."""

    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize(
        "settings",
        [{"random_ratio": 0.6}, {"random_ratio": 0.3, "pool_kernel": 1, "sink_tokens": 5},
         {"protect": "proxies", "max_proxy": 20}, {"preset": "paper_20"}], ids=str,
    )  # fmt: skip
    def test_padded_batch(self, side, settings):
        model, lengths = tiny(), (400, 257, 333)
        ids, mask, starts = padded(lengths, side)
        press = nacl.NaclPress(**({"compression_ratio": 0.8} | settings))
        cache = prefill(model, press, ids, mask)
        for layer in (0, 1):
            assert press.kept[layer].shape == (3, 2, 80)
            for b, (start, length) in enumerate(zip(starts, lengths)):
                plan = press.plan(length)
                assert plan.keep == length // 5
                for head in range(2):
                    row = press.kept[layer][b, head]
                    kept = row[row >= 0]
                    assert len(kept) == plan.keep and bool((row[: -plan.keep] == -1).all())
                    assert bool((kept.diff() > 0).all())  # increasing, hence no duplicates
                    assert start <= int(kept[0]) and int(kept[-1]) < start + length
                    tokens = (kept - start).tolist()
                    assert tokens[: plan.n_sink] == list(range(plan.n_sink))
                    assert tokens[plan.keep - plan.n_recent :] == list(
                        range(length - plan.n_recent, length)
                    )
            assert cache.layers[layer].valid.sum(1).tolist() == [n // 5 for n in lengths]


class TestDraws:
    """Check 7: what a draw depends on, and what it does not."""

    PARTS = (4, 20, 200, 300)

    def keys_of(self, scores, seed, layer, start):
        """The sort keys of the draw in float64, by the definition: score + Gumbel noise."""
        b, h, length = scores.shape
        token = torch.arange(length)[None] - start[:, None]
        counter = (torch.tensor(layer), torch.arange(h)[None, :, None],
                   token[:, None].clamp(min=0), torch.zeros(b, 1, 1, dtype=torch.int64))  # fmt: skip
        return scores.double() + gumbel(philox4x32_10(counter, seed)[0])

    @pytest.mark.parametrize("seed, layer", [(0, 0), (7, 3), (2**33 + 1, 31)])
    def test_same_seed_same_tokens_on_every_device(self, seed, layer, device):
        """Against the float64 definition; only pairs closer than 1e-5 may change places."""
        scores = fill((2, 4, 2500), torch.float32, seed=layer).abs()
        start = torch.tensor([0, 37])
        idx, _ = ops.nacl_select(scores.to(device), *self.PARTS, seed=seed, layer=layer,
                                 kv_start=start.to(device))  # fmt: skip
        want, _ = reference.nacl_select(scores, *self.PARTS, seed=seed, layer=layer, kv_start=start)
        keys = self.keys_of(scores, seed, layer, start)
        for b in range(2):
            for head in range(4):
                mine, theirs = set(idx[b, head].tolist()), set(want[b, head].tolist())
                swapped = keys[b, head, sorted(mine ^ theirs)]
                assert len(mine) == 524 and len(mine - theirs) == len(theirs - mine)
                assert swapped.numel() == 0 or float(swapped.max() - swapped.min()) < 1e-5

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_whole_eviction_on_every_device(self, dtype, device):
        """Scores of two devices differ by rounding, so near ties may swap; nothing else may."""
        q, k = fill((2, 8, 32, 64), dtype, seed=1), fill((2, 2, 2000, 64), dtype, seed=2)
        v = fill((2, 2, 2000, 64), dtype, seed=3)
        ints = {"n_sink": 4, "n_recent": 20, "n_topk": 150, "n_random": 226, "seed": 5, "layer": 2}
        here = ops.nacl_evict(q, k, v, **ints)
        there = ops.nacl_evict(*(x.to(device) for x in (q, k, v)), **ints)
        scores = ops.proxy_scores(q, k)[0]
        keys = self.keys_of(scores, 5, 2, torch.zeros(2, dtype=torch.int64))
        for b in range(2):
            for head in range(2):
                mine, theirs = set(there[2][b, head].tolist()), set(here[2][b, head].tolist())
                assert len(mine) == len(theirs) == 400
                for token in mine ^ theirs:  # a tie at the top-k threshold or at that of the draw
                    others = (mine ^ theirs) - {token}
                    near = [min(abs(float(keys[b, head, token] - keys[b, head, j])),
                                abs(float(scores[b, head, token] - scores[b, head, j])))
                            for j in others]  # fmt: skip
                    assert min(near, default=math.inf) < 1e-5

    def test_layers_heads_and_seeds_draw_apart(self, device):
        scores = fill((1, 1, 600), torch.float32).abs().expand(1, 4, 600).contiguous().to(device)
        drawn = [
            ops.nacl_select(scores, 0, 0, 0, 100, seed=seed, layer=layer)[0].cpu()
            for seed in (0, 1) for layer in (0, 1, 2)
        ]  # fmt: skip
        sets = {tuple(x[0, head].tolist()) for x in drawn for head in range(4)}
        assert len(sets) == 2 * 3 * 4
        # independent: two sets of 100 out of 600 share about 100 / 6, not most
        for a in sets:
            for b in sets:
                assert a == b or len(set(a) & set(b)) < 45

    def test_press_draws_apart_in_layers_and_heads_and_again_with_the_same_seed(self):
        model, ids = tiny(), prompt(1, 300)
        for layer in model.model.layers:  # equal scores: only the draw decides
            layer.self_attn.q_proj.weight.data.zero_()

        def kept(seed):
            press = nacl.NaclPress(compression_ratio=0.7, random_ratio=0.9, causal=False, seed=seed)
            prefill(model, press, ids)
            return [tuple(press.kept[i][0, h].tolist()) for i in (0, 1) for h in (0, 1)]

        assert kept(3) == kept(3) and len(set(kept(3)) | set(kept(4))) == 8

    def test_press_batch_order_only_permutes(self):
        """B = 1 equals the row of B = 4, whatever the order and the company."""
        model, ids = tiny(), prompt(4, 300)
        settings = {"compression_ratio": 0.8, "random_ratio": 0.6, "seed": 11}

        def kept(rows):
            press = nacl.NaclPress(**settings)
            prefill(model, press, ids[rows])
            return press.kept

        want = kept([0, 1, 2, 3])
        for rows in ([2, 0, 3, 1], [3], [1, 1]):
            got = kept(rows)
            for layer in (0, 1):
                assert torch.equal(got[layer], want[layer][rows])


class TestFusedAgainstNaive:
    """Check 8 at a layer of a real model: L 4,096, W 64, eight query heads on two KV heads."""

    L, W = 4096, 64

    def inputs(self, d, dtype):
        q, k = fill((1, 8, self.W, d), dtype, seed=d), fill((1, 2, self.L, d), dtype, seed=d + 1)
        # A few heavy hitters, as real attention has them, on top of the flat rest.
        k[:, :, ::97] *= 2
        return q, k

    def naive(self, q, k):
        """Logits, softmax in float32 and sum over proxies, all of it stored."""
        k = k.repeat_interleave(4, 1)
        logits = (q @ k.transpose(-1, -2)).float() / math.sqrt(q.shape[-1])
        see = torch.ones(self.W, self.L, dtype=torch.bool).tril(self.L - self.W)
        p = logits.masked_fill(~see, -math.inf).softmax(-1)
        return p.sum(2).view(1, 2, 4, self.L).mean(2)

    @pytest.mark.parametrize("d", [64, 128])
    def test_float32(self, d, device):
        q, k = self.inputs(d, torch.float32)
        got = ops.proxy_scores(q.to(device), k.to(device))[0].cpu()
        assert float((got - self.naive(q, k)).abs().max()) <= 1e-4 * self.W
        assert float((got.double() - self.naive(q.double(), k.double())).abs().max()) <= 1e-5

    @pytest.mark.parametrize("d", [64, 128])
    def test_bfloat16(self, d, device):
        """Every single score within 2e-2, and 99 % of the top fifth, top 5 % and top 64 the same."""
        q, k = self.inputs(d, torch.bfloat16)
        got = ops.proxy_scores(q.to(device), k.to(device))[0].cpu()
        want = self.naive(q.float(), k.float())
        assert float(((got - want).abs() / want).nan_to_num().max()) <= 2e-2
        for count in (self.L // 5, self.L // 20, 64):
            for head in range(2):
                mine, theirs = (set(x[0, head].topk(count).indices.tolist()) for x in (got, want))
                assert len(mine & theirs) >= 0.99 * count

    @pytest.mark.parametrize("d", [64, 128])
    def test_bfloat16_keeps_what_float32_keeps(self, d, device):
        """The same through selection: rounding the inputs aside, the kept set is the naive one's."""
        q, k = (x.to(device) for x in self.inputs(d, torch.bfloat16))
        *_, idx, lens = ops.nacl_evict(q, k, k, n_sink=40, n_recent=41, n_topk=738, n_random=0)
        assert lens.tolist() == [819]
        want = self.naive(q.float().cpu(), k.float().cpu())[..., 40:-41].topk(738).indices + 40
        for head in range(2):
            mine = set(idx[0, head].tolist()) - set(range(40)) - set(range(self.L - 41, self.L))
            assert len(mine & set(want[0, head].tolist())) >= 0.99 * 738
