# SPDX-License-Identifier: Apache-2.0
"""Runs the tests of ``loss`` on its emulated CUDA kernels: ``emulated_loss.py CHECK``.

Started by test_emulated.py with ASan preloaded. The emulated kernels stand in for the CPU's, so that the
tests of ``tests/ops`` see them through the public ops. Calls run under two thread schedules, whose results must
be the same bits.
"""

from __future__ import annotations

import ctypes
import sys
import tempfile

import torch

import tenfold
from build import build
from emu_calls import (
    CODES,
    OPS,
    far_apart,
    numbers,
    pointers,
    ptr,
    row_stride,
    rows_of,
    run_tests,
    scheduled,
    shifted,
    stand_in,
)
from tenfold import reference
from tenfold.ops import loss as ops
from tenfold.testing import assert_close_to_ref

sys.path.insert(0, str(OPS))
import test_sequence_nll as nll
from linear_loss_cases import OPTIONS, compare, eager_cross_entropy

LIB = ctypes.CDLL(str(build("kernels_loss", "-shared", "-fPIC")))


def sizes(logits, ids):
    return numbers(CODES[logits.dtype], *logits.shape, row_stride(logits), ids.dtype == torch.int64)


def selective_logprob(logits, ids, temperature=1.0):
    logits, ids = rows_of(logits), ids.contiguous()

    def run():
        out = [torch.full(ids.shape, float("nan")) for _ in range(3)]
        LIB.emu_selective_logprob(ptr(logits), ptr(ids), pointers(*out), sizes(logits, ids),
                                  ctypes.c_double(1 / temperature))  # fmt: skip
        return out

    return tuple(scheduled(LIB, run))


def selective_logprob_backward(of_logp, of_lse, of_entropy, logits, ids, lse, entropy, temperature):
    logits, ids = rows_of(logits), ids.contiguous()
    grads = [None if g is None else g.contiguous() for g in (of_logp, of_lse, of_entropy)]

    def run():
        out = logits.new_full(logits.shape, float("nan"))
        LIB.emu_selective_logprob_backward(ptr(logits), ptr(ids), pointers(*grads, lse, entropy),
                                           ptr(out), sizes(logits, ids),
                                           ctypes.c_double(1 / temperature))  # fmt: skip
        return out

    return scheduled(LIB, run)


def sequence(logits, labels, ignore):
    """logits and labels as kernels take them, and their sizes."""
    logits, labels = rows_of(logits), labels.contiguous()
    strides = logits.stride()[:2] if logits.numel() else (0, 0)
    return logits, labels, numbers(CODES[logits.dtype], *logits.shape, *strides, labels.dtype == torch.int64,
                                   ignore)  # fmt: skip


def sequence_nll_forward(logits, labels, ignore_index=-100, with_lse=True):
    logits, labels, sizes = sequence(logits, labels, ignore_index)

    def run():
        total = torch.full((len(logits),), float("nan"))
        count = torch.full((len(logits),), -7)
        lse = torch.full(logits.shape[:2], float("nan")) if with_lse else None
        places = ptr(total), ptr(count), ptr(lse)
        LIB.emu_sequence_nll(ptr(logits), ptr(labels), *places, sizes)
        return [total, count, lse] if with_lse else [total, count]

    return tuple(scheduled(LIB, run))


def sequence_nll(logits, labels, ignore_index=-100):
    return sequence_nll_forward(logits, labels, ignore_index, False)


def sequence_nll_backward(grad, logits, labels, lse, ignore_index=-100):
    logits, labels, sizes = sequence(logits, labels, ignore_index)
    grad, lse = grad.contiguous(), lse.contiguous()

    def run():
        out = logits.new_full(logits.shape, float("nan"))
        LIB.emu_sequence_nll_backward(ptr(logits), ptr(labels), ptr(grad), ptr(lse), ptr(out), sizes)  # fmt: skip
        return out

    return scheduled(LIB, run)


LIMITS = (8192, 4096, 1 << 26, 1 << 26, 256, 128)  # of LceLimits


class Linear:
    """Arguments that the linear ops share, and the limits under test."""

    limits = LIMITS

    def __init__(self, hidden, weight, target, *, row_weight=None, ignore_index=-100, ids=False,
                 reduction="mean", softcap=0.0, z_loss=0.0, temperature=1.0):  # fmt: skip
        self.hidden, self.weight = rows_of(hidden), rows_of(weight)
        self.target = target.contiguous()
        self.row_weight = None if row_weight is None else row_weight.contiguous()
        strides = [t.stride(0) if len(t) else 0 for t in (self.hidden, self.weight)]
        n, h = hidden.shape
        self.ints = numbers(CODES[hidden.dtype], n, h, len(weight), *strides,
                            target.dtype == torch.int64, ids, ignore_index, reduction == "none",
                            reduction == "mean", *self.limits)  # fmt: skip
        self.floats = (ctypes.c_double * 3)(softcap, z_loss, temperature)
        self.scalar = reduction != "none" and not ids

    def inputs(self):
        return [ptr(t) for t in (self.hidden, self.weight, self.target, self.row_weight)]

    def forward(self, ids=False):
        def run():
            rows = [torch.full(self.target.shape, float("nan")) for _ in range(3)]
            loss = torch.full(() if self.scalar else self.target.shape, float("nan"))
            out = [None, *rows] if ids else [loss, rows[0], None, None]
            out += [None, None]
            LIB.emu_linear_forward(*self.inputs(), pointers(*out), self.ints, self.floats)
            return [rows[1], rows[0], rows[2]] if ids else out[:2]

        return tuple(scheduled(LIB, run))

    def weighted(self):
        def run():
            rows = [torch.full(self.target.shape, float("nan")) for _ in range(2)]
            sums = [torch.tensor(float("nan")) for _ in range(2)]
            out = [sums[0], rows[1], None, None, rows[0], sums[1]]
            LIB.emu_linear_forward(*self.inputs(), pointers(*out), self.ints, self.floats)
            return [*sums, *rows]

        return tuple(scheduled(LIB, run))

    def backward(self, of_hidden, of_weight, *rows, of_nll=None, one=False):
        rows = [None if t is None else t.contiguous() for t in (*rows, of_nll)]

        def run():
            grads = [x.new_full(x.shape if wanted else (0,), float("nan"))
                     for x, wanted in ((self.hidden, of_hidden), (self.weight, of_weight))]  # fmt: skip
            places = [ptr(g) if w else None for g, w in zip(grads, (of_hidden, of_weight))]
            LIB.emu_linear_backward(*self.inputs(), pointers(*rows), ctypes.c_int64(one), *places,
                                    self.ints, self.floats)  # fmt: skip
            return grads

        return tuple(scheduled(LIB, run))


def linear_cross_entropy(*args, **options):
    return Linear(*args, **options).forward()


def linear_cross_entropy_grads(hidden, weight, target, of_hidden, of_weight, **options):
    call = Linear(hidden, weight, target, **options)
    loss, lse = call.forward()
    return loss, lse, *call.backward(of_hidden, of_weight, lse, *[None] * 5, one=True)


def linear_cross_entropy_backward(of_loss, of_lse, hidden, weight, target, lse, of_hidden, of_weight,
                                  **options):  # fmt: skip
    call = Linear(hidden, weight, target, **options)
    return call.backward(of_hidden, of_weight, lse, None, of_loss, None, of_lse, None)


def linear_logprob(hidden, weight, ids, temperature=1.0):
    return Linear(hidden, weight, ids, ids=True, temperature=temperature).forward(ids=True)


def linear_logprob_backward(of_logp, of_lse, of_entropy, hidden, weight, ids, lse, entropy, of_hidden,
                            of_weight, temperature):  # fmt: skip
    call = Linear(hidden, weight, ids, ids=True, temperature=temperature)
    return call.backward(of_hidden, of_weight, lse, entropy, None, of_logp, of_lse, of_entropy)


def weighted(hidden, weight, targets, w, chunk=0, *, ignore_index=-100):
    call = Linear(hidden, weight, targets, row_weight=w, ignore_index=ignore_index, reduction="sum")
    if chunk:  # as the registration does it
        call.ints[11] = min(LIMITS[0], -(-chunk // 256) * 256)
    return call


def weighted_linear_ce_forward(*args, **options):
    return weighted(*args, **options).weighted()


def weighted_linear_ce(*args, grad_of="loss_sum", **options):
    return weighted(*args, **options).weighted()[:3]


def weighted_linear_ce_backward(of_sum, of_nll, hidden, weight, targets, w, lse, of_hidden, of_weight, chunk=0,
                                **options):  # fmt: skip
    call = weighted(hidden, weight, targets, w, chunk, **options)
    return call.backward(of_hidden, of_weight, lse, None, of_sum, *[None] * 3, of_nll=of_nll)


def weighted_linear_ce_grads(hidden, weight, targets, w, of_hidden, of_weight, chunk=0, **options):
    call = weighted(hidden, weight, targets, w, chunk, **options)
    made = call.weighted()
    return *made, *call.backward(of_hidden, of_weight, made[3], *[None] * 5, one=True)


def check_logprob():
    run_tests("test_loss.py", "-k", "cpu and not errors and not registration")
    sequences()


def sequences():
    cpu = torch.device("cpu")
    shapes = [(1, 1, 1), (3, 5, 7), (2, 9, 1000), (2, 3, 20001), (0, 4, 5), (3, 0, 5)]
    for turn, shape in enumerate(shapes):
        nll.test_values_and_gradients(shape, list(CODES)[turn % 3], cpu)
    nll.test_another_ignore_index_and_rows_never_read(cpu)
    nll.test_slices_are_read_where_they_lie(cpu)
    nll.test_sequences_alone_and_special_values(cpu)
    logits, labels = torch.randn(2, 3, 7), torch.tensor([[1, 7, -100], [-5, 1 << 40, 2]])
    x = logits.requires_grad_()
    total, count = ops.sequence_nll(x, labels)  # what is out of range gives nothing
    assert count.tolist() == [2, 3]
    want, _ = reference.sequence_nll(logits, labels.where((labels >= 0) & (labels < 7), -100))
    torch.testing.assert_close(total, want)
    grad, expected = (torch.autograd.grad(t.sum(), x)[0] for t in (total, want))
    torch.testing.assert_close(grad, expected)


def check_logprob_alignment():
    for dtype in CODES:
        logits, ids = torch.randn(3, 4104).to(dtype), torch.tensor([0, 4103, 77])
        want = ops.selective_logprob(logits, ids)
        mine = logits.clone().requires_grad_()
        sum(x.sum() for x in ops.selective_logprob(mine, ids)).backward()
        for lag in range(1, 9):  # odd strides and offsets: the same bits
            wide = torch.cat([logits.new_zeros(3, lag), logits], 1)[:, lag:]
            for w, g in zip(want, ops.selective_logprob(wide, ids), strict=True):
                assert torch.equal(w, g)
            there = shifted(wide).requires_grad_()
            sum(x.sum() for x in ops.selective_logprob(there, ids)).backward()
            assert torch.equal(there.grad, mine.grad)
        for n in range(1, 18):  # an output row of every alignment
            some = logits[:, :n].contiguous().requires_grad_()
            ops.selective_logprob(some, ids % n)[1].sum().backward()
            want = logits[:, :n].float().softmax(-1)
            torch.testing.assert_close(some.grad.float(), want, atol=4e-3, rtol=4e-3)


def check_linear_limits():
    """Chunks of rows, blocks, segments and ranges of the vocabulary: one of each, or several."""
    raw = torch.ops.tenfold
    options = {"softcap": 3.0, "z_loss": 0.01, "temperature": 0.7, "reduction": "sum"}
    segments, few, many = 256, (1 << 26, 1 << 26, 1, 2), (1 << 26, 1 << 26, 9, 2)
    for dtype in CODES:
        hidden, weight = torch.randn(150, 40).to(dtype), (torch.randn(530, 40) / 3).to(dtype)
        target = torch.randint(0, 530, (150,))
        target[::7] = -100
        hidden[::7] = float("nan")
        results = []
        for limits in (
            (8192, segments, *few),
            (8192, segments, *many),
            (128, segments, 1, 1, 9, 2),
        ):
            Linear.limits = limits
            results.append(
                raw.linear_cross_entropy_grads(hidden, weight, target, True, True, **options)
            )
        one, split, several = results
        assert all(torch.equal(a, b) for a, b in zip(one, split))
        assert all(torch.equal(a, b) for a, b in zip(one[:3], several))
        exact = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
        loss, lse = reference.linear_cross_entropy(*exact, target, **options)
        plain = [x.clone().requires_grad_() for x in (hidden.nan_to_num(), weight)]
        simple = eager_cross_entropy(*plain, target, **options)
        low = [None, None, *torch.autograd.grad(simple[0], plain)]
        want = [loss.detach(), lse.detach(), *torch.autograd.grad(loss, exact)]
        for result in (one, several):
            for got, w, simple in zip(result, want, low):
                assert_close_to_ref(got, w, simple)


def check_linear_values():
    """Within a tile, at its end and past it, in whole vectors and not; every option once."""
    shapes = [(17, 31, 47), (33, 264, 70), (130, 48, 65), (40, 33, 257), (20, 64, 130)]
    options = [OPTIONS[name] for name in ("weights", "everything", "softcap", "z_loss", "ignore")]
    for turn, (shape, chosen) in enumerate(zip(shapes, options)):
        compare(shape, list(CODES)[turn % 3], torch.device("cpu"), samples=1, **chosen)
    for dtype, ups in zip(CODES, ((True, True), (None, True), (True, None))):
        compare(
            (60, 40, 90), dtype, torch.device("cpu"), "logprob", ups, samples=1, temperature=0.8
        )


def check_linear_rows():
    run_tests("test_linear_cross_entropy.py", "-k", "cpu and (closed or outside or no_row_counts or "
              "over_the_weights or (infinity and dtype1 and options0))")  # fmt: skip


def check_linear_programs():
    run_tests("test_linear_loss_programs.py", "-k", "cpu and (only_what or other_kinds or "
              "(may_run_again and dtype1) or lowers_the_loss)")  # fmt: skip
    run_tests("test_loss_linear.py", "-k", "cpu and (of_one_call or nothing_counts)")


def check_weighted():
    run_tests("test_loss_weighted.py", "-k", "cpu and (printed or cost_nothing or all_zero or halves or autocast "
              "or (every_chunk and dtype0) or (and_gradients and 0.6 and shape1 and dtype1))")  # fmt: skip


def softcap_slope():
    """The slope of a softcap keeps its digits where the cap saturates."""
    x, weight = torch.linspace(-30, 30, 241)[:, None], torch.tensor([[1.0], [0.0]])
    grads = []
    for op, dtype in ((ops, torch.float32), (reference, torch.float64)):
        leaf = x.to(dtype).requires_grad_()
        target = torch.ones(241, dtype=torch.int64)
        loss, _ = op.linear_cross_entropy(leaf, weight.to(dtype), target, softcap=4.0, reduction="sum")  # fmt: skip
        grads.append(torch.autograd.grad(loss, leaf)[0].double())
    torch.testing.assert_close(*grads, rtol=3e-6, atol=0)


def target_out_of_range():
    """Cannot be reported by the device: the loss and the gradients are NaN, and nothing else is read."""
    hidden, weight = torch.randn(5, 8), torch.randn(11, 8)
    for wrong in (11, -1, 2**31 + 3, -(2**40)):
        args = [x.clone().requires_grad_() for x in (hidden, weight)]
        target = torch.tensor([0, 1, wrong, -100, 4])
        loss, lse = ops.linear_cross_entropy(*args, target, reduction="none")
        assert loss.isnan().tolist() == [False, False, True, False, False]
        assert lse.isfinite().all()
        grads = torch.autograd.grad(loss.nan_to_num().sum(), args)
        assert grads[0].isnan().any(-1).tolist() == [False, False, True, False, False]
        assert grads[1].isnan().all()


def offsets_beyond_32_bits():
    """Both inputs in turn, and the logits of selective_logprob."""
    hidden, weight = torch.randn(3, 40).bfloat16(), torch.randn(3, 40).bfloat16()
    target = torch.tensor([2, 0, 1])
    raw = torch.ops.tenfold
    with tempfile.TemporaryDirectory() as folder:
        for op, one, args in (
            (raw.linear_cross_entropy_grads, hidden, lambda x: (x, weight, target, True, True)),
            (raw.linear_cross_entropy_grads, weight, lambda x: (hidden, x, target, True, True)),
            (raw.selective_logprob, hidden, lambda x: (x, target)),
        ):
            far = far_apart(one, folder)
            for got, want in zip(op(*args(far)), op(*args(one)), strict=True):
                assert torch.equal(got, want)


def check_linear_edges():
    softcap_slope()
    offsets_beyond_32_bits()
    target_out_of_range()


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    tenfold.cpu_capabilities = lambda: [tenfold.cpu_capability()]  # none of them is asked
    stand_in((selective_logprob, selective_logprob_backward, linear_cross_entropy, linear_cross_entropy_grads,
              linear_cross_entropy_backward, linear_logprob, linear_logprob_backward, sequence_nll,
              sequence_nll_forward, sequence_nll_backward, weighted_linear_ce, weighted_linear_ce_forward,
              weighted_linear_ce_backward, weighted_linear_ce_grads))  # fmt: skip
    for check in sys.argv[1:]:
        torch.manual_seed(0)
        globals()[f"check_{check}"]()
    print("ok")
