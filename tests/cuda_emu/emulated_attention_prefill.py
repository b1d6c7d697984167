"""Runs dha_attention's emulated CUDA kernels against the reference: ``emulated_attention_prefill.py CHECK``.

Started by test_attention_prefill.py with ASan preloaded. Every case runs under two thread schedules,
whose results must be the same bits.
"""

from __future__ import annotations

import ctypes
import math
import sys

import torch
from build import build

from tenfold import reference
from tenfold.testing.tolerance import assert_close_to_ref

LIB = ctypes.CDLL(str(build("kernels_attention_prefill", "-shared", "-fPIC")))
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
BIAS = {torch.bool: 1, torch.float32: 2, torch.bfloat16: 3, torch.float16: 4}
SCHEDULES = (1, 77)
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


def twice(run):
    """The result of ``run`` under two schedules, asserted equal."""
    results = []
    for seed in SCHEDULES:
        LIB.emu_schedule(seed)
        results.append(run())
    for a, b in zip(*results):
        assert torch.equal(a.nan_to_num(nan=7.5), b.nan_to_num(nan=7.5)), "depends on the schedule"
    return results[0]


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

    return twice(run)


def shifted(t):
    """``t`` at a storage offset of one element: no 16-byte loads."""
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


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
    torch.testing.assert_close(got[1].double(), ref[1], atol=2e-5, rtol=2e-5, msg=lambda m: what + m)
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


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    globals()[f"check_{sys.argv[1]}"]()
    print("ok")
