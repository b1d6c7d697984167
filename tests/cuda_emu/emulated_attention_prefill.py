# SPDX-License-Identifier: Apache-2.0
"""Runs dha_attention's emulated CUDA kernels against the reference: ``emulated_attention_prefill.py CHECK``.

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
from tenfold.testing.tolerance import assert_close_to_ref

LIB = ctypes.CDLL(str(build("kernels_attention_prefill", "-shared", "-fPIC")))
BIAS = {torch.bool: 1, torch.float32: 2, torch.bfloat16: 3, torch.float16: 4}
_Three = ctypes.c_int64 * 3


class _Problem(ctypes.Structure):
    _fields_ = [
        *((n, ctypes.c_int64) for n in ("dtype", "batch", "q_heads", "k_heads", "v_heads", "head_dim",
                                        "value_dim", "queries", "keys", "packed", "maps_wide", "left",
                                        "right", "bias_kind")),
        ("bias_stride", ctypes.c_int64 * 4),
        *((f"{n}_at", _Three) for n in ("q", "k", "v", "out", "dout", "dq", "dk", "dv")),
        *((n, ctypes.c_void_p) for n in ("kmap", "vmap", "cu_q", "cu_k", "bias", "q", "k", "v", "out",
                                         "dout", "lse", "dlse", "dq", "dk", "dv", "delta")),
        ("scale", ctypes.c_double), ("softcap", ctypes.c_double),
    ]  # fmt: skip


def ptr(t):
    return None if t is None else t.data_ptr()


def row_strides(t):
    s = t.stride()
    return _Three(*(s[:3] if t.dim() == 4 else (0, s[1], s[0])))


def problem(q, k, v, kmap, vmap, *, scale=None, causal=True, window_left=-1, cu_seqlens_q=None,
            cu_seqlens_k=None, attn_bias=None, softcap=0.0, window_right=-1, **tensors):  # fmt: skip
    packed = cu_seqlens_q is not None
    n = _Problem()
    n.dtype, n.packed = CODES[q.dtype], packed
    n.batch = cu_seqlens_q.numel() - 1 if packed else q.shape[0]
    n.q_heads, n.k_heads, n.v_heads = (x.shape[1] for x in (q, k, v))
    n.head_dim, n.value_dim = q.shape[-1], v.shape[-1]
    n.queries, n.keys = (x.shape[0 if packed else 2] for x in (q, k))
    n.maps_wide = kmap.dtype == torch.int64
    n.left, n.right = window_left, 0 if causal else window_right
    n.kmap, n.vmap, n.cu_q, n.cu_k = (ptr(x) for x in (kmap, vmap, cu_seqlens_q, cu_seqlens_k))
    if attn_bias is not None:
        shape = (1,) * (4 - attn_bias.dim()) + attn_bias.shape
        strides = (0,) * (4 - attn_bias.dim()) + attn_bias.stride()
        n.bias, n.bias_kind = attn_bias.data_ptr(), BIAS[attn_bias.dtype]
        n.bias_stride = (ctypes.c_int64 * 4)(*(0 if d == 1 else s for d, s in zip(shape, strides)))
    for name, x in {"q": q, "k": k, "v": v, **tensors}.items():
        setattr(n, name, ptr(x))
        if x is not None and name not in ("lse", "dlse", "delta"):
            setattr(n, f"{name}_at", row_strides(x))
    n.scale = q.shape[-1] ** -0.5 if scale is None else scale
    n.softcap = softcap
    return n


def like_rows(x, dim):
    """Memory order of ``x``, filled with a number that must not stay."""
    if x.dim() == 4 and x.stride(2) > x.stride(1):
        return x.new_full((x.shape[0], x.shape[2], x.shape[1], dim), 9).transpose(1, 2)
    return x.new_full((*x.shape[:-1], dim), 9)


def attention(q, k, v, kmap, vmap, **options):
    rows = q.shape[:3] if q.dim() == 4 else (q.shape[1], q.shape[0])

    def run():
        out, lse = like_rows(q, v.shape[-1]), torch.full(rows, 9.0)
        n = problem(q, k, v, kmap, vmap, out=out, **options)
        LIB.emu_dha_attention(ctypes.byref(n), ctypes.c_void_p(out.data_ptr()),
                              ctypes.c_void_p(lse.data_ptr()))  # fmt: skip
        return out, lse

    return scheduled(LIB, run)


def inputs(b, h, hk, hv, sq, sk, d, dv, dtype, spread=1.0):
    q, k, v = ((torch.randn(s) * spread).to(dtype)
               for s in ((b, h, sq, d), (b, hk, sk, d), (b, hv, sk, dv)))  # fmt: skip
    return q, k, v, torch.randint(0, hk, (h,)), torch.randint(0, hv, (h,), dtype=torch.int64)


def check_forward(args, options):
    got = attention(*args, **options)
    exact = [x.double() for x in args[:3]]
    ref = reference.dha_attention(*exact, *args[3:], **options)
    low = reference.dha_attention(*args, **options)
    what = f"{tuple(args[0].shape)} {args[0].dtype} {options}"
    assert_close_to_ref(got[0], ref[0], low[0], what=what)
    torch.testing.assert_close(
        got[1].double(), ref[1], atol=2e-5, rtol=2e-5, msg=lambda m: what + m
    )
    return got


# b h hk hv sq sk d dv
SHAPES = [
    (1, 3, 2, 1, 1, 37, 64, 64),
    (2, 2, 1, 2, 70, 70, 40, 24),
    (1, 2, 2, 2, 5, 130, 33, 7),
    (1, 1, 1, 1, 140, 20, 96, 128),
    (1, 2, 2, 1, 33, 70, 80, 72),
    (1, 1, 1, 1, 66, 66, 200, 256),
    (1, 1, 1, 1, 3, 65, 130, 16),
]


def bias_of(kind, b, h, sq, sk):
    if kind == "bool":
        return torch.rand(b, 1, sq, sk) < 0.6
    if kind == "padding":
        return (torch.arange(sk) >= sk // 3).expand(b, 1, 1, sk)
    x = torch.randn(h, 1, sk)
    x[0, 0, 0] = -math.inf
    return x


OPTIONS = [
    {"causal": True},
    {"causal": False, "bias": "float"},
    {"causal": True, "window_left": 9, "softcap": 3.0},
    {"causal": False, "window_left": 5, "window_right": 20, "scale": -0.3},
    {"causal": True, "bias": "bool"},
    {"causal": False, "scale": 0.0},
]


def options_of(turn, shape):
    options = dict(OPTIONS[turn % len(OPTIONS)])
    kind = options.pop("bias", None)
    if kind:
        options["attn_bias"] = bias_of(kind, shape[0], shape[1], shape[4], shape[5])
    return options


def run_forward_dtype(dtype, offset):
    for turn, shape in enumerate(SHAPES):
        args = inputs(*shape, dtype)
        for step in (0, 3) if max(shape[6:]) <= 96 else (0,):
            check_forward(args, options_of(turn + step + offset, shape))


def check_forward_float32():
    run_forward_dtype(torch.float32, 0)


def check_forward_bfloat16():
    run_forward_dtype(torch.bfloat16, 1)


def check_forward_float16():
    run_forward_dtype(torch.float16, 2)


def backward(dout, q, k, v, out, lse, kmap, vmap, dlse=None, **options):
    def run():
        grads = [like_rows(x, x.shape[-1]) for x in (q, k, v)]
        delta = torch.full_like(lse, 9.0)
        named = dict(
            zip(("dq", "dk", "dv"), grads), dout=dout, out=out, lse=lse, dlse=dlse, delta=delta
        )
        n = problem(q, k, v, kmap, vmap, **named, **options)
        LIB.emu_dha_attention_backward(ctypes.byref(n))
        return grads

    return scheduled(LIB, run)


def check_gradients(args, options, use_dlse):
    out, lse = attention(*args, **options)  # its rounding is the kernel's own
    dout, dlse = torch.randn_like(out), torch.randn_like(lse) if use_dlse else None
    got = backward(dout, *args[:3], out, lse, *args[3:], dlse=dlse, **options)
    exact = [x.double() for x in (dout, *args[:3], out, lse)]
    ref = reference.dha_attention_backward(
        *exact, *args[3:], dlse=None if dlse is None else dlse.double(), **options
    )
    low = reference.dha_attention_backward(
        dout, *args[:3], out, lse, *args[3:], dlse=dlse, **options
    )
    for name, x, y, z in zip(("dq", "dk", "dv"), got, ref, low):
        assert_close_to_ref(x, y, z, what=f"{name} {tuple(args[0].shape)} {x.dtype} {options}")


def run_backward_dtype(dtype, offset):
    for turn, shape in enumerate(SHAPES):
        options = options_of(turn + offset, shape)
        check_gradients(inputs(*shape, dtype), options, turn % 2 == 1)


def check_backward_float32():
    run_backward_dtype(torch.float32, 0)


def check_backward_bfloat16():
    run_backward_dtype(torch.bfloat16, 1)


def check_backward_float16():
    run_backward_dtype(torch.float16, 2)


def packed_inputs(dtype, lens_q, lens_k, spare=0):
    cu_q, cu_k = (torch.tensor([0, *x], dtype=torch.int32).cumsum(0, dtype=torch.int32)
                  for x in (lens_q, lens_k))  # fmt: skip
    h, hk, hv, d, dv = 3, 2, 3, 64, 24
    q, k, v = (torch.randn(n + spare, heads, dim).to(dtype) for n, heads, dim in (
        (sum(lens_q), h, d), (sum(lens_k), hk, d), (sum(lens_k), hv, dv)))  # fmt: skip
    args = q, k, v, torch.tensor([1, 0, 1]), torch.tensor([2, 0, 2])
    return args, {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}


def check_packed():
    for dtype, options in ((torch.float32, {}), (torch.bfloat16, {"window_left": 6}),
                           (torch.float16, {"causal": False, "softcap": 2.0})):  # fmt: skip
        args, cu = packed_inputs(dtype, (70, 0, 5, 130, 1), (75, 4, 0, 131, 1))
        check_forward(args, {**cu, **options})
        args, cu = packed_inputs(dtype, (20, 3), (33, 3))
        check_gradients(args, {**cu, **options}, True)
    # Rows behind the last sequence belong to nobody: 0, -inf and no gradient; wild numbers are cut.
    args, cu = packed_inputs(torch.float32, (20, 3), (33, 3), spare=7)
    out, lse = attention(*args, **cu)
    assert bool((out[23:] == 0).all()) and bool(lse[:, 23:].isneginf().all())
    cut = [x[:-7] for x in args[:3]]
    want, want_lse = reference.dha_attention(*cut, *args[3:], **cu)
    torch.testing.assert_close(out[:23], want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse[:, :23], want_lse, atol=1e-5, rtol=1e-5)
    dq, dk, dv = backward(torch.ones_like(out), *args[:3], out, lse, *args[3:], **cu)
    assert bool((dq[23:] == 0).all() and (dk[36:] == 0).all() and (dv[36:] == 0).all())
    wild = {n: torch.tensor([-3, 99, 7], dtype=torch.int32) for n in cu}
    attention(*args[:3], torch.tensor([-1, 5, 0]), torch.tensor([9, 0, -7]), **wild)


def check_edges():
    for dtype in CODES:
        q, k, v, kmap, vmap = inputs(1, 2, 2, 1, 9, 70, 64, 32, dtype)
        got = attention(q, k, v, kmap, vmap)
        for form in ((shifted(q), k, v), (q, shifted(k), v), (q, k, shifted(v))):
            assert all(map(torch.equal, attention(*form, kmap, vmap), got))  # no vector loads
        # [B, S, H, D] memory, read and written in place.
        turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
        again = attention(*turned, kmap, vmap)
        assert all(map(torch.equal, again, got)) and again[0].stride(1) < again[0].stride(2)
        # Values that the bias hides from everybody may be anything.
        bias = (torch.arange(70) >= 8).view(1, 1, 1, 70)
        good = attention(q, k, v, kmap, vmap, attn_bias=bias)
        bad_k, bad_v = k.clone(), v.clone()
        bad_k[:, :, :8], bad_v[:, :, :8] = float("nan"), float("inf")
        assert all(map(torch.equal, attention(q, bad_k, bad_v, kmap, vmap, attn_bias=bias), good))
        # NaN that a row sees reaches it; no keys at all, no queries.
        bad_v[:, :, :8] = float("nan")
        assert bool(attention(q, k, bad_v, kmap, vmap)[0].isnan().all())
        out, lse = attention(q, k[:, :, :0], v[:, :, :0], kmap, vmap)
        assert bool((out == 0).all()) and bool(lse.isneginf().all())
        attention(q[:, :, :0], k, v, kmap, vmap)
        _, dk, dv = backward(
            out[:, :, :0], q[:, :, :0], k, v, out[:, :, :0], lse[:, :, :0], kmap, vmap
        )
        assert bool((dk == 0).all()) and bool((dv == 0).all())


def check_lowest_bias():
    """The lowest finite number of a dtype is a number: no overflow on the way to weights."""
    for dtype in (torch.bfloat16, torch.float32):
        args = inputs(1, 2, 1, 2, 40, 150, 32, 24, dtype)
        bias = torch.zeros(1, 1, 40, 150, dtype=dtype)
        bias[..., :64] = torch.finfo(dtype).min  # the first tile of keys, behind which others win
        check_gradients(args, {"causal": False, "attn_bias": bias}, False)
        bias[:, :, 7] = torch.finfo(dtype).min  # a row that sees all keys alike
        out, lse = attention(*args, causal=False, attn_bias=bias)
        torch.testing.assert_close(
            out[:, :, 7], args[2][:, args[4]].float().mean(2).to(dtype), atol=1e-3, rtol=1e-2
        )
        assert bool(out.isfinite().all()) and bool(lse.isfinite().all())


def check_hidden_wild():
    """NaN and infinities of keys that a row does not see do not reach it, nor its gradients."""
    nan, inf = float("nan"), float("inf")
    for dtype in CODES:
        # The tiles with NaN take another way: rounding differs.
        near = (
            {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
        )
        q, k, v, kmap, vmap = inputs(1, 1, 1, 1, 150, 150, 32, 24, dtype)
        bad = v.clone()
        bad[0, 0, 40, 5], bad[0, 0, 41, 6] = nan, inf
        for options, hidden in (({}, 40), ({"window_right": 3, "causal": False}, 37)):
            good, out = (attention(q, k, x, kmap, vmap, **options)[0][0, 0] for x in (v, bad))
            torch.testing.assert_close(out[:hidden], good[:hidden], **near)
            assert bool(out[hidden:, 5].isnan().all())
            assert bool((out[hidden + 1 :, 6] == inf).all())
        # A bias of -inf for some rows only; then keys hidden from all of them, in every gradient.
        bias = torch.zeros(1, 1, 150, 150)
        bias[..., :60, 35:50] = -inf
        options = {"causal": False, "attn_bias": bias}
        good, out = (attention(q, k, x, kmap, vmap, **options)[0][0, 0] for x in (v, bad))
        torch.testing.assert_close(out[:60], good[:60], **near)
        assert bool(out[60:, 5].isnan().all())
        bias[..., 35:50] = -inf
        bad_k, bad_v = k.clone(), v.clone()
        bad_k[:, :, 36], bad_v[:, :, 37:39] = nan, inf
        out, lse = attention(q, k, v, kmap, vmap, **options)
        dout = torch.randn_like(out)
        want = backward(dout, q, k, v, out, lse, kmap, vmap, **options)
        got = backward(dout, q, bad_k, bad_v, out, lse, kmap, vmap, **options)
        for x, y in zip(got, want):
            torch.testing.assert_close(x, y, **near)
        # A causal mask: key 140 is for the last rows, query 0 sees key 0 only.
        bad_k, bad_q = k.clone(), q.clone()
        bad_k[:, :, 140], bad_q[:, :, 0] = nan, nan
        out, lse = attention(q, k, v, kmap, vmap)
        want = backward(dout, q, k, v, out, lse, kmap, vmap)
        got = backward(dout, bad_q, bad_k, v, out, lse, kmap, vmap)
        for x, y in zip(got, want):
            torch.testing.assert_close(x[:, :, 1:140], y[:, :, 1:140], **near)


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for check in sys.argv[1:]:
        torch.manual_seed(0)
        globals()[f"check_{check}"]()
    print("ok")
