# SPDX-License-Identifier: Apache-2.0
"""dha_decode against its definition."""

import contextlib
import functools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tenfold import ops, reference
from tenfold.testing import (
    DTYPES,
    LAYOUTS,
    VALUES,
    PlainSums,
    assert_close_to_ref,
    check_compiles,
    check_cuda_graph,
    check_errors,
    check_op,
    fill,
    layout,
    on,
    peak_growth,
    poisoned_memory,
)  # fmt: skip
from tenfold.testing.plugin import cuda_only

O = torch.ops.tenfold  # noqa: E741


def equal(got, want):
    return all(torch.equal(x.cpu(), y.cpu()) for x, y in zip(got, want, strict=True))


# Query head -> key head and value head: name, (HK, HV), maps.
MAPS = {
    "mha": ((6, 6), (0, 1, 2, 3, 4, 5), (0, 1, 2, 3, 4, 5)),
    "gqa": ((2, 2), (0, 0, 0, 1, 1, 1), (0, 0, 0, 1, 1, 1)),
    "contiguous, HK != HV": ((2, 3), (0, 0, 0, 1, 1, 1), (0, 0, 1, 1, 2, 2)),
    "HK = 1": ((1, 3), (0,) * 6, (2, 0, 1, 1, 2, 0)),
    "HV = 1": ((4, 1), (3, 1, 0, 0, 2, 2), (0,) * 6),
    "unequal groups": ((3, 2), (0, 1, 0, 0, 2, 0), (1, 1, 1, 0, 1, 1)),
    "unused heads": ((5, 4), (3, 3, 0, 3, 0, 0), (2, 2, 2, 2, 2, 1)),
    "no groups": ((6, 6), (5, 3, 1, 0, 2, 4), (1, 2, 0, 5, 4, 3)),
    "one of nine rows": ((2, 2), (0,) * 9 + (1,), (1,) * 9 + (0,)),
}


def maps(name):
    (hk, hv), kmap, vmap = MAPS[name]
    return hk, hv, torch.tensor(kmap), torch.tensor(vmap)


def caches(b, hk, hv, length, d, dv, dtype, seed=0):
    k, v = ((b, hk, length, d), (b, hv, length, dv))
    return fill(k, dtype, seed=seed + 1), fill(v, dtype, seed=seed + 2)


def compare(got, q, k, v, *rest, **kwargs):
    """Both outputs by the tolerance rule, for contiguous caches or whatever ``rest`` and kwargs say."""
    want = reference.dha_decode(q.double(), k.double(), v.double(), *rest, **kwargs)
    with PlainSums() if k.numel() < 100_000 else contextlib.nullcontext():
        plain = reference.dha_decode(q, k, v, *rest, **kwargs)
    for x, y, z in zip(got, want, plain, strict=True):
        assert_close_to_ref(x.cpu(), y, z)


def run(device, *args, **kwargs):
    with poisoned_memory():
        return ops.dha_decode(*on(device, args), **on(device, kwargs))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sq", [0, 1, 3, 16])  # 0: q without that dimension
@pytest.mark.parametrize("name", MAPS)
def test_maps(name, sq, dtype, device):
    hk, hv, kmap, vmap = maps(name)
    h = len(kmap)
    q = fill((3, h, 64) if sq == 0 else (3, h, sq, 64), dtype)
    k, v = caches(3, hk, hv, 300, 64, 40, dtype)
    lens, start = torch.tensor([0, 211, 77]), torch.tensor([300, 3, 0], dtype=torch.int32)
    for kwargs in ({}, {"kv_start": start}):
        got = run(device, q, k, v, kmap, vmap, lens, **kwargs)
        compare(got, q, k, v, kmap, vmap, lens, **kwargs)
        out, lse = (x.cpu() for x in got)
        assert out.dtype == dtype and lse.dtype == torch.float32
        assert not out[0].any() and torch.isneginf(lse[0]).all()  # kv_len 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [(64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (128, 40),
                                  (1, 1), (7, 33), (17, 255)])  # fmt: skip
def test_head_dims(dims, dtype, device):
    hk, hv, kmap, vmap = maps("unequal groups")
    # Rows enough: each has its own rounding, and logits of one product are as good as their luck.
    n = 32 if dims[0] > 1 else 128
    q = fill((n, 6, 2, dims[0]), dtype)
    k, v = caches(n, hk, hv, 150, *dims, dtype)
    lens = torch.full((n,), 150)
    compare(run(device, q, k, v, kmap, vmap, lens), q, k, v, kmap, vmap, lens)


@pytest.mark.parametrize("splits", [0, 1, 2, 7, 1000])
@pytest.mark.parametrize("kwargs", [{}, {"window_left": 40}, {"softcap": 3.0}])
def test_splits_agree(splits, kwargs, device):
    """Acceptance check 5: any number of parts, also more than there are keys or blocks."""
    hk, hv, kmap, vmap = maps("contiguous, HK != HV")
    q, (k, v) = fill((2, 6, 3, 64), torch.float32), caches(2, hk, hv, 700, 64, 64, torch.float32)
    lens = torch.tensor([700, 5])
    got = run(device, q, k, v, kmap, vmap, lens, num_splits=splits, **kwargs)
    compare(got, q, k, v, kmap, vmap, lens, **kwargs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 1, 15, 64, 5000, 2**62])
def test_window(window, dtype, device):
    hk, hv, kmap, vmap = maps("unequal groups")
    q, (k, v) = fill((2, 6, 5, 64), dtype), caches(2, hk, hv, 400, 64, 64, dtype)
    lens = torch.tensor([400, 3])
    got = run(device, q, k, v, kmap, vmap, lens, window_left=window)
    compare(got, q, k, v, kmap, vmap, lens, window_left=window)
    if window == 0:  # every token sees itself
        for s in range(5):
            torch.testing.assert_close(got[0][0, :, s].cpu(), v[0, vmap, 395 + s])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [0.3, 5.0, 50.0])
def test_softcap_and_scale(softcap, dtype, device):
    hk, hv, kmap, vmap = maps("no groups")
    q, (k, v) = fill((1, 6, 64), dtype), caches(1, hk, hv, 200, 64, 64, dtype)
    for scale in (None, 1.0, -0.3, 0.0):
        rest = kmap, vmap, torch.tensor([200])
        got = run(device, q, k, v, *rest, softcap=softcap, scale=scale)
        compare(got, q, k, v, *rest, softcap=softcap, scale=scale)


def paged_copy(x, table, block):
    """Contiguous [B, heads, L, D] as a pool [blocks, block, heads, D]; the rest of the pool is NaN."""
    b, heads, length, d = x.shape
    pool = torch.full((int(table.max()) + 2, block, heads, d), float("nan"), dtype=x.dtype)
    for i in range(b):
        for t in range(length):
            pool[table[i, t // block], t % block] = x[i, :, t]
    return pool


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [1, 3, 16, 64, 100])
def test_paged_equals_contiguous(block, dtype, device):
    """Acceptance check 5, to the bit: the same tokens in the same order."""
    hk, hv, kmap, vmap = maps("contiguous, HK != HV")
    q, (k, v) = fill((2, 6, 2, 64), dtype), caches(2, hk, hv, 90, 64, 48, dtype)
    width = -(-90 // block)
    table = torch.randperm(2 * width + 3)[: 2 * width].view(2, width).to(torch.int32)
    pools = paged_copy(k, table, block), paged_copy(v, table, block)
    for lens, start in (
        (torch.tensor([90, 31]), None),
        (torch.tensor([0, 50]), torch.tensor([90, 7])),
    ):
        rest = (kmap, vmap, lens)
        want = run(device, q, k, v, *rest, kv_start=start)
        got = run(device, q, *pools, *rest, block_table=table, block_size=block, kv_start=start)
        assert equal(got, want)
        compare(got, q, *pools, *rest, block_table=table, kv_start=start)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ragged_equals_contiguous(dtype, device):
    hk, hv, kmap, vmap = maps("unequal groups")
    q, (k, v) = fill((3, 6, 64), dtype), caches(3, hk, hv, 90, 64, 48, dtype)
    lens, offsets = torch.tensor([90, 0, 31]), torch.tensor([2, 95, 97, 140])
    flat = [torch.full((141, x.shape[1], x.shape[3]), float("nan"), dtype=dtype) for x in (k, v)]
    for x, y in zip((k, v), flat):
        for b in range(3):
            y[offsets[b] : offsets[b] + lens[b]] = x[b, :, : lens[b]].transpose(0, 1)
    want = run(device, q, k, v, kmap, vmap, lens)
    assert equal(run(device, q, *flat, kmap, vmap, lens, offsets=offsets), want)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_layouts(kind, device):
    hk, hv, kmap, vmap = maps("unequal groups")
    q, (k, v) = fill((2, 6, 3, 40), torch.float32), caches(2, hk, hv, 90, 40, 24, torch.float32)
    lens = torch.tensor([90, 33])
    there = on(device, (q, k, v))
    got = ops.dha_decode(*(layout(x, kind) for x in there), *on(device, (kmap, vmap, lens)))
    compare(got, q, k, v, kmap, vmap, lens)
    assert got[0].is_contiguous() and got[1].is_contiguous()
    columns = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in there]
    again = ops.dha_decode(*columns, *on(device, (kmap, vmap, lens)))
    compare(again, q, k, v, kmap, vmap, lens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["k", "v"])
def test_hidden_slots_do_not_matter(side, garbage, dtype, device):
    """Padding, slots behind the last token, keys before the window, heads that nobody uses."""
    hk, hv, kmap, vmap = maps("unused heads")
    q, (k, v) = fill((2, 6, 3, 16), dtype), caches(2, hk, hv, 300, 16, 16, dtype)
    lens, start = torch.tensor([200, 150]), torch.tensor([0, 100])
    kwargs = {"kv_start": start, "window_left": 100}
    want = run(device, q, k, v, kmap, vmap, lens, **kwargs)
    x, used = (k, kmap) if side == "k" else (v, vmap)
    for b in range(2):
        first, last = int(start[b] + lens[b]) - 103, int(start[b] + lens[b])
        x[b, :, :first] = garbage
        x[b, :, last:] = garbage
    unused = [h for h in range(x.shape[1]) if h not in used.tolist()]
    assert unused
    x[:, unused] = garbage
    assert equal(run(device, q, k, v, kmap, vmap, lens, **kwargs), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", ["k", "v"])
def test_later_keys_are_hidden(side, dtype, device):
    """Garbage in the newest token reaches the newest query only, and only its heads."""
    hk, hv, kmap, vmap = maps("contiguous, HK != HV")
    q, (k, v) = fill((1, 6, 3, 16), dtype), caches(1, hk, hv, 300, 16, 16, dtype)
    rest = kmap, vmap, torch.tensor([300])
    want = run(device, q, k, v, *rest)[0].cpu()
    for garbage in (float("nan"), float("inf")):
        {"k": k, "v": v}[side][0, 1, 299] = garbage
        got = run(device, q, k, v, *rest)[0].cpu()
        assert torch.equal(got[:, :, :2], want[:, :, :2])
        hit = {"k": kmap, "v": vmap}[side] == 1
        assert not torch.isfinite(got[0, hit, 2]).any()
        assert torch.equal(got[0, ~hit, 2], want[0, ~hit, 2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("values", VALUES)
def test_values(values, dtype, device):
    hk, hv, kmap, vmap = maps("unequal groups")
    q, (k, v) = fill((1, 6, 16), dtype), caches(1, hk, hv, 300, 16, 16, dtype)
    bad_k, bad_v = (fill(x.shape, dtype, values, seed=5) for x in (k, v))
    rest = kmap, vmap, torch.tensor([300])
    for a, b in ((bad_k, v), (k, bad_v)):
        compare(run(device, q, a, b, *rest), q, a, b, *rest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_sdpa(dtype, device):
    """Acceptance checks 1 to 3: MHA, GQA, different head counts, arbitrary maps."""
    for name in MAPS:
        hk, hv, kmap, vmap = maps(name)
        q, (k, v) = fill((2, len(kmap), 1, 64), dtype), caches(2, hk, hv, 257, 64, 64, dtype)
        want = torch.nn.functional.scaled_dot_product_attention(
            q.double(), k[:, kmap].double(), v[:, vmap].double()
        )
        got = run(device, q, k, v, kmap, vmap, torch.tensor([257, 257]))[0].cpu()
        atol = 1e-6 if dtype == torch.float32 else 4e-3
        torch.testing.assert_close(got.double(), want, atol=atol, rtol=atol)


def test_step_by_step_equals_all_rows_at_once(device):
    """Acceptance check 5: decoding token by token gives the rows of causal attention."""
    hk, hv, kmap, vmap = maps("contiguous, HK != HV")
    length = 40
    q, (k, v) = (
        fill((2, 6, length, 32), torch.float32),
        caches(2, hk, hv, length, 32, 32, torch.float32),
    )
    want = torch.nn.functional.scaled_dot_product_attention(
        q, k[:, kmap], v[:, vmap], is_causal=True
    )
    maps_there = on(device, (kmap, vmap))
    k_cache, v_cache = (torch.full_like(x, float("nan")).to(device) for x in (k, v))
    for t in range(length):
        new = on(device, (k[:, :, t : t + 1], v[:, :, t : t + 1]))
        slots = torch.full((2, 1), t, device=device)
        ops.dha_cache_append_(k_cache, v_cache, *new, slots)
        lens = torch.tensor([t + 1, t + 1], device=device)
        out, _ = ops.dha_decode(q[:, :, t].to(device), k_cache, v_cache, *maps_there, lens)
        torch.testing.assert_close(out.cpu(), want[:, :, t], atol=1e-6, rtol=1e-5)
    assert equal((k_cache, v_cache), (k, v))


def test_permuted_query_heads_permute_the_output(device):
    hk, hv, kmap, vmap = maps("unequal groups")
    q, (k, v) = fill((1, 6, 2, 32), torch.float32), caches(1, hk, hv, 100, 32, 32, torch.float32)
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    lens = torch.tensor([100])
    out, lse = run(device, q, k, v, kmap, vmap, lens)
    again = run(device, q[:, order], k, v, kmap[order], vmap[order], lens)
    torch.testing.assert_close(again[0], out[:, order], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(again[1], lse[:, order], atol=1e-6, rtol=1e-6)


def test_long_batch_of_unequal_lengths(device):
    """Several parts per sequence, cut where the op chooses; int32 everywhere."""
    kmap, vmap = torch.arange(8) // 4, torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    q, (k, v) = fill((4, 8, 64), torch.bfloat16), caches(4, 2, 3, 9000, 64, 64, torch.bfloat16)
    lens = torch.tensor([9000, 1, 4097, 300])
    args = [x.to(torch.int32) for x in (kmap, vmap, lens)]
    compare(run(device, q, k, v, *args), q, k, v, *args)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    b=st.integers(1, 3), h=st.integers(1, 12), hk=st.integers(1, 5), hv=st.integers(1, 5),
    sq=st.integers(1, 5), length=st.integers(1, 150), d=st.integers(1, 40), dv=st.integers(1, 40),
    window=st.integers(-1, 160), splits=st.integers(0, 5), seed=st.integers(0, 99),
)  # fmt: skip
def test_odd_shapes(device, b, h, hk, hv, sq, length, d, dv, window, splits, seed):
    generator = torch.Generator().manual_seed(seed)
    kmap, vmap = (torch.randint(0, n, (h,), generator=generator) for n in (hk, hv))
    lens = torch.randint(0, length + 1, (b,), generator=generator)
    start = (torch.rand(b, generator=generator) * (length - lens + 1)).long().clamp(max=length)
    q, (k, v) = (
        fill((b, h, sq, d), torch.float32, seed=seed),
        caches(b, hk, hv, length, d, dv, torch.float32, seed=seed),
    )
    kwargs = {"window_left": window, "kv_start": start}
    got = run(device, q, k, v, kmap, vmap, lens, num_splits=splits, **kwargs)
    want = reference.dha_decode(q.double(), k.double(), v.double(), kmap, vmap, lens, **kwargs)
    for x, y in zip(got, want):
        torch.testing.assert_close(x.cpu(), y.float(), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    "b, h, sq, length", [(0, 4, 2, 10), (2, 0, 2, 10), (2, 4, 0, 10), (2, 4, 2, 0)]
)
def test_empty(b, h, sq, length, device):
    q, k, v = torch.randn(b, h, sq, 8), torch.randn(b, 3, length, 8), torch.randn(b, 2, length, 6)
    kmap, vmap = torch.arange(h) % 3, torch.arange(h) % 2
    lens = torch.full((b,), length)
    out, lse = (x.cpu() for x in run(device, q, k, v, kmap, vmap, lens))
    assert out.shape == (b, h, sq, 6) and lse.shape == (b, h, sq)
    if length == 0:
        assert not out.any() and torch.isneginf(lse).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_standing_checks(dtype, device):
    hk, hv, kmap, vmap = maps("contiguous, HK != HV")
    q, (k, v) = fill((2, 6, 3, 64), dtype), caches(2, hk, hv, 700, 64, 24, dtype)
    tol = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 4e-3}
    lens = torch.tensor([700, 99])
    args = on(device, (q, k, v, kmap, vmap, lens))
    check_op(O.dha_decode.default, args, {"scale": 0.1, "window_left": 600}, **tol)
    table = torch.arange(14, dtype=torch.int32).view(2, 7)
    pools = [x.transpose(1, 2).reshape(14, 100, x.shape[1], x.shape[3]) for x in (k, v)]
    paged = on(device, (q, *pools, kmap, vmap, lens))
    kwargs = {"block_table": table.to(device), "kv_start": torch.tensor([0, 30]).to(device)}
    check_op(O.dha_decode.default, paged, kwargs, **tol)
    flat = [x[:1].transpose(1, 2)[0].contiguous() for x in (k, v)]
    ragged = on(device, (q[:, :, 0], *flat, kmap, vmap, torch.tensor([300, 99])))
    offsets = torch.tensor([0, 350, 700]).to(device)
    check_op(O.dha_decode.default, ragged, {"offsets": offsets, "softcap": 4.0}, **tol)


def test_compiles_with_inductor():
    hk, hv, kmap, vmap = maps("unequal groups")
    q, (k, v) = fill((2, 6, 32), torch.float32), caches(2, hk, hv, 40, 32, 32, torch.float32)
    args = q, k, v, kmap, vmap, torch.tensor([40, 7])
    check_compiles(ops.dha_decode, args, backend="inductor", dynamic=None)


@cuda_only
@pytest.mark.parametrize("sq", [1, 3])
def test_cuda_graph(sq, device):
    """Replays follow changed values, maps, lengths and starts."""

    def inputs(seed, kmap, vmap, lens, start):
        q, (k, v) = (
            fill((2, 6, sq, 64), torch.bfloat16, seed=seed),
            caches(2, 3, 2, 1200, 64, 64, torch.bfloat16, seed=seed),
        )
        rest = tuple(torch.tensor(x) for x in (kmap, vmap, lens))
        return on(device, ((q, k, v, *rest), {"kv_start": torch.tensor(start)}))

    first = inputs(1, [0, 0, 1, 1, 2, 2], [0, 0, 0, 1, 1, 1], [1200, 300], [0, 4])
    fresh = inputs(9, [2, 1, 0, 2, 2, 2], [1, 0, 1, 0, 1, 0], [0, 1001], [77, 199])
    check_cuda_graph(ops.dha_decode, *first, *fresh)


def test_memory_is_its_outputs_and_tiles():
    """No expanded heads, no copy of the cache in float32."""
    setup = """
        from tenfold import ops, reference
        q = torch.randn(1, 32, 128, dtype=torch.bfloat16)
        k, v = (torch.zeros(1, 8, 16384, 128, dtype=torch.bfloat16).normal_() for _ in range(2))
        maps = torch.arange(32) // 4, torch.arange(32) % 8
        for module in (ops, reference):
            module.dha_decode(q, k[:, :, :64], v[:, :, :64], *maps, torch.tensor([64]))
        lens = torch.tensor([16384])
    """
    most = 32 * 128 * 2 + 2**22
    assert peak_growth(setup, "ops.dha_decode(q, k, v, *maps, lens)") < most
    assert peak_growth(setup, "reference.dha_decode(q, k, v, *maps, lens)") > 4 * most


def check_bad(device, error, *words, kwargs=None, **replaced):
    """Bad arguments in place of good ones, all on the device."""
    good = {
        "q": torch.randn(2, 4, 8), "k": torch.randn(2, 3, 20, 8), "v": torch.randn(2, 2, 20, 6),
        "kmap": torch.tensor([0, 1, 2, 0]), "vmap": torch.tensor([0, 1, 1, 0]),
        "lens": torch.tensor([20, 5]),
    }  # fmt: skip
    args = tuple({**good, **replaced}.values())
    check_errors(ops.dha_decode, O.dha_decode, on(device, args), on(device, kwargs or {}), error,
                 "tenfold::dha_decode", *words)  # fmt: skip


def test_bad_input(device):
    bad = functools.partial(check_bad, device)
    q, k, v = torch.randn(2, 4, 8), torch.randn(2, 3, 20, 8), torch.randn(2, 2, 20, 6)
    bad(TypeError, "k_cache", "float64", q=q.double(), k=k.double(), v=v.double())
    bad(ValueError, "k_cache", "dtype", q=q.half())
    bad(ValueError, "v_cache", "dtype", v=v.half())
    bad(ValueError, "q", "[8]", q=q[0, 0])
    bad(ValueError, "Sq", "16", "[2, 4, 17, 8]", q=torch.randn(2, 4, 17, 8))
    bad(ValueError, "agree in D", "[2, 3, 20, 7]", k=k[..., :7].contiguous())
    bad(ValueError, "agree in B", "[3, 4, 8]", q=torch.randn(3, 4, 8))
    bad(ValueError, "same tokens", "[2, 2, 19, 6]", v=v[:, :, :19])
    bad(ValueError, "k_cache", "4-dimensional", k=k[0])
    bad(ValueError, "[1, 256]", "257", q=torch.randn(2, 4, 257), k=torch.randn(2, 3, 20, 257))
    bad(ValueError, "kmap", "[4]", "[3]", kmap=torch.tensor([0, 1, 2]))
    bad(TypeError, "vmap", "float32", vmap=torch.zeros(4))
    bad(ValueError, "kv_lens", "[B] = [2]", lens=torch.tensor([1, 1, 1]))
    bad(TypeError, "kv_lens", "bool", lens=torch.tensor([True, False]))
    for name, value in (("scale", math.nan), ("scale", math.inf), ("softcap", -1.0),
                        ("softcap", math.inf), ("window_left", -2), ("num_splits", -1)):  # fmt: skip
        bad(ValueError, name, "got", kwargs={name: value})
    bad(ValueError, "block_size", "16", kwargs={"block_size": 16})
    offsets = torch.tensor([0, 20, 20])
    flat = {"k": torch.randn(40, 3, 8), "v": torch.randn(40, 2, 6)}
    bad(ValueError, "offsets", "[3]", "[2]", kwargs={"offsets": offsets[:2]}, **flat)
    bad(ValueError, "kv_start", "ragged",
        kwargs={"offsets": offsets, "kv_start": torch.tensor([0, 0])}, **flat)  # fmt: skip
    pools = {"k": torch.randn(9, 5, 3, 8), "v": torch.randn(9, 5, 2, 6)}
    table = torch.arange(8, dtype=torch.int32).view(2, 4)
    bad(ValueError, "exclude", kwargs={"block_table": table, "offsets": offsets}, **pools)
    bad(ValueError, "block_table", "[2, 4]", "[3, 4]",
        kwargs={"block_table": torch.zeros(3, 4, dtype=torch.int32)}, **pools)  # fmt: skip
    bad(ValueError, "block_table", "2-dimensional", kwargs={"block_table": table[0]}, **pools)
    bad(
        ValueError,
        "block_size",
        "(5)",
        "got 4",
        kwargs={"block_table": table, "block_size": 4},
        **pools,
    )
    with pytest.raises(RuntimeError, match="inference only"):
        args = on(
            device, (q, k, v, *(torch.zeros(4, dtype=torch.int32),) * 2, torch.tensor([1, 1]))
        )
        ops.dha_decode(args[0].requires_grad_(), *args[1:])


def test_bad_index_values():
    """CPU only: CUDA does not wait for values on the device."""
    bad = functools.partial(check_bad, "cpu")
    bad(ValueError, "kmap[2]", "[0, 3)", "got 3", kmap=torch.tensor([0, 1, 3, 0]))
    bad(ValueError, "vmap[0]", "[0, 2)", "got -1", vmap=torch.tensor([-1, 1, 1, 0]))
    bad(ValueError, "kv_lens[1]", "[0, 20]", "got 21", lens=torch.tensor([20, 21]))
    bad(ValueError, "kv_lens[0]", "[0, 17]", "got 18", lens=torch.tensor([18, 0]),
        kwargs={"kv_start": torch.tensor([3, 0])})  # fmt: skip
    bad(ValueError, "kv_start[1]", "got -1", kwargs={"kv_start": torch.tensor([0, -1])})
    flat = {"k": torch.randn(40, 3, 8), "v": torch.randn(40, 2, 6)}
    for offsets, word in (([0, 25, 41], "41"), ([0, 25, 20], "ascend"), ([-1, 25, 30], "-1")):
        bad(ValueError, "offsets", word, kwargs={"offsets": torch.tensor(offsets)}, **flat)
    bad(ValueError, "kv_lens[0]", "[0, 19]", kwargs={"offsets": torch.tensor([0, 19, 40])}, **flat)
    pools = {"k": torch.randn(9, 5, 3, 8), "v": torch.randn(9, 5, 2, 6)}
    table = torch.tensor([[0, 1, 2, 9], [3, -1, 77, 77]])
    bad(ValueError, "block_table[0][3]", "[0, 9)", "got 9", kwargs={"block_table": table}, **pools)
    args = on(
        "cpu", (torch.randn(2, 4, 8), *pools.values(), *(torch.zeros(4, dtype=torch.int64),) * 2)
    )
    out, _ = ops.dha_decode(*args, torch.tensor([15, 5]), block_table=table)  # the rest is not read
    assert torch.isfinite(out).all()


@cuda_only
@pytest.mark.parametrize(
    "name", ["k_cache", "v_cache", "kmap", "vmap", "kv_lens", "kv_start", "block_table"]
)
def test_tensors_on_two_devices(name, device):
    k, v = caches(2, 3, 2, 20, 16, 6, torch.float32)
    given = {
        "q": fill((2, 6, 16), torch.float32), "k_cache": k.transpose(1, 2), "v_cache": v.transpose(1, 2),
        "kmap": torch.zeros(6, dtype=torch.int32), "vmap": torch.zeros(6, dtype=torch.int32),
        "kv_lens": torch.tensor([20, 3]), "kv_start": torch.tensor([0, 1]),
        "block_table": torch.tensor([[0], [1]]),
    }  # fmt: skip
    given = {n: x if n == name else x.to(device) for n, x in given.items()}
    args = [given.pop(n) for n in ("q", "k_cache", "v_cache", "kmap", "vmap", "kv_lens")]
    words = ("tenfold::dha_decode", name, "cpu", "cuda")
    check_errors(ops.dha_decode, O.dha_decode, args, given, ValueError, *words)
