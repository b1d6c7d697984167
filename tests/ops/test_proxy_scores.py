# SPDX-License-Identifier: Apache-2.0
"""proxy_scores against its definition, judged in float64."""

import functools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tenfold
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
    forced_isa,
    layout,
    on,
    peak_growth,
    poisoned_memory,
    threads,
)  # fmt: skip
from tenfold.testing.plugin import cuda_only

op = torch.ops.tenfold.proxy_scores

SHAPES = [  # B, Hq, Hkv, W, L, D
    (1, 1, 1, 1, 1, 64), (1, 4, 2, 5, 37, 64), (2, 9, 3, 40, 130, 64), (1, 8, 2, 33, 257, 80),
    (2, 4, 4, 20, 12, 96), (1, 2, 1, 3, 500, 128), (1, 16, 1, 2, 61, 256), (1, 3, 3, 7, 31, 33),
    (1, 32, 8, 9, 100, 128), (3, 2, 2, 1, 13, 7),
]  # fmt: skip


def eager(q, k, lse, **kwargs):
    """Plain PyTorch in the tested dtype: logits rounded to it, softmax in float32."""
    if q.dtype == torch.float32:
        return reference.proxy_scores(q, k, lse, **kwargs)
    heads = kwargs.get("kmap", torch.arange(q.shape[1]) // (q.shape[1] // k.shape[1]))
    logits = (q @ k[:, heads.long()].transpose(-1, -2)).float()
    # The reference's own masking and reduction, fed with these logits: one-hot keys pick them out.
    b, hq, _w, length = logits.shape
    one_hot = torch.eye(length).expand(b, hq, length, length)
    scale = kwargs.pop("scale", None)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    kwargs = {n: v for n, v in kwargs.items() if n not in ("reduce", "kmap")} | {"scale": scale}
    per_head, row_lse = reference.proxy_scores(logits, one_hot, lse, **kwargs)
    scores = per_head.new_zeros(b, k.shape[1], length)
    for head in range(k.shape[1]):
        scores[:, head] = per_head[:, heads == head].mean(1)
    return scores, row_lse


def run(q, k, lse=None, device="cpu", **kwargs):
    """Kernel output, float64 reference and eager low-precision result."""
    out = ops.proxy_scores(*on(device, (q, k, lse)), **on(device, kwargs))
    ref = reference.proxy_scores(
        q.double(), k.double(), None if lse is None else lse.double(), **kwargs
    )
    low = eager(q, k, lse, **kwargs)
    return [x.cpu() for x in out], ref, low


def compare(q, k, lse=None, device="cpu", **kwargs):
    results = [run(q, k, lse, device, **kwargs)]
    # One rounding error of each side is a coin toss: tiny cases are judged over more samples.
    for shift in range(1, 9 if k.shape[2] * q.shape[2] < 2000 else 1):
        results.append(run(q.roll(shift, -1), k, lse, device, **kwargs))
    for name, *sides in zip(("scores", "lse"), *(zip(*side) for side in zip(*results))):
        o, r, e = (torch.cat(side) for side in sides)
        assert o.dtype == torch.float32 and all(x.is_contiguous() for x in sides[0])
        assert_close_to_ref(o, r, e, what=name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(shape, dtype, device):
    b, hq, hkv, w, length, d = shape
    q, k = fill((b, hq, w, d), dtype, seed=1), fill((b, hkv, length, d), dtype, seed=2)
    compare(q, k, device=device)
    compare(q, k, device=device, causal=False, reduce="sum")
    compare(q, k, device=device, window=5, reduce="max", scale=0.3)
    compare(q, k, device=device, scale=0.0)
    compare(q, k, device=device, scale=-0.2)
    if length > 4:
        start, lens = torch.arange(b), torch.full((b,), length - b, dtype=torch.int32)
        compare(q, k, device=device, kv_start=start, kv_lens=lens)
    positions = torch.randint(-1, length, (b, w), dtype=torch.int32)
    compare(q, k, device=device, q_positions=positions)
    lse = reference.proxy_scores(q, k)[1]
    compare(q, k, lse, device=device)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_layouts(kind, device):
    q, k = fill((2, 6, 9, 40), torch.bfloat16, seed=1), fill((2, 3, 45, 40), torch.bfloat16, seed=2)
    q, k = q.to(device), k.to(device)
    want = ops.proxy_scores(q, k)
    got = ops.proxy_scores(layout(q, kind), layout(k, kind))
    for a, b in zip(want, got):
        assert torch.equal(a.cpu(), b.cpu())
    turned = k.transpose(-1, -2).contiguous().transpose(-1, -2)  # rows not contiguous: copied
    assert torch.equal(ops.proxy_scores(q, turned)[0].cpu(), want[0].cpu())


@pytest.mark.parametrize("values", VALUES)
def test_values_propagate(values, device):
    q, k = (
        fill((1, 4, 6, 64), torch.float32, seed=1),
        fill((1, 2, 50, 64), torch.float32, values, seed=2),
    )
    compare(q, k, device=device)
    q, k = fill((1, 4, 6, 64), torch.float32, values), fill((1, 2, 50, 64), torch.float32)
    compare(q, k, device=device)


def test_garbage_in_padding_is_never_read(device):
    q, k = fill((2, 2, 4, 64), torch.float32, seed=1), fill((2, 2, 40, 64), torch.float32, seed=2)
    start, lens = torch.tensor([7, 0]), torch.tensor([30, 33])
    where = {
        "kv_start": start.to(device), "kv_lens": lens.to(device),
        "q_positions": torch.stack([torch.arange(33, 37), torch.arange(29, 33)]).to(device),
    }  # fmt: skip
    clean = [x.cpu() for x in ops.proxy_scores(q.to(device), k.to(device), **where)]
    for b in range(2):
        k[b, :, : start[b]] = float("nan")
        k[b, :, start[b] + lens[b] :] = float("inf")
    dirty = [x.cpu() for x in ops.proxy_scores(q.to(device), k.to(device), **where)]
    for a, b in zip(clean, dirty):
        assert torch.equal(a, b)
    assert not clean[0][0, :, :7].any() and not clean[0][1, :, 33:].any()


def test_scores_of_each_head_sum_to_the_active_proxies(device):
    q, k = fill((2, 3, 11, 64), torch.float32), fill((2, 3, 64, 64), torch.float32, seed=1)
    q, k = q.to(device), k.to(device)
    for causal in (True, False):
        scores = ops.proxy_scores(q, k, causal=causal)[0].cpu()
        torch.testing.assert_close(scores.sum(-1), torch.full((2, 3), 11.0), atol=1e-4, rtol=0)
        positions = torch.arange(53, 64).repeat(2, 1)
        positions[1, :4] = -1
        got = ops.proxy_scores(q, k, causal=causal, q_positions=positions.to(device))
        scores, lse = (x.cpu() for x in got)
        want = torch.tensor([11.0, 7.0])[:, None].expand(2, 3)
        torch.testing.assert_close(scores.sum(-1), want, atol=1e-4, rtol=0)
        assert torch.isneginf(lse[1, :, :4]).all() and torch.isfinite(lse[1, :, 4:]).all()


def test_zero_keys_give_the_counting_formula(device):
    length, w = 50, 8
    q, k = fill((1, 1, w, 64), torch.float32).to(device), torch.zeros(1, 1, length, 64).to(device)
    flat = ops.proxy_scores(q, k, causal=False)[0].cpu()
    torch.testing.assert_close(flat[0, 0], torch.full((length,), w / length))
    causal = ops.proxy_scores(q, k)[0].cpu()
    want = [sum(1 / (p + 1) for p in range(max(j, length - w), length)) for j in range(length)]
    torch.testing.assert_close(causal[0, 0], torch.tensor(want))


def test_kmap_names_the_key_head_of_each_query_head(device):
    q, k = fill((1, 5, 4, 64), torch.float32), fill((1, 3, 30, 64), torch.float32, seed=1)
    kmap = torch.tensor([2, 0, 2, 2, 0], dtype=torch.int32)
    for reduce in ("mean", "sum", "max"):
        compare(q, k, device=device, kmap=kmap, reduce=reduce)
    q, k = q.to(device), k.to(device)
    assert not ops.proxy_scores(q, k, kmap=kmap.to(device))[0][:, 1].any()
    grouped = torch.tensor([0, 0, 1, 1]).to(device)
    a = ops.proxy_scores(q[:, :4], k[:, :2], kmap=grouped)
    b = ops.proxy_scores(q[:, :4], k[:, :2])
    assert torch.equal(a[0].cpu(), b[0].cpu()) and torch.equal(a[1].cpu(), b[1].cpu())


@pytest.mark.parametrize(
    "shape", [(0, 2, 1, 3, 5), (1, 0, 0, 3, 5), (1, 2, 1, 0, 5), (1, 2, 1, 3, 0)]
)
def test_empty(shape, device):
    b, hq, hkv, w, length = shape
    q, k = torch.randn(b, hq, w, 8), torch.randn(b, hkv, length, 8)
    scores, lse = (x.cpu() for x in ops.proxy_scores(q.to(device), k.to(device)))
    assert scores.shape == (b, hkv, length) and lse.shape == (b, hq, w)
    assert not scores.any() and (lse.numel() == 0 or torch.isneginf(lse).all())


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    b=st.integers(1, 3), hkv=st.integers(1, 3), g=st.integers(1, 5), w=st.integers(1, 40),
    length=st.integers(1, 70), d=st.integers(1, 40), causal=st.booleans(),
    window=st.integers(-1, 30), seed=st.integers(0, 99),
)  # fmt: skip
def test_odd_shapes(device, b, hkv, g, w, length, d, causal, window, seed):
    b *= 8  # samples: see compare()
    q = fill((b, hkv * g, w, d), torch.float32, seed=seed)
    k = fill((b, hkv, length, d), torch.float32, seed=seed + 1)
    compare(q, k, device=device, causal=causal, window=window)


def test_batch_order_and_threads_do_not_matter():
    q, k = fill((4, 6, 50, 64), torch.float32), fill((4, 3, 333, 64), torch.float32, seed=1)
    want, _lse = ops.proxy_scores(q, k)
    order = torch.tensor([2, 0, 3, 1])
    got, _lse2 = ops.proxy_scores(q[order], k[order])
    for i, j in enumerate(order):
        one, _ = ops.proxy_scores(q[j : j + 1], k[j : j + 1])
        torch.testing.assert_close(one[0], want[j], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(got[i], want[j], atol=1e-5, rtol=1e-5)
    with threads(1), poisoned_memory():
        assert torch.equal(ops.proxy_scores(q, k)[0], want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_standing_checks(dtype, device):
    q, k = fill((2, 4, 10, 64), dtype).to(device), fill((2, 2, 75, 64), dtype, seed=1).to(device)
    check_op(op, (q, k), {"scale": 0.125}, atol=1e-4)
    kwargs = {"scale": 0.125, "causal": False, "window": 20, "reduce": "max",
              "kv_start": torch.tensor([3, 0]).to(device),
              "kmap": torch.tensor([0, 1, 1, 0]).to(device)}  # fmt: skip
    check_op(op, (q, k), kwargs, atol=1e-4)
    check_op(op, (q, k, op(q, k, scale=0.125)[1]), {"scale": 0.125}, atol=1e-4)


def test_compiles_with_inductor():
    q, k = fill((1, 2, 4, 64), torch.float32), fill((1, 1, 33, 64), torch.float32)
    check_compiles(ops.proxy_scores, (q, k), backend="inductor", dynamic=None)


@cuda_only
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_graph(dtype, device):
    """Replays follow changed values, also those of the index tensors."""

    def inputs(seed, start, kmap):
        q, k = fill((2, 4, 70, 64), dtype, seed=seed), fill((2, 2, 600, 64), dtype, seed=seed + 1)
        where = {"kv_start": torch.tensor(start).to(device), "kmap": torch.tensor(kmap).to(device)}
        return (q.to(device), k.to(device)), where

    first, fresh = inputs(1, [3, 0], [0, 1, 1, 0]), inputs(7, [0, 90], [0, 0, 1, 1])
    check_cuda_graph(ops.proxy_scores, *first, *fresh)
    lse = [ops.proxy_scores(*args, **where)[1] for args, where in (first, fresh)]
    check_cuda_graph(ops.proxy_scores, (*first[0], lse[0]), first[1], (*fresh[0], lse[1]), fresh[1])


def test_memory_stays_at_a_few_rows():
    """Far below the [Hq, W, L] probabilities that the eager form stores."""
    setup = """
        from tenfold import ops, reference
        q, k = torch.randn(1, 16, 256, 64), torch.randn(1, 4, 4096, 64)
        ops.proxy_scores(q[:, :, :8], k)
        reference.proxy_scores(q[:, :, :8], k[:, :, :64])
    """
    most = 16 * 256 * 4096 * 4 // 8
    assert peak_growth(setup, "ops.proxy_scores(q, k)") < most
    assert peak_growth(setup, "reference.proxy_scores(q, k)") > 8 * most  # it can be seen


def test_matches_a_loop_written_from_the_formula():
    """The oracle itself, against scalar loops."""
    q, k = fill((1, 2, 3, 5), torch.float64), fill((1, 1, 6, 5), torch.float64, seed=3)
    q, k = q.double(), k.double()
    got, lse = reference.proxy_scores(q, k)
    for h in range(2):
        column = [0.0] * 6
        for w in range(3):
            p = 3 + w
            logits = [float(q[0, h, w] @ k[0, 0, j]) / math.sqrt(5) for j in range(p + 1)]
            total = sum(math.exp(x) for x in logits)
            assert math.isclose(float(lse[0, h, w]), math.log(total), rel_tol=1e-9)
            for j, x in enumerate(logits):
                column[j] += math.exp(x) / total / 2
        if h == 0:
            first = column
    for j in range(6):
        assert math.isclose(float(got[0, 0, j]), first[j] + column[j], rel_tol=1e-9)


def check_bad(device, error, *words, q=None, k=None, lse=None, **kwargs):
    """Bad arguments in place of good ones, all on the device."""
    q, k = torch.randn(2, 4, 5, 8) if q is None else q, torch.randn(2, 2, 20, 8) if k is None else k
    kwargs = {"scale": 1.0} | on(device, kwargs)
    check_errors(
        ops.proxy_scores, op, on(device, (q, k, lse)), kwargs, error, "proxy_scores", *words
    )


def test_bad_input(device):
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 20, 8)
    bad = functools.partial(check_bad, device)
    bad(TypeError, "q", "float64", q=q.double(), k=k.double())
    bad(ValueError, "k", "dtype", "bfloat16", k=k.bfloat16())
    bad(ValueError, "q", "4-dimensional", "[4, 5, 8]", q=q[0])
    bad(ValueError, "k", "4-dimensional", k=k[0])
    bad(ValueError, "[2, 4, 5, 8]", "[1, 2, 20, 8]", k=k[:1])
    bad(ValueError, "D", "[2, 2, 20, 6]", k=k[..., :6])
    bad(ValueError, "multiple of Hkv", "[2, 3, 5, 8]", q=q[:, :3])
    bad(ValueError, "lse", "[B, Hq, W]", "[2, 4, 5]", "[2, 4, 4]", lse=torch.zeros(2, 4, 4))
    bad(TypeError, "lse", "float32", lse=torch.zeros(2, 4, 5).double())
    bad(ValueError, "scale", "finite", scale=float("inf"))
    bad(ValueError, "q_offset", "-2", q_offset=-2)
    bad(ValueError, "q_positions", "[4]", q_positions=torch.zeros(4, dtype=torch.int32))
    bad(TypeError, "q_positions", "int32 or int64", "float32", q_positions=torch.zeros(5))
    bad(ValueError, "kv_start", "[B] = [2]", "[3]", kv_start=torch.zeros(3, dtype=torch.int64))
    bad(ValueError, "window", "-2", window=-2)
    bad(ValueError, "reduce", "'median'", "'mean'", reduce="median")
    bad(ValueError, "kmap", "[Hq]", kmap=torch.tensor([0, 1]))
    q, k = q.to(device), k.to(device)
    with pytest.raises(RuntimeError, match="inference only"):
        ops.proxy_scores(q.clone().requires_grad_(), k)
    with torch.no_grad():
        ops.proxy_scores(q.clone().requires_grad_(), k)


def test_bad_index_values():
    """CPU only: CUDA does not wait for values on the device."""
    t, bad = torch.tensor, functools.partial(check_bad, "cpu")
    bad(ValueError, "kv_start[1]", "21", kv_start=t([0, 21]))
    bad(ValueError, "kv_lens[0]", "-1", kv_lens=t([-1, 3]))
    bad(ValueError, "kv_lens[1]", "16", kv_start=t([0, 5]), kv_lens=t([3, 16]))
    bad(IndexError, "kmap[3]", "2", kmap=t([0, 1, 1, 2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_minus_infinity_contribute_nothing(device, dtype):
    """Spec section 6: such rows give 0, never NaN; with and without the row's log-sum-exp."""
    q = fill((1, 2, 3, 64), dtype).to(device).abs() + 0.1
    k = torch.full((1, 1, 70, 64), float("-inf"), dtype=dtype).to(device)
    for lse in (None, torch.full((1, 2, 3), float("-inf"), device=device)):
        for module in (ops, reference):
            scores, out = module.proxy_scores(q, k, lse)
            assert bool((scores == 0).all()) and bool(out.isneginf().all())
    k = fill((1, 1, 70, 64), dtype).to(device)
    k[:, :, 40] = float("-inf")  # one dead key among others takes nothing from them
    got = ops.proxy_scores(q, k)[0]
    assert float(got[..., 40]) == 0 and abs(float(got.sum()) - 3) < 1e-2


@pytest.mark.parametrize("isa", tenfold.cpu_capabilities())
@pytest.mark.parametrize("scale", [0.0, -0.2, 1e-3, 2.0])
def test_any_finite_scale_on_every_isa(isa, scale):
    """Masks hide and maxima are maxima whatever the sign of the scale."""
    q, k = fill((1, 4, 5, 32), torch.bfloat16, seed=1), fill((1, 2, 90, 32), torch.bfloat16, seed=2)
    with forced_isa(isa):
        compare(q, k, scale=scale)
        compare(q, k, scale=scale, window=7)


@pytest.mark.parametrize("isa", tenfold.cpu_capabilities())
def test_an_lse_far_below_the_logits_gives_inf(isa):
    q, k = fill((1, 2, 3, 8), torch.float32, seed=1), fill((1, 1, 40, 8), torch.float32, seed=2)
    lse = torch.full((1, 2, 3), -200.0)
    with forced_isa(isa):
        assert torch.equal(ops.proxy_scores(q, k, lse)[0], reference.proxy_scores(q, k, lse)[0])


def test_a_row_of_a_batch_is_the_row_alone():
    q, k = (
        fill((4, 4, 300, 64), torch.float32, seed=1),
        fill((4, 1, 900, 64), torch.float32, seed=2),
    )
    whole = ops.proxy_scores(q, k)[0]
    for row in range(4):
        alone = ops.proxy_scores(q[row : row + 1], k[row : row + 1])[0]
        assert torch.equal(alone[0], whole[row])


@pytest.mark.parametrize("isa", tenfold.cpu_capabilities())
@pytest.mark.parametrize("d", [8, 33, 64, 96, 130])
def test_float32_keeps_its_precision(isa, d):
    """Also where float32 is multiplied as sums of bf16: elements of any size, with all 24 bits."""
    g = torch.Generator().manual_seed(d)
    q, k = torch.randn(1, 4, 40, d, generator=g), torch.randn(1, 2, 200, d, generator=g)
    k[..., ::3] *= torch.logspace(-30, 1, k[..., ::3].shape[-1])  # and tiny ones among them
    q[..., 1::3] *= torch.logspace(1, -30, q[..., 1::3].shape[-1])
    want = reference.proxy_scores(q.double(), k.double(), scale=0.2)
    plain = reference.proxy_scores(q, k, scale=0.2)
    with forced_isa(isa):
        got = ops.proxy_scores(q, k, scale=0.2)
    for a, b, c in zip(got, want, plain):
        rms = [(x.double() - b)[b.isfinite()].square().mean().sqrt().item() for x in (a, c)]
        assert rms[0] <= 1.5 * rms[1] + 1e-8 * b[b.isfinite()].abs().max().item()


@pytest.mark.parametrize("isa", tenfold.cpu_capabilities())
@pytest.mark.parametrize("where", ["q", "k"])
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3.4e38, -3.39e38])
def test_an_extreme_value_changes_only_its_row(isa, where, value):
    q, k = fill((1, 4, 40, 64), torch.float32, seed=1), fill((1, 2, 100, 64), torch.float32, seed=2)
    with forced_isa(isa):
        _, clean = ops.proxy_scores(q, k)
        (q if where == "q" else k)[0, 1, 17, 5] = value
        _, lse = ops.proxy_scores(q, k)
    want = reference.proxy_scores(q, k)[1]
    assert torch.equal(lse.isnan(), want.isnan())
    heads = slice(0, 2) if where == "k" else [0, 2, 3]
    torch.testing.assert_close(lse[:, heads], clean[:, heads], rtol=1e-6, atol=1e-6)
    if where == "q":
        rest = [i for i in range(40) if i != 17]
        torch.testing.assert_close(lse[:, 1, rest], clean[:, 1, rest], rtol=1e-6, atol=1e-6)
