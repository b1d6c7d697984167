"""Runs the tests of ``loss`` on its emulated CUDA kernels: ``emulated_loss.py CHECK``.

Started by test_emulated.py with ASan preloaded. The emulated kernels stand in for the CPU's, so that the
tests of ``tests/ops`` see them through the public ops. Every call runs under two thread schedules, whose
results must be the same bits.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from pathlib import Path

import pytest
import torch

from build import build
from emu_calls import CODES, numbers, ptr, shifted, twice
from tenfold.ops import loss as ops

LIB = ctypes.CDLL(str(build("kernels_loss", "-shared", "-fPIC")))
OPS = Path(__file__).resolve().parents[1] / "ops"
library = torch.library.Library("tenfold", "IMPL")


def pointers(*tensors):
    return (ctypes.c_void_p * len(tensors))(*(None if t is None else t.data_ptr() for t in tensors))


def sizes(logits, ids):
    stride = logits.stride(0) if len(logits) else 0
    return numbers(CODES[logits.dtype], *logits.shape, stride, ids.dtype == torch.int64)


def rows_of(t):
    return t if t.numel() == 0 or t.stride(-1) == 1 else t.contiguous()


def selective_logprob(logits, ids, temperature=1.0):
    logits, ids = rows_of(logits), ids.contiguous()

    def run():
        out = [torch.full(ids.shape, float("nan")) for _ in range(3)]
        LIB.emu_selective_logprob(ptr(logits), ptr(ids), pointers(*out), sizes(logits, ids),
                                  ctypes.c_double(1 / temperature))  # fmt: skip
        return out

    return tuple(twice(LIB, run))


def selective_logprob_backward(of_logp, of_lse, of_entropy, logits, ids, lse, entropy, temperature):
    logits, ids = rows_of(logits), ids.contiguous()
    grads = [None if g is None else g.contiguous() for g in (of_logp, of_lse, of_entropy)]

    def run():
        out = logits.new_full(logits.shape, float("nan"))
        LIB.emu_selective_logprob_backward(ptr(logits), ptr(ids), pointers(*grads, lse, entropy),
                                           ptr(out), sizes(logits, ids),
                                           ctypes.c_double(1 / temperature))  # fmt: skip
        return out

    return twice(LIB, run)


def run_tests(file, *choice):
    """The tests of a file, those of argument checks aside: these are not the kernels'."""
    with contextlib.redirect_stdout(sys.stderr):
        code = pytest.main(["-q", "-x", "-p", "no:cacheprovider", str(OPS / file), *choice])
    assert code == 0, code


def check_logprob():
    run_tests("test_loss.py", "-k", "cpu and not errors and not registration")


def check_logprob_alignment():
    for dtype in CODES:
        logits, ids = torch.randn(3, 4104).to(dtype), torch.tensor([0, 4103, 77])
        want = ops.selective_logprob(logits, ids)
        mine = logits.clone().requires_grad_()
        sum(x.sum() for x in ops.selective_logprob(mine, ids)).backward()
        for lag in range(1, 17):  # odd strides and offsets: the same bits
            wide = torch.cat([logits.new_zeros(3, lag), logits], 1)[:, lag:]
            for w, g in zip(want, ops.selective_logprob(wide, ids), strict=True):
                assert torch.equal(w, g)
            there = shifted(wide).requires_grad_()
            sum(x.sum() for x in ops.selective_logprob(there, ids)).backward()
            assert torch.equal(there.grad, mine.grad)
        for n in range(1, 40):  # an output row of every alignment
            some = logits[:, :n].contiguous().requires_grad_()
            ops.selective_logprob(some, ids % n)[1].sum().backward()
            want = logits[:, :n].float().softmax(-1)
            torch.testing.assert_close(some.grad.float(), want, atol=4e-3, rtol=4e-3)


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for name in ("selective_logprob", "selective_logprob_backward"):
        library.impl(name, globals()[name], "CPU", allow_override=True)
    globals()[f"check_{sys.argv[1]}"]()
    print("ok")
