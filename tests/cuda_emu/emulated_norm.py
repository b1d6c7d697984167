# SPDX-License-Identifier: Apache-2.0
"""Runs the tests of ``norm`` on its emulated CUDA kernels: ``emulated_norm.py all``.

Started by test_emulated.py with ASan preloaded. The emulated kernels stand in for the CPU's, so that the
tests of ``tests/ops`` see them through the public ops. Calls run under two thread schedules, whose results must
be the same bits.
"""

from __future__ import annotations

import ctypes
import math
import sys

import torch

import tenfold
from build import build
from emu_calls import CODES, numbers, pointers, run_tests, scheduled, stand_in
from tenfold import ops

LIB = ctypes.CDLL(str(build("kernels_norm", "-shared", "-fPIC")))
NAN = float("nan")


def as_rows(t):
    """(what is read, distance of rows): as csrc/norm/rows.cpp finds them."""
    if t is None:
        return None, 0
    shape = math.prod(t.shape[:-1]), t.shape[-1]
    try:
        flat = (
            t.view(shape) if t.shape[-1] <= 1 or t.stride(-1) == 1 else t.contiguous().view(shape)
        )
    except RuntimeError:
        flat = t.contiguous().view(shape)
    return flat, flat.stride(0) if len(flat) > 1 else t.shape[-1]


def fresh(*shapes_and_dtypes):
    return [None if s is None else torch.full(s, NAN, dtype=d) for s, d in shapes_and_dtypes]


def norm(y, total, rstd, x, residual, weight, eps, order):
    (x, x_step), (residual, r_step), weight = as_rows(x), as_rows(residual), weight.contiguous()
    narrow = weight.dtype != torch.float32
    rounds = {"llama": x.dtype != torch.float32, "t5": narrow, "float": False}[order]
    ints = (CODES[x.dtype], CODES[weight.dtype], CODES[y.dtype], rounds, *x.shape, x_step, r_step,
            as_rows(y)[1], as_rows(total)[1])  # fmt: skip
    LIB.emu_rms_norm(pointers(x, residual, weight), pointers(y, total, rstd), numbers(*ints),
                     ctypes.byref(ctypes.c_double(eps)))  # fmt: skip


def rms_norm(x, residual, weight, eps, *, order="llama"):
    narrow = order == "t5" and weight.dtype != torch.float32

    def run():
        made = fresh((x.shape, weight.dtype if narrow else x.dtype),
                     ((0,) if residual is None else x.shape, x.dtype), (x.shape[:-1], torch.float32))  # fmt: skip
        norm(
            made[0], None if residual is None else made[1], made[2], x, residual, weight, eps, order
        )
        return made

    return tuple(scheduled(LIB, run))


def rms_norm_forward_(y, sum, x, residual, weight, eps, order):
    norm(y, sum, None, x, residual, weight, eps, ("llama", "t5", "float")[order])


def rms_norm_forward(x, residual, weight, eps, order):
    return rms_norm(x, residual, weight, eps, order=("llama", "t5", "float")[order])


def rms_norm_(y, sum, x, residual, weight, eps, *, order="llama"):
    norm(y, sum, None, x, residual, weight, eps, order)


def rms_norm_backward(grad_y, grad_sum, x, weight, rstd, of_x, of_weight):
    (dy, dy_step), (dsum, dsum_step), (h, h_step) = map(as_rows, (grad_y, grad_sum, x))
    weight, rstd = weight.contiguous(), rstd.contiguous()
    ints = (
        CODES[x.dtype],
        CODES[weight.dtype],
        CODES[dy.dtype],
        *h.shape,
        dy_step,
        dsum_step,
        h_step,
    )

    def run():
        made = fresh(
            (x.shape if of_x else None, x.dtype),
            (weight.shape if of_weight else None, weight.dtype),
        )
        LIB.emu_rms_norm_grad(
            pointers(dy, dsum if of_x else None, h, weight, rstd), pointers(*made), numbers(*ints)
        )
        return [like.new_empty(0) if t is None else t for t, like in zip(made, (x, weight))]

    return tuple(scheduled(LIB, run))


def gate(made, dout, a, b, act):
    (dout, d_step), (a, a_step), (b, b_step) = map(as_rows, (dout, a, b))
    out_step = a.shape[1] if made[0] is None else as_rows(made[0])[1]
    ints = (CODES[a.dtype], act, *a.shape, d_step, a_step, b_step, out_step)
    LIB.emu_gated_act(pointers(dout, a, b), pointers(*made), numbers(*ints))


def gated_act(a, b, act):
    def run():
        made = fresh((a.shape, a.dtype))
        gate([*made, None, None], None, a, b, act)
        return made

    return scheduled(LIB, run)[0]


def swiglu(gate, up):
    return gated_act(gate, up, 0)


def gated_act_(out, a, b, act):
    gate([out, None, None], None, a, b, act)


def swiglu_(out, gate_, up):
    gate([out, None, None], None, gate_, up, 0)


def gelu_of(approximate):
    return {"tanh": 1, "none": 2}[approximate]


def gated_gelu(a, b, *, approximate="tanh"):
    return gated_act(a, b, gelu_of(approximate))


def gated_gelu_(out, a, b, *, approximate="tanh"):
    gate([out, None, None], None, a, b, gelu_of(approximate))


def gated_act_backward(grad, a, b, act, of_a, of_b):
    def run():
        made = fresh(*((a.shape if wanted else None, a.dtype) for wanted in (of_a, of_b)))
        if of_a or of_b:
            gate([None, *made], grad, a, b, act)
        return [a.new_empty(0) if t is None else t for t in made]

    return tuple(scheduled(LIB, run))


def group_norm(y, mean, rstd, x, weight, bias, residual, eps):
    x, weight, bias = (t.contiguous() for t in (x, weight, bias))
    residual = None if residual is None else residual.contiguous()
    n = numbers(CODES[x.dtype], CODES[weight.dtype], *x.shape)
    LIB.emu_gn1_gelu(pointers(x, residual, weight, bias), pointers(y, mean, rstd), n,
                     ctypes.byref(ctypes.c_double(eps)))  # fmt: skip


def gn1_gelu(x, weight, bias, residual, eps):
    def run():
        made = fresh((x.shape, x.dtype), *[(x.shape[:1], torch.float32)] * 2)
        group_norm(*made, x, weight, bias, residual, eps)
        return made

    return tuple(scheduled(LIB, run))


def gn1_gelu_(y, x, weight, bias, residual, eps):
    group_norm(y, None, None, x, weight, bias, residual, eps)


def gn1_gelu_backward(dy, x, weight, bias, mean, rstd):
    given = [t.contiguous() for t in (dy, x, weight, bias, mean, rstd)]
    n = numbers(CODES[x.dtype], CODES[weight.dtype], *x.shape)

    def run():
        made = fresh((x.shape, x.dtype), *[(weight.shape, weight.dtype)] * 2)
        LIB.emu_gn1_gelu_grad(pointers(*given), pointers(*made), n)
        return made

    return tuple(scheduled(LIB, run))


def long_rows():
    """Longer than a block keeps in registers, and strips of several rows."""
    for dtype, (rows, n) in (
        (torch.float32, (3, 8300)),
        (torch.bfloat16, (2, 8216)),
        (torch.float16, (600, 24)),
    ):
        x, residual, upstream = (torch.randn(rows, n).to(dtype) for _ in range(3))
        leaves = [t.clone().requires_grad_() for t in (x, residual, 1 + torch.rand(n).to(dtype))]
        exact = [t.detach().double().requires_grad_() for t in leaves]
        y, total, _ = ops.rms_norm(*leaves, 1e-5)
        want, want_total, _ = tenfold.reference.rms_norm(*exact, 1e-5)
        step = torch.finfo(dtype).eps
        torch.testing.assert_close(y.double(), want, rtol=3 * step, atol=3 * step)
        grads = torch.autograd.grad((y, total), leaves, (upstream, upstream))
        wide = upstream.double()
        exact_grads = torch.autograd.grad((want, want_total), exact, (wide, wide))
        for g, e in zip(grads, exact_grads):
            torch.testing.assert_close(
                g.double(), e, rtol=20 * step, atol=20 * step * float(e.abs().max())
            )


def check_all():
    small = ("not errors and not registration and not large and not gradcheck and not inductor and not graph and "
             "not many_elements and not is_the_models")  # fmt: skip
    for file in ("test_norm.py", "test_norm_gates.py", "test_norm_group.py"):
        run_tests(file, "-k", f"cpu and {small}")
    long_rows()


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    tenfold.cpu_capabilities = lambda: [tenfold.cpu_capability()]  # none of them is asked
    stand_in((rms_norm, rms_norm_, rms_norm_forward, rms_norm_forward_, rms_norm_backward, swiglu, swiglu_,
              gated_gelu, gated_gelu_, gated_act, gated_act_, gated_act_backward, gn1_gelu, gn1_gelu_,
              gn1_gelu_backward))  # fmt: skip
    for check in sys.argv[1:]:
        torch.manual_seed(0)
        globals()[f"check_{check}"]()
    print("ok")
