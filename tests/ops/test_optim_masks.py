# SPDX-License-Identifier: Apache-2.0
"""Packed masks, masked gradient norms and masked copies, against their definitions."""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optim_cases import (
    BF16,
    F16,
    F32,
    KINDS,
    assert_lists,
    copies,
    each_isa,
    mask_of,
    moved,
    shapes_of,
    some_masks,
    tensors,
)  # fmt: skip

from tenfold import ops, reference
from tenfold.reference.optim.masks import storage_flat, trained_elements
from tenfold.testing import (
    DTYPES,
    check_compiles,
    check_cuda_graph,
    check_deterministic,
    check_errors,
    check_op,
    fill,
    peak_growth,
    poisoned_memory,
    threads,
)  # fmt: skip
from tenfold.testing.plugin import cuda_only

raw = torch.ops.tenfold
LENGTHS = [*range(66), 255, 256, 257, 1000, 4099, 65537]


def random_bits(n, fraction=0.5, seed=0):
    return torch.rand(n, generator=torch.Generator().manual_seed(seed)) < fraction


# -- pack, unpack, count -----------------------------------------------------------------------------


def test_pack_and_unpack_round_trip(device):
    for context in each_isa(device):
        for n in LENGTHS:
            mask = random_bits(n, seed=n).to(device)
            with context, poisoned_memory():
                packed = ops.pack_mask(mask)
                assert torch.equal(ops.unpack_mask(packed, n), mask)
            assert packed.dtype == torch.uint8 and packed.shape == (-(-n // 8),)
            want = torch.from_numpy(np.packbits(mask.cpu().numpy(), bitorder="little"))
            assert torch.equal(packed.cpu(), want)  # tail bits are zero
            assert torch.equal(reference.pack_mask(mask.cpu()), want)
            assert torch.equal(reference.unpack_mask(want, n), mask.cpu())


def test_pack_flattens_any_shape_and_strides(device):
    mask = random_bits(7 * 33).view(7, 33).to(device)
    want = reference.pack_mask(mask.cpu())
    assert torch.equal(ops.pack_mask(mask).cpu(), want)
    assert torch.equal(ops.pack_mask(mask.t().contiguous().t()).cpu(), want)
    wide = torch.stack([mask, ~mask], -1)[..., 0]
    assert torch.equal(ops.pack_mask(wide).cpu(), want)
    assert ops.pack_mask(torch.tensor(True, device=device)).tolist() == [1]
    assert ops.pack_mask(mask[1:]).tolist() == reference.pack_mask(mask[1:].cpu()).tolist()


def test_unpack_of_a_part_and_at_an_offset(device):
    packed = reference.pack_mask(random_bits(1000)).to(device)
    for n in (0, 1, 9, 63, 970):
        part = packed[3 : 3 + -(-n // 8)]
        assert torch.equal(ops.unpack_mask(part, n).cpu(), random_bits(1000)[24 : 24 + n])


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.5, 1.0])
def test_popcount(fraction, device):
    for context in each_isa(device):
        for n in (0, 1, 7, 8, 9, 63, 64, 65, 511, 513, 4099, 1_000_003):
            mask = random_bits(n, fraction, seed=n)
            packed = reference.pack_mask(mask).to(device)
            with context:
                got = ops.mask_popcount(packed)
            assert got.dtype == torch.int64 and got.shape == () and got.device.type == device.type
            assert int(got) == int(mask.sum())
    with_offset = torch.full((100,), 255, dtype=torch.uint8, device=device)[3:90]
    assert int(ops.mask_popcount(with_offset)) == 87 * 8


@pytest.mark.parametrize("block", [32, 64, 256, 1024, 65536])
def test_prefix(block, device):
    for context in each_isa(device):
        for n in (0, 1, 8, 31, 32, 33, 255, 256, 257, 2049, 4099, 65537, 300_001):
            mask = random_bits(n, seed=n)
            packed = reference.pack_mask(mask)
            with context, poisoned_memory():
                got = ops.mask_prefix(packed.to(device), block)
            want = reference.mask_prefix(packed, block)
            assert got.dtype == torch.int32 and torch.equal(got.cpu(), want)
            assert want.numel() == -(-packed.numel() * 8 // block)
            before = torch.cat([torch.zeros(1), mask.cumsum(0)]).int()[: n + 1 : block]
            assert torch.equal(want, before[: want.numel()])
    assert torch.equal(ops.mask_prefix(packed.to(device)).cpu(), reference.mask_prefix(packed, 256))


# -- top-k and random masks --------------------------------------------------------------------------


def topk_mask(score, k):
    """By torch.topk's values; ties to the lower index by a stable sort in numpy."""
    order = np.argsort(-np.where(np.isnan(score), np.inf, score), kind="stable")
    first = np.concatenate([np.flatnonzero(np.isnan(score)), order[~np.isnan(score)[order]]])
    mask = torch.zeros(len(score), dtype=torch.bool)
    mask[torch.from_numpy(first[:k].copy())] = True
    return mask


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.29, 1.0])
def test_topk(dtype, fraction, device):
    for n in (0, 1, 2, 7, 8, 31, 33, 100, 257, 4099, 70_001):
        score = fill((n,), dtype, seed=n)
        k = math.floor(fraction * n)
        want = reference.mask_topk(score, fraction)
        for context in each_isa(device):
            with context, poisoned_memory():
                got = ops.mask_topk(score.to(device), fraction)
            assert torch.equal(got.cpu(), want)
        mask = reference.unpack_mask(want, n)
        assert int(reference.mask_popcount(want)) == k == int(mask.sum())
        assert torch.equal(score[mask].sort().values, score.topk(k).values.sort().values)
        assert torch.equal(mask, topk_mask(score.double().numpy(), k))


SPECIAL = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    float("inf"),
    float("-inf"),
    float("nan"),
    1e-45,
    -1e-45,
    3e38,
    -3e38,
]


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(values=st.lists(st.sampled_from(SPECIAL), max_size=80), fraction=st.floats(0, 1))
def test_topk_breaks_ties_to_the_lower_index(device, values, fraction):
    """-0 equals 0, and all NaN are equal, above +inf."""
    score = torch.tensor(values, dtype=torch.float32)
    if len(values) > 2:
        score[0] = torch.tensor(-1).int().view(F32)  # a negative NaN
    want = topk_mask(score.double().numpy(), math.floor(fraction * len(values)))
    assert torch.equal(reference.mask_topk(score, fraction), reference.pack_mask(want))
    assert torch.equal(ops.mask_topk(score.to(device), fraction).cpu(), reference.pack_mask(want))


def test_topk_of_equal_scores_and_other_shapes(device):
    equal = torch.full((1000,), 3.0, device=device)
    got = ops.unpack_mask(ops.mask_topk(equal, 0.3), 1000)
    assert bool(got[:300].all()) and not got[300:].any()
    score = fill((33, 57), F32)
    want = reference.mask_topk(score, 0.5)
    assert torch.equal(ops.mask_topk(score.to(device), 0.5).cpu(), want)
    turned = score.to(device).t().contiguous().t()
    assert torch.equal(ops.mask_topk(turned, 0.5).cpu(), want)
    assert ops.mask_topk(torch.tensor(2.0, device=device), 1.0).tolist() == [1]


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.5, 1.0])
def test_random_masks_have_exact_counts(fraction, device):
    for n in (0, 1, 2, 7, 31, 33, 257, 4099, 70_001):
        for seed, stream in ((0, 0), (2**63 - 1, 3), (-5, 2**31)):
            with threads(1):
                want = reference.mask_random(n, fraction, seed, stream)
            for context in each_isa(device):
                with context:
                    got = ops.mask_random(n, fraction, seed, stream, device=device)
                assert got.dtype == torch.uint8 and got.device.type == device.type
                assert torch.equal(got.cpu(), want)
            assert int(ops.mask_popcount(got)) == math.floor(fraction * n)


def test_random_masks_are_uniform_and_independent(device):
    n, draws = 64, 2000
    a, b = (torch.stack([ops.unpack_mask(ops.mask_random(n, 0.5, s, stream, device=device), n)
                         for s in range(draws)]).double().cpu() for stream in (0, 1))  # fmt: skip
    assert torch.equal(a.sum(1), torch.full((draws,), n / 2.0).double())
    error = 0.5 / math.sqrt(draws)
    assert float((a.mean(0) - 0.5).abs().max()) < 4.5 * error
    pairs = torch.corrcoef(a.t()) + torch.eye(n) * (1 / (n - 1) - 1)  # -1 / (n - 1) is expected
    assert float((pairs - torch.eye(n) / (n - 1) + 1 / (n - 1)).abs().max()) < 0.2
    assert abs(float((a == b).double().mean()) - 0.5) < 4.5 * 0.5 / math.sqrt(draws * n)
    assert float((a[1:] == a[:-1]).double().mean()) == pytest.approx(0.5, abs=0.01)


# -- grad_norm ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "scaled", [{}, {"grad_scale": 3.0}, {"grad_scale_tensor": torch.tensor(1024.0)}]
)
def test_grad_norm(dtype, kind, scaled, device):
    shapes = shapes_of(kind)
    lists = {"grads": tensors(shapes, dtype, 2), "masks": some_masks(shapes, kind)}
    want = reference.grad_norm(*lists.values(), mask_kind=kind, **scaled)
    there = copies(lists, device)
    for context in each_isa(device):
        with context:
            got = ops.grad_norm(*there.values(), mask_kind=kind, **moved(scaled, device))
        assert got.dtype == F32 and got.shape == () and got.device.type == device.type
        torch.testing.assert_close(got.cpu(), want, rtol=1e-6, atol=0)
    assert_lists(there, lists)


def test_grad_norm_equals_torchs(device):
    grads = [x.to(device) for x in tensors([(300, 700), (65537,), (3,)], F32, 1)]
    want = torch.stack([g.double().norm() for g in grads]).norm().float()
    torch.testing.assert_close(ops.grad_norm(grads, []), want, rtol=1e-6, atol=0)
    torch.testing.assert_close(ops.grad_norm(grads, [None] * 3, 2.0), want / 2, rtol=1e-6, atol=0)
    assert float(ops.grad_norm([], [])) == 0 and ops.grad_norm([], []).shape == ()
    empty = torch.zeros(0, 3, device=device)
    assert float(ops.grad_norm([empty], [])) == 0


def test_grad_norm_of_frozen_and_trained_bad_values(device):
    g, mask = torch.randn(1000), random_bits(1000)
    bad = g.clone()
    bad[~mask] = float("nan")
    packed = [reference.pack_mask(mask).to(device)]
    want = reference.grad_norm([g * mask], [])
    torch.testing.assert_close(
        ops.grad_norm([bad.to(device)], packed).cpu(), want, rtol=1e-6, atol=0
    )
    for value, test in ((float("nan"), torch.isnan), (float("-inf"), torch.isposinf)):
        bad[mask.nonzero()[7]] = value
        assert bool(test(ops.grad_norm([bad.to(device)], packed)))


def test_grad_norm_of_huge_fp16_gradients_and_mixed_dtypes(device):
    """Squares of 6e4 and their sum are far inside float32; a frozen remainder is not counted."""
    grads = [
        torch.full((5000,), 6e4, dtype=F16),
        torch.full((4, 8), 2.0, dtype=BF16),
        torch.ones(3),
    ]
    masks = [
        None,
        reference.pack_mask(torch.arange(32) < 16),
        reference.pack_mask(torch.arange(3) == 1),
    ]
    want = math.sqrt(5000 * float(grads[0][0]) ** 2 + 16 * 4 + 1)
    got = ops.grad_norm(
        [g.to(device) for g in grads], [m if m is None else m.to(device) for m in masks]
    )
    assert float(got) == pytest.approx(want, rel=1e-6)


def test_grad_norm_layouts(device):
    x = torch.randn(3, 8, 5, 7).contiguous(memory_format=torch.channels_last)
    y = torch.empty(1001)[1:].normal_()
    grads, masks = [x, y], [mask_of(x.shape, "element"), mask_of(y.shape, "element", seed=1)]
    want = reference.grad_norm(grads, masks)
    there = copies({"g": grads, "m": masks}, device)
    torch.testing.assert_close(ops.grad_norm(*there.values()).cpu(), want, rtol=1e-6, atol=0)


# -- masked_copy_ ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64, torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("kind", KINDS)
def test_masked_copy(dtype, kind, device):
    shapes = shapes_of(kind)
    lists = {"dst": tensors(shapes, dtype, 1, 10.0), "src": tensors(shapes, dtype, 2, 10.0),
             "masks": some_masks(shapes, kind)}  # fmt: skip
    if dtype.is_floating_point:
        for x in (*lists["dst"], *lists["src"]):
            storage_flat(x)[::5] = float("nan")
    want = copies(lists)
    reference.masked_copy_(*want.values(), mask_kind=kind)
    for context in each_isa(device):
        got = copies(lists, device)
        with context:
            ops.masked_copy_(*got.values(), mask_kind=kind)
        assert_lists(got, want, strict=True)


def test_masked_copy_converts_and_follows_the_order_of_dst(device):
    dst = [torch.randn(3, 8, 5, 7).to(BF16).contiguous(memory_format=torch.channels_last),
           torch.empty(1003, dtype=F16)[3:].normal_()]  # fmt: skip
    src = [torch.randn(3, 8, 5, 7).half().contiguous(memory_format=torch.channels_last),
           torch.empty(1001, dtype=BF16)[1:].normal_() * 1e5]  # fmt: skip
    dst += [torch.randn(40, 30), torch.randn(40, 30).t()]  # strides of the source do not matter
    src += [torch.randn(30, 40, dtype=F16).t(), torch.randn(30, 40)]
    lists = {"dst": dst, "src": src, "masks": [mask_of(x.shape, "element") for x in dst]}
    got, want = copies(lists, device), copies(lists)
    ops.masked_copy_(*got.values())
    reference.masked_copy_(*want.values())
    assert_lists(got, want)
    on = trained_elements(dst[0], lists["masks"][0], "element")
    assert torch.equal(storage_flat(want["dst"][0])[on], storage_flat(src[0])[on].to(BF16))


def test_half_reset_and_whole_copies(device):
    dst, src = torch.zeros(70_001, device=device), torch.ones(70_001, device=device)
    mask = ops.mask_random(70_001, 0.5, 7, device=device)
    ops.masked_copy_([dst], [src], [mask])
    assert torch.equal(dst.bool(), ops.unpack_mask(mask, 70_001)) and float(dst.sum()) == 35_000
    ops.masked_copy_([dst], [src], [])
    assert bool((dst == 1).all())
    ops.masked_copy_([], [], [])


# -- standing checks ---------------------------------------------------------------------------------


def test_standing_checks(device):
    mask = random_bits(1003).to(device)
    packed = ops.pack_mask(mask)
    score = fill((1003,), F32).to(device)
    check_op(raw.pack_mask.default, (mask,))
    check_op(raw.unpack_mask.default, (packed, 1003))
    check_op(raw.mask_popcount.default, (packed,))
    check_op(raw.mask_prefix.default, (packed, 64))
    check_op(raw.mask_topk.default, (score, 0.5))
    check_op(
        raw.grad_norm.default, ([score, score[:8]], [packed, None], 2.0), {"mask_kind": "element"}
    )
    check_op(raw.masked_copy_.default, ([score.clone()], [score + 1], [packed]), mutates=True)


def test_threads_and_runs():
    """The norm's tree does not depend on the threads: equal bits, also between mixed sizes."""
    grads = tensors([(300_001,), (7,), (513, 1000)], BF16, 1)
    masks = [mask_of(g.shape, "element", seed=i) for i, g in enumerate(grads)]
    check_deterministic(ops.grad_norm, (grads, masks))
    mask = random_bits(1_000_003)
    check_deterministic(ops.pack_mask, (mask,))
    packed = ops.pack_mask(mask)
    check_deterministic(ops.unpack_mask, (packed, 1_000_003))
    check_deterministic(ops.mask_prefix, (packed,))
    check_deterministic(ops.mask_topk, (torch.randint(9, (300_001,)).float(), 0.37))
    check_deterministic(lambda: ops.mask_random(300_001, 0.5, 1), ())


def test_compiles_with_inductor():
    def call(score, g):
        packed = ops.mask_topk(score, 0.5)
        norm = ops.grad_norm([g], [packed])
        ops.masked_copy_([g], [score], [packed])
        return g.clone(), norm, ops.mask_prefix(packed), ops.unpack_mask(packed, 300)

    check_compiles(call, (torch.randn(300), torch.randn(300)), backend="inductor", dynamic=None)


@cuda_only
def test_cuda_graph(device):
    def inputs(seed):
        return tuple(x.to(device) for x in tensors([(4099,), (4099,)], F32, seed))

    def call(score, g):
        packed = ops.mask_topk(score, 0.5)
        return ops.grad_norm([g], [packed]), ops.mask_prefix(packed), ops.mask_popcount(packed)

    check_cuda_graph(call, inputs(1), None, inputs(2))


def test_inputs_that_require_grad_are_refused_under_grad_mode_only(device):
    g = torch.randn(9, device=device, requires_grad=True)
    for call in (lambda: ops.grad_norm([g], []), lambda: ops.mask_topk(g, 0.5),
                 lambda: ops.masked_copy_([g], [g.detach()], [])):  # fmt: skip
        with pytest.raises(RuntimeError, match="inference only"):
            call()
        with torch.no_grad():
            call()


def test_norm_and_copy_need_no_memory():
    setup = """
        from tenfold import ops
        a, b = torch.ones(2**23), torch.ones(2**23)
        mask = torch.full((2**20,), 0x55, dtype=torch.uint8)
        def call():
            ops.masked_copy_([a], [b], [mask]), ops.grad_norm([a], [mask])
        call()
    """
    assert peak_growth(setup, "call()") < 2**20


# -- bad input ---------------------------------------------------------------------------------------


def test_bad_masks(device):
    def bad(name, error, *words, args, **kwargs):
        check_errors(getattr(ops, name), getattr(raw, name), args, kwargs, error, name, *words)

    packed, score = torch.zeros(3, dtype=torch.uint8, device=device), torch.zeros(9, device=device)
    bad("pack_mask", TypeError, "mask", "bool", "uint8", args=(packed,))
    bad("unpack_mask", TypeError, "packed", "uint8", "float32", args=(score, 9))
    bad("unpack_mask", ValueError, "packed", "[4]", "[3]", args=(packed, 25))
    bad("unpack_mask", ValueError, "n", "-1", args=(packed, -1))
    bad("mask_popcount", TypeError, "packed", "uint8", "float32", args=(score,))
    bad("mask_prefix", TypeError, "packed", "uint8", "float32", args=(score,))
    for block in (0, 16, 48, -32):
        bad(
            "mask_prefix",
            ValueError,
            "block",
            "power of two >= 32",
            str(block),
            args=(packed, block),
        )
    for fraction in (-0.1, 1.5, float("nan")):
        bad("mask_topk", ValueError, "fraction", "[0, 1]", args=(score, fraction))
        with pytest.raises(ValueError, match="fraction"):
            ops.mask_random(9, fraction, 0, device=device)
    with pytest.raises(ValueError, match="n"):
        ops.mask_random(-1, 0.5, 0, device=device)
    bad("mask_topk", TypeError, "score", "int64", args=(score.long(), 0.5))


def test_bad_norms_and_copies(device):
    a, b = torch.zeros(2, 9, device=device), torch.ones(2, 9, device=device)
    mask, rows = (torch.zeros(k, dtype=torch.uint8, device=device) for k in (3, 1))
    for name, first in (("grad_norm", ([a],)), ("masked_copy_", ([a], [b]))):

        def bad(error, *words, masks, first=first, name=name, **kwargs):
            args = (*first, masks)
            check_errors(getattr(ops, name), getattr(raw, name), args, kwargs, error, name, *words)

        bad(ValueError, "masks", "2", masks=[mask, mask])
        bad(ValueError, "masks[0]", "[3]", "[2, 9]", "[1]", masks=[rows])
        bad(TypeError, "masks[0]", "uint8", "bool", masks=[mask.bool()])
        bad(ValueError, "mask_kind", "'diag'", masks=[mask], mask_kind="diag")
        bad(ValueError, "masks[0]", "'none'", masks=[mask], mask_kind="none")
        bad(ValueError, "block_size", "48", masks=[rows], mask_kind="block", block_size=48)
        flat = [[x[0][0]] for x in first]
        bad(ValueError, "'row'", "2 or more", "[9]", masks=[rows], first=flat, mask_kind="row")
        sparse = [[x[0][:, ::2]] for x in first]  # a mask has no order there
        bad(ValueError, "[0]", "dense", masks=[mask[:2]], first=sparse)
        if device.type == "cuda":
            bad(ValueError, "masks[0]", "cuda", "cpu", masks=[mask.cpu()])
    copy = ops.masked_copy_, raw.masked_copy_
    check_errors(*copy, ([a], [b, b], []), {}, ValueError, "src", "2")
    check_errors(*copy, ([a], [b[:1]], []), {}, ValueError, "src[0]", "[2, 9]", "[1, 9]")
    check_errors(*copy, ([a], [b.long()], []), {}, TypeError, "src[0]", "int64", "float32")
    wide = torch.zeros(9, device=device).expand(2, 9)
    check_errors(*copy, ([wide], [b], []), {}, ValueError, "dst[0]")
    norm = ops.grad_norm, raw.grad_norm
    check_errors(*norm, ([a.double()], []), {}, TypeError, "grads[0]", "float64")
    for scale in (0.0, float("nan")):
        check_errors(*norm, ([a], [], scale), {}, ValueError, "grad_scale")
    both = {"grad_scale_tensor": torch.ones((), device=device)}
    check_errors(*norm, ([a], [], 2.0), both, ValueError, "grad_scale")
