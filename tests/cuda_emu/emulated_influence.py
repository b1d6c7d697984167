# SPDX-License-Identifier: Apache-2.0
"""Runs the tests of ``influence`` on its emulated CUDA kernels: ``emulated_influence.py CHECK``.

Started by test_emulated.py with ASan preloaded. The emulated kernels stand in for the CPU's, so that the tests of
``tests/ops`` see them through the public ops. Calls run under two thread schedules, whose results must be the same
bits.
"""

from __future__ import annotations

import ctypes
import sys

import torch

import tenfold
from build import build
from emu_calls import CODES, numbers, pointers, ptr, rows_of, run_tests, scheduled, stand_in
from tenfold import ops, reference

LIB = ctypes.CDLL(str(build("kernels_influence", "-shared", "-fPIC")))
CODES = CODES | {torch.float64: 3}
SCAN, SCAN_BACK, STEP, STEP_BACK = range(4)
STRETCH = [1 << 22]  # numbers of a stretch


def real(t):
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def is_wide(t):
    return t is not None and t.dtype == torch.int64


def strides(t, dims=2):
    return (0,) * dims if t is None else t.stride()[:dims]


def poisoned(shape, dtype):
    return torch.full(shape, float("nan"), dtype=dtype)


def markov(what, factors, order, residual, outputs, *, y=None, y0=None, mask=None, grad=None,
           lengths=None, reduction="sum"):  # fmt: skip
    """``outputs``: (shape, dtype) of out, of_y and of_y0, or None."""
    factors, y, y0, mask, grad = (
        None if t is None else rows_of(t) for t in (factors, y, y0, mask, grad)
    )
    order = order.contiguous()
    (planes, rows, tests), (runs, steps, batch) = factors.shape, order.shape
    ints = (CODES[factors.dtype], what, *strides(factors), is_wide(order), batch, rows,
            reduction == "mean", is_wide(lengths), planes - 1, tests, runs, steps, residual, *strides(y),
            *strides(y0), *strides(mask), *strides(grad), STRETCH[0])  # fmt: skip

    def run():
        made = [None if o is None else poisoned(*o) for o in outputs]
        LIB.emu_markov(pointers(factors, order, lengths, y, y0, mask, grad, *made), numbers(*ints))
        return [x for x in made if x is not None]

    return scheduled(LIB, run)


def states(factors, order):
    return (*order.shape[:2], factors.shape[2]), real(factors)


def markov_scan(factors, order, y0, residual=False, *, lengths=None, reduction="sum"):
    outputs = [states(factors, order), None, None]
    return markov(SCAN, factors, order, residual, outputs, y0=y0, lengths=lengths, reduction=reduction)[0]  # fmt: skip


def markov_scan_backward(grad, factors, order, y0, pred, residual=False, *, lengths=None,
                         reduction="sum"):  # fmt: skip
    outputs = [(factors.shape, factors.dtype), None, (y0.shape, y0.dtype)]
    made = markov(SCAN_BACK, factors, order, residual, outputs, y=pred, y0=y0, grad=grad,
                  lengths=lengths, reduction=reduction)  # fmt: skip
    return tuple(made)


def markov_onestep(factors, order, y, residual=False, y0=None, **more):
    outputs = [states(factors, order), None, None]
    return markov(STEP, factors, order, residual, outputs, y=y, y0=y0, **more)[0]


def markov_onestep_backward(
    grad, factors, order, y, residual=False, y0=None, of_past=False, **more
):
    outputs = [(factors.shape, factors.dtype), (y.shape, y.dtype) if of_past else None,
               (y0.shape, y0.dtype) if of_past and y0 is not None else None]  # fmt: skip
    made = markov(STEP_BACK, factors, order, residual, outputs, y=y, y0=y0, grad=grad, **more)
    return tuple(made + [y.new_empty(0)] * (3 - len(made)))


def tuples(H, G, order_rows, test_rows, hist, outputs, grad=None, residual=False, reduction="sum"):
    """``outputs``: (shape, dtype) of pred, of_H, of_G and of_hist, or None."""
    H, G, hist = map(rows_of, (H, G, hist))
    order_rows, test_rows = order_rows.contiguous(), test_rows.contiguous()
    grad = None if grad is None else grad.contiguous()
    ints = (CODES[H.dtype], *strides(H), *strides(G), is_wide(order_rows), order_rows.shape[1],
            H.shape[1], reduction == "mean", is_wide(test_rows), H.shape[0] - 1, G.shape[1], H.shape[2],
            len(test_rows), hist.stride(0), residual)  # fmt: skip

    def run():
        made = [None if o is None else poisoned(*o) for o in outputs]
        tensors = (H, G, order_rows, test_rows, hist, grad, *made)
        LIB.emu_tuples(pointers(*tensors), numbers(*ints))
        return [x for x in made if x is not None]

    return scheduled(LIB, run)


def markov_onestep_tuples(H, G, order_rows, test_rows, hist, **more):
    outputs = [(test_rows.shape, real(H)), None, None, None]
    if len(test_rows) == 0:  # its null pointer would ask for gradients
        return poisoned(*outputs[0])
    return tuples(H, G, order_rows, test_rows, hist, outputs, **more)[0]


def markov_onestep_tuples_backward(
    grad, H, G, order_rows, test_rows, hist, of_H, of_G, of_hist, **more
):
    wanted = ((H, of_H), (G, of_G), (hist, of_hist))
    outputs = [None, *((x.shape, x.dtype) if of else None for x, of in wanted)]
    made = iter(tuples(H, G, order_rows, test_rows, hist, outputs, grad=grad, **more))
    return tuple(next(made) if of else x.new_empty(0) for x, of in wanted)


def vectors(*tensors):
    """Whether their rows are whole vectors of 16 bytes."""
    return all(
        t.data_ptr() % 16 == 0 and all(s * t.element_size() % 16 == 0 for s in (*t.stride()[:-1], t.shape[-1]))
        for t in tensors
    )  # fmt: skip


def outer_dot(J, X, J2, X2, *, paired=False):
    if J.dim() == 2:
        return outer_dot(J[None], X[None], J2[None], X2[None], paired=True)[0]
    J, X, J2, X2 = map(rows_of, (J, X, J2, X2))
    (n, t, v), (m, s, d) = J.shape, (*J2.shape[:2], X.shape[2])
    ints = (CODES[J.dtype], n, t, m, s, v, d, paired, vectors(J, J2), vectors(X, X2),
            *(x for tensor in (J, X, J2, X2) for x in strides(tensor)))  # fmt: skip

    def run():
        out = poisoned((n,) if paired else (n, m), torch.float32)
        LIB.emu_outer_dot(pointers(J, X, J2, X2), ptr(out), numbers(*ints))
        return out

    return scheduled(LIB, run)


def ids_that_cannot_be_reported():
    """Training examples that there are not count as none, lengths are brought into range, test examples give NaN."""
    factors, y0 = torch.randn(2, 3, 40), torch.randn(2, 1, 40)
    order = torch.randint(0, 3, (2, 5, 3))
    wild = order.clone()
    wild[0, 1, 2], wild[1, 4, 0], wild[1, 0, 1] = 3, -7, 1 << 40
    tame = torch.where((wild < 0) | (wild > 2), -1, wild)
    leaves = [x.clone().requires_grad_() for x in (factors, factors)]
    lengths = torch.tensor([9, -3])
    got, want = (
        ops.markov_scan(leaf, ids, y0, True, lengths=n)
        for leaf, ids, n in zip(leaves, (wild, tame), (lengths, lengths.clamp(0, 5)))
    )
    assert torch.equal(got, want) and not got[1].any()
    a, b = (torch.autograd.grad(y.sum(), leaf)[0] for y, leaf in zip((got, want), leaves))
    assert torch.equal(a, b)
    H, G = torch.randn(2, 3, 8, requires_grad=True), torch.randn(2, 4, 8, requires_grad=True)
    rows, tests = torch.tensor([[0, 5], [1, 2]]), torch.tensor([1, 4])
    pred = ops.markov_onestep_tuples(H, G, rows, tests, torch.ones(2, 1))
    assert pred.isnan().tolist() == [False, True]
    pred.nan_to_num().sum().backward()
    assert H.grad[:, 0].any() and not H.grad[:, 1:].any() and not G.grad[:, [0, 2, 3]].any()


def long_runs():
    """Several stretches, and more training examples than a block of the sums owns."""
    for n, dtype in ((1, torch.float32), (2, torch.float64)):
        made = torch.Generator().manual_seed(n)
        factors = (0.1 * torch.randn(n + 1, 500, 40, generator=made)).to(dtype)
        order = torch.randint(-1, 500, (2, 23, 5), generator=made)
        y0 = torch.randn(2, n, 40, generator=made).to(dtype)
        lengths = torch.tensor([23, 12])
        leaves = [x.clone().requires_grad_() for x in (factors, factors)]
        for STRETCH[0] in (1, 1500, 1 << 22):
            got = ops.markov_scan(leaves[0], order, y0, True, lengths=lengths)
            want = reference.markov_scan(leaves[1], order, y0, True, lengths=lengths)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
            a, b = (
                torch.autograd.grad(y.square().sum(), x)[0] for y, x in zip((got, want), leaves)
            )
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def check_markov():
    shapes = "shape1 or shape3 or shape6 or shape7 or shape8 or shape9 or shape10"
    values = f"(definition and (({shapes}) and dtype0 or shape2 and dtype1))"
    others = (
        "(closed or one_step_is or ragged or names or layouts or nan_without or (float64 and 2))"
    )
    run_tests("test_influence.py", "-k", f"cpu and ({values} or {others})")
    ids_that_cannot_be_reported()
    long_runs()


def check_products():
    few = "(Tuples and not errors and not registration)"
    dots = "(OuterDot and not errors and not registration)"
    run_tests("test_influence_tuples.py", "-k", f"cpu and ({few} or {dots})")


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    tenfold.cpu_capabilities = lambda: [tenfold.cpu_capability()]  # none of them is asked
    stand_in((markov_scan, markov_scan_backward, markov_onestep, markov_onestep_backward,
              markov_onestep_tuples, markov_onestep_tuples_backward, outer_dot))  # fmt: skip
    for check in sys.argv[1:]:
        torch.manual_seed(0)
        globals()[f"check_{check}"]()
    print("ok")
