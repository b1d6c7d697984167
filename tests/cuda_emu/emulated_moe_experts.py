"""Runs the tests of expert blocks on their emulated CUDA kernels: ``emulated_moe_experts.py CHECK``.

Started by test_emulated.py with ASan preloaded. The emulated kernels stand in for the CPU's, so that the
tests of ``tests/ops`` see them through the public ops. Calls run under two thread schedules, whose results must
be the same bits.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from build import build
from emu_calls import CODES, numbers, pointers, ptr, scheduler, shifted
from tenfold import ops, reference
from tenfold.testing import assert_close_to_ref

OPS = Path(__file__).resolve().parents[1] / "ops"
sys.path.insert(0, str(OPS))
from moe_expert_cases import compare, eager_experts, experts, lora, run_experts, run_lora, step  # noqa: E402

LIB = ctypes.CDLL(str(build("kernels_moe_experts", "-shared", "-fPIC")))
EMULATED = ("grouped_gemm", "grouped_gemm_wgrad", "moe_swiglu_mlp", "moe_swiglu_mlp_train",
            "moe_swiglu_mlp_backward", "moe_lora_experts", "moe_lora_experts_train", "moe_lora_experts_backward",
            "moe_lora_swiglu_mlp")  # fmt: skip
LIMITS = (1 << 28, 32)  # of ExpertLimits
library = torch.library.Library("tenfold", "IMPL")
scheduled = scheduler(LIB)
limits = LIMITS


def rows_of(t):
    return t if t.numel() == 0 or t.stride(-1) == 1 else t.contiguous()


def nan_like(t, shape, wanted=True):
    return t.new_full(tuple(shape) if wanted else (0,), float("nan"))


def grouped_gemm(a, w, offsets, trans_w=True, gather=None):
    a, w, offsets = rows_of(a), rows_of(w), offsets.contiguous()
    gather = None if gather is None else gather.contiguous()
    slots = len(a) if gather is None else len(gather)
    cols = w.shape[1 if trans_w else 2]
    wide = [t is not None and t.dtype == torch.int64 for t in (offsets, gather)]
    n = numbers(CODES[a.dtype], trans_w, *wide, slots, len(a), len(w), cols, a.shape[1], a.stride(0),
                *w.stride()[:2], *limits)  # fmt: skip

    def run():
        out = nan_like(a, (slots, cols))
        LIB.emu_grouped_gemm(ptr(a), ptr(w), ptr(offsets), ptr(gather), ptr(out), n)
        return out

    return scheduled(run)


def grouped_gemm_wgrad(dy, a, offsets, gather=None):
    dy, a, offsets = rows_of(dy), rows_of(a), offsets.contiguous()
    gather = None if gather is None else gather.contiguous()
    groups = len(offsets) - 1
    wide = [t is not None and t.dtype == torch.int64 for t in (offsets, gather)]
    n = numbers(CODES[a.dtype], *wide, len(dy), len(a), groups, dy.shape[1], a.shape[1], dy.stride(0),
                a.stride(0))  # fmt: skip

    def run():
        out = nan_like(a, (groups, dy.shape[1], a.shape[1]))
        LIB.emu_grouped_wgrad(ptr(dy), ptr(a), ptr(offsets), ptr(gather), ptr(out), n)
        return out

    return scheduled(run)


class Routed:
    """Arguments that the blocks share."""

    def __init__(self, x, index, weight, n, f, grad=None):
        self.x, self.index, self.weight = rows_of(x), index.contiguous(), weight.contiguous()
        self.grad = None if grad is None else rows_of(grad)
        self.slots = index.numel()
        grad_stride = 0 if grad is None else self.grad.stride(0)
        self.ints = numbers(CODES[x.dtype], index.dtype == torch.int64, *x.shape, index.shape[1], n, f,
                            self.x.stride(0), grad_stride, *limits)  # fmt: skip


def experts_call(x, gate_up, down, index, weight, grad=None):
    gate_up, down = rows_of(gate_up), rows_of(down)
    call = Routed(x, index, weight, len(down), down.shape[2], grad)
    return call, gate_up, down, numbers(*gate_up.stride()[:2], *down.stride()[:2])


def forward(train, x, gate_up, down, index, weight):
    call, gate_up, down, strides = experts_call(x, gate_up, down, index, weight)

    def run():
        out, hidden = nan_like(x, x.shape), nan_like(x, (call.slots, gate_up.shape[1]), train)
        if out.numel() > 0:
            LIB.emu_experts_forward(*map(ptr, (call.x, gate_up, down, call.index, call.weight)),
                                    ptr(hidden if train else None), ptr(out), call.ints, strides)  # fmt: skip
        return out, hidden

    return tuple(scheduled(run))


def moe_swiglu_mlp(*args, allow_sentinel=False):
    return forward(False, *args)[0]


def moe_swiglu_mlp_train(*args, allow_sentinel=False):
    return forward(True, *args)


def moe_swiglu_mlp_backward(grad, x, gate_up, down, index, weight, hidden, *wanted, allow_sentinel=False):
    call, gate_up, down, strides = experts_call(x, gate_up, down, index, weight, grad)
    hidden = hidden.contiguous()

    def run():
        made = [nan_like(t, t.shape, some) for t, some in zip((x, gate_up, down, weight), wanted)]
        places = pointers(*(t if some else None for t, some in zip(made, wanted)))
        ins = (call.grad, call.x, gate_up, down, call.index, call.weight, hidden)
        LIB.emu_experts_backward(*map(ptr, ins), places, call.ints, strides)
        return made

    return tuple(scheduled(run))


def lora_call(x, *rest, grad=None):
    *matrices, scale, index, weight = rest
    matrices = [rows_of(m) for m in matrices]
    call = Routed(x, index, weight, len(matrices[3]), len(matrices[0]), grad)
    strides = [s for m in matrices for s in m.stride()[:-1]]
    tail = numbers(*strides), ctypes.c_int64(matrices[3].shape[1]), ctypes.c_double(scale)
    return call, matrices, tail


def lora_forward(train, *args):
    call, matrices, tail = lora_call(*args)
    x, rank = call.x, matrices[3].shape[1]

    def run():
        out = nan_like(x, x.shape)
        hidden = nan_like(x, (call.slots, 2 * len(matrices[0])), train)
        low = nan_like(x, (call.slots, 2 * rank))
        if out.numel() > 0:
            LIB.emu_lora_forward(ptr(x), pointers(*matrices), ptr(call.index), ptr(call.weight),
                                 ptr(hidden if train else None), ptr(low), ptr(out), call.ints, *tail)  # fmt: skip
        return out, hidden, low

    return tuple(scheduled(run))


def moe_lora_experts(*args, allow_sentinel=False):
    return lora_forward(False, *args)[0]


def moe_lora_experts_train(*args, allow_sentinel=False):
    return lora_forward(True, *args)


def moe_lora_swiglu_mlp(x, wg, wu, wd, a, b, *rest, allow_sentinel=False):
    return lora_forward(False, x, wg, wu, wd, *a, *b, *rest)[0]


def moe_lora_experts_backward(grad, x, *args, allow_sentinel=False):
    *args, hidden, low, wanted = args
    call, matrices, tail = lora_call(x, *args, grad=grad)
    hidden, low = hidden.contiguous(), low.contiguous()

    def run():
        some = [bool(wanted >> i & 1) for i in range(11)]
        made = [nan_like(t, t.shape, s) for t, s in zip((x, *matrices, args[-1]), some)]
        places = pointers(*(t if s else None for t, s in zip(made, some)))
        LIB.emu_lora_backward(ptr(call.grad), ptr(call.x), pointers(*matrices), ptr(call.index),
                              ptr(call.weight), ptr(hidden), ptr(low), places, call.ints, *tail)  # fmt: skip
        return made

    return tuple(scheduled(run))


def run_tests(file, *choice):
    """The tests of a file, those of argument checks aside: these are not the kernels'."""
    with contextlib.redirect_stdout(sys.stderr):
        code = pytest.main(
            ["-q", "-x", "--capture=sys", "-p", "no:cacheprovider", str(OPS / file), *choice]
        )
    assert code == 0, code


@contextlib.contextmanager
def limited(*values):
    global limits
    limits = values
    yield
    limits = LIMITS


def check_values():
    """Both tiles; within one, at its end and past it; whole vectors and not."""
    cpu = torch.device("cpu")
    for turn, shape in enumerate([(3, 5, 6, 3, 2), (20, 72, 136, 3, 2), (40, 33, 65, 2, 1)]):
        for dtype in list(CODES)[turn % 3 :][:2]:
            compare("experts", lambda s, p=shape, t=dtype: experts(p, t, seed=s), cpu, samples=2)


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for name in EMULATED:
        library.impl(name, globals()[name], "CPU", allow_override=True)
    globals()[f"check_{sys.argv[1]}"]()
    print("ok")
