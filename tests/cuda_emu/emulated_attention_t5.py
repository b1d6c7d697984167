# SPDX-License-Identifier: Apache-2.0
"""Runs t5_attention's emulated CUDA kernels against the CPU's and the reference: ``emulated_attention_t5.py CHECK``.

Started by test_emulated.py with ASan preloaded. Calls run under two thread schedules,
whose results must be the same bits.
"""

from __future__ import annotations

import ctypes
import math
import sys

import torch

from build import build
from emu_calls import CODES, scheduled, shifted
from tenfold import reference
from tenfold.testing.tolerance import PlainSums, assert_close_to_ref

LIB = ctypes.CDLL(str(build("kernels_attention_t5", "-shared", "-fPIC")))
_Three = ctypes.c_int64 * 3


class _Problem(ctypes.Structure):
    _fields_ = [
        *((n, ctypes.c_int64) for n in (
            "dtype", "batch", "heads", "head_dim", "value_dim", "queries", "keys", "bidirectional",
            "causal", "max_distance", "q_offset", "table_dtype", "buckets", "lens_wide", "below",
            "seed", "offset")),
        *((f"{n}_at", _Three) for n in ("q", "k", "v", "out", "dout", "dq", "dk", "dv")),
        *((n, ctypes.c_void_p) for n in (
            "q", "k", "v", "table", "kv_len", "head_map", "out", "lse", "dout", "dlse", "dq", "dk",
            "dv", "delta", "dtable")),
        ("scale", ctypes.c_double), ("keep_scale", ctypes.c_double),
    ]  # fmt: skip


def problem(q, k, v, table, kv_len, *, bidirectional=True, causal=False, max_distance=128,
            q_offset=0, dropout_p=0.0, seed=0, offset=0, scale=1.0, **tensors):  # fmt: skip
    n = _Problem()
    n.dtype, n.batch, n.heads, n.queries, n.head_dim = CODES[q.dtype], *q.shape
    n.keys, n.value_dim = v.shape[2:]
    n.bidirectional, n.causal, n.max_distance, n.q_offset = (
        bidirectional, causal, max_distance, q_offset)  # fmt: skip
    if table is not None:
        n.table_dtype, n.buckets = CODES[table.dtype], table.shape[0]
    n.lens_wide = kv_len is not None and kv_len.dtype == torch.int64
    n.below, n.seed, n.offset = round(dropout_p * 2**32), seed, offset
    n.scale, n.keep_scale = scale, 1 / (1 - dropout_p)
    heads = torch.arange(n.heads, dtype=torch.int32)
    named = {"q": q, "k": k, "v": v, "table": table, "kv_len": kv_len, "head_map": heads, **tensors}
    for name, x in named.items():
        setattr(n, name, None if x is None else x.data_ptr())
        if hasattr(n, f"{name}_at") and x is not None:
            setattr(n, f"{name}_at", _Three(*x.stride()[:3]))
    return n, named


def like_rows(x, dim):
    """Memory order of ``x``, filled with a number that must not stay."""
    if x.stride(2) > x.stride(1):
        return x.new_full((x.shape[0], x.shape[2], x.shape[1], dim), 9).transpose(1, 2)
    return x.new_full((*x.shape[:-1], dim), 9)


def attention(q, k, v, table=None, kv_len=None, **options):
    def run():
        out, lse = like_rows(q, v.shape[-1]), torch.full(q.shape[:3], 9.0)
        n, _held = problem(q, k, v, table, kv_len, out=out, lse=lse, **options)
        LIB.emu_t5_attention(ctypes.byref(n))
        return out, lse

    return scheduled(LIB, run)


def backward(dout, q, k, v, table, kv_len, out, lse, dlse=None, **options):
    def run():
        grads = [like_rows(x, x.shape[-1]) for x in (q, k, v)]
        dtable = torch.full((0, q.shape[1]) if table is None else table.shape, 9.0)
        named = dict(zip(("dq", "dk", "dv"), grads), dout=dout, out=out, lse=lse, dlse=dlse,
                     delta=torch.full_like(lse, 9.0), dtable=dtable)  # fmt: skip
        n, _held = problem(q, k, v, table, kv_len, **named, **options)
        LIB.emu_t5_attention_backward(ctypes.byref(n))
        return [*grads, dtable]

    return scheduled(LIB, run)


def inputs(b, h, lq, lk, d, dv, dtype, buckets=32):
    q, k, v = ((torch.randn(s) * scale).to(dtype) for s, scale in (
        ((b, h, lq, d), d**-0.5), ((b, h, lk, d), 1), ((b, h, lk, dv), 1)))  # fmt: skip
    return q, k, v, torch.randn(buckets, h)


# b h lq lk d dv, options
CASES = [
    ((1, 2, 1, 37, 64, 64), {}),
    ((2, 2, 70, 70, 40, 24), {"bidirectional": False, "causal": True}),
    ((1, 2, 140, 200, 33, 7), {"max_distance": 40, "scale": 0.5}),
    ((2, 1, 37, 150, 96, 64), {"bidirectional": False, "causal": True, "q_offset": 113}),
    ((1, 1, 53, 300, 64, 64), {"bidirectional": False, "q_offset": -7}),
    ((1, 2, 20, 33, 200, 256), {"dropout_p": 0.3, "seed": -7, "offset": 3}),
    ((2, 1, 140, 70, 64, 64), {"dropout_p": 0.1, "seed": 2**40 + 1}),
]


def wide(x):
    return None if x is None else x.double()


def check(args, table, kv_len, options):
    what = f"{tuple(args[0].shape)} {args[0].dtype} {options}"
    got, lse = attention(*args, table, kv_len, **options)
    exact = [*map(wide, args), wide(table), kv_len]
    ref, ref_lse = reference.t5_attention(*exact, **options)
    with PlainSums():
        low, _ = reference.t5_attention(*args, table, kv_len, **options)
    assert_close_to_ref(got, ref, low, what=what)
    torch.testing.assert_close(lse.double(), ref_lse, atol=2e-5, rtol=2e-5)
    dout, dlse = torch.randn_like(got), torch.randn_like(lse)
    dlse[lse.isneginf()] = 0
    grads = backward(dout, *args, table, kv_len, got, lse, dlse, **options)
    want = reference.t5_attention_backward(
        wide(dout), *exact, wide(got), wide(lse), dlse=wide(dlse), **options
    )
    eps = torch.finfo(args[0].dtype).eps
    for name, x, y in zip(("dq", "dk", "dv", "dtable"), grads, want):
        # Judged in full by the tests of the op; here the kernel's index logic.
        assert float((x.double() - y).abs().max() if y.numel() else 0) <= 16 * eps * (
            1 + float(y.abs().max() if y.numel() else 0)
        ), f"{name} {what} {float((x.double() - y).abs().max())}"


def run_dtype(dtype, odd):
    for turn, (shape, options) in enumerate(CASES):
        *args, table = inputs(*shape, dtype, buckets=(32, 6)[turn == 2])
        if turn == 3:
            table = table.to(dtype)
        if turn == 4 and odd:
            table = None
        kv_len = None
        if (turn + odd) % 2:
            kv_len = torch.randint(
                0, shape[3] + 1, (shape[0],), dtype=(torch.int32, torch.int64)[odd]
            )
        check(args, table, kv_len, options)


def check_float32():
    run_dtype(torch.float32, 0)


def check_bfloat16():
    run_dtype(torch.bfloat16, 1)


def check_float16():
    run_dtype(torch.float16, 0)


def check_edges():
    """Draws and buckets equal the CPU's; layouts; hidden keys may be anything; wild kv_len are cut."""
    q, k = torch.zeros(2, 2, 37, 8), torch.zeros(2, 2, 53, 8)
    v = torch.eye(53).expand(2, 2, 53, 53)
    out, _ = attention(q, k, v.contiguous(), dropout_p=0.5, seed=11, offset=5)
    drawn = reference.t5_dropout(torch.Size((2, 2, 37, 53)), 0.5, 11, 5)
    torch.testing.assert_close(out, drawn.float() / 53)
    table = torch.arange(32.0)[:, None]
    for bidirectional in (True, False):
        _, lse = attention(torch.zeros(1, 1, 600, 8), torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 1, 8),
                           table, q_offset=-300, bidirectional=bidirectional)  # fmt: skip
        want = reference.t5_buckets(torch.arange(300, -300, -1), bidirectional=bidirectional)
        assert torch.equal(lse[0, 0], want.float())
    for dtype in CODES:
        q, k, v, table = inputs(2, 2, 37, 70, 32, 32, dtype)
        want = attention(q, k, v, table)
        for form in ((shifted(q), k, v), (q, shifted(k), v), (q, k, shifted(v))):
            assert all(map(torch.equal, attention(*form, table), want))
        turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
        again = attention(*turned, table)
        assert all(map(torch.equal, again, want)) and again[0].stride(1) < again[0].stride(2)
        bad_k, bad_v = k.clone(), v.clone()
        bad_k[:, :, 40:], bad_v[:, :, 40:] = math.nan, math.inf
        kv_len = torch.tensor([40, 0])
        good, out = (attention(q, x, y, table, kv_len) for x, y in ((k, v), (bad_k, bad_v)))
        assert all(map(torch.equal, good, out)) and not out[0][1].any()
        grads = backward(torch.ones_like(q), q, bad_k, bad_v, table, kv_len, *out)
        assert all(bool(x.isfinite().all()) for x in grads)
        assert not grads[1][:, :, 40:].any() and not grads[2][1].any()
        attention(q, k, v, table, torch.tensor([-5, 2**40]))


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for name in sys.argv[1:]:
        torch.manual_seed(0)
        globals()[f"check_{name}"]()
    print("ok")
