"""kv_gather, kv_compact_, nacl_evict and ragged_decode against their definitions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tenfold import ops, reference
from tenfold.testing import (
    DTYPES,
    LAYOUTS,
    assert_close_to_ref,
    check_compiles,
    check_errors,
    check_op,
    fill,
    layout,
    poisoned_memory,
)  # fmt: skip

O = torch.ops.tenfold  # noqa: E741


def indices(b, h, length, c, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(b, h, length, generator=generator).argsort(-1)[..., :c].sort(-1).values


SHAPES = [(1, 1, 1, 1, 8, 8), (2, 3, 50, 17, 64, 64), (1, 2, 301, 100, 128, 40), (2, 2, 33, 33, 80, 7),
          (1, 4, 64, 0, 64, 64), (3, 1, 7, 3, 2, 3)]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_gather_and_compact(shape, dtype, index_dtype, device):
    b, h, length, c, d, dv = shape
    k, v = fill((b, h, length, d), dtype, seed=1), fill((b, h, length, dv), dtype, seed=2)
    idx = indices(b, h, length, c).to(index_dtype)
    cases = [{}, {"new_lens": torch.randint(0, c + 1, (b,))},
             {"new_lens": torch.randint(0, c + 1, (b, h), dtype=torch.int32)}]  # fmt: skip
    for kwargs in cases:
        moved = {n: x.to(device) for n, x in kwargs.items()}
        with poisoned_memory():
            got = ops.kv_gather(k.to(device), v.to(device), idx.to(device), **moved)
        want = reference.kv_gather(k, v, idx, **kwargs)
        assert all(torch.equal(x.cpu(), y) for x, y in zip(got, want))
        mine, theirs = (k.to(device).clone(), v.to(device).clone()), (k.clone(), v.clone())
        ops.kv_compact_(*mine, idx.to(device), **moved)
        reference.kv_compact_(*theirs, idx, **kwargs)
        assert all(torch.equal(x.cpu(), y) for x, y in zip(mine, theirs))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rerotation(dtype, device):
    b, h, length, c, d = 2, 3, 700, 90, 64
    k, v = fill((b, h, length, d), dtype, seed=1), fill((b, h, length, d), dtype, seed=2)
    start = torch.tensor([0, 40])
    idx = indices(b, h, length - 40, c) + start[:, None, None]
    freq = 10000.0 ** (-torch.arange(0, d, 2) / d)
    kwargs = {"inv_freq": freq, "kv_start": start}
    moved = {n: x.to(device) for n, x in kwargs.items()}
    got = ops.kv_gather(k.to(device), v.to(device), idx.to(device), **moved)
    want = reference.kv_gather(k.double(), v.double(), idx, **kwargs)
    low = reference.kv_gather(k, v, idx, **kwargs)
    assert_close_to_ref(got[0].cpu(), want[0], low[0])
    assert torch.equal(got[1].cpu(), v.gather(2, idx[..., None].expand(-1, -1, -1, d)))
    mine = k.to(device).clone(), v.to(device).clone()
    ops.kv_compact_(*mine, idx.to(device), **moved)
    assert torch.equal(mine[0][:, :, :c], got[0]) and torch.equal(
        mine[0][:, :, c:].cpu(), k[:, :, c:]
    )
    # turned by the angle of its own slot difference: lengths stay
    norm = k.float().gather(2, idx[..., None].expand(-1, -1, -1, d)).norm(dim=-1)
    torch.testing.assert_close(got[0].cpu().float().norm(dim=-1), norm, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_layouts(kind):
    k, v = (
        fill((2, 3, 40, 24), torch.bfloat16, seed=1),
        fill((2, 3, 40, 24), torch.bfloat16, seed=2),
    )
    idx = indices(2, 3, 40, 11)
    want = ops.kv_gather(k, v, idx)
    got = ops.kv_gather(layout(k, kind), layout(v, kind), idx)
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    mine = layout(k.clone(), kind), layout(v.clone(), kind)
    ops.kv_compact_(*mine, idx)
    assert torch.equal(mine[0][:, :, :11], want[0]) and torch.equal(
        mine[0][:, :, 11:], k[:, :, 11:]
    )
    assert torch.equal(mine[1][:, :, :11], want[1])


def test_large_output_is_streamed_right():
    k, v = torch.randn(1, 4, 20_000, 128), torch.randn(1, 4, 20_000, 128)
    idx = indices(1, 4, 20_000, 6_000)
    want = reference.kv_gather(k, v, idx)
    got = ops.kv_gather(k, v, idx)
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    ops.kv_compact_(k, v, idx)
    assert torch.equal(k[:, :, :6000], want[0]) and torch.equal(v[:, :, :6000], want[1])


def test_shared_indices_with_different_head_counts():
    k, v = torch.randn(2, 2, 30, 8), torch.randn(2, 5, 30, 16)
    idx = indices(2, 1, 30, 7)
    got = ops.kv_gather(k, v, idx, new_lens=torch.tensor([7, 4]))
    want = reference.kv_gather(k, v, idx, new_lens=torch.tensor([7, 4]))
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_gather_takes_any_order_repeats_and_holes():
    k, v = torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    idx = torch.tensor([[[3, 3, -1, 0], [8, -1, -1, 1]]])
    got, want = ops.kv_gather(k, v, idx), reference.kv_gather(k, v, idx)
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    assert not got[0][0, 0, 2].any()


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 120), d=st.integers(1, 40), share=st.floats(0, 1), seed=st.integers(0, 99)
)
def test_compaction_in_place_never_overwrites_what_it_needs(length, d, share, seed):
    c = int(share * length)
    k, v = fill((1, 2, length, d), torch.float32, seed=seed), fill((1, 2, length, d), torch.float32)
    idx = indices(1, 2, length, c, seed)
    want = reference.kv_gather(k, v, idx)
    rest = k[:, :, c:].clone()
    ops.kv_compact_(k, v, idx)
    assert torch.equal(k[:, :, :c], want[0]) and torch.equal(v[:, :, :c], want[1])
    assert torch.equal(k[:, :, c:], rest)


def test_moves_standing_checks():
    k, v = fill((2, 2, 40, 16), torch.bfloat16), fill((2, 2, 40, 16), torch.bfloat16, seed=1)
    idx = indices(2, 2, 40, 9)
    freq = torch.rand(8)
    check_op(O.kv_gather.default, (k, v, idx), {"new_lens": torch.tensor([9, 5]), "inv_freq": freq},
             atol=2e-2, rtol=1e-2)  # fmt: skip
    check_op(
        O.kv_compact_.default, (k, v, idx), {"inv_freq": freq}, mutates=True, atol=2e-2, rtol=1e-2
    )
    check_compiles(ops.kv_gather, (k, v, idx), backend="inductor", dynamic=None)


def test_moves_bad_input():
    k, v = torch.randn(2, 3, 20, 8), torch.randn(2, 3, 20, 8)
    idx = indices(2, 3, 20, 5)

    def bad(error, *words, k=k, v=v, idx=idx, **kwargs):
        for face, op in ((ops.kv_gather, O.kv_gather), (ops.kv_compact_, O.kv_compact_)):
            check_errors(face, op, (k, v, idx), kwargs, error, *words)

    bad(TypeError, "k", "float64", k=k.double(), v=v.double())
    bad(ValueError, "v", "dtype", v=v.half())
    bad(ValueError, "k", "4-dimensional", k=k[0])
    bad(ValueError, "agree in B and L", v=v[:, :, :19])
    bad(TypeError, "idx", "float32", idx=idx.float())
    bad(ValueError, "idx", "[2, 2, 5]", idx=idx[:, :2])
    bad(ValueError, "idx", "3-dimensional", idx=idx[0])
    bad(IndexError, "idx", "20", idx=idx + 16)
    bad(ValueError, "new_lens", "6", new_lens=torch.tensor([6, 1]))
    bad(ValueError, "new_lens", "[3]", new_lens=torch.tensor([1, 1, 1]))
    bad(ValueError, "inv_freq", "[D / 2] = [4]", inv_freq=torch.rand(5))
    bad(TypeError, "inv_freq", "float32", inv_freq=torch.rand(4).double())
    bad(ValueError, "even head dim", k=k[..., :7], inv_freq=torch.rand(3))
    bad(ValueError, "kv_start", "[B] = [2]", kv_start=torch.tensor([1]))
    compact = ops.kv_compact_, O.kv_compact_
    check_errors(*compact, (k, v, idx.flip(-1)), {}, ValueError, "strictly increasing")
    holes = idx.clone()
    holes[0, 0, 1] = -1
    check_errors(*compact, (k, v, holes), {}, ValueError, "strictly increasing")
    check_errors(*compact, (k, k, idx), {}, ValueError, "share memory")
    wide = k[:, :1].expand(2, 3, 20, 8)
    check_errors(*compact, (wide, v, idx), {}, ValueError, "overlap", "k")
    turned = k.transpose(-1, -2).contiguous().transpose(-1, -2)
    check_errors(*compact, (turned, v, idx), {}, ValueError, "last dimension", "k")
    long = torch.arange(25).expand(2, 3, 25)
    check_errors(*compact, (k, v, long), {}, ValueError, "25 slots")
    for call in (ops.kv_gather, ops.kv_compact_):
        with pytest.raises(RuntimeError, match="inference only"):
            call(k.clone().requires_grad_(), v, idx)


# -- nacl_evict ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_evict_is_the_composition(dtype, device):
    q, k = fill((2, 6, 12, 64), dtype, seed=1), fill((2, 3, 90, 64), dtype, seed=2)
    v = fill((2, 3, 90, 64), dtype, seed=3)
    q, k, v = (x.to(device) for x in (q, k, v))
    start = torch.tensor([0, 11], device=device)
    shared = {"kv_start": start}
    ints = {"n_sink": 2, "n_recent": 5, "n_topk": 10, "n_random": 8}
    scores, _ = ops.proxy_scores(q, k, **shared)
    idx, lens = ops.nacl_select(scores, 2, 5, 10, 8, seed=4, pool_kernel=3, **shared)
    want = ops.kv_gather(k, v, idx, new_lens=lens)
    got = ops.nacl_evict(q, k, v, seed=4, pool_kernel=3, **ints, **shared)
    for a, b in zip(got, (*want, idx, lens)):
        assert torch.equal(a, b)


def test_evict_standing_checks():
    q, k, v = torch.randn(1, 4, 6, 16), torch.randn(1, 2, 50, 16), torch.randn(1, 2, 50, 16)
    kwargs = {"scale": 0.25, "n_sink": 1, "n_recent": 2, "n_topk": 5, "n_random": 4}
    check_op(O.nacl_evict.default, (q, k, v), kwargs)
    check_errors(ops.nacl_evict, O.nacl_evict, (q, k, v), kwargs | {"n_topk": -2}, ValueError,
                 "nacl_evict", "n_topk", "-2")  # fmt: skip
    check_errors(ops.nacl_evict, O.nacl_evict, (q, k, v.half()), kwargs, ValueError, "v", "dtype")
    with pytest.raises(RuntimeError, match="inference only"):
        ops.nacl_evict(q.requires_grad_(), k, v, **kwargs)


# -- ragged_decode ---------------------------------------------------------------------------------


def segments(b, hkv, longest, seed, spare=3):
    generator = torch.Generator().manual_seed(seed)
    lens = torch.randint(0, longest + 1, (b * hkv,), generator=generator)
    lens[0] = 0
    lens[-1] = longest
    return lens, torch.cat([lens.new_zeros(1), (lens + spare).cumsum(0)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 4, 1, 70, 64, 64), (1, 2, 1, 5, 2100, 128, 40),
                                   (2, 1, 3, 16, 30, 80, 33), (1, 3, 3, 0, 20, 7, 5)])  # fmt: skip
def test_decode(shape, dtype, device):
    b, hkv, g, sq, longest, d, dv = shape
    lens, offsets = segments(b, hkv, longest, seed=longest)
    n = int(offsets[-1])
    size = (b, hkv * g, d) if sq == 0 else (b, hkv * g, sq, d)
    q, k, v = fill(size, dtype, seed=1), fill((n, d), dtype, seed=2), fill((n, dv), dtype, seed=3)
    with poisoned_memory():
        got = ops.ragged_decode(*(x.to(device) for x in (q, k, v, offsets)), lens=lens.to(device))
    want = reference.ragged_decode(q.double(), k.double(), v.double(), offsets, lens=lens)
    low = reference.ragged_decode(q, k, v, offsets, lens=lens)
    for x, y, z in zip(got, want, low):
        assert_close_to_ref(x.cpu(), y, z)
    assert got[0].dtype == dtype and torch.isneginf(got[1][0, :g]).all()


def test_decode_ignores_spare_rows():
    lens, offsets = segments(1, 2, 40, seed=0)
    k, v = torch.randn(int(offsets[-1]), 16), torch.randn(int(offsets[-1]), 16)
    q = torch.randn(1, 4, 16)
    want = ops.ragged_decode(q, k, v, offsets, lens=lens)
    for i in range(2):
        k[offsets[i] + lens[i] : offsets[i + 1]] = float("nan")
        v[offsets[i] + lens[i] : offsets[i + 1]] = float("inf")
    got = ops.ragged_decode(q, k, v, offsets, lens=lens)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_decode_of_equal_segments_is_sdpa():
    q, k, v = torch.randn(2, 6, 1, 64), torch.randn(2, 3, 50, 64), torch.randn(2, 3, 50, 64)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    got, _ = ops.ragged_decode(q, k.reshape(-1, 64), v.reshape(-1, 64), torch.arange(7) * 50)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_decode_standing_checks():
    lens, offsets = segments(2, 2, 30, seed=1)
    n = int(offsets[-1])
    q, k, v = torch.randn(2, 4, 3, 16), torch.randn(n, 16), torch.randn(n, 24)
    check_op(O.ragged_decode.default, (q, k, v, offsets), {"scale": 0.25, "lens": lens})
    check_compiles(ops.ragged_decode, (q, k, v, offsets), backend="inductor", dynamic=None)


def test_decode_bad_input():
    q, k, v = torch.randn(2, 4, 8), torch.randn(30, 8), torch.randn(30, 8)
    offsets = torch.tensor([0, 10, 20, 25, 30])

    def bad(error, *words, q=q, k=k, v=v, offsets=offsets, **kwargs):
        check_errors(ops.ragged_decode, O.ragged_decode, (q, k, v, offsets), {"scale": 1.0} | kwargs,
                     error, "ragged_decode", *words)  # fmt: skip

    bad(ValueError, "q", "[8]", q=q[0, 0])
    bad(ValueError, "Sq", "16", q=torch.randn(2, 4, 17, 8))
    bad(ValueError, "k", "dtype", k=k.half())
    bad(ValueError, "k", "[30, 6]", k=k[:, :6].contiguous())
    bad(ValueError, "v", "[29, 8]", v=v[:29])
    bad(ValueError, "offsets", "4 entries", offsets=offsets[:4])
    bad(TypeError, "offsets", "float32", offsets=offsets.float())
    bad(ValueError, "offsets", "31", offsets=torch.tensor([0, 10, 20, 25, 31]))
    bad(ValueError, "offsets", "ascend", offsets=torch.tensor([0, 10, 5, 25, 30]))
    bad(ValueError, "lens[1]", "11", lens=torch.tensor([1, 11, 1, 1]))
    bad(ValueError, "lens", "[B * Hkv]", lens=torch.tensor([1, 1]))
    bad(ValueError, "scale", scale=float("nan"))
    with pytest.raises(RuntimeError, match="inference only"):
        ops.ragged_decode(q.clone().requires_grad_(), k, v, offsets)
