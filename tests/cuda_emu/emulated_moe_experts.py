# SPDX-License-Identifier: Apache-2.0
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

import torch

import tenfold.testing
from build import build
from emu_calls import (
    CODES,
    OPS,
    far_apart,
    numbers,
    pointers,
    ptr,
    rows_of,
    run_tests,
    scheduled,
    shifted,
    stand_in,
)
from tenfold import ops, reference
from tenfold.testing import assert_close_to_ref

sys.path.insert(0, str(OPS))
tenfold.testing.poisoned_memory = contextlib.nullcontext  # every result is full of NaN before, here
from moe_expert_cases import (  # noqa: E402
    ROUTES,
    compare,
    eager_experts,
    experts,
    lora,
    run_experts,
    run_lora,
    step,
)

LIB = ctypes.CDLL(str(build("kernels_moe_experts", "-shared", "-fPIC")))
LIMITS = (1 << 28, 32)  # of ExpertLimits
limits = LIMITS


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

    return scheduled(LIB, run)


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

    return scheduled(LIB, run)


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

    return tuple(scheduled(LIB, run))


def moe_swiglu_mlp(*args, allow_sentinel=False):
    return forward(False, *args)[0]


def moe_swiglu_mlp_train(*args, allow_sentinel=False):
    return forward(True, *args)


def moe_swiglu_mlp_backward(
    grad, x, gate_up, down, index, weight, hidden, *wanted, allow_sentinel=False
):
    call, gate_up, down, strides = experts_call(x, gate_up, down, index, weight, grad)
    hidden = hidden.contiguous()

    def run():
        made = [nan_like(t, t.shape, some) for t, some in zip((x, gate_up, down, weight), wanted)]
        places = pointers(*(t if some else None for t, some in zip(made, wanted)))
        ins = (call.grad, call.x, gate_up, down, call.index, call.weight, hidden)
        LIB.emu_experts_backward(*map(ptr, ins), places, call.ints, strides)
        return made

    return tuple(scheduled(LIB, run))


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

    return tuple(scheduled(LIB, run))


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

    return tuple(scheduled(LIB, run))


def some_tests(*choice):
    run_tests("test_moe_experts.py", "-k", f"cpu and ({' or '.join(choice)})")


@contextlib.contextmanager
def limited(*values):
    global limits
    limits = values
    yield
    limits = LIMITS


ALL_LARGE = (1 << 28, 0)


def compare_all(kind, cases, problem):
    """(shape, dtype, limits) each: within a tile, at its end and past it; whole vectors and not."""
    for shape, dtype, values in cases:
        with limited(*values):
            compare(kind, lambda _, p=shape, t=dtype: problem(p, t), torch.device("cpu"))


def lora_values():
    f32, bf16, f16 = CODES
    cases = [((10, 24, 70, 3, 2), bf16, LIMITS), ((20, 33, 65, 2, 2), f32, ALL_LARGE),
             ((12, 40, 48, 1, 2), f16, ALL_LARGE)]  # fmt: skip
    for rank, case in zip((8, 66, 5), cases):
        compare_all("lora", [case], lambda p, t, r=rank: lora(p, r, t))
    for kind, rank in (("sentinels", 3), ("empty", 0)):
        made = lora((12, 20, 33, 4, 2), rank, f32, kind)
        compare("lora", lambda _, made=made: made, torch.device("cpu"), allow_sentinel=True)
    some_tests("lora_equals", "scale_multiplies")


def check_values():
    f32, bf16, f16 = CODES
    cases = [((9, 72, 136, 3, 2), bf16, LIMITS), ((40, 33, 65, 2, 1), f16, LIMITS),
             ((70, 40, 24, 2, 1), f32, LIMITS), ((9, 72, 136, 2, 2), f32, ALL_LARGE),
             ((20, 40, 64, 1, 1), bf16, ALL_LARGE), ((140, 9, 17, 1, 1), f16, LIMITS)]  # fmt: skip
    compare_all("experts", cases, experts)
    for turn, kind in enumerate(ROUTES):
        made = experts((16, 20, 33, 4, 2), list(CODES)[turn % 3], kind)
        with limited(1 << 28, 32 * (turn % 2)):
            compare("experts", lambda _, made=made: made, torch.device("cpu"), allow_sentinel=True)
    some_tests("expert_without", "order_of", "nan_and_inf", "identical", "dense_mixture")
    lora_values()


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def tiles_and_rounds():
    """No result depends on the shape of tiles, nor on how many columns are done at a time."""
    for run, op, (tensors, index) in (
        (run_experts, ops.moe_swiglu_mlp, experts((6, 264, 24, 2, 1), torch.bfloat16)),
        (run_lora, ops.moe_lora_swiglu_mlp, lora((5, 24, 260, 1, 1), 4, torch.float32)),
    ):
        x, *matrices, weight = tensors
        results = []
        for values in (LIMITS, (1, 32), ALL_LARGE):
            with limited(*values):
                leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
                out = run(op, [leaves[0], *matrices, leaves[1]], index)
                results.append([out, *torch.autograd.grad(out.sum(), leaves)])
        assert all(same(r, results[0]) for r in results[1:])


def alignment():
    """The same bits with and without vector loads, of one operand after the other."""
    tensors, index = experts((12, 40, 32, 2, 2), torch.bfloat16)
    up = torch.randn(12, 40)
    want = step(run_experts, ops.moe_swiglu_mlp, tensors, index, up)
    for i in range(3):
        mine = [shifted(t) if i == j else t for j, t in enumerate(tensors)]
        assert same(step(run_experts, ops.moe_swiglu_mlp, mine, index, up), want)
    tensors, index = lora((12, 40, 32, 2, 2), 8, torch.float16)
    want = run_lora(ops.moe_lora_swiglu_mlp, tensors, index)
    for i in range(len(tensors) - 1):
        mine = [shifted(t) if i == j else t for j, t in enumerate(tensors)]
        assert torch.equal(run_lora(ops.moe_lora_swiglu_mlp, mine, index), want)


def many_groups():
    """More than a warp looks at, most of them empty, in more tiles than lie together; many slots."""
    for shape in ((30, 130, 10, 75, 1), (700, 4, 3, 5, 2)):
        tensors, index = experts(shape, torch.float32)
        got = run_experts(ops.moe_swiglu_mlp, tensors, index)
        want = run_experts(reference.moe_swiglu_mlp, [t.double() for t in tensors], index)
        assert_close_to_ref(got, want, eager_experts(*tensors[:3], index, tensors[3]))


def values_that_the_host_does_not_see():
    """Indices out of range are slots of nobody, rows that do not exist are 0, offsets stay inside."""
    tensors, index = experts((20, 12, 10, 3, 2), torch.float32)
    for wrong in (-1, -(2**40), 2**33 + 1, 3):
        bad, weight = index.clone(), tensors[3].clone()
        bad[4:7, 1] = wrong
        weight[4:7, 1] = 0
        got = run_experts(ops.moe_swiglu_mlp, tensors, bad)
        assert torch.equal(got, run_experts(ops.moe_swiglu_mlp, [*tensors[:3], weight], index))
    a, w = torch.randn(12, 9), torch.randn(3, 7, 9)
    offsets, gather = torch.tensor([0, 4, 4, 10]), torch.arange(12)
    want = ops.grouped_gemm(a, w, offsets)
    gather[[1, 5]] = torch.tensor([12, -3])
    want[[1, 5]] = 0
    assert torch.equal(ops.grouped_gemm(a, w, offsets, True, gather), want)
    for offsets in ([-5, 9, 3, 40], [0, 1 << 40, -(1 << 40), 6], [12, 0, 12, 0]):
        ops.grouped_gemm(a, w, torch.tensor(offsets))
        ops.grouped_gemm_wgrad(torch.randn(12, 7), a, torch.tensor(offsets))


def offsets_beyond_32_bits():
    """Rows of x and of a matrix, in turn."""
    a, w, offsets = (
        torch.randn(3, 40).bfloat16(),
        torch.randn(3, 40).bfloat16(),
        torch.tensor([0, 3]),
    )
    want = ops.grouped_gemm(a, w[None], offsets), ops.grouped_gemm_wgrad(w, a, offsets)
    for far in range(2):
        with tempfile.TemporaryDirectory() as folder:
            x, y = (far_apart(t, folder) if i == far else t for i, t in enumerate((a, w)))
            got = ops.grouped_gemm(x, y[None], offsets), ops.grouped_gemm_wgrad(y, x, offsets)
            assert same(got, want)


def grouped_products():
    some_tests("(test_grouped_gemm[ and (case0 or case1 or case2 or case3 or (case4 and True and dtype1)))",
              "test_grouped_gemm_wgrad", "test_grouped_gemm_equals")  # fmt: skip
    with limited(*ALL_LARGE):
        some_tests("(test_grouped_gemm[ and False and case4 and dtype1)")


def check_edges():
    grouped_products()
    many_groups()
    tiles_and_rounds()
    alignment()
    values_that_the_host_does_not_see()
    offsets_beyond_32_bits()
    some_tests("(gradients_of_some and experts)")


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    stand_in([grouped_gemm, grouped_gemm_wgrad, moe_swiglu_mlp, moe_swiglu_mlp_train,
              moe_swiglu_mlp_backward, moe_lora_experts, moe_lora_experts_train, moe_lora_experts_backward,
              moe_lora_swiglu_mlp])  # fmt: skip
    for check in sys.argv[1:]:
        torch.manual_seed(0)
        globals()[f"check_{check}"]()
    print("ok")
