# SPDX-License-Identifier: Apache-2.0
"""Runs the tests of traces and rewards on their emulated CUDA kernels: ``emulated_loss_traces.py all``.

Started by test_emulated.py with ASan preloaded. The emulated kernels stand in for the CPU's, so that the
tests of ``tests/ops`` see them through the public ops. Calls run under two thread schedules, whose results must
be the same bits.
"""

from __future__ import annotations

import ctypes
import sys

import torch

import tenfold
from build import build
from emu_calls import (
    CODES,
    numbers,
    pointers,
    ptr,
    row_stride,
    rows_of,
    run_tests,
    scheduled,
    stand_in,
)
from tenfold import ops

LIB = ctypes.CDLL(str(build("kernels_loss_traces", "-shared", "-fPIC")))
NAN = float("nan")


def wide(*tensors):
    return [t.dtype == torch.int64 for t in tensors]


def real(*values):
    return (ctypes.c_double * len(values))(*values)


def call(name, inputs, outputs, ints, doubles=None):
    """``outputs``: (shape, dtype) of each, poisoned; None: a null pointer."""

    def run():
        made = [None if o is None else torch.full(o[0], NAN if o[1].is_floating_point else 77, dtype=o[1])
                for o in outputs]  # fmt: skip
        args = [*map(ptr, (*inputs, *made)), numbers(*ints)]
        getattr(LIB, f"emu_{name}")(*args, *([] if doubles is None else [real(*doubles)]))
        return [x for x in made if x is not None]

    return scheduled(LIB, run)


def trace_token_class(ids, mask, asst, answer, tool, obs, work, eos):
    ids, mask, asst, answer = rows_of(ids), rows_of(mask), asst.contiguous(), answer.contiguous()
    ints = (
        *ids.shape,
        row_stride(ids),
        row_stride(mask),
        *wide(ids, asst, answer),
        tool,
        obs,
        work,
        eos,
    )
    return call("trace_classes", [ids, mask, asst, answer], [(ids.shape, torch.int8)], ints)[0]


def lm_weight(cls, is_pos, beta, omega, lm_on_positive):
    cls = rows_of(cls)
    ints = (*cls.shape, row_stride(cls), lm_on_positive)
    return call(
        "class_weights",
        [cls, is_pos.contiguous()],
        [(cls.shape, torch.float32)],
        ints,
        (beta, omega),
    )[0]


def first_stop(ids, lens, stop_ids):
    ids, lens, stop_ids = rows_of(ids), lens.contiguous(), stop_ids.contiguous()
    ints = (*ids.shape, row_stride(ids), len(stop_ids), *wide(ids, lens, stop_ids))
    return tuple(call("first_stop", [ids, lens, stop_ids], [(lens.shape, torch.int64)] * 2, ints))


def segment_mean(nll, seg, T):
    ints = (*seg.shape, T, *wide(seg), False)
    inputs = [nll.contiguous(), seg.contiguous()]
    return call("segment_mean", inputs, [((len(seg), T), torch.float32)], ints)[0]


def segment_mean_backward(grad, seg, T):
    ints = (*seg.shape, T, *wide(seg), True)
    inputs = [grad.contiguous(), seg.contiguous()]
    return call("segment_mean", inputs, [(seg.shape, torch.float32)], ints)[0]


def last_token_reward_forward(hidden, mask, w_v, pool="last", pooled=True):
    hidden, mask, w_v = rows_of(hidden), rows_of(mask), w_v.contiguous()
    n, length, dim = hidden.shape
    classes = 1 if w_v.dim() == 1 else len(w_v)
    ints = (CODES[hidden.dtype], CODES[w_v.dtype], n, length, dim, classes, *hidden.stride()[:2],
            row_stride(mask), pool == "mean")  # fmt: skip
    outputs = [((n, *w_v.shape[:-1]), torch.float32), ((n, dim), torch.float32) if pooled else None]
    return tuple(call("reward", [hidden, mask, w_v], outputs, ints))


def last_token_reward(hidden, mask, w_v, pool="last"):
    return last_token_reward_forward(hidden, mask, w_v, pool, False)[0]


def last_token_reward_backward(grad, pooled, mask, w_v, like, of_hidden, of_weight, pool="last"):
    grad, pooled, mask, w_v = (
        grad.contiguous(),
        pooled.contiguous(),
        rows_of(mask),
        w_v.contiguous(),
    )
    classes = 1 if w_v.dim() == 1 else len(w_v)
    ints = (CODES[like.dtype], CODES[w_v.dtype], *mask.shape, pooled.shape[1], classes, row_stride(mask),
            pool == "mean")  # fmt: skip
    outputs = [((*mask.shape, pooled.shape[1]), like.dtype) if of_hidden else None,
               (w_v.shape, w_v.dtype) if of_weight else None]  # fmt: skip
    made = iter(call("reward_backward", [grad, pooled, mask, w_v], outputs, ints))
    return tuple(next(made) if wanted else like.new_empty(0) for wanted in (of_hidden, of_weight))


def pairwise_logsigmoid_grads(r_pos, r_neg, margin=None, center=0.0, grads=True):
    r_pos, r_neg = r_pos.contiguous(), r_neg.contiguous()
    margin = None if margin is None else margin.contiguous()

    def run():
        made = [torch.full(s, NAN) for s in ((), *[r_pos.shape] * (3 if grads else 1))]
        LIB.emu_pairs(ptr(r_pos), ptr(r_neg), ptr(margin), pointers(*made, *[None] * (4 - len(made))),
                      numbers(CODES[r_pos.dtype], len(r_pos)), real(center))  # fmt: skip
        return made

    return tuple(scheduled(LIB, run))


def pairwise_logsigmoid(r_pos, r_neg, margin=None, center=0.0):
    return pairwise_logsigmoid_grads(r_pos, r_neg, margin, center, grads=False)


def values_that_cannot_be_reported():
    """Rows without a token are NaN, classes that there are not count nothing, lengths are brought into the row."""
    hidden, mask = torch.randn(3, 4, 8), torch.ones(3, 4, dtype=torch.bool)
    mask[1] = False
    w = torch.randn(8, requires_grad=True)
    leaf = hidden.clone().requires_grad_()
    reward = ops.last_token_reward(leaf, mask, w)
    assert reward.isnan().tolist() == [False, True, False]
    reward.nan_to_num().sum().backward()
    assert w.grad.isnan().all() and not leaf.grad[1].any() and leaf.grad.isfinite().all()
    cls = torch.tensor([[6, -1, 2, 77]], dtype=torch.int8)
    assert ops.lm_weight(cls, mask[1:2, 0], 1.0, 1.0, True).tolist() == [[0, 0, 1, 0]]
    lens = torch.tensor([-3, 99, 2])
    pos, which = ops.first_stop(torch.arange(12).view(3, 4), lens, torch.tensor([6, 11]))
    assert pos.tolist() == [0, 2, 2] and which.tolist() == [-1, 0, -1]


def many_segments():
    """More than shared memory holds."""
    seg = torch.randint(-1, 4200, (2, 600))
    nll = torch.randn(2, 600, requires_grad=True)
    mean = ops.segment_mean(nll, seg, 4100)
    exact = nll.detach().double().requires_grad_()
    want = tenfold.reference.segment_mean(exact, seg, 4100)
    torch.testing.assert_close(mean.double(), want)
    both = (
        torch.autograd.grad(x.square().sum(), y)[0].double()
        for x, y in ((mean, nll), (want, exact))
    )
    torch.testing.assert_close(*both)


def check_all():
    run_tests("test_loss_traces.py", "-k", "cpu and not errors and not registration")
    values = "(values_and_gradients and mean and ((shape3 and dtype1) or (shape4 and not dtype1)))"
    others = (
        "(change_nothing and last) or (test_pair_loss and dtype2) or printed or far_apart or kept"
    )
    run_tests("test_loss_reward.py", "-k", f"cpu and ({values} or {others})")
    values_that_cannot_be_reported()
    many_segments()


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    tenfold.cpu_capabilities = lambda: [tenfold.cpu_capability()]  # none of them is asked
    stand_in((trace_token_class, lm_weight, first_stop, segment_mean, segment_mean_backward, last_token_reward,
              last_token_reward_forward, last_token_reward_backward, pairwise_logsigmoid,
              pairwise_logsigmoid_grads))  # fmt: skip
    for check in sys.argv[1:]:
        torch.manual_seed(0)
        globals()[f"check_{check}"]()
    print("ok")
