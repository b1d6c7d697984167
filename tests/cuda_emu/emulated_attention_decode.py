# SPDX-License-Identifier: Apache-2.0
"""Runs the emulated CUDA kernels of dha_decode and dha_cache_append_ against the reference:
``emulated_attention_decode.py CHECK``.

Started by test_emulated.py with ASan preloaded. Calls run under two thread schedules,
whose results must be the same bits.
"""

from __future__ import annotations

import ctypes
import itertools
import sys

import torch

from build import build
from emu_calls import CODES, index_args, numbers, ptr, scheduled, shifted
from tenfold import reference
from tenfold.testing.tolerance import assert_close_to_ref

LIB = ctypes.CDLL(str(build("kernels_attention_decode", "-shared", "-fPIC")))
CONTIGUOUS, PAGED, RAGGED = range(3)


def cache_strides(t, layout):
    s = t.stride()
    if layout == RAGGED:
        return 0, s[0], s[1]
    return (s[0], s[1], s[2]) if layout == PAGED else (s[0], s[2], s[1])


def decode(q, k, v, kmap, vmap, kv_lens, *, block_table=None, scale=None, window_left=-1,
           num_splits=0, kv_start=None, offsets=None, softcap=0.0):  # fmt: skip
    layout = RAGGED if offsets is not None else PAGED if block_table is not None else CONTIGUOUS
    q4 = q if q.dim() == 4 else q[:, :, None]
    (b, h, sq, d), dv = q4.shape, v.shape[-1]
    heads_at = 1 if layout == CONTIGUOUS else k.dim() - 2
    width = block_table.shape[1] if layout == PAGED else 0
    length = width * k.shape[1] if layout == PAGED else k.shape[0 if layout == RAGGED else 2]
    block = (k.shape[1], k.shape[0]) if layout == PAGED else (0, 0)
    ints = numbers(CODES[q.dtype], layout, b, h, k.shape[heads_at], v.shape[heads_at], sq, d, dv, length,
                   *block, width, window_left, num_splits, *cache_strides(k, layout),
                   *cache_strides(v, layout))  # fmt: skip

    def run():
        out, lse = q.new_full((*q.shape[:-1], dv), 9), torch.full(q.shape[:-1], 9.0)
        hold = q4.contiguous()
        pointers, wide = index_args([kmap, vmap, kv_lens, kv_start, offsets, block_table])
        LIB.emu_dha_decode(ptr(hold), ptr(k), ptr(v), ptr(out), ptr(lse), pointers, wide, ints,
                           ctypes.c_float(d**-0.5 if scale is None else scale),
                           ctypes.c_float(softcap))  # fmt: skip
        return out, lse

    return scheduled(LIB, run)


def compare(q, k, v, *index, **options):
    got = decode(q, k, v, *index, **options)
    exact = reference.dha_decode(q.double(), k.double(), v.double(), *index, **options)
    low = reference.dha_decode(q, k, v, *index, **options)
    what = f"{tuple(q.shape)} {q.dtype} {[n for n in options]}"
    assert_close_to_ref(got[0], exact[0], low[0], what=what)
    torch.testing.assert_close(got[1].double(), exact[1], atol=2e-5, rtol=2e-5)
    return got


# b h hk hv sq longest d dv
SHAPES = [
    (2, 4, 2, 4, 1, 40, 64, 64),
    (1, 20, 3, 2, 1, 300, 128, 20),
    (2, 3, 3, 1, 5, 140, 33, 130),
    (1, 9, 1, 1, 16, 70, 64, 40),
    (1, 2, 2, 1, 3, 150, 80, 72),
    (1, 3, 2, 3, 1, 200, 256, 200),
    (3, 2, 1, 2, 2, 5, 8, 8),
]


def caches(layout, b, hk, hv, longest, d, dv, dtype):
    """Caches of a layout with room for starts up to 3, and what says where the tokens are."""
    lens = torch.randint(0, longest + 1, (b,), dtype=torch.int32)
    lens[-1] = longest
    if layout == CONTIGUOUS:
        k, v = torch.randn(b, hk, longest + 3, d), torch.randn(b, hv, longest + 3, dv)
        where = {"kv_start": torch.arange(b) % 4}
    elif layout == RAGGED:
        offsets = torch.cat([lens.new_zeros(1), (lens + 3).cumsum(0, dtype=torch.int32)])
        k, v = torch.randn(int(offsets[-1]), hk, d), torch.randn(int(offsets[-1]), hv, dv)
        where = {"offsets": offsets}
    else:
        size, width = 16, -(-longest // 16) + 1
        k = torch.randn(b * width + 2, size, hk, d)
        v = torch.randn(b * width + 2, size, hv, dv)
        table = torch.randperm(b * width + 2, dtype=torch.int32)[: b * width].view(b, width)
        where = {"block_table": table, "kv_start": torch.arange(b, dtype=torch.int32) % 4}
    return k.to(dtype), v.to(dtype), lens, where


OPTIONS = [
    {},
    {"num_splits": 1, "softcap": 2.5},
    {"window_left": 7, "num_splits": 3},
    {"scale": -0.2},
]


def run_decode(dtype):
    turn = CODES[dtype]
    for (b, h, hk, hv, sq, longest, d, dv), layout in itertools.product(SHAPES, range(3)):
        k, v, lens, where = caches(layout, b, hk, hv, longest, d, dv, dtype)
        q = torch.randn(b, h, sq, d).to(dtype)
        kmap = torch.randint(0, hk, (h,), dtype=torch.int32)
        vmap = torch.randint(0, hv, (h,))
        compare(q, k, v, kmap, vmap, lens, **where, **OPTIONS[turn % len(OPTIONS)])
        turn += 1


def check_float32():
    run_decode(torch.float32)


def check_bfloat16():
    run_decode(torch.bfloat16)


def check_float16():
    run_decode(torch.float16)


def check_edges():
    maps = torch.tensor([0, 1, 1, 0]), torch.tensor([1, 0, 1, 0])
    for dtype in CODES:
        q, k, v = (torch.randn(s).to(dtype) for s in ((2, 4, 64), (2, 2, 300, 64), (2, 2, 300, 32)))
        lens = torch.tensor([290, 131])
        whole = compare(q, k, v, *maps, lens, num_splits=1)
        for splits in (2, 3, 50):
            got = decode(q, k, v, *maps, lens, num_splits=splits)
            torch.testing.assert_close(got[0], whole[0], atol=1e-2, rtol=1e-2)
            torch.testing.assert_close(got[1], whole[1], atol=1e-5, rtol=1e-5)
        for form in ((shifted(k), v), (k, shifted(v))):  # the same bits without vector loads
            assert all(map(torch.equal, decode(q, *form, *maps, lens, num_splits=1), whole))
        wild = decode(q, k, v, torch.tensor([-5, 1, 9, 0]), maps[1], torch.tensor([10**6, -4]))
        assert bool((wild[0][1] == 0).all()) and bool(wild[1][1].isneginf().all())
        # What a row does not see must not reach it: the last token, and those before its window.
        q4, bad_k, bad_v = torch.randn(2, 4, 3, 64).to(dtype), k.clone(), v.clone()
        for cache in (bad_k, bad_v):
            cache[0, :, 289:], cache[1, :, 130:] = float("nan"), float("inf")
        good, bad = (decode(q4, *c, *maps, lens) for c in ((k, v), (bad_k, bad_v)))
        assert torch.equal(good[0][:, :, :2], bad[0][:, :, :2])
        assert bool(bad[0][0, :, 2].isnan().all())


def append(k_cache, v_cache, k, v, slots, *, paged=False, cos=None, sin=None):
    layout = PAGED if paged else RAGGED if k_cache.dim() == 3 else CONTIGUOUS
    (b, hk, s, d), (_, hv, _, dv) = k.shape, v.shape
    size = k_cache.shape[1] if paged else 0
    num_slots = k_cache.shape[0] * size if paged else k_cache.shape[0 if layout == RAGGED else 2]
    angle = CODES[cos.dtype] if cos is not None else 0
    steps = [0 if t is None or t.shape[0] == 1 else s * d for t in (cos, sin)]

    def run():
        k1, v1 = k_cache.clone(), v_cache.clone()
        ints = numbers(CODES[k.dtype], layout, angle, b, hk, hv, s, d, dv, num_slots, size,
                       cos is not None, slots.dtype == torch.int64, *steps,
                       *cache_strides(k1, layout), *cache_strides(v1, layout))  # fmt: skip
        LIB.emu_dha_append(ptr(k1), ptr(v1), ptr(k), ptr(v), ptr(slots), ptr(cos), ptr(sin), ints)
        return k1, v1

    return scheduled(LIB, run)


def check_append():
    for dtype, (hk, hv, d, dv) in itertools.product(
        CODES, [(2, 3, 64, 32), (1, 2, 34, 7), (3, 1, 8, 128)]
    ):
        k, v = torch.randn(2, hk, 5, d).to(dtype), torch.randn(2, hv, 5, dv).to(dtype)
        forms = [
            (
                (2, hk, 9, d),
                (2, hv, 9, dv),
                torch.tensor([[0, 8, -1, 3, 2], [5, 4, 1, 7, -1]]),
                False,
            ),
            (
                (4, 4, hk, d),
                (4, 4, hv, dv),
                torch.tensor([[3, 15, 9, -1, 0], [1, 2, 4, 5, 6]]),
                True,
            ),
            ((13, hk, d), (13, hv, dv), torch.arange(10, dtype=torch.int32).view(2, 5), False),
        ]
        for k_shape, v_shape, slots, paged in forms:
            caches = torch.randn(k_shape).to(dtype), torch.randn(v_shape).to(dtype)
            for angles in (None, torch.float32, dtype):
                rope = {}
                if angles is not None:
                    rope = {
                        "cos": torch.randn(1, 5, d).to(angles),
                        "sin": torch.randn(2, 5, d).to(angles),
                    }
                got = append(*caches, k, v, slots, paged=paged, **rope)
                want = [c.clone() for c in caches]
                reference.dha_cache_append_(*want, k, v, slots, paged=paged, **rope)
                assert torch.equal(got[1], want[1])
                if rope:
                    assert_close_to_ref(got[0], want[0].double(), want[0])
                else:
                    assert torch.equal(got[0], want[0])
    k = torch.randn(1, 1, 3, 8)
    got = append(torch.zeros(1, 1, 2, 8), torch.zeros(1, 1, 2, 8), k, k, torch.tensor([[2, 1, -7]]))
    assert bool((got[0][0, 0, 0] == 0).all()) and torch.equal(got[0][0, 0, 1], k[0, 0, 1])


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for check in sys.argv[1:]:
        torch.manual_seed(0)
        globals()[f"check_{check}"]()
    print("ok")
