# SPDX-License-Identifier: Apache-2.0
"""Runs the emulated CUDA kernels of the head operations: ``emulated_attention_heads.py OP``.

Started by test_emulated.py with ASan preloaded. Every case runs under two thread schedules,
whose results must be the same bits.
"""

from __future__ import annotations

import ctypes
import itertools
import sys

import torch

from build import build
from emu_calls import CODES, numbers, ptr, twice
from tenfold import reference
from tenfold.testing.tolerance import assert_close_to_ref

LIB = ctypes.CDLL(str(build("kernels_attention_heads", "-shared", "-fPIC")))
# N, g, d, m: one and several column tiles, vectors and odd widths, tiles of domega that are whole
# groups (g <= 8) and not, several blocks of outputs, more inputs than one chunk of coefficients.
SHAPES = [(1, 1, 1, 1), (2, 4, 3, 24), (3, 3, 2, 17), (1, 8, 2, 1100), (2, 5, 1, 16), (1, 11, 2, 40),
          (1, 70, 1, 8)]  # fmt: skip


def inputs(n, g, d, m, dtype):
    w, omega = torch.randn(n * g, d, m).to(dtype), torch.randn(n, g, g, d)
    return w, omega, torch.randperm(n * g).view(n, g)


def mix(kind, source, omega, groups, out):
    n, g, _, d = omega.shape
    wide = groups.dtype == torch.int64
    ints = numbers(CODES[source.dtype], n, g, d, source.shape[-1], wide, kind)

    def run():
        to = torch.full_like(out, float("nan"))
        LIB.emu_mix_heads(ptr(source), ptr(omega), ptr(groups), ptr(to), ints)
        return to

    return twice(LIB, run)


def check_mix_heads():
    for shape, dtype in itertools.product(SHAPES, CODES):
        w, omega, groups = inputs(*shape, dtype)
        n, g, d, m = shape
        got = mix(0, w, omega, groups, w.new_empty(n, g, d, m))
        want = reference.fuse_heads(w.double(), omega.double(), groups)
        assert_close_to_ref(got, want, reference.fuse_heads(w, omega, groups))
        assert torch.equal(got, mix(0, w, omega, groups.int(), w.new_empty(n, g, d, m)))
        got = mix(1, w, omega, groups, w.new_empty(n, d, m))
        want = reference.collapse_heads(w.double(), omega.double(), groups)
        assert_close_to_ref(got, want, reference.collapse_heads(w, omega, groups))
    w, omega, groups = inputs(2, 3, 2, 24, torch.float32)
    groups[0, 1] = 6  # no such head: a row of zeros, and no access outside
    held = torch.cat([w, torch.zeros(1, 2, 24)])
    got = mix(0, w, omega, groups, w.new_empty(2, 3, 2, 24))
    torch.testing.assert_close(got, reference.fuse_heads(held, omega, groups))


def backward(dout, w, omega, groups, one_pass):
    n, g, _, d = omega.shape
    ints = numbers(CODES[w.dtype], n, g, d, w.shape[-1], groups.dtype == torch.int64)
    grads = []

    def run():
        dw = torch.full_like(w, float("nan"))
        domega = torch.full_like(omega, float("nan"))
        LIB.emu_fuse_backward(ptr(dout), ptr(w), ptr(omega), ptr(groups), ptr(dw if one_pass else None),
                              ptr(domega), ints)  # fmt: skip
        grads.append(dw)
        return domega

    domega = twice(LIB, run)
    if one_pass:
        assert torch.equal(*grads)
        return grads[0], domega
    return mix(2, dout, omega, groups, w), domega


def check_fuse_backward():
    for (n, g, d, m), dtype in itertools.product(SHAPES, CODES):
        w, omega, groups = inputs(n, g, d, m, dtype)
        dout = torch.randn(n, g, d, m).to(dtype)
        want, lowp = [], []
        for kind, into in ((torch.float64, want), (dtype, lowp)):
            a = w.to(kind).requires_grad_()
            b = omega.to(torch.float64 if kind == torch.float64 else torch.float32).requires_grad_()
            reference.fuse_heads(a, b, groups).backward(dout.to(kind))
            into += [a.grad, b.grad]
        for one_pass in (False, True) if g <= 8 else (False,):
            got = backward(dout, w, omega, groups, one_pass)
            for x, ref, low in zip(got, want, lowp):
                assert_close_to_ref(x, ref, low)


def check_fusion_mse():
    for n, g, d in [(1, 1, 3), (3, 4, 17), (130, 2, 5), (2, 5, 200)]:
        omega = torch.randn(n, g, g, d) * 1e-3 + 1  # almost equal heads
        ints = numbers(n, g, d, 2)

        def run(omega=omega, n=n, ints=ints):
            out = torch.full((n,), float("nan"))
            LIB.emu_fusion_mse(ptr(omega), None, ptr(out), ints)
            return out

        want = omega.double().requires_grad_()
        mse = reference.fusion_mse(want)
        torch.testing.assert_close(twice(LIB, run).double(), mse, rtol=1e-5, atol=0)
        dout = torch.randn(n, 2)
        mse.backward(dout[:, 0].double())

        def run_backward(omega=omega, dout=dout, ints=ints):
            out = torch.full_like(omega, float("nan"))
            LIB.emu_fusion_mse(ptr(omega), ptr(dout), ptr(out), ints)
            return out

        scale = float(want.grad.abs().max())
        torch.testing.assert_close(twice(LIB, run_backward).double(), want.grad, rtol=1e-3,
                                   atol=2e-4 * scale)  # fmt: skip


def check_head_cka():
    for (h, d, m), dtype, center in itertools.product(
        [(1, 1, 1), (3, 5, 40), (2, 70, 33), (5, 16, 100)], CODES, (False, True)
    ):
        held = (torch.randn(h, d, m + 3) + 0.2).to(dtype)
        w = held[:, :, :m]
        ints = numbers(CODES[dtype], h, d, m, *w.stride()[:2], center)

        def run(w=w, h=h, ints=ints):
            out = torch.full((h, h), float("nan"))
            LIB.emu_head_cka(ptr(w), ptr(out), ints)
            return out

        want = reference.head_cka(w.double(), center=center)
        torch.testing.assert_close(
            twice(LIB, run).double(), want, atol=3e-6, rtol=1e-5, equal_nan=True
        )


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for check in sys.argv[1:]:
        torch.manual_seed(0)
        globals()[f"check_{check}"]()
    print("ok")
