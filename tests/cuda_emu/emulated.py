# SPDX-License-Identifier: Apache-2.0
"""Runs the emulated CUDA kernels against the reference; one op per call: ``emulated.py OP``.

Started by test_emulated.py with ASan preloaded. Calls run under two thread schedules, whose
results must be the same bits.
"""

from __future__ import annotations

import ctypes
import itertools
import sys

import torch

from build import build
from emu_calls import CODES, index_args, numbers, ptr, scheduled, shifted, twice
from tenfold import reference
from tenfold.testing.tolerance import assert_close_to_ref

LIB = ctypes.CDLL(str(build("kernels", "-shared", "-fPIC")))
REDUCE = {"mean": 0, "sum": 1, "max": 2}


def proxy_scores(q, k, lse=None, *, causal=True, q_offset=-1, q_positions=None, kv_start=None,
                 kv_lens=None, window=-1, reduce="mean", kmap=None):  # fmt: skip
    (b, hq, w, d), (_, hkv, length, _) = q.shape, k.shape
    offset = length - w if q_offset == -1 else q_offset
    per_row = q_positions is not None and q_positions.dim() == 2
    ints = numbers(CODES[q.dtype], b, hq, hkv, w, length, d, *q.stride()[:3], *k.stride()[:3], offset,
                   causal, window, REDUCE[reduce], per_row, lse is not None)  # fmt: skip

    def run():
        row_lse = torch.full((b, hq, w), float("nan")) if lse is None else lse.clone()
        scores = torch.full((b, hkv, length), float("nan"))
        pointers, wide = index_args([q_positions, kv_start, kv_lens, kmap])
        LIB.emu_proxy_scores(ptr(q), ptr(k), ptr(row_lse), ptr(scores), pointers, wide, ints,
                             ctypes.c_float(d**-0.5))  # fmt: skip
        return scores, row_lse

    return scheduled(LIB, run)


def check_proxy_scores():
    shapes = [(1, 1, 1, 1, 1, 8), (1, 4, 2, 5, 37, 64), (1, 2, 2, 66, 130, 80), (1, 8, 1, 2, 600, 33),
              (1, 4, 2, 9, 5, 128), (1, 1, 1, 2, 1100, 16), (1, 2, 1, 3, 70, 200)]  # fmt: skip
    for turn, ((b, hq, hkv, w, length, d), dtype) in enumerate(itertools.product(shapes, CODES)):
        q, k = torch.randn(b, hq, w, d).to(dtype), torch.randn(b, hkv, length, d).to(dtype)
        positions = torch.randint(-1, length, (b, w), dtype=torch.int32)
        cases = [{}, {"causal": False, "reduce": "sum"}, {"window": 3, "reduce": "max"},
                 {"q_positions": positions},
                 {"kmap": torch.randint(0, hkv, (hq,), dtype=torch.int64)}]  # fmt: skip
        if length > 4:
            start = torch.arange(b, dtype=torch.int32)
            cases.append({"kv_start": start, "kv_lens": torch.full((b,), length - b - 1)})
        # Each shape meets every case, in one dtype each; over the shapes each case meets every dtype.
        for kwargs in cases[(turn + turn // len(CODES)) % 3 :: 3]:
            for given in (False, True):
                lse = reference.proxy_scores(q, k, **kwargs)[1] if given else None
                got = proxy_scores(q, k, lse, **kwargs)
                ref = reference.proxy_scores(q.double(), k.double(), None if lse is None else lse.double(),
                                             **kwargs)  # fmt: skip
                for name, x, y in zip(("scores", "lse"), got, ref):
                    torch.testing.assert_close(
                        x.double(),
                        y,
                        atol=3e-5 * max(w, 1),
                        rtol=1e-4,
                        msg=lambda m, n=name, c=kwargs: f"{n} {c} {m}",
                    )
    for dtype in CODES:  # the same bits with and without vector loads
        q, k = torch.randn(1, 2, 70, 64).to(dtype), torch.randn(1, 1, 90, 64).to(dtype)
        aligned = proxy_scores(q, k)
        for form in ((shifted(q), k), (q, shifted(k))):
            assert all(torch.equal(x, y) for x, y in zip(proxy_scores(*form), aligned))
    q, k = torch.randn(1, 2, 3, 64), torch.randn(1, 2, 70, 64)
    scores, lse = proxy_scores(q, k, kmap=torch.tensor([0, 7]))  # no such key head: scores nothing
    want = reference.proxy_scores(q[:, :1], k[:, :1])
    torch.testing.assert_close(scores[:, 0], want[0][:, 0], atol=1e-4, rtol=1e-4)
    assert bool((scores[:, 1] == 0).all()) and bool(lse[:, 1].isneginf().all())
    dead = torch.full_like(k, float("-inf"))
    scores, lse = proxy_scores(q.abs(), dead)  # every logit is -inf
    assert bool((scores == 0).all()) and bool(lse.isneginf().all())
    assert bool((proxy_scores(q, k, torch.full((1, 2, 3), float("-inf")))[0] == 0).all())
    big = torch.randn(1, 40, 6, 64)  # rows strided as [B, L, H, D]
    got = proxy_scores(big[:, :6].transpose(1, 2), big.transpose(1, 2)[:, :3])
    want = reference.proxy_scores(big[:, :6].transpose(1, 2), big.transpose(1, 2)[:, :3])
    torch.testing.assert_close(got[0], want[0], atol=1e-4, rtol=1e-4)


def nacl_select(scores, *parts, tau=1.0, logits="score", seed=0, layer=0, kv_start=None, kv_lens=None,
                row_id=None, counts=None, pool_kernel=1, pool="max"):  # fmt: skip
    b, h, length = scores.shape
    per_head = counts is not None and counts.dim() == 3
    ints = numbers(b, h, length, *parts, layer, pool_kernel, pool == "max", per_head,
                   logits == "log_score", seed)  # fmt: skip

    def run():
        idx = torch.full((b, h, sum(parts)), -7, dtype=torch.int64)
        lens = torch.full((b, h) if per_head else (b,), -7, dtype=torch.int32)
        pointers, wide = index_args([kv_start, kv_lens, row_id, counts])
        LIB.emu_nacl_select(
            ptr(scores), ptr(idx), ptr(lens), pointers, wide, ints, ctypes.c_float(tau)
        )
        return idx, lens

    return scheduled(LIB, run)


def check_nacl_select():
    for length in (8, 17, 300, 1500, 5000):
        n = max(length // 12, 1)
        scores = torch.rand(2, 2, length)
        coarse = torch.randint(0, 4, (2, 2, length)).float()  # many ties
        broken = scores.clone()
        broken[0, 0, 1], broken[1, 1, 2] = float("nan"), float("-inf")
        cases = [{}, {"pool_kernel": 5}, {"pool_kernel": 3, "pool": "avg"},
                 {"logits": "log_score", "tau": 0.5}, {"seed": -3, "layer": 9},
                 {"kv_start": torch.tensor([0, 3]), "row_id": torch.tensor([4, 9], dtype=torch.int32)},
                 {"counts": torch.randint(0, n + 1, (2, 4), dtype=torch.int32)},
                 {"counts": torch.randint(0, n + 1, (2, 2, 4))}]  # fmt: skip
        for values, kwargs in itertools.product((scores, coarse, broken), cases):
            for parts in ((1, n, n, n), (n, n, n, 0), (0, 1, 0, n)):
                if length > 4096 and (parts[0] != 1 or "pool_kernel" in kwargs):
                    continue  # a wider block, slow here; what it computes is the same
                if ("counts" in kwargs and parts[2] == 0) or ("counts" in kwargs and parts[3] == 0):
                    continue
                if "counts" in kwargs:
                    parts = (n, n, n, n)
                if sum(parts) > length:
                    continue
                got, want = (
                    nacl_select(values, *parts, **kwargs),
                    reference.nacl_select(values, *parts, **kwargs),
                )
                assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1]), (
                    length,
                    parts,
                    kwargs,
                )


def kv_move(k, v, idx, compact, new_lens=None, inv_freq=None, kv_start=None):
    (b, hk, length, d), (_, hv, _, dv) = k.shape, v.shape
    c, hi = idx.shape[2], idx.shape[1]
    per_head = new_lens is not None and new_lens.dim() == 2
    ints = numbers(CODES[k.dtype], b, hk, hv, length, d, dv, c, hi, per_head, compact)

    def run():
        k1, v1 = k.clone(), v.clone()
        k2, v2 = (
            (k1, v1) if compact else (k.new_full((b, hk, c, d), 9), v.new_full((b, hv, c, dv), 9))
        )
        pointers, wide = index_args([idx, new_lens, kv_start])
        LIB.emu_kv_move(ptr(k1), ptr(v1), ptr(k2), ptr(v2), ptr(inv_freq), pointers, wide, ints)
        return k2, v2

    return scheduled(LIB, run)


def check_kv_moves():
    for (b, h, length, c, d, dv), dtype in itertools.product(
        [
            (1, 1, 1, 1, 8, 8),
            (2, 3, 50, 17, 64, 40),
            (1, 2, 90, 33, 6, 7),
            (1, 1, 9, 0, 8, 8),
            (1, 1, 700, 600, 64, 1056),
            (1, 1, 3000, 2900, 12, 64),  # many steps of a compaction, idle threads in a step
            (1, 2, 30, 20, 8, 0),  # nothing to move on one side
        ],
        CODES,
    ):
        k, v = torch.randn(b, h, length, d).to(dtype), torch.randn(b, h, length, dv).to(dtype)
        idx = torch.rand(b, h, length).argsort(-1)[..., :c].sort(-1).values
        freq = torch.rand(d // 2)
        for kwargs in ({}, {"new_lens": torch.randint(0, c + 1, (b,))}, {"inv_freq": freq},
                       {"new_lens": torch.randint(0, c + 1, (b, h), dtype=torch.int32)},
                       {"inv_freq": freq, "kv_start": torch.arange(b)}):  # fmt: skip
            for form in (idx, idx.int()):
                got, want = (
                    kv_move(k, v, form, False, **kwargs),
                    reference.kv_gather(k, v, idx, **kwargs),
                )
                moved = k.clone(), v.clone()
                reference.kv_compact_(*moved, idx, **kwargs)
                inside = kv_move(k, v, form, True, **kwargs)
                for x, y in (*zip(got, want), *zip(inside, moved)):
                    if "inv_freq" in kwargs:
                        torch.testing.assert_close(
                            x, y, atol=2e-2 if dtype != torch.float32 else 1e-5, rtol=1e-2
                        )
                    else:
                        assert torch.equal(x, y)
    k, v = torch.randn(264, 1, 9, 24), torch.randn(264, 1, 9, 0)  # enough heads: whole rows
    idx = torch.rand(264, 1, 9).argsort(-1)[..., :5].sort(-1).values
    moved = k.clone(), v.clone()
    reference.kv_compact_(*moved, idx)
    assert torch.equal(kv_move(k, v, idx, True)[0], moved[0])
    k = torch.randn(1, 1, 20, 8)
    hole = torch.tensor([[[-1, 0, 5, 7]]])  # a token below its slot is refused: slots 0, 1 stay
    for freq in (None, torch.zeros(4)):
        moved = kv_move(k, k.clone(), hole, True, inv_freq=freq)[0][0, 0, :4]
        assert torch.equal(moved, k[0, 0, [0, 1, 5, 7]])
    k, v = torch.randn(1, 2, 20, 8), torch.randn(1, 3, 20, 16)
    shared = torch.tensor([[[1, 4, 4, -1, 25]]])  # holes and out of range give zeros
    got = kv_move(k, v, shared, False)
    want = reference.kv_gather(k, v, torch.tensor([[[1, 4, 4, -1, -1]]]))
    assert all(torch.equal(x, y) for x, y in zip(got, want))


def check_ragged_decode():
    for (b, hkv, g, sq, longest, d, dv), dtype in itertools.product(
        [
            (2, 2, 3, 1, 40, 64, 64),
            (1, 2, 1, 4, 700, 128, 20),
            (1, 1, 9, 2, 300, 33, 130),
            (1, 2, 1, 1, 300, 64, 20),
            (1, 1, 2, 3, 280, 80, 16),
            (1, 1, 5, 1, 290, 256, 24),
        ],
        CODES,
    ):
        lens = torch.randint(0, longest + 1, (b * hkv,))
        lens[0] = 0 if b * hkv > 1 else longest
        offsets = torch.cat([lens.new_zeros(1), (lens + 3).cumsum(0)])
        n = int(offsets[-1])
        q, k, v = (torch.randn(s).to(dtype) for s in ((b, hkv * g, sq, d), (n, d), (n, dv)))
        ints = numbers(CODES[dtype], b, hkv * g, hkv, sq, d, dv, n)

        def run(q=q, k=k, v=v, lens=lens, offsets=offsets, ints=ints, dv=dv):
            out = q.new_full((*q.shape[:-1], dv), 9)
            lse = torch.full(q.shape[:-1], 9.0)
            hold = offsets.int()
            pointers, wide = index_args([hold, lens])
            LIB.emu_ragged_decode(ptr(q), ptr(k), ptr(v), ptr(out), ptr(lse), pointers, wide, ints,
                                  ctypes.c_float(q.shape[-1] ** -0.5))  # fmt: skip
            return out, lse

        got = twice(LIB, run)
        if d % 8 == 0 and dtype == torch.bfloat16:  # without vector loads
            for x, y in zip(run(k=shifted(k)), got):
                torch.testing.assert_close(x, y, atol=1e-2, rtol=1e-2)
        if sq > 1:  # the last key is hidden from every query but the last
            bad = v.clone()
            bad[(offsets[:-1] + lens - 1).clamp(min=0)] = float("nan")
            out = run(v=bad)[0]
            assert torch.equal(out[:, :, : sq - 1], got[0][:, :, : sq - 1])
        ref = reference.ragged_decode(q.double(), k.double(), v.double(), offsets, lens=lens)
        low = reference.ragged_decode(q, k, v, offsets, lens=lens)
        assert_close_to_ref(got[0], ref[0], low[0])
        torch.testing.assert_close(got[1].double(), ref[1], atol=1e-4, rtol=1e-4)


def check_template():
    for dtype, n in itertools.product(CODES, (0, 1, 255, 1000)):
        x = torch.randn(n).to(dtype) * torch.logspace(-9, 5, n).to(dtype)
        y = torch.full_like(x, 9)
        LIB.emu_template_scale(ptr(x), ptr(y), ctypes.c_int64(n), ctypes.c_float(1.7),
                               ctypes.c_int64(CODES[dtype]))  # fmt: skip
        assert torch.equal(y, reference.template_scale(x, 1.7))


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for check in sys.argv[1:]:
        torch.manual_seed(0)
        globals()[f"check_{check}"]()
    print("ok")
