# SPDX-License-Identifier: Apache-2.0
"""kv_gather, kv_compact_, nacl_evict and ragged_decode against their definitions."""

import functools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tenfold import ops, reference
from tenfold.testing import (
    DTYPES,
    LAYOUTS,
    VALUES,
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
    assert_close_to_ref(mine[0][:, :, :c].cpu(), want[0], low[0])
    assert torch.equal(mine[0][:, :, c:].cpu(), k[:, :, c:])
    # turned by the angle of its own slot difference: lengths stay
    norm = k.float().gather(2, idx[..., None].expand(-1, -1, -1, d)).norm(dim=-1)
    torch.testing.assert_close(got[0].cpu().float().norm(dim=-1), norm, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_layouts(kind, device):
    k, v = (fill((2, 3, 40, 24), torch.bfloat16, seed=s).to(device) for s in (1, 2))
    idx = indices(2, 3, 40, 11).to(device)
    want = ops.kv_gather(k, v, idx)
    assert equal(ops.kv_gather(layout(k, kind), layout(v, kind), idx), want)
    mine = layout(k.clone(), kind), layout(v.clone(), kind)
    ops.kv_compact_(*mine, idx)
    assert equal([x[:, :, :11] for x in mine], want)
    assert equal([x[:, :, 11:] for x in mine], (k[:, :, 11:], v[:, :, 11:]))


@pytest.mark.parametrize("step", [1, 2])
def test_strided_indices(step, device):
    k, v = (fill((2, 3, 40, 24), torch.bfloat16, seed=s).to(device) for s in (1, 2))
    idx, lens = indices(2, 3, 40, 12), torch.tensor([5, 9, 4, 9])
    want = reference.kv_gather(k.cpu(), v.cpu(), idx[..., ::step], new_lens=lens[::2])
    idx, lens = idx.to(device)[..., ::step], lens.to(device)[::2]
    assert equal(ops.kv_gather(k, v, idx, new_lens=lens), want)
    turned = idx.transpose(0, 1).contiguous().transpose(0, 1)
    assert equal(ops.kv_gather(k, v, turned, new_lens=lens), want)


@pytest.mark.parametrize("values", VALUES)
def test_values_are_moved_as_they_are(values, device):
    k, v = (fill((1, 2, 20, 8), torch.float16, values, seed=s) for s in (1, 2))
    idx = torch.arange(1, 20, 2).expand(1, 2, 10)
    want = reference.kv_gather(k, v, idx)
    bits = lambda xs: [x.cpu().contiguous().view(torch.int16) for x in xs]  # noqa: E731
    got = ops.kv_gather(*on(device, (k, v, idx)))
    assert equal(bits(got), bits(want))
    mine = on(device, (k.clone(), v.clone()))
    ops.kv_compact_(*mine, idx.to(device))
    assert equal(bits(x[:, :, :10] for x in mine), bits(want))


def test_unused_slots_hide_what_they_name(device):
    """Slots from new_lens on are zeros, even if NaN stands where their index points."""
    k, v = (fill((2, 2, 20, 8), torch.float32, seed=s) for s in (1, 2))
    idx, lens = indices(2, 2, 20, 9), torch.tensor([4, 7])
    want = reference.kv_gather(k, v, idx, new_lens=lens)
    for b in range(2):
        for h in range(2):
            k[b, h, idx[b, h, lens[b] :]] = float("nan")
            v[b, h, idx[b, h, lens[b] :]] = float("inf")
    args = on(device, (k, v, idx))
    assert equal(ops.kv_gather(*args, new_lens=lens.to(device)), want)
    freq = torch.rand(4)
    want = reference.kv_gather(k, v, idx, new_lens=lens, inv_freq=freq)
    got = ops.kv_gather(*args, new_lens=lens.to(device), inv_freq=freq.to(device))
    for b in range(2):
        assert not got[0][b, :, lens[b] :].any() and not want[0][b, :, lens[b] :].any()


def test_large_output_is_streamed_right(device):
    k, v = torch.randn(1, 4, 20_000, 128), torch.randn(1, 4, 20_000, 128)
    idx = indices(1, 4, 20_000, 6_000)
    want = reference.kv_gather(k, v, idx)
    k, v, idx = on(device, (k, v, idx))
    assert equal(ops.kv_gather(k, v, idx), want)
    ops.kv_compact_(k, v, idx)
    assert equal((k[:, :, :6000], v[:, :, :6000]), want)


def test_shared_indices_with_different_head_counts(device):
    k, v = torch.randn(2, 2, 30, 8), torch.randn(2, 5, 30, 16)
    idx = indices(2, 1, 30, 7)
    for lens in (torch.tensor([7, 4]), torch.tensor([[3], [6]])):
        want = reference.kv_gather(k, v, idx, new_lens=lens)
        args, there = on(device, (k.clone(), v.clone(), idx)), lens.to(device)
        assert equal(ops.kv_gather(*args, new_lens=there), want)
        ops.kv_compact_(*args, new_lens=there)
        for x, y, old in zip(args[:2], want, (k, v)):
            for b in range(2):
                n = int(lens[b])
                assert torch.equal(x[b, :, :n].cpu(), y[b, :, :n])
                assert torch.equal(x[b, :, n:].cpu(), old[b, :, n:])


def test_gather_takes_any_order_repeats_and_holes(device):
    k, v = torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    idx = torch.tensor([[[3, 3, -1, 0], [8, -1, -1, 1]]])
    got, want = ops.kv_gather(*on(device, (k, v, idx))), reference.kv_gather(k, v, idx)
    assert equal(got, want)
    assert not got[0][0, 0, 2].any()


@cuda_only
def test_cuda_ignores_indices_out_of_range(device):
    """It cannot refuse them: zeros in a gather, untouched slots in a compaction."""
    k, v = torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    idx = torch.tensor([[[1, 9, 2**40, 5], [-7, 2, 8, 9]]])
    inside = torch.where((idx >= 0) & (idx < 9), idx, -1)
    got = ops.kv_gather(*on(device, (k, v, idx)))
    assert equal(got, reference.kv_gather(k, v, inside))
    mine = on(device, (k.clone(), v.clone()))
    ops.kv_compact_(*mine, idx.to(device))
    for x, old in zip(mine, (k, v)):
        want = old.clone()
        want[0, 0, 0], want[0, 0, 3] = old[0, 0, 1], old[0, 0, 5]
        want[0, 1, 1], want[0, 1, 2] = old[0, 1, 2], old[0, 1, 8]
        assert torch.equal(x.cpu(), want)


@pytest.mark.parametrize("shape", [(0, 2, 5, 3), (2, 0, 5, 3), (2, 2, 5, 0), (2, 2, 0, 0)])
def test_empty(shape, device):
    b, h, length, c = shape
    k, v = torch.randn(b, h, length, 8).to(device), torch.randn(b, h, length, 6).to(device)
    idx = torch.arange(c).expand(b, h, c).to(device)
    before = k.clone(), v.clone()
    k_new, v_new = ops.kv_gather(k, v, idx)
    assert k_new.shape == (b, h, c, 8) and v_new.shape == (b, h, c, 6)
    ops.kv_compact_(k, v, idx)
    assert equal((k, v), before)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    length=st.integers(1, 120), d=st.integers(1, 40), share=st.floats(0, 1), seed=st.integers(0, 99)
)
def test_compaction_in_place_never_overwrites_what_it_needs(device, length, d, share, seed):
    c = int(share * length)
    k, v = fill((1, 2, length, d), torch.float32, seed=seed), fill((1, 2, length, d), torch.float32)
    idx = indices(1, 2, length, c, seed)
    want = reference.kv_gather(k, v, idx)
    rest = k[:, :, c:].clone()
    k, v, idx = on(device, (k, v, idx))
    ops.kv_compact_(k, v, idx)
    assert equal((k[:, :, :c], v[:, :, :c]), want)
    assert torch.equal(k[:, :, c:].cpu(), rest)


def test_moves_standing_checks(device):
    k, v = fill((2, 2, 40, 16), torch.bfloat16), fill((2, 2, 40, 16), torch.bfloat16, seed=1)
    k, v, idx, freq, lens = on(
        device, (k, v, indices(2, 2, 40, 9), torch.rand(8), torch.tensor([9, 5]))
    )
    check_op(O.kv_gather.default, (k, v, idx), {"new_lens": lens, "inv_freq": freq},
             atol=2e-2, rtol=1e-2)  # fmt: skip
    check_op(
        O.kv_compact_.default, (k, v, idx), {"inv_freq": freq}, mutates=True, atol=2e-2, rtol=1e-2
    )


def test_moves_compile_with_inductor():
    k, v = fill((2, 2, 40, 16), torch.bfloat16), fill((2, 2, 40, 16), torch.bfloat16, seed=1)
    idx = indices(2, 2, 40, 9)
    check_compiles(ops.kv_gather, (k, v, idx), backend="inductor", dynamic=None)


def compact(k, v, idx, **kwargs):
    """``kv_compact_`` as a function: what it leaves in k and v."""
    ops.kv_compact_(k, v, idx, **kwargs)
    return k.clone(), v.clone()


@cuda_only
@pytest.mark.parametrize("call", [ops.kv_gather, compact])
def test_moves_cuda_graph(call, device):
    """Replays follow changed rows, indices, lengths and frequencies."""

    def inputs(seed, lens):
        k, v = (fill((2, 3, 300, 16), torch.bfloat16, seed=seed + i) for i in range(2))
        where = {"new_lens": torch.tensor(lens), "inv_freq": fill((8,), torch.float32, seed=seed),
                 "kv_start": torch.tensor([0, seed])}  # fmt: skip
        idx = indices(2, 3, 290, 90, seed) + 10  # never below kv_start
        return on(device, ((k, v, idx), where))

    check_cuda_graph(call, *inputs(1, [90, 40]), *inputs(5, [3, 77]))


def test_compaction_needs_no_memory():
    """In place: of the order of the indices, where a gather makes new tensors."""
    setup = """
        from tenfold import ops
        k, v = (torch.zeros(1, 8, 16384, 128, dtype=torch.bfloat16) for _ in range(2))
        k.normal_(), v.normal_()
        idx = torch.arange(0, 16384, 2).expand(1, 8, 8192).contiguous()
        for call in (ops.kv_gather, ops.kv_compact_):
            call(k[:, :, :64], v[:, :, :64], idx[:, :, :32])
    """
    most = 8 * 8192 * 8 + 2**20
    assert peak_growth(setup, "ops.kv_compact_(k, v, idx)") < most
    assert peak_growth(setup, "ops.kv_gather(k, v, idx)") > 8 * most  # it can be seen


def check_bad_move(device, error, *words, faces=("kv_gather", "kv_compact_"), k=None, v=None, idx=None,
                   **kwargs):  # fmt: skip
    """Bad arguments in place of good ones, all on the device."""
    k, v = (torch.randn(2, 3, 20, 8) if x is None else x for x in (k, v))
    args = on(device, (k, v, indices(2, 3, 20, 5) if idx is None else idx))
    for name in faces:
        check_errors(getattr(ops, name), getattr(O, name), args, on(device, kwargs), error, *words)


def test_moves_bad_input(device):
    k, v, idx = torch.randn(2, 3, 20, 8), torch.randn(2, 3, 20, 8), indices(2, 3, 20, 5)
    bad = functools.partial(check_bad_move, device)
    bad(TypeError, "k", "float64", k=k.double(), v=v.double())
    bad(ValueError, "v", "dtype", v=v.half())
    bad(ValueError, "k", "4-dimensional", k=k[0])
    bad(ValueError, "agree in B and L", v=v[:, :, :19])
    bad(TypeError, "idx", "float32", idx=idx.float())
    bad(ValueError, "idx", "[2, 2, 5]", idx=idx[:, :2])
    bad(ValueError, "idx", "3-dimensional", idx=idx[0])
    bad(ValueError, "new_lens", "[3]", new_lens=torch.tensor([1, 1, 1]))
    bad(ValueError, "inv_freq", "[D / 2] = [4]", inv_freq=torch.rand(5))
    bad(TypeError, "inv_freq", "float32", inv_freq=torch.rand(4).double())
    bad(ValueError, "even head dim", k=k[..., :7], inv_freq=torch.rand(3))
    bad(ValueError, "kv_start", "[B] = [2]", kv_start=torch.tensor([1]))
    k, v, idx = on(device, (k, v, idx))  # moving copies: strides and sharing are made there
    in_place = ops.kv_compact_, O.kv_compact_
    check_errors(*in_place, (k, k, idx), {}, ValueError, "share memory")
    wide = k[:, :1].expand(2, 3, 20, 8)
    check_errors(*in_place, (wide, v, idx), {}, ValueError, "overlap", "k")
    turned = k.transpose(-1, -2).contiguous().transpose(-1, -2)
    check_errors(*in_place, (turned, v, idx), {}, ValueError, "last dimension", "k")
    long = torch.arange(25).to(device).expand(2, 3, 25)
    check_errors(*in_place, (k, v, long), {}, ValueError, "25 slots")
    for call in (ops.kv_gather, ops.kv_compact_):
        with pytest.raises(RuntimeError, match="inference only"):
            call(k.clone().requires_grad_(), v, idx)


def test_moves_bad_index_values():
    """CPU only: CUDA does not wait for values on the device."""
    idx, bad = indices(2, 3, 20, 5), functools.partial(check_bad_move, "cpu")
    bad(IndexError, "idx", "20", idx=idx + 16)
    bad(ValueError, "new_lens", "6", new_lens=torch.tensor([6, 1]))
    holes = idx.clone()
    holes[0, 0, 1] = -1
    for wrong in (idx.flip(-1), holes):
        bad(ValueError, "strictly increasing", idx=wrong, faces=("kv_compact_",))


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


def test_evict_masks_maps_and_counts(device):
    """All optional tensors at once; a second sequence is padded with garbage."""
    q, k = fill((2, 4, 6, 16), torch.float32, seed=1), fill((2, 2, 50, 16), torch.float32, seed=2)
    v = fill((2, 2, 50, 16), torch.float32, seed=3)
    k[1, :, :7], v[1, :, :7] = float("nan"), float("inf")
    k[1, :, 45:], v[1, :, 45:] = float("inf"), float("nan")
    tensors = {
        "kv_start": torch.tensor([0, 7]), "kv_lens": torch.tensor([50, 38]),
        "kmap": torch.tensor([0, 1, 1, 0]), "row_id": torch.tensor([4, 9]),
        "q_positions": torch.stack([torch.arange(44, 50), torch.arange(39, 45)]),
        "counts": torch.tensor([[[1, 2, 5, 4], [2, 2, 2, 2]], [[0, 1, 0, 9], [3, 3, 3, 3]]]),
        "inv_freq": torch.rand(8),
    }  # fmt: skip
    ints = {"n_sink": 3, "n_recent": 3, "n_topk": 3, "n_random": 3, "seed": 11}
    got = ops.nacl_evict(*on(device, (q, k, v)), **on(device, tensors), **ints)
    k_new, v_new, idx, lens = (x.cpu() for x in got)
    want = reference.nacl_evict(q, k, v, **tensors, **ints)
    assert torch.equal(idx, want[2]) and torch.equal(lens, want[3])
    assert lens.tolist() == [[12, 8], [10, 12]] and torch.equal(v_new, want[1])
    torch.testing.assert_close(k_new, want[0], atol=1e-5, rtol=1e-5)


def test_evict_standing_checks(device):
    q, k, v = torch.randn(1, 4, 6, 16), torch.randn(1, 2, 50, 16), torch.randn(1, 2, 50, 16)
    q, k, v = on(device, (q, k, v))
    kwargs = {"scale": 0.25, "n_sink": 1, "n_recent": 2, "n_topk": 5, "n_random": 4}
    check_op(O.nacl_evict.default, (q, k, v), kwargs)
    check_errors(ops.nacl_evict, O.nacl_evict, (q, k, v), kwargs | {"n_topk": -2}, ValueError,
                 "nacl_evict", "n_topk", "-2")  # fmt: skip
    check_errors(ops.nacl_evict, O.nacl_evict, (q, k, v.half()), kwargs, ValueError, "v", "dtype")
    with pytest.raises(RuntimeError, match="inference only"):
        ops.nacl_evict(q.requires_grad_(), k, v, **kwargs)


def test_evict_of_nothing(device):
    kwargs = {"n_sink": 1, "n_recent": 1, "n_topk": 2, "n_random": 1}
    for b, h in ((0, 2), (2, 0)):
        q, k = torch.randn(b, 2 * h, 3, 8).to(device), torch.randn(b, h, 20, 8).to(device)
        got = ops.nacl_evict(q, k, k, **kwargs)
        assert [tuple(x.shape) for x in got] == [(b, h, 5, 8), (b, h, 5, 8), (b, h, 5), (b,)]


@cuda_only
def test_evict_cuda_graph(device):
    def inputs(seed, start):
        q, k = fill((2, 4, 9, 64), torch.bfloat16, seed=seed), fill((2, 2, 200, 64), torch.bfloat16)
        v = fill((2, 2, 200, 64), torch.bfloat16, seed=seed + 1)
        return on(device, ((q, k, v), {"kv_start": torch.tensor(start), **ints}))

    ints = {"n_sink": 2, "n_recent": 5, "n_topk": 20, "n_random": 10, "seed": 3}
    check_cuda_graph(ops.nacl_evict, *inputs(1, [0, 30]), *inputs(5, [170, 0]))


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


def test_decode_ignores_spare_rows(device):
    lens, offsets = segments(1, 2, 40, seed=0)
    k, v = torch.randn(int(offsets[-1]), 16), torch.randn(int(offsets[-1]), 16)
    q = torch.randn(1, 4, 16)
    there = lens.to(device)
    want = ops.ragged_decode(*on(device, (q, k, v, offsets)), lens=there)
    for i in range(2):
        k[offsets[i] + lens[i] : offsets[i + 1]] = float("nan")
        v[offsets[i] + lens[i] : offsets[i + 1]] = float("inf")
    got = ops.ragged_decode(*on(device, (q, k, v, offsets)), lens=there)
    assert equal(got, want)


@pytest.mark.parametrize("side", ["k", "v"])
def test_decode_hides_later_keys(side, device):
    """Garbage in the newest token reaches the newest query only."""
    q, k, v = torch.randn(1, 2, 3, 16), torch.randn(300, 16), torch.randn(300, 16)
    offsets = torch.tensor([0, 300])
    want = ops.ragged_decode(*on(device, (q, k, v, offsets)))[0].cpu()
    for garbage in (float("nan"), float("inf")):
        {"k": k, "v": v}[side][299] = garbage
        got = ops.ragged_decode(*on(device, (q, k, v, offsets)))[0].cpu()
        assert torch.equal(got[:, :, :2], want[:, :, :2])
        assert not torch.isfinite(got[:, :, 2]).any()


@pytest.mark.parametrize("values", VALUES)
def test_decode_values(values, device):
    q, k, v = (
        torch.randn(1, 4, 16),
        fill((600, 16), torch.float32, seed=1),
        fill((600, 16), torch.float32),
    )
    bad = fill((600, 16), torch.float32, values, seed=2)
    offsets = torch.tensor([0, 280, 600])
    for args in ((q, bad, v, offsets), (q, k, bad, offsets)):
        got = ops.ragged_decode(*on(device, args))
        want = reference.ragged_decode(*(x.double() for x in args[:3]), offsets)
        for x, y, z in zip(got, want, reference.ragged_decode(*args)):
            assert_close_to_ref(x.cpu(), y, z)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_decode_layouts(kind, device):
    """Queries and rows of a bigger buffer; the arithmetic is the same up to its order."""
    q, k, v = fill((2, 4, 3, 40), torch.float32), torch.randn(90, 40), torch.randn(90, 24)
    lens, offsets = torch.tensor([20, 9, 30, 0]), torch.tensor([0, 25, 40, 80, 90])
    want = reference.ragged_decode(q.double(), k.double(), v.double(), offsets, lens=lens)
    low = reference.ragged_decode(q, k, v, offsets, lens=lens)
    q, k, v, offsets, lens = on(device, (q, k, v, offsets, lens))
    rows = [x if kind == "transposed" else layout(x, kind) for x in (k, v)]
    got = ops.ragged_decode(layout(q, kind), *rows, offsets, lens=lens)
    for x, y, z in zip(got, want, low):
        assert_close_to_ref(x.cpu(), y, z)


@pytest.mark.parametrize("shape", [(0, 4, 2, 10), (2, 0, 2, 10), (2, 4, 2, 0), (2, 4, 0, 10)])
def test_decode_empty(shape, device):
    b, hq, sq, rows = shape
    q, k, v = torch.randn(b, hq, sq, 8), torch.randn(rows, 8), torch.randn(rows, 6)
    offsets = torch.arange(b * 2 + 1) * min(rows, 2)
    with poisoned_memory():
        got = ops.ragged_decode(*on(device, (q, k, v, offsets)), lens=None)
    out, lse = (x.cpu() for x in got)
    assert out.shape == (b, hq, sq, 6) and lse.shape == (b, hq, sq)
    if rows == 0:
        assert not out.any() and torch.isneginf(lse).all()


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    b=st.integers(1, 2), hkv=st.integers(1, 3), g=st.integers(1, 9), sq=st.integers(1, 5),
    longest=st.integers(1, 70), d=st.integers(1, 40), dv=st.integers(1, 40),
    spare=st.integers(0, 4), seed=st.integers(0, 99),
)  # fmt: skip
def test_decode_odd_shapes(device, b, hkv, g, sq, longest, d, dv, spare, seed):
    lens, offsets = segments(b, hkv, longest, seed, spare)
    n = int(offsets[-1])
    q, k, v = (fill(s, torch.float32, seed=seed + i)
               for i, s in enumerate(((b, hkv * g, sq, d), (n, d), (n, dv))))  # fmt: skip
    got = ops.ragged_decode(*on(device, (q, k, v, offsets)), lens=lens.to(device))
    want = reference.ragged_decode(q.double(), k.double(), v.double(), offsets, lens=lens)
    for x, y in zip(got, want):
        torch.testing.assert_close(x.cpu(), y.float(), atol=2e-5, rtol=2e-5)


def test_decode_of_equal_segments_is_sdpa(device):
    q, k, v = torch.randn(2, 6, 1, 64), torch.randn(2, 3, 50, 64), torch.randn(2, 3, 50, 64)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    flat = (q, k.reshape(-1, 64), v.reshape(-1, 64), torch.arange(7) * 50)
    got, _ = ops.ragged_decode(*on(device, flat))
    torch.testing.assert_close(got.cpu(), want, atol=1e-5, rtol=1e-5)


def test_decode_standing_checks(device):
    lens, offsets = segments(2, 2, 30, seed=1)
    n = int(offsets[-1])
    args = on(device, (torch.randn(2, 4, 3, 16), torch.randn(n, 16), torch.randn(n, 24), offsets))
    check_op(O.ragged_decode.default, args, {"scale": 0.25, "lens": lens.to(device)})


def test_decode_compiles_with_inductor():
    _, offsets = segments(2, 2, 30, seed=1)
    n = int(offsets[-1])
    args = torch.randn(2, 4, 3, 16), torch.randn(n, 16), torch.randn(n, 24), offsets
    check_compiles(ops.ragged_decode, args, backend="inductor", dynamic=None)


@cuda_only
@pytest.mark.parametrize("sq", [1, 3])
def test_decode_cuda_graph(sq, device):
    """Replays follow changed values, segments and lengths."""

    def inputs(seed, offsets, lens):
        q, k, v = (fill(s, torch.bfloat16, seed=seed + i)
                   for i, s in enumerate(((2, 4, sq, 64), (1200, 64), (1200, 40))))  # fmt: skip
        return on(device, ((q, k, v, torch.tensor(offsets)), {"lens": torch.tensor(lens)}))

    first = inputs(1, [0, 100, 110, 700, 1200], [90, 0, 590, 300])
    fresh = inputs(9, [0, 0, 900, 1000, 1100], [0, 900, 1, 77])
    check_cuda_graph(ops.ragged_decode, *first, *fresh)


def test_decode_memory_is_its_outputs_and_tiles():
    """No copy of the cache, in float32 or padded to the longest segment."""
    setup = """
        from tenfold import ops, reference
        q = torch.randn(1, 32, 128, dtype=torch.bfloat16)
        k, v = (torch.zeros(8 * 32768, 128, dtype=torch.bfloat16).normal_() for _ in range(2))
        offsets = torch.arange(9) * 32768
        for module in (ops, reference):
            module.ragged_decode(q, k[:512], v[:512], torch.arange(9) * 64)
    """
    most = 32 * 128 * 2 + 2**21
    assert peak_growth(setup, "ops.ragged_decode(q, k, v, offsets)") < most
    assert peak_growth(setup, "reference.ragged_decode(q, k, v, offsets)") > 4 * most


def check_bad_decode(device, error, *words, q=None, k=None, v=None, offsets=None, **kwargs):
    """Bad arguments in place of good ones, all on the device."""
    good = (
        torch.randn(2, 4, 8),
        torch.randn(30, 8),
        torch.randn(30, 8),
        torch.tensor([0, 10, 20, 25, 30]),
    )
    args = [x if y is None else y for x, y in zip(good, (q, k, v, offsets))]
    check_errors(ops.ragged_decode, O.ragged_decode, on(device, args), {"scale": 1.0} | on(device, kwargs),
                 error, "ragged_decode", *words)  # fmt: skip


def test_decode_bad_input(device):
    q, k, v = torch.randn(2, 4, 8), torch.randn(30, 8), torch.randn(30, 8)
    offsets = torch.tensor([0, 10, 20, 25, 30])
    bad = functools.partial(check_bad_decode, device)
    bad(ValueError, "q", "[8]", q=q[0, 0])
    bad(ValueError, "Sq", "16", q=torch.randn(2, 4, 17, 8))
    bad(ValueError, "k", "dtype", k=k.half())
    bad(ValueError, "k", "[30, 6]", k=k[:, :6].contiguous())
    bad(ValueError, "v", "[29, 8]", v=v[:29])
    bad(ValueError, "offsets", "4 entries", offsets=offsets[:4])
    bad(TypeError, "offsets", "float32", offsets=offsets.float())
    bad(ValueError, "lens", "[B * Hkv]", lens=torch.tensor([1, 1]))
    bad(ValueError, "scale", scale=float("nan"))
    q, k, v, offsets = on(device, (q, k, v, offsets))
    with pytest.raises(RuntimeError, match="inference only"):
        ops.ragged_decode(q.clone().requires_grad_(), k, v, offsets)


def test_decode_bad_index_values():
    """CPU only: CUDA does not wait for values on the device."""
    bad = functools.partial(check_bad_decode, "cpu")
    bad(ValueError, "offsets", "31", offsets=torch.tensor([0, 10, 20, 25, 31]))
    bad(ValueError, "offsets", "ascend", offsets=torch.tensor([0, 10, 5, 25, 30]))
    bad(ValueError, "lens[1]", "11", lens=torch.tensor([1, 11, 1, 1]))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_in_place_moves_are_seen_by_autograd(device, mode):
    """A tensor that was saved for a backward and compacted since must not be used silently."""
    with mode():
        k, v = (torch.randn(1, 2, 9, 8).to(device) for _ in range(2))
        idx = torch.arange(3, 8).expand(1, 2, -1).to(device)
        before = None if k.is_inference() else (k._version, v._version)
        want = k[:, :, 3:8].clone()
        ops.kv_compact_(k, v, idx)
    assert torch.equal(k[:, :, :5], want)
    if before is not None:
        assert k._version > before[0] and v._version > before[1]


def test_inputs_that_require_grad_are_refused_under_grad_mode_only(device):
    k, v = (torch.randn(1, 2, 9, 8, device=device, requires_grad=True) for _ in range(2))
    idx = torch.arange(3, 8, device=device).expand(1, 2, -1)
    with pytest.raises(RuntimeError, match="inference only"):
        ops.kv_gather(k, v, idx)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(ops.kv_gather(k, v, idx)[0], k[:, :, 3:8])
