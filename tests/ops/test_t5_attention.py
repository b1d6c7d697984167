# SPDX-License-Identifier: Apache-2.0
"""t5_attention and its backward: the definition, transformers, both kernels, draws, memory, bad input."""

from __future__ import annotations

import math
import random

import pytest
import torch
from t5_cases import (
    DECODER,
    DTYPES,
    ENCODER,
    check_backward,
    check_forward,
    make,
)

import tenfold
from tenfold import ops, reference
from tenfold.testing import (
    check_compiles,
    check_errors,
    check_op,
    peak_growth,
)


class TestDefinition:
    """Checks 6 and 7 of the method."""

    def test_thresholds_are_the_published_ones(self):
        n = torch.arange(2001)
        both = reference.t5_buckets(-n, bidirectional=True)
        assert [int((both >= b).nonzero()[0]) for b in range(8, 16)] == [
            8, 12, 16, 23, 32, 46, 64, 91,
        ]  # fmt: skip
        assert torch.equal(reference.t5_buckets(n[1:], bidirectional=True), both[1:] + 16)
        one = reference.t5_buckets(-n, bidirectional=False)
        assert [int((one >= b).nonzero()[0]) for b in range(16, 32)] == [
            16, 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113,
        ]  # fmt: skip
        assert not reference.t5_buckets(n, bidirectional=False).any()

    @pytest.mark.parametrize("bidirectional", [True, False])
    def test_buckets_of_kernel_definition_and_transformers(self, bidirectional, device):
        """One key and a query at every distance: lse is the row of the table."""
        t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
        distance = torch.arange(2000, -2001, -1)
        for buckets, most in (
            (32, 128),
            (4, 20),
            (6, 100),
            (64, 256),
            (100, 1000),
            (256, 2000),
            (32, 300),
        ):
            q = torch.zeros(1, 1, 4001, 8, device=device)
            k = torch.zeros(1, 1, 1, 8, device=device)
            table = torch.arange(float(buckets), device=device)[:, None]
            options = {"bidirectional": bidirectional, "max_distance": most}
            _, lse = ops.t5_attention(q, k, k, table, q_offset=-2000, **options)
            want = t5.T5Attention._relative_position_bucket(distance, bidirectional, buckets, most)
            assert torch.equal(lse[0, 0].cpu(), want.float())
            mine = reference.t5_buckets(distance, num_buckets=buckets, **options)
            assert torch.equal(mine, want)
        clamped = reference.t5_buckets(distance.clamp(-128, 128), bidirectional=bidirectional)
        assert torch.equal(clamped, reference.t5_buckets(distance, bidirectional=bidirectional))

    def test_definition_is_the_explicit_softmax(self):
        worst = 0.0
        for lq in (1, 7, 37, 53, 130):
            for lk in (1, 7, 37, 53, 130):
                (q, k, v), table = make(2, 3, lq, lk, 8, torch.float64, seed=lq * lk)
                table = table.double()
                bias = table[
                    reference.t5_buckets(
                        torch.arange(lk) - torch.arange(lq)[:, None], bidirectional=True
                    )
                ]
                want = torch.softmax(q @ k.mT + bias.permute(2, 0, 1), -1) @ v
                got, _ = reference.t5_attention(q, k, v, table)
                worst = max(worst, float((got - want).abs().max()))
        assert worst < 1e-12

    def test_gradcheck(self):
        (q, k, v), table = make(2, 2, 5, 7, 3, torch.float64, table=8)
        leaves = [x.double().requires_grad_() for x in (q, k, v, table)]
        for options in (
            {**ENCODER, "max_distance": 6},
            {**DECODER, "max_distance": 9, "q_offset": 2, "scale": 0.5},
            {**ENCODER, "dropout_p": 0.3, "seed": 5, "max_distance": 6},
        ):
            kv_len = torch.tensor([7, 3])
            assert torch.autograd.gradcheck(
                lambda *x, o=options, n=kv_len: reference.t5_attention(*x, n, **o), leaves
            )


SHAPES = [  # b h lq lk d dv
    (2, 2, 1, 7, 8, 8),
    (1, 3, 7, 37, 64, 64),
    (2, 1, 37, 53, 64, 64),
    (1, 2, 53, 1, 33, 7),
    (1, 1, 130, 130, 64, 64),
    (1, 2, 53, 130, 80, 24),
    (1, 1, 300, 261, 64, 64),
    (2, 2, 1, 130, 64, 64),
]


def options_of(turn, shape):
    b, _, lq, lk = shape[:4]
    made = random.Random(turn)
    options = [
        dict(ENCODER),
        {**DECODER, "q_offset": max(lk - lq, 0)},
        {**ENCODER, "scale": 0.5, "q_offset": 3},
        {**DECODER, "q_offset": -2},
        {**ENCODER, "max_distance": 40},
        {"bidirectional": False},
    ][turn % 6]
    kv_len = None
    if turn % 2:
        kv_len = torch.tensor([made.randint(0, lk) for _ in range(b)])
        kv_len = kv_len.to((torch.int32, torch.int64)[turn // 2 % 2])
    return options, kv_len


@pytest.mark.parametrize("dtype", DTYPES)
class TestKernel:
    def test_forward_and_backward(self, dtype, device):
        for turn, shape in enumerate(SHAPES):
            options, kv_len = options_of(turn + DTYPES.index(dtype), shape)
            kv_len = None if kv_len is None else kv_len.to(device)
            args, table = make(*shape[:5], dtype, device, dv=shape[5], table=(32, 6)[turn % 2])
            table = table.to(dtype) if turn % 3 == 2 else table
            table = None if turn == 3 else table
            what = f"{shape} {options}"
            check_forward(args, table, kv_len, options, what)
            check_backward(args, table, kv_len, options, what)

    def test_every_isa(self, dtype):
        isas = tenfold.cpu_capabilities()
        for turn, shape in enumerate(
            ((1, 2, 53, 130, 64, 64), (2, 1, 37, 53, 40, 24), (1, 1, 1, 70, 64, 64))
        ):
            options = [
                dict(ENCODER),
                {**DECODER, "q_offset": 9, "dropout_p": 0.2, "seed": 3},
                dict(ENCODER),
            ][turn]
            kv_len = torch.tensor([shape[3] - 5] * shape[0])
            args, table = make(*shape[:5], dtype, dv=shape[5])
            check_forward(args, table, kv_len, options, isas=isas)
            check_backward(args, table, kv_len, options, isas=isas)

    def test_dropout(self, dtype, device):
        args, table = make(2, 3, 70, 140, 16, dtype, device)
        for options in (
            {**ENCODER, "dropout_p": 0.1},
            {**DECODER, "dropout_p": 0.6, "q_offset": 70},
        ):
            options = {**options, "seed": -(2**40) + 1, "offset": 77}
            kv_len = torch.tensor([140, 90], device=device)
            check_forward(args, table, kv_len, options)
            check_backward(args, table, kv_len, options)


def test_dropout_is_a_coin_per_probability(device):
    """v = 1: the output is the share that was kept; its mean, spread and draws are those of a coin."""
    p, n = 0.3, 1000
    q, k = torch.zeros(1, 2, 400, 8, device=device), torch.zeros(1, 2, n, 8, device=device)
    v = torch.ones(1, 2, n, 1, device=device)
    out, lse = ops.t5_attention(q, k, v, dropout_p=p, seed=1)
    kept = out.flatten() * (1 - p)
    assert abs(float(kept.mean()) - (1 - p)) < 5 * math.sqrt(p * (1 - p) / (n * kept.numel()))
    assert 0.9 < float(kept.std()) / math.sqrt(p * (1 - p) / n) < 1.1
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(n)))
    for other in ({"seed": 2}, {"seed": 1, "offset": 1}):
        assert not torch.equal(ops.t5_attention(q, k, v, dropout_p=p, **other)[0], out)
    # The same draws whatever is computed beside them.
    few, _ = ops.t5_attention(q[:, :, :7], k, v, dropout_p=p, seed=1)
    torch.testing.assert_close(few, out[:, :, :7], rtol=1e-5, atol=1e-6)


def test_lse_has_a_gradient(device):
    args, table = make(1, 2, 37, 53, 16, device=device)
    dlse = torch.randn(1, 2, 37, device=device)
    check_backward(args, table, None, dict(ENCODER), "dlse", dlse=dlse)


def test_autograd_is_the_definition_s(device):
    args, table = make(2, 2, 37, 53, 16, device=device)
    options = {**ENCODER, "dropout_p": 0.2, "seed": 3}
    grads = []
    for f in (ops.t5_attention, reference.t5_attention):
        leaves = [x.clone().requires_grad_() for x in (*args, table)]
        out, lse = f(*leaves, **options)
        grads.append(torch.autograd.grad(out.square().sum() + lse.sum(), leaves))
    for x, y in zip(*grads):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
    leaves[0].grad = None
    out, _ = ops.t5_attention(*leaves, **options)
    with pytest.raises(RuntimeError, match="inference only"):
        torch.autograd.grad(out.sum(), leaves, create_graph=True)


def test_layouts(device):
    """[B, L, H, D] memory is read and written in place; rows that are not contiguous are copied."""
    (q, k, v), table = make(2, 3, 37, 53, 16, device=device)
    want, _ = ops.t5_attention(q, k, v, table)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    out, lse = ops.t5_attention(*turned, table.T.contiguous().T)
    assert torch.equal(out, want) and out.stride() == turned[0].stride()
    grads = ops.t5_attention_backward(out, *turned, table, None, out, lse)
    for x, y in zip(grads, turned):
        assert x.stride() == y.stride()
    for x, y in zip(grads, ops.t5_attention_backward(out, q, k, v, table, None, out, lse)):
        assert torch.equal(x, y)
    columns = [x.mT.contiguous().mT for x in (q, k, v)]
    assert torch.equal(ops.t5_attention(*columns, table)[0], want)


def test_rows_that_see_nothing(device):
    for lq, lk in ((1, 9), (20, 9)):
        (q, k, v), table = make(2, 2, lq, lk, 8, device=device)
        k[:, :, 4:], v[:, :, 4:] = math.nan, math.inf  # what is hidden may be anything
        kv_len = torch.tensor([4, 0], device=device)
        out, lse = ops.t5_attention(q, k, v, table, kv_len)
        assert bool((out[1] == 0).all()) and bool(lse[1].isneginf().all())
        assert bool(out.isfinite().all()) and bool(lse[0].isfinite().all())
        grads = ops.t5_attention_backward(torch.ones_like(out), q, k, v, table, kv_len, out, lse)
        assert all(bool(x.isfinite().all()) for x in grads)
        assert not any(bool(x[1].any()) for x in grads[:3])
        assert not grads[1][:, :, 4:].any() and not grads[2][:, :, 4:].any()
    for shape in ((0, 2, 3, 4, 8), (2, 2, 0, 4, 8), (2, 2, 3, 0, 8)):
        (q, k, v), table = make(*shape, device=device)
        for options in ({}, {"dropout_p": 0.5, "seed": 1}):
            out, lse = ops.t5_attention(q, k, v, table, **options)
            grads = ops.t5_attention_backward(out, q, k, v, table, None, out, lse, **options)
            assert not any(bool(x.any()) for x in (out, *grads)) and bool(lse.isneginf().all())
            assert reference.t5_attention(q, k, v, table, **options)[0].shape == out.shape


def test_one_program_for_all_steps(device):
    """What changes from step to step of a training, or of decoding, compiles once."""
    torch.compiler.reset()
    (q, k, v), table = make(1, 2, 5, 9, 8, device=device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def call(seed, offset, q_offset):
        return ops.t5_attention(
            q, k, v, table, dropout_p=0.3, seed=seed, offset=offset, q_offset=q_offset, **DECODER
        )[0]

    for i in range(2, 14):
        want, _ = ops.t5_attention(
            q, k, v, table, dropout_p=0.3, seed=5 * i, offset=i, q_offset=i, **DECODER
        )
        assert torch.equal(call(5 * i, i, i), want)


def test_decoding_equals_the_whole(device):
    """Step by step against a cache with spare room behind kv_len."""
    (q, k, v), table = make(2, 2, 20, 24, 16, device=device)
    k[:, :, 20:] = math.nan
    whole, _ = ops.t5_attention(q, k, v, table, torch.tensor([20, 20], device=device), **DECODER)
    for i in (0, 1, 13, 19):
        one, _ = ops.t5_attention(
            q[:, :, i : i + 1], k, v, table, torch.full((2,), i + 1, device=device), **DECODER,
            q_offset=i,
        )  # fmt: skip
        torch.testing.assert_close(one, whole[:, :, i : i + 1], rtol=1e-5, atol=1e-5)


def test_standing_checks(device):
    (q, k, v), table = make(2, 2, 37, 53, 16, device=device)
    kv_len = torch.tensor([53, 20], device=device)
    op, back = torch.ops.tenfold.t5_attention, torch.ops.tenfold.t5_attention_backward
    check_op(op, (q, k, v, table, kv_len), {"dropout_p": 0.1, "seed": 3})
    out, lse = op(q, k, v, table, kv_len)
    check_op(back, (out, q, k, v, table, kv_len, out, lse), {}, rtol=1e-4, atol=1e-4)
    check_op(op, (q[:, :, :1], k, v, table, kv_len), {"q_offset": 20})
    check_op(back, (out, q, k, v, None, None, out, lse), {}, rtol=1e-4, atol=1e-4)

    def trained(*leaves):
        out, _ = ops.t5_attention(*leaves, kv_len)
        return torch.autograd.grad(out.square().sum(), leaves)

    leaves = [x.clone().requires_grad_() for x in (q, k, v, table)]
    check_compiles(lambda *x: ops.t5_attention(*x)[0], leaves)
    assert all(bool(x.isfinite().all()) for x in trained(*leaves))


def test_autocast_leaves_the_table(device):
    args, table = make(1, 2, 37, 53, 16, device=device)
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        got, _ = ops.t5_attention(*args, table)
    assert got.dtype == torch.bfloat16
    want, _ = ops.t5_attention(*(x.bfloat16() for x in args), table)
    assert torch.equal(got, want)


def test_memory_is_linear():
    """Scores of 12 heads would take 50 MB at 1024 and four times as much at 2048."""
    setup = """
    from tenfold import ops
    q, k, v = (torch.randn(1, 12, {n}, 64) for _ in range(3))
    table = torch.randn(32, 12)
    small = [x[:, :, :64].contiguous() for x in (q, k, v)]
    out, lse = ops.t5_attention(*small, table)
    ops.t5_attention_backward(out, *small, table, None, out, lse)
    """
    call = """
    out, lse = ops.t5_attention(q, k, v, table)
    ops.t5_attention_backward(out, q, k, v, table, None, out, lse)
    """
    one, two = (peak_growth(setup.format(n=n), call) for n in (1024, 2048))
    assert one < 45e6 and two < 2.4 * one, (one, two)


def test_bad_input(device):
    (q, k, v), table = make(2, 3, 5, 7, 8, device=device)
    face, op = ops.t5_attention, torch.ops.tenfold.t5_attention

    def bad(error, *words, args=(q, k, v, table), **options):
        check_errors(face, op, args, options, error, "t5_attention", *words)

    bad(ValueError, "bidirectional", "causal", causal=True)
    bad(ValueError, "bias_table", "[num_buckets, H = 3]", "[32, 2]", args=(q, k, v, table[:, :2]))
    bad(ValueError, "even number", "31", args=(q, k, v, table[:31]))
    bad(ValueError, "2 to 256", "got 1", args=(q, k, v, table[:1]), bidirectional=False)
    bad(TypeError, "bias_table", "float64", args=(q, k, v, table.double()))
    bad(ValueError, "max_distance", "(8,", "got 8", max_distance=8)
    bad(ValueError, "kv_len", "[B]", args=(q, k, v, table, torch.tensor([7], device=device)))
    bad(TypeError, "kv_len", args=(q, k, v, table, torch.tensor([7.0, 1.0], device=device)))
    if torch.device(device).type == "cpu":
        for wrong in ([7, 8], [-1, 7]):
            bad(ValueError, "kv_len", "[0, Lk = 7]", args=(q, k, v, table, torch.tensor(wrong)))
    bad(ValueError, "k [B, H, Lk, D]", args=(q, k[:, :2], v, table))
    bad(ValueError, "dtype", args=(q, k.half(), v, table))
    bad(TypeError, "float64", args=(q.double(), k.double(), v.double(), table))
    for p in (-0.1, 1.0, math.nan):
        bad(ValueError, "dropout_p", "[0, 1)", dropout_p=p)
    bad(ValueError, "offset", "2^32", offset=2**32)
    bad(ValueError, "q_offset", q_offset=2**31)
    bad(ValueError, "scale", scale=math.inf)
    out, lse = face(q, k, v, table)
    check_errors(
        ops.t5_attention_backward, torch.ops.tenfold.t5_attention_backward,
        (out[:, :, :4], q, k, v, table, None, out, lse), {}, ValueError,
        "t5_attention_backward", "dout",
    )  # fmt: skip
