# SPDX-License-Identifier: Apache-2.0
"""dha_attention, forward: against its definition in float64 and against torch's own attention."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tenfold
from tenfold import ops, reference
from tenfold.testing import (
    DTYPES,
    LAYOUTS,
    assert_close_to_ref,
    check_compiles,
    check_deterministic,
    check_errors,
    check_isas_agree,
    check_op,
    check_strides_equal_fake,
    fill,
    forced_isa,
    layout,
    on,
    peak_growth,
    poisoned_memory,
)
from tenfold.testing.plugin import cuda_only

op = torch.ops.tenfold.dha_attention

SHAPES = [  # B, H, HK, HV, Sq, Sk, D, DV
    (1, 1, 1, 1, 1, 1, 64, 64), (2, 4, 2, 1, 7, 7, 64, 64), (1, 9, 3, 3, 61, 61, 64, 64),
    (1, 4, 4, 4, 130, 130, 128, 128), (1, 6, 2, 3, 33, 257, 80, 80), (2, 3, 3, 1, 100, 37, 96, 96),
    (1, 2, 1, 2, 49, 300, 256, 256), (1, 5, 2, 4, 17, 31, 33, 7), (1, 4, 2, 2, 1, 129, 128, 64),
    (3, 2, 2, 2, 16, 16, 1, 256), (1, 8, 4, 2, 48, 128, 127, 61), (1, 32, 8, 8, 96, 96, 128, 128),
]  # fmt: skip


def inputs(shape, dtype, seed=0):
    b, h, hk, hv, sq, sk, d, dv = shape
    made = torch.Generator().manual_seed(seed)
    kmap = torch.randint(0, hk, (h,), generator=made, dtype=torch.int32)
    vmap = torch.randint(0, hv, (h,), generator=made)
    return (
        fill((b, h, sq, d), dtype, seed=3 * seed), fill((b, hk, sk, d), dtype, seed=3 * seed + 1),
        fill((b, hv, sk, dv), dtype, seed=3 * seed + 2), kmap, vmap,
    )  # fmt: skip


def visible(sq, sk, causal=True, left=-1, right=-1):
    """[Sq, Sk]: what flash-attn says about its windows."""
    at, key = torch.arange(sq)[:, None] + sk - sq, torch.arange(sk)[None]
    right = 0 if causal else right
    sees_left = (key >= at - left) if left >= 0 else torch.ones(sq, sk, dtype=torch.bool)
    return sees_left & ((key <= at + right) if right >= 0 else True)


def expanded(k, v, kmap, vmap):
    return k[:, kmap.long()], v[:, vmap.long()]


def plain(q, k, v, kmap, vmap, *, causal=True, window_left=-1, window_right=-1, attn_bias=None,
          softcap=0.0, scale=None):  # fmt: skip
    """Attention as models write it in eager PyTorch: float32 logits and softmax, then the dtype."""
    k, v = expanded(k, v, kmap, vmap)
    logits = q.float() @ k.float().mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    seen = visible(q.shape[2], k.shape[2], causal, window_left, window_right)
    if attn_bias is not None and attn_bias.dtype == torch.bool:
        seen = seen & attn_bias
    elif attn_bias is not None:
        logits = logits + attn_bias.float()
    weights = logits.masked_fill(~seen, -math.inf).softmax(-1).nan_to_num(0.0)
    return weights.to(q.dtype) @ v


def run(args, device, options):
    """Of ``out`` and ``lse``: the kernel's, the definition's in float64, plain PyTorch's."""
    q, k, v, kmap, vmap = args
    out, lse = ops.dha_attention(*on(device, args), **on(device, options))
    assert out.dtype == q.dtype and lse.dtype == torch.float32
    ref, ref_lse = reference.dha_attention(
        q.double(), k.double(), v.double(), kmap, vmap, **options
    )
    _, low_lse = reference.dha_attention(q, k, v, kmap, vmap, **options)  # computes in float32
    return (out.cpu(), ref, plain(*args, **options)), (lse.cpu(), ref_lse, low_lse)


def compare(args, device="cpu", **options):
    """The kernel is at most twice as wrong as plain PyTorch."""
    results = [run(args, device, options)]
    # One rounding error of each side is a coin toss: tiny cases are judged over more samples.
    pairs = args[0].shape[2] * args[1].shape[2]
    for shift in range(1, min(20, 8000 // pairs if pairs < 2000 else 1)):
        results.append(
            run([args[0].roll(shift, -1) * (1 + shift / 64), *args[1:]], device, options)
        )
    for name, samples in zip(("out", "lse"), zip(*results)):
        assert_close_to_ref(*(torch.cat(side) for side in zip(*samples)), what=name)


# -- the mathematics: acceptance checks 1 to 3 of the method ------------------------------------------

# The method asks for 1e-6. The first rows of a causal mask see few keys, so that outputs are as large as
# single values (up to 4) and the logits' own rounding shows: there kernel and torch are each up to
# 1.5e-6 away from the float64 result, on either side of it.
TORCH_CAUSAL = 2e-6


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [(8, 8, 8), (8, 2, 2), (8, 4, 2), (8, 2, 4)])
def test_equals_torch_attention(heads, causal, device):
    h, hk, hv = heads
    q, k, v, _, _ = (x.to(device) for x in inputs((2, h, hk, hv, 90, 90, 64, 64), torch.float32))
    kmap, vmap = (torch.arange(h, device=device) // (h // n) for n in (hk, hv))
    want = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    got = ops.dha_attention(q, k, v, kmap, vmap, causal=causal)[0]
    torch.testing.assert_close(got, want, rtol=0, atol=TORCH_CAUSAL if causal else 1e-6)


def test_arbitrary_maps_equal_torch_on_expanded_heads(device):
    args = [x.to(device) for x in inputs((2, 9, 4, 5, 70, 70, 64, 32), torch.float32)]
    k, v = expanded(*args[1:])
    want = F.scaled_dot_product_attention(args[0], k, v, is_causal=True)
    torch.testing.assert_close(ops.dha_attention(*args)[0], want, rtol=0, atol=TORCH_CAUSAL)


def test_permuted_heads_give_permuted_results(device):
    q, k, v, kmap, vmap = (
        x.to(device) for x in inputs((1, 8, 3, 4, 50, 50, 64, 64), torch.float32)
    )
    at = torch.randperm(8).to(device)
    out, lse = ops.dha_attention(q, k, v, kmap, vmap)
    moved, moved_lse = ops.dha_attention(q[:, at], k, v, kmap[at], vmap[at])
    assert torch.equal(moved, out[:, at]) and torch.equal(moved_lse, lse[:, at])


# -- against the definition --------------------------------------------------------------------------


def grid():
    """All shapes x dtypes; float32 and one half-precision type of each if time is short."""
    for i, shape in enumerate(SHAPES):
        for k, dtype in enumerate(DTYPES):
            late = dtype != torch.float32 and (i + k) % 2 == 1
            yield pytest.param(shape, dtype, marks=[pytest.mark.slow] if late else [])


@pytest.mark.parametrize(("shape", "dtype"), grid())
def test_matches_reference(shape, dtype, device):
    args = inputs(shape, dtype)
    compare(args, device)
    compare(args, device, causal=False, scale=0.3)
    compare(args, device, window_left=9, softcap=2.0)
    compare(args, device, causal=False, window_left=3, window_right=20, scale=-0.2)


@pytest.mark.parametrize("isa", tenfold.cpu_capabilities())
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(isa, dtype):
    with forced_isa(isa):
        for shape in SHAPES[2:8]:
            compare(inputs(shape, dtype))
        compare(inputs(SHAPES[4], dtype), attn_bias=torch.rand(1, 1, 33, 257) > 0.3, softcap=5.0)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_odd_shapes(data):
    def pick(*of):
        return data.draw(st.sampled_from(of))

    def size(most):
        return data.draw(st.integers(1, most))

    shape = (size(3), size(7), size(4), size(4), size(150), size(300), size(256), size(256))
    options = {
        "causal": pick(True, False),
        "window_left": pick(-1, 0, 13),
        "scale": pick(None, 0.1),
    }
    compare(inputs(shape, pick(*DTYPES), seed=size(1000)), **options)


@pytest.mark.parametrize("sq, sk", [(1, 1), (1, 40), (40, 1), (60, 20), (20, 60), (0, 5), (5, 0)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("left, right", [(-1, -1), (0, 0), (2, 3), (5, -1), (-1, 4), (100, 100)])
def test_windows_mean_what_flash_attn_says(sq, sk, causal, left, right, device):
    args = inputs((1, 2, 2, 1, sq, sk, 16, 16), torch.float32)
    seen = visible(sq, sk, causal, left, right)
    out, lse = ops.dha_attention(
        *(x.to(device) for x in args), causal=causal, window_left=left, window_right=right
    )
    out, lse = out.cpu(), lse.cpu()
    want = plain(*args, causal=causal, window_left=left, window_right=right)
    torch.testing.assert_close(out, want, rtol=0, atol=2e-6)
    nothing = ~seen.any(-1).expand(lse.shape)
    assert torch.equal(lse == -math.inf, nothing) and not out[nothing].any()


@pytest.mark.parametrize("wide", [2**40 + 1, 2**62, 2**63 - 1])
def test_windows_wider_than_any_sequence_limit_nothing(wide, device):
    args = [x.to(device) for x in inputs((1, 4, 2, 1, 60, 90, 16, 24), torch.float32)]
    for window in ({"window_left": wide}, {"window_right": wide},
                   {"window_left": wide, "window_right": wide}):  # fmt: skip
        for causal in (True, False):
            out, lse = ops.dha_attention(*args, causal=causal)
            got = ops.dha_attention(*args, causal=causal, **window)
            assert torch.equal(got[0], out) and torch.equal(got[1], lse)
            gradients = [
                torch.ops.tenfold.dha_attention_backward(
                    torch.ones_like(out), *args[:3], out, lse, *args[3:], causal=causal, **limits
                )
                for limits in ({}, window)
            ]
            assert all(map(torch.equal, *gradients))


BIASES = [size for size in itertools.product((1, 2), (1, 4), (1, 70), (1, 133))]


@pytest.mark.parametrize("kind", ["bool", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("size", BIASES)
def test_bias_broadcasts(size, kind, device):
    args = inputs((2, 4, 2, 2, 70, 133, 64, 64), torch.float32)
    bias = torch.rand(size) > 0.2 if kind == "bool" else torch.randn(size).to(getattr(torch, kind))
    compare(args, device, attn_bias=bias, causal=False)
    compare(args, device, attn_bias=bias.expand(2, 4, 70, 133).mT.contiguous().mT)
    if size[0] == 1:
        compare(args, device, attn_bias=bias[0], causal=False, window_left=20)


@pytest.mark.parametrize("lowest", [-math.inf, torch.finfo(torch.float32).min])
def test_rows_that_a_bias_hides(lowest, device):
    """-inf hides: 0 and -inf. The lowest finite number is a number: the row sees all keys alike."""
    args = inputs((1, 2, 1, 1, 20, 50, 64, 64), torch.float32)
    bias = torch.zeros(20, 50)
    bias[3], bias[7, ::2] = lowest, lowest
    compare(args, device, attn_bias=bias, causal=False)
    if lowest == -math.inf:
        compare(args, device, attn_bias=bias == 0, causal=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_softcap(softcap, dtype, device):
    q, k, v, kmap, vmap = inputs((2, 4, 2, 2, 50, 150, 64, 64), dtype)
    for factor in (1e-3, 1.0, 20.0):
        compare((q * factor, k, v, kmap, vmap), device, softcap=softcap, causal=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [0.0, 1e-6, 30.0, 1e4])
def test_small_and_large_logits(factor, dtype, device):
    q, k, v, kmap, vmap = inputs((1, 4, 2, 2, 80, 200, 64, 64), dtype)
    compare((q * factor, k, v, kmap, vmap), device)
    rising = torch.linspace(0, 1, 200)[:, None].to(dtype) * k.abs()  # the maximum moves on and on
    compare((q.abs() * factor, rising, v, kmap, vmap), device, causal=False)


# -- values that are not finite ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 40, 97, 149])
def test_bad_values_reach_the_rows_that_see_them_and_no_other(at, bad, dtype, device):
    args = inputs((1, 2, 1, 2, 150, 150, 32, 24), dtype)
    for which in (1, 2):
        broken = [x.clone() for x in args]
        broken[which][0, 0, at, 5] = bad
        options = {"causal": True, "window_left": 60}
        got = ops.dha_attention(*(x.to(device) for x in broken), **options)[0].cpu()
        clean = ops.dha_attention(*(x.to(device) for x in args), **options)[0].cpu()
        sees = visible(150, 150, left=60)[:, at]
        # Such a block is summed key by key: equal to rounding.
        tolerance = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
        torch.testing.assert_close(
            got[:, :, ~sees], clean[:, :, ~sees], rtol=tolerance, atol=tolerance
        )
        if which == 2:
            ref = reference.dha_attention(*[x.double() for x in broken[:3]], *args[3:], **options)[
                0
            ]
            assert torch.equal(got.isfinite(), ref.isfinite())
        elif bad != bad:
            assert got[:, :, sees].isnan().all()
    args[0][0, 1, at, 3] = bad
    got = ops.dha_attention(*(x.to(device) for x in args))[0].cpu()
    ref = reference.dha_attention(*[x.double() for x in args[:3]], *args[3:])[0]
    assert torch.equal(got.isfinite(), ref.isfinite()) and got[0, 0].isfinite().all()
    assert got[0, 1, torch.arange(150) != at].isfinite().all()


def test_hidden_garbage_is_never_read(device):
    q, k, v, kmap, vmap = (
        x.to(device) for x in inputs((2, 4, 2, 2, 60, 90, 64, 64), torch.float32)
    )
    keep = (torch.arange(90) >= torch.tensor([[7], [30]])).to(device)[:, None, None]  # left padding
    want = ops.dha_attention(q, k, v, kmap, vmap, attn_bias=keep)
    for bad in (math.nan, math.inf):
        k2, v2 = (x.masked_fill(~keep[:, :, 0, :, None], bad) for x in (k, v))
        for bias in (keep, torch.zeros(keep.shape, device=device).masked_fill(~keep, -math.inf)):
            got = ops.dha_attention(q, k2, v2, kmap, vmap, attn_bias=bias)
            assert all(torch.equal(a, b) for a, b in zip(got, want))


# -- layouts, packed batches -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", LAYOUTS)
def test_layouts(kind, dtype, device):
    args = [x.to(device) for x in inputs((2, 6, 3, 2, 50, 70, 72, 40), dtype)]
    want = ops.dha_attention(*args)
    moved = [layout(x, kind) for x in args[:3]]
    got = ops.dha_attention(*moved, *args[3:])
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    turned = [x.mT.contiguous().mT for x in args[:3]]  # rows not contiguous: copied
    assert torch.equal(ops.dha_attention(*turned, *args[3:])[0], want[0])


def test_out_of_a_transposed_query_needs_no_copy(device):
    args = [x.to(device) for x in inputs((2, 6, 3, 2, 50, 70, 72, 40), torch.bfloat16)]
    out = ops.dha_attention(layout(args[0], "transposed"), *args[1:])[0]
    assert out.transpose(1, 2).is_contiguous()
    assert ops.dha_attention(*args)[0].is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window_left": 5, "softcap": 3.0}])
def test_packed_batch_equals_its_sequences(options, dtype, device):
    q_lens, k_lens = [5, 0, 65, 130, 1, 3], [9, 11, 0, 170, 1, 2]
    cu_q, cu_k = (
        torch.tensor([0, *itertools.accumulate(x)], dtype=torch.int32) for x in (q_lens, k_lens)
    )
    q, k = fill((204, 6, 40), dtype, seed=1), fill((193, 2, 40), dtype, seed=2)
    v = fill((193, 3, 24), dtype, seed=3)
    maps = [torch.tensor([0, 1, 0, 1, 1, 0]), torch.tensor([2, 1, 0, 0, 1, 2], dtype=torch.int32)]
    where = {"cu_seqlens_q": cu_q.to(device), "cu_seqlens_k": cu_k.to(device)}
    moved = [x.to(device) for x in (q, k, v, *maps)]
    out, lse = ops.dha_attention(*moved, **where, **options)
    hinted = ops.dha_attention(*moved, **where, **options, max_q=130, max_k=170)
    assert torch.equal(out, hinted[0]) and torch.equal(lse, hinted[1])
    assert out.shape == (204, 6, 24) and lse.shape == (6, 204)
    wide = [x.double() for x in (q, k, v)]
    ref = reference.dha_attention(*wide, *maps, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **options)
    parts = []
    for b in range(6):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        one = [x.transpose(0, 1)[None] for x in (q[rows], k[keys], v[keys])]
        parts.append(plain(*one, *maps, **options)[0].transpose(0, 1))
        if q_lens[b] >= 48:  # a long sequence is cut into tiles as a batch of its own
            alone = ops.dha_attention(*(x.to(device) for x in (*one, *maps)), **options)
            torch.testing.assert_close(alone[0][0].transpose(0, 1), out[rows])
    assert_close_to_ref(out.cpu(), ref[0], torch.cat(parts), what="out")
    low_lse = reference.dha_attention(
        q, k, v, *maps, **{n: x.cpu() for n, x in where.items()}, **options
    )[1]
    assert_close_to_ref(lse.cpu(), ref[1], low_lse, what="lse")


@pytest.mark.parametrize(
    "shape", [(0, 2, 1, 1, 4, 4, 8, 8), (1, 2, 1, 1, 0, 4, 8, 8), (2, 2, 1, 1, 4, 0, 8, 8)]
)
def test_empty(shape, device):
    with poisoned_memory():
        out, lse = ops.dha_attention(*(x.to(device) for x in inputs(shape, torch.float32)))
    assert out.shape == (*shape[:2], shape[4], shape[7]) and not out.any()
    assert bool((lse == -math.inf).all())
    empty = torch.zeros(0, 2, 8, device=device)
    cu, maps = (
        torch.zeros(1, dtype=torch.int32, device=device),
        torch.zeros(2, dtype=torch.int32, device=device),
    )
    got = ops.dha_attention(empty, empty, empty, maps, maps, cu_seqlens_q=cu, cu_seqlens_k=cu)
    assert got[0].shape == (0, 2, 8) and got[1].shape == (2, 0)


def test_more_heads_than_a_grid_dimension(device):
    args = inputs((2200, 32, 2, 4, 3, 5, 8, 8), torch.float32)
    got = ops.dha_attention(*(x.to(device) for x in args))[0].cpu()
    torch.testing.assert_close(got, plain(*args), rtol=0, atol=2e-6)


# -- what every op must do ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_standing_checks(dtype, device):
    args = [x.to(device) for x in inputs((2, 6, 3, 2, 100, 140, 64, 40), dtype)]
    loose = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}  # weights are rounded
    check_op(op, args, {"window_left": 50}, **loose)
    bias = torch.rand(2, 1, 100, 140, device=device) > 0.2
    check_op(op, args, {"attn_bias": bias, "softcap": 4.0, "scale": 0.2}, **loose)
    packed = [x.transpose(1, 2).flatten(0, 1) for x in args[:3]]
    cu = {"cu_seqlens_q": torch.tensor([0, 30, 200]), "cu_seqlens_k": torch.tensor([0, 100, 280])}
    cu = {n: x.to(device, torch.int32) for n, x in cu.items()}
    check_op(op, [*packed, *args[3:]], cu, **loose)
    turned = [layout(x, "transposed") for x in args[:3]]
    check_strides_equal_fake(op, [*turned, *args[3:]])


def test_deterministic_over_threads_when_heads_share(device):
    for shape in ((1, 9, 3, 3, 500, 500, 64, 64), (3, 8, 2, 4, 20, 300, 128, 128)):
        args = [x.to(device) for x in inputs(shape, torch.bfloat16)]
        check_deterministic(ops.dha_attention, args)


def test_compiles_with_inductor():
    check_compiles(
        ops.dha_attention, inputs((1, 4, 2, 2, 40, 40, 64, 64), torch.float32), backend="inductor"
    )


def test_isas_agree_closely_in_float32():
    check_isas_agree(
        ops.dha_attention,
        inputs((2, 4, 2, 2, 70, 130, 64, 64), torch.float32),
        rtol=1e-5,
        atol=2e-6,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    args = inputs((1, 4, 2, 2, 30, 30, 64, 64), torch.float32)
    bias = torch.randn(30, 30)
    with torch.autocast("cpu", dtype=dtype):
        got = ops.dha_attention(*args, attn_bias=bias)[0]
        mask = ops.dha_attention(*args, attn_bias=bias > 0)[0]
    want = ops.dha_attention(*(x.to(dtype) for x in args[:3]), *args[3:], attn_bias=bias.to(dtype))[
        0
    ]
    assert got.dtype == mask.dtype == dtype and torch.equal(got, want)


def test_peak_memory_is_tiles_only():
    """16 MB of output; a matrix of logits would be 512 MB."""
    setup = """
    from tenfold import ops
    q, k, v = (torch.randn(1, 8, 4096, 128) for _ in range(3))
    maps = torch.arange(8)
    ops.dha_attention(q[:, :, :64], k[:, :, :64], v[:, :, :64], maps, maps)
    """
    grown = peak_growth(setup, "out = ops.dha_attention(q, k, v, maps, maps)")
    assert grown < (16 + 6) << 20, f"{grown >> 20} MB"


Q, K, V = torch.zeros(2, 4, 6, 8), torch.zeros(2, 2, 7, 8), torch.zeros(2, 3, 7, 5)
KMAP, VMAP = torch.tensor([0, 1, 1, 0]), torch.tensor([2, 0, 1, 1], dtype=torch.int32)
PACKED = {"q": torch.zeros(8, 4, 8), "k": torch.zeros(14, 2, 8), "v": torch.zeros(14, 3, 5)}
CU = torch.tensor([0, 3, 8], dtype=torch.int32)


BAD = [
    ({"kmap": torch.tensor([0, 2, 1, 0])}, ValueError, ["kmap[1]", "[0, 2)", "got 2"]),
    ({"vmap": torch.tensor([0, 0, -1, 0])}, ValueError, ["vmap[2]", "[0, 3)", "got -1"]),
    ({"kmap": torch.tensor([0, 1])}, ValueError, ["kmap", "[H]", "[2]"]),
    ({"vmap": VMAP.float()}, TypeError, ["vmap", "int32", "float"]),
    ({"k": torch.zeros(2, 2, 7, 9)}, ValueError, ["q [2, 4, 6, 8]", "k [2, 2, 7, 9]"]),
    ({"k": torch.zeros(3, 2, 7, 8)}, ValueError, ["k [3, 2, 7, 8]"]),
    ({"v": torch.zeros(2, 3, 6, 5)}, ValueError, ["v [2, 3, 6, 5]"]),
    ({"q": Q[0]}, ValueError, ["q", "[B, H, Sq, D]"]),
    ({"k": K.bfloat16()}, ValueError, ["k", "bfloat16"]),
    ({"q": Q.long(), "k": K.long(), "v": V.long()}, TypeError, ["q", "int64"]),
    ({"v": torch.zeros(2, 3, 7, 257)}, ValueError, ["[1, 256]", "257"]),
    ({"q": Q[..., :0], "k": K[..., :0]}, ValueError, ["[1, 256]", "[2, 4, 6, 0]"]),
    ({"scale": math.inf}, ValueError, ["scale", "finite"]),
    ({"softcap": -1.0}, ValueError, ["softcap", "-1"]),
    ({"window_left": -2}, ValueError, ["window_left", "-2"]),
    ({"window_right": -3}, ValueError, ["window_right", "-3"]),
    ({"attn_bias": torch.zeros(5, 7)}, ValueError, ["attn_bias", "[5, 7]"]),
    ({"attn_bias": torch.zeros(1, 1, 1, 6, 7)}, ValueError, ["attn_bias"]),
    ({"attn_bias": torch.zeros(6, 7, dtype=torch.int64)}, TypeError, ["attn_bias", "int64"]),
    ({"cu_seqlens_q": CU}, ValueError, ["cu_seqlens_k", "together"]),
    (PACKED | {"cu_seqlens_q": CU, "cu_seqlens_k": CU[:2]}, ValueError, ["B + 1", "[3]", "[2]"]),
]


@pytest.mark.parametrize("change, error, words", BAD)
def test_bad_inputs(change, error, words, device):
    base = {"q": Q, "k": K, "v": V, "kmap": KMAP, "vmap": VMAP} | change
    base = on(device, base)
    args = [base.pop(n) for n in ("q", "k", "v", "kmap", "vmap")]
    check_errors(ops.dha_attention, op, args, base, error, "dha_attention", *words)


@cuda_only
@pytest.mark.parametrize("name", ["k", "v", "kmap", "vmap", "attn_bias"])
def test_tensors_on_two_devices(name, device):
    given = {"q": Q, "k": K, "v": V, "kmap": KMAP, "vmap": VMAP, "attn_bias": torch.zeros(6, 7)}
    given = {n: x if n == name else x.to(device) for n, x in given.items()}
    args = [given.pop(n) for n in ("q", "k", "v", "kmap", "vmap")]
    check_errors(
        ops.dha_attention, op, args, given, ValueError, "dha_attention", name, "cpu", "cuda"
    )


@pytest.mark.parametrize(
    "cu, words",
    [
        ([0, 5, 4, 14], ["cu_seqlens_k", "5 then 4", "[2]"]),
        ([1, 5, 6, 14], ["cu_seqlens_k[0]", "got 1"]),
        ([0, 5, 6, 13], ["cu_seqlens_k[3]", "14", "got 13"]),
        ([0, 5, 6, 15], ["cu_seqlens_k[3]", "14", "got 15"]),
    ],
)
def test_bad_sequences(cu, words):
    args = [*PACKED.values(), KMAP, VMAP]
    good = torch.tensor([0, 1, 2, 8], dtype=torch.int32)
    options = {"cu_seqlens_q": good, "cu_seqlens_k": torch.tensor(cu, dtype=torch.int32)}
    check_errors(ops.dha_attention, op, args, options, ValueError, *words)


def test_a_bias_that_requires_grad_is_refused():
    args = inputs((1, 2, 2, 2, 4, 4, 8, 8), torch.float32)
    with pytest.raises(RuntimeError, match="attn_bias requires grad"):
        ops.dha_attention(*args, attn_bias=torch.zeros(4, 4, requires_grad=True))
