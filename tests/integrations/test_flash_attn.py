# SPDX-License-Identifier: Apache-2.0
"""flash-attn's functions over tenfold's ops, against their definition written out per query and head."""

import math

import pytest
import torch

from tenfold.integrations import flash_attn as fa

TOL = {"atol": 2e-5, "rtol": 1e-4}
# (query, key, value) heads, with maps or grouped.
HEADS = {
    "MHA": (4, 4, 4), "GQA": (4, 2, 2), "MQA": (4, 1, 1), "K not V": (8, 2, 4), "V not K": (8, 4, 1),
}  # fmt: skip
MASKS = {
    "full": {}, "causal": {"causal": True}, "left": {"window_size": (5, -1)},
    "both": {"window_size": (4, 2)}, "right": {"window_size": (-1, 3)},
    "causal left": {"causal": True, "window_size": (6, 7)}, "right 0": {"window_size": (3, 0)},
}  # fmt: skip


def rand(*shape):
    return torch.randn(shape)


def maps_of(heads, kind):
    """Maps of a head count: grouped, as flash-attn does without them, or at random."""
    h, hk, hv = heads
    if kind == "grouped":
        return [torch.arange(h) // (h // n) for n in (hk, hv)]
    return [torch.randint(0, n, (h,), dtype=torch.int32) for n in (hk, hv)]


def attend(
    q, k, v, kmap, vmap, causal=False, window_size=(-1, -1), softcap=0.0, softmax_scale=None
):
    """One sequence: q [Sq, H, D], k [Sk, HK, D], v [Sk, HV, DV] -> out [Sq, H, DV], lse [H, Sq]."""
    (sq, heads, dim), sk = q.shape, k.shape[0]
    left, right = window_size
    right = 0 if causal else right
    at = torch.arange(sq)[:, None] + sk - sq
    slot = torch.arange(sk)[None]
    see = torch.ones(sq, sk, dtype=torch.bool)
    if left >= 0:
        see &= slot >= at - left
    if right >= 0:
        see &= slot <= at + right
    out, lse = torch.zeros(sq, heads, v.shape[-1]), torch.full((heads, sq), -math.inf)
    for h in range(heads):
        logits = q[:, h] @ k[:, kmap[h]].T * (softmax_scale or dim**-0.5)
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        logits = logits.masked_fill(~see, -math.inf)
        lse[h] = logits.logsumexp(-1)
        out[:, h] = (logits.softmax(-1).nan_to_num(0.0)) @ v[:, vmap[h]]
    return out, lse


@pytest.mark.parametrize("kind", ["grouped", "maps"])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("mask", MASKS)
class TestForward:
    def test_dense(self, heads, kind, mask):
        h, hk, hv = HEADS[heads]
        q, k, v = rand(2, 9, h, 16), rand(2, 13, hk, 16), rand(2, 13, hv, 8)
        maps = maps_of(HEADS[heads], kind)
        given = {} if kind == "grouped" else dict(zip(("kmap", "vmap"), maps))
        out, lse, _ = fa.flash_attn_func(q, k, v, return_attn_probs=True, **MASKS[mask], **given)
        for b in range(2):
            want, want_lse = attend(q[b], k[b], v[b], *maps, **MASKS[mask])
            torch.testing.assert_close(out[b], want, **TOL)
            torch.testing.assert_close(lse[b], want_lse, **TOL)
        again = fa.flash_attn_func(q, k, v, **MASKS[mask], **given)
        assert torch.equal(again, out) and again.is_contiguous()

    def test_varlen(self, heads, kind, mask):
        h, hk, hv = HEADS[heads]
        lens_q, lens_k = [5, 0, 9, 1], [7, 3, 9, 12]
        q, k, v = rand(15, h, 16), rand(31, hk, 16), rand(31, hv, 8)
        maps = maps_of(HEADS[heads], kind)
        given = {} if kind == "grouped" else dict(zip(("kmap", "vmap"), maps))
        cu = [torch.tensor([0, *lens]).cumsum(0).int() for lens in (lens_q, lens_k)]
        out, lse, _ = fa.flash_attn_varlen_func(
            q, k, v, *cu, max(lens_q), max(lens_k), return_attn_probs=True, **MASKS[mask], **given
        )
        for b in range(4):
            rows, keys = slice(*cu[0][b : b + 2]), slice(*cu[1][b : b + 2])
            want, want_lse = attend(q[rows], k[keys], v[keys], *maps, **MASKS[mask])
            torch.testing.assert_close(out[rows], want, **TOL)
            torch.testing.assert_close(lse[:, rows], want_lse, **TOL)


class TestTraining:
    @pytest.mark.parametrize("packed", [False, True])
    def test_gradients(self, packed):
        maps = maps_of((8, 2, 4), "maps")
        q, k, v = (rand(2, 12, n, 16).requires_grad_() for n in (8, 2, 4))
        how = {"causal": True, "kmap": maps[0], "vmap": maps[1]}
        if packed:
            cu = torch.tensor([0, 12, 24], dtype=torch.int32)
            flat = [x.flatten(0, 1) for x in (q, k, v)]
            out = fa.flash_attn_varlen_func(*flat, cu, cu, 12, 12, **how).view(2, 12, 8, 16)
        else:
            out = fa.flash_attn_func(q, k, v, **how)
        weight = rand(*out.shape)
        got = torch.autograd.grad((out * weight).sum(), (q, k, v))
        full = torch.nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2), k[:, :, maps[0].long()].transpose(1, 2),
            v[:, :, maps[1].long()].transpose(1, 2), is_causal=True,
        )  # fmt: skip
        want = torch.autograd.grad((full.transpose(1, 2) * weight).sum(), (q, k, v))
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("settings", [{"softcap": 3.0}, {"softmax_scale": 0.7}])
    def test_settings(self, settings):
        q, k, v = rand(1, 9, 4, 16), rand(1, 9, 2, 16), rand(1, 9, 2, 16)
        out = fa.flash_attn_func(q, k, v, causal=True, **settings)
        want, _ = attend(q[0], k[0], v[0], *maps_of((4, 2, 2), "grouped"), causal=True, **settings)
        torch.testing.assert_close(out[0], want, **TOL)


ROOM, BLOCK = 48, 8


def cache_of(kind, keys, values, batch):
    """Rows [B, ROOM, heads, dim] as a dense cache, one with more rows than sequences, or pages."""
    if kind == "dense":
        return keys.clone(), values.clone(), {}
    if kind == "indexed":
        rows = torch.randperm(batch + 2)[:batch].to(torch.int32)
        pools = [torch.full((batch + 2, *x.shape[1:]), math.nan) for x in (keys, values)]
        for pool, x in zip(pools, (keys, values)):
            pool[rows.long()] = x
        return *pools, {"cache_batch_idx": rows}
    pages = ROOM // BLOCK
    table = torch.randperm(batch * pages + 3)[: batch * pages].view(batch, pages).to(torch.int32)
    pools = [torch.full((batch * pages + 3, BLOCK, *x.shape[2:]), math.nan) for x in (keys, values)]
    for pool, x in zip(pools, (keys, values)):
        pool[table.long()] = x.view(batch, pages, BLOCK, *x.shape[2:])
    return *pools, {"block_table": table}


def rows_of(pool, extra, batch):
    """The rows [B, ROOM, heads, dim] of such a cache."""
    if "block_table" in extra:
        return pool[extra["block_table"].long()].flatten(1, 2)
    return pool[extra["cache_batch_idx"].long()] if extra else pool


def turn(x, positions, cos, sin, interleaved):
    """Rotates x [S, heads, D] by complex numbers, pair by pair."""
    half = cos.shape[1]
    angle = torch.complex(cos[positions], sin[positions])[:, None]
    head, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        pairs = torch.complex(head[..., 0::2], head[..., 1::2]) * angle
        return torch.cat([torch.view_as_real(pairs).flatten(-2), rest], -1)
    pairs = torch.complex(head[..., :half], head[..., half:]) * angle
    return torch.cat([pairs.real, pairs.imag, rest], -1)


@pytest.mark.parametrize("kind", ["dense", "indexed", "paged"])
class TestCache:
    batch, heads = 3, (8, 2, 4)

    def case(self, kind):
        _, hk, hv = self.heads
        keys, values = rand(self.batch, ROOM, hk, 16), rand(self.batch, ROOM, hv, 8)
        return keys, values, *cache_of(kind, keys, values, self.batch)

    @pytest.mark.parametrize("mask", MASKS)
    @pytest.mark.parametrize("count", [1, 5, 21])
    @pytest.mark.parametrize("pad", [False, True])
    def test_reading(self, kind, mask, count, pad):
        keys, values, k_cache, v_cache, extra = self.case(kind)
        maps = maps_of(self.heads, "maps")
        q, lens = rand(self.batch, count, 8, 16), torch.tensor([30, 25, 48], dtype=torch.int32)
        start = torch.tensor([0, 3, 11], dtype=torch.int32)
        if pad:
            extra = extra | {"cache_leftpad": start}
        out, lse = fa.flash_attn_with_kvcache(
            q, k_cache, v_cache, cache_seqlens=lens, return_softmax_lse=True, kmap=maps[0],
            vmap=maps[1], **MASKS[mask], **extra,
        )  # fmt: skip
        for b in range(self.batch):
            used = slice(int(start[b]) if pad else 0, int(lens[b]))
            want, want_lse = attend(q[b], keys[b, used], values[b, used], *maps, **MASKS[mask])
            torch.testing.assert_close(out[b], want, **TOL)
            torch.testing.assert_close(lse[b], want_lse, **TOL)

    @pytest.mark.parametrize("interleaved", [True, False])
    @pytest.mark.parametrize("rotary", [0, 8, 16])
    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("count", [1, 4])
    def test_appending(self, kind, interleaved, rotary, causal, count):
        """New keys are rotated, written in place, and seen; nothing else of the cache changes."""
        keys, values, k_cache, v_cache, extra = self.case(kind)
        lens = torch.tensor([30, 0, 44], dtype=torch.int32)
        q, k, v = (rand(self.batch, count, n, d) for n, d in zip(self.heads, (16, 16, 8)))
        angles = {}
        if rotary:
            phase = rand(ROOM, rotary // 2) * 3
            cos, sin = phase.cos(), phase.sin()
            angles = {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": interleaved}
        untouched = [int(x.isnan().sum()) for x in (k_cache, v_cache)]
        out = fa.flash_attn_with_kvcache(
            q, k_cache, v_cache, k, v, cache_seqlens=lens, causal=causal, **angles, **extra
        )
        maps = maps_of(self.heads, "grouped")
        for b in range(self.batch):
            old = int(lens[b])
            at = torch.arange(old, old + count)
            new_k, query = k[b], q[b]
            if rotary:
                new_k = turn(k[b], at, cos, sin, interleaved)
                query = turn(q[b], at if causal else at[:1].expand(count), cos, sin, interleaved)
            keys[b, at], values[b, at] = new_k, v[b]
            seen = slice(0, old + count)
            want, _ = attend(query, keys[b, seen], values[b, seen], *maps, causal=causal)
            torch.testing.assert_close(out[b], want, **TOL)
        torch.testing.assert_close(rows_of(k_cache, extra, self.batch), keys, **TOL)
        torch.testing.assert_close(rows_of(v_cache, extra, self.batch), values, **TOL)
        assert untouched == [int(x.isnan().sum()) for x in (k_cache, v_cache)]
        assert lens.tolist() == [30, 0, 44]

    def test_all_of_it_by_default_and_one_length_for_all(self, kind):
        keys, values, k_cache, v_cache, extra = self.case(kind)
        q, maps = rand(self.batch, 1, 8, 16), maps_of(self.heads, "grouped")
        for lens, count in ((None, ROOM), (17, 17)):
            out = fa.flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=lens, **extra)
            want, _ = attend(q[1], keys[1, :count], values[1, :count], *maps)
            torch.testing.assert_close(out[1], want, **TOL)


def call(name, **changes):
    q, k = rand(2, 6, 4, 16), rand(2, 6, 2, 16)
    cu = torch.tensor([0, 6, 12], dtype=torch.int32)
    args = {
        "flash_attn_func": {"q": q, "k": k, "v": k},
        "flash_attn_varlen_func": {
            "q": q.flatten(0, 1), "k": k.flatten(0, 1), "v": k.flatten(0, 1), "cu_seqlens_q": cu,
            "cu_seqlens_k": cu, "max_seqlen_q": 6, "max_seqlen_k": 6,
        },
        "flash_attn_with_kvcache": {
            "q": q, "k_cache": rand(2, 20, 2, 16), "v_cache": rand(2, 20, 2, 16), "k": k, "v": k,
            "cache_seqlens": torch.tensor([3, 4], dtype=torch.int32),
        },
    }[name]  # fmt: skip
    args |= changes
    tensors = {n: x for n, x in args.items() if isinstance(x, torch.Tensor)}
    before = {n: x.clone() for n, x in tensors.items() if x.device.type != "meta"}
    try:
        return getattr(fa, name)(**args)
    finally:
        for n, x in before.items():
            assert name != "flash_attn_with_kvcache" or torch.equal(args[n], x), f"{n} changed"


ALL = ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache")
BAD = [
    *[(name, {"dropout_p": 0.1}, "dropout is not supported, got dropout_p=0.1") for name in ALL[:2]],
    *[(name, {"alibi_slopes": torch.ones(4)}, "alibi_slopes is not supported") for name in ALL],
    *[(name, {"kmap": torch.tensor([0, 1, 2, 0])}, r"kmap.* must be .*in \[0, 2\)") for name in ALL],
    *[(name, {"vmap": torch.zeros(3, dtype=torch.int32)}, r"vmap must (be \[4\]|have shape \[H\])") for name in ALL],
    (ALL[1], {"block_table": torch.zeros(2, 1)}, "use flash_attn_with_kvcache for paged caches"),
    (ALL[2], {"v": None}, "k and v must be given together"),
    (ALL[2], {"rotary_cos": torch.ones(9, 8)}, "rotary_cos and rotary_sin must be given together"),
    (ALL[2], {"cache_seqlens": None}, "new keys need cache_seqlens"),
    (ALL[2], {"cache_seqlens": torch.tensor([3, 15])}, "6 new tokens do not fit: .* room for 20"),
    (ALL[2], {"cache_seqlens": torch.tensor([3.0, 4.0])}, "cache_seqlens must be an int32 or int64"),
    (ALL[2], {"cache_seqlens": torch.tensor([3])}, r"cache_seqlens must be \[2\], got shape \[1\]"),
    (ALL[2], {"q": rand(2, 6, 4, 8)}, "q and k_cache in head dim"),
    (ALL[2], {"q": rand(2, 6, 4, 16).half()}, "must agree in dtype"),
    (ALL[2], {"k": rand(2, 6, 4, 16)}, r"k must be \[2, 'S', 2, 16\]"),
    (ALL[2], {"k_cache": rand(3, 20, 2, 16)}, "one row per sequence of q .2. or cache_batch_idx"),
    (ALL[2], {"window_size": (-2, 0)}, "window_size must be >= -1"),
    (ALL[2], {"num_splits": -1}, "num_splits"),
    (ALL[2], {"num_splits": 1 << 21}, "num_splits"),
    (ALL[2], {"block_table": torch.zeros(2, 1).int(), "cache_batch_idx": torch.arange(2)},
     "cache_batch_idx is not for paged caches"),
    (ALL[2], {"rotary_cos": torch.ones(5, 8), "rotary_sin": torch.ones(5, 8)}, "rotary_cos has 5 rows"),
    (ALL[2], {"rotary_cos": torch.ones(50), "rotary_sin": torch.ones(50)}, r"kvcache: rotary_cos .* got shapes \[50\]"),
    (ALL[2], {"rotary_cos": torch.ones(50, 8, device="meta"), "rotary_sin": torch.ones(50, 8)},
     "rotary_cos must be on the device of q, cpu, got meta"),
    *[(ALL[2], {m: torch.zeros(4, dtype=torch.int32, device="meta")}, f"{m} must be on the device of q, cpu, got meta")
      for m in ("kmap", "vmap")],
    (ALL[2], {"k_cache": torch.zeros(2, 20, 2, 16, device="meta")}, "k_cache must be on the device of q"),
    (ALL[2], {"block_table": torch.zeros(2, 1)}, "block_table must be an int32 or int64 tensor, got torch.float32"),
    (ALL[2], {"block_table": torch.zeros(3, 1).int()}, r"block_table must be \[2, 1\], got shape \[3, 1\]"),
    (ALL[2], {"block_table": torch.zeros(2).int()}, r"block_table must be \[2, 2\], got shape \[2\]"),
    (ALL[2], {"block_table": torch.tensor([[0], [2]])}, r"block_table must be in \[0, 2\) where"),
    (ALL[2], {"block_table": torch.tensor([[0], [-1]])}, r"block_table must be in \[0, 2\) where"),
    (ALL[2], {"cache_batch_idx": torch.tensor([0, 2])}, r"cache_batch_idx must be in \[0, 2\)"),
    (ALL[2], {"cache_seqlens": torch.tensor([3, -1])}, r"cache_seqlens must be in \[0, 20\].*, got \[3, -1\]"),
    (ALL[2], {"cache_leftpad": torch.tensor([0, -1])}, r"cache_leftpad must be in \[0, 20\]"),
    (ALL[2], {"softcap": math.nan}, "softcap"),
    (ALL[2], {"rotary_cos": torch.ones(50, 9), "rotary_sin": torch.ones(50, 9)}, "R <= 16"),
    (ALL[0], {"k": rand(2, 6, 3, 16)}, "must divide the 4 query heads or come with maps, got 3"),
]  # fmt: skip


@pytest.mark.parametrize("name, changes, message", BAD, ids=[f"{i}" for i in range(len(BAD))])
def test_bad_input(name, changes, message):
    with pytest.raises((ValueError, IndexError), match=message):
        call(name, **changes)


def test_pages_without_tokens_may_hold_anything():
    """Behind the last token, and before the padding's end."""
    table = torch.tensor([[0, 99], [-1, 1]])
    pad = torch.tensor([0, 20])
    q, new = rand(2, 1, 4, 16), rand(2, 1, 2, 16)
    k_cache, v_cache = rand(2, 20, 2, 16), rand(2, 20, 2, 16)
    out = fa.flash_attn_with_kvcache(
        q, k_cache, v_cache, new, new, cache_seqlens=torch.tensor([5, 30]), block_table=table,
        cache_leftpad=pad,
    )  # fmt: skip
    for b, used in enumerate((slice(0, 6), slice(0, 11))):
        want, _ = attend(q[b], k_cache[b, used], v_cache[b, used], *maps_of((4, 2, 2), "grouped"))
        torch.testing.assert_close(out[b], want, **TOL)


def test_pages_before_the_window_may_hold_anything():
    table = torch.tensor([[-1, 1, 0]])
    q, new, cache = rand(1, 2, 4, 16), rand(1, 2, 2, 16), rand(2, 20, 2, 16)
    how = {"cache_seqlens": torch.tensor([45]), "causal": True, "window_size": (24, 0)}
    with pytest.raises(ValueError, match="block_table must be in"):
        fa.flash_attn_with_kvcache(q, cache, cache.clone(), new, new, block_table=table,
                                   **how | {"window_size": (26, 0)})  # fmt: skip
    values = cache.clone()
    out = fa.flash_attn_with_kvcache(q, cache, values, new, new, block_table=table, **how)
    keys = torch.cat([torch.full((20, 2, 16), 9.0), cache[1], cache[0]])[:47]
    want, _ = attend(q[0], keys, keys, *maps_of((4, 2, 2), "grouped"), causal=True,
                     window_size=(24, 0))  # fmt: skip
    torch.testing.assert_close(out[0], want, **TOL)


def test_queries_that_see_all_read_the_cache_once(monkeypatch):
    decode, calls = fa.ops.dha_decode, []
    monkeypatch.setattr(fa.ops, "dha_decode", lambda *a, **k: calls.append(a) or decode(*a, **k))
    cache = rand(2, 20, 2, 16)
    out = fa.flash_attn_with_kvcache(rand(2, 19, 4, 16), cache, cache, cache_seqlens=9)
    assert len(calls) == 1 and out.shape == (2, 19, 4, 16)


def test_rotary_without_new_keys():
    angles = {"rotary_cos": torch.ones(50, 8), "rotary_sin": torch.ones(50, 8)}
    with pytest.raises(ValueError, match="needs new keys"):
        call("flash_attn_with_kvcache", k=None, v=None, **angles)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(dtype):
    q, k, v = (rand(1, 9, n, 16).to(dtype) for n in (4, 2, 2))
    out = fa.flash_attn_func(q, k, v, causal=True)
    want, _ = attend(q[0].float(), k[0].float(), v[0].float(), *maps_of((4, 2, 2), "grouped"),
                     causal=True)  # fmt: skip
    assert out.dtype == dtype
    torch.testing.assert_close(out[0].float(), want, atol=0.02, rtol=0.02)


def test_compiles():
    q, k, v = rand(2, 20, 4, 16), rand(2, 20, 2, 16), rand(2, 20, 2, 16)
    compiled = torch.compile(fa.flash_attn_func, fullgraph=True, backend="aot_eager")
    got = compiled(q, k, v, causal=True)
    torch.testing.assert_close(got, fa.flash_attn_func(q, k, v, causal=True), **TOL)
