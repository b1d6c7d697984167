# SPDX-License-Identifier: Apache-2.0
"""Runs the emulated CUDA kernels of ``rl`` through the test bodies of ``tests/ops/test_rl.py``.

``emulated_rl.py CHECK``, started by test_emulated.py with ASan preloaded. Calls run under two thread
schedules, whose results must be the same bits.
"""

from __future__ import annotations

import ctypes
import itertools
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from build import build
from emu_calls import numbers, ptr, scheduled
from tenfold import reference
from tenfold.ops.rl.segments import NO_LIMIT

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "ops"))
import test_rl as bodies

LIB = ctypes.CDLL(str(build("kernels_rl", "-shared", "-fPIC")))
SEGMENT_BY = ("fixed", "lengths", "macro_prefix", "response_prefix", "token_rise", "token_rise_ref",
              "starts")  # fmt: skip
POOL_BY = ("sum", "equal", "unit", "position", "position_early")
KL_BY = ("k1", "k2", "k3")
RATIO_BY = ("token", "joint", "geo_mean")


def real(*values):
    return (ctypes.c_double * len(values))(*values)


def flat(x):
    return None if x is None else x.contiguous()


def launch(name, cu, like, inputs, outputs, more=(), doubles=()):
    """Fresh ``outputs``, poisoned, written by the kernels of ``name``; None: a null pointer."""
    rows, width = like.shape if cu is None else (cu.shape[0] - 1, like.shape[0])
    layout = (rows, width, like.numel(), cu is not None, cu is not None and cu.dtype == torch.int64)
    inputs = [flat(x) for x in (cu, *inputs)]
    more = numbers(*layout, *(int(x) for x in more))

    def run():
        made = [
            None if out is None
            else torch.full(*out[:1], float("nan") if out[1].is_floating_point else 113, dtype=out[1])
            for out in outputs
        ]  # fmt: skip
        tensors = [*map(ptr, inputs), *map(ptr, made)]
        args = [(ctypes.c_void_p * len(tensors))(*(t.value for t in tensors)), more]
        getattr(LIB, f"emu_{name}")(*args, *([real(*doubles)] if doubles else []))
        return [x for x in made if x is not None]

    return scheduled(LIB, run)


def rows_of(x, cu):
    return x.shape[0] if cu is None else cu.shape[0] - 1


def wide(x):
    return x is not None and x.dtype == torch.int64


def segment(by, mask, *, lengths=None, nll=None, starts=None, isolate=False, holes="bridge",
            recycle=False, n=1, cu=None):  # fmt: skip
    as_bytes = [None if x is None else (x != 0).to(torch.uint8) for x in (mask, starts)]
    num = 0 if lengths is None else lengths.shape[1]
    outputs = [(mask.shape, torch.int32), ((rows_of(mask, cu),), torch.int32)]
    more = (SEGMENT_BY.index(by), isolate, holes == "split", recycle, n, num)
    nll = None if nll is None else nll.float()
    inputs = [as_bytes[0], lengths, nll, as_bytes[1]]
    return tuple(launch("segments", cu, mask, inputs, outputs, more))


def macro_segment_fixed(mask, n, isolate_last=False, *, holes="bridge", cu_seqlens=None):
    n = NO_LIMIT if n is None else n
    return segment("fixed", mask, n=n, isolate=isolate_last, holes=holes, cu=cu_seqlens)


def macro_segment_lengths(mask, lengths, tail="one_segment", *, isolate_last=False, holes="bridge",
                          cu_seqlens=None):  # fmt: skip
    return segment("lengths", mask, lengths=lengths, recycle=tail == "recycle",
                   isolate=isolate_last, holes=holes, cu=cu_seqlens)  # fmt: skip


def macro_segment_ppl(nll, mask, mode="macro_prefix", *, holes="bridge", cu_seqlens=None):
    return segment(mode, mask, nll=nll, holes=holes, cu=cu_seqlens)


def macro_segment_starts(starts, mask, *, holes="bridge", cu_seqlens=None):
    return segment("starts", mask, starts=starts, holes=holes, cu=cu_seqlens)


def macro_pool(x, seg, num, weight="equal", *, cu_seqlens=None):
    more = (wide(seg), num, POOL_BY.index(weight), False)
    outputs = [((rows_of(seg, cu_seqlens), num), torch.float32)]
    return launch("pool", cu_seqlens, seg, [seg, x.float()], outputs, more)[0]


def macro_pool_backward(grad, seg, weight, cu_seqlens=None):
    more = (wide(seg), grad.shape[1], POOL_BY.index(weight), True)
    return launch("pool", cu_seqlens, seg, [seg, grad], [(seg.shape, torch.float32)], more)[0]


def macro_gae(value, reward, nseg, length=None, gamma=1.0, lam=0.95, bootstrap=None):
    inputs = [nseg, None, value, reward, bootstrap, length]
    outputs = [(value.shape, torch.float32)] * 2
    return tuple(launch("gae", None, value, inputs, outputs, (False, wide(nseg)), (gamma, lam)))


def gae(value, reward, mask, gamma=1.0, lam=0.95, bootstrap=None, *, cu_seqlens=None):
    inputs = [None, mask.to(torch.uint8), value, reward, bootstrap, None]
    outputs = [(value.shape, torch.float32)] * 2
    return tuple(launch("gae", cu_seqlens, value, inputs, outputs, (True, False), (gamma, lam)))


def ma_ppo_prepare(old, ref, value, score, seg, nseg, beta=0.05, gamma=1.0, lam=0.95, score_clip=2.5,
                   sigma="equal", reward_reduce="sum", discount="per_macro", kl="k1", bootstrap=None,
                   *, cu_seqlens=None):  # fmt: skip
    more = (wide(seg), wide(nseg), POOL_BY.index(sigma), reward_reduce == "sigma", KL_BY.index(kl),
            discount == "per_token")  # fmt: skip
    outputs = [(seg.shape, torch.float32)] * 4 + [(score.shape, torch.float32)]
    inputs = [seg, nseg, old, ref, value, score, bootstrap]
    made = launch("prepare", cu_seqlens, seg, inputs, outputs, more, (beta, score_clip, gamma, lam))
    return tuple(made)


def segment_check(seg, nseg, limit, cu_seqlens=None):
    outputs = [((rows_of(seg, cu_seqlens),), torch.uint8)]
    return launch("check", cu_seqlens, seg, [seg, nseg], outputs, (wide(seg), wide(nseg), limit))[0]


class Loss(torch.autograd.Function):
    """A loss with its slopes; also asserts that the form without slopes has the same bits."""

    @staticmethod
    def forward(ctx, x, name, stats, rest, cu, more, doubles):
        outputs = [(x.shape, torch.float32), ((), torch.float32), ((stats,), torch.float32),
                   ((rows_of(x, cu),), torch.float64)]  # fmt: skip
        inputs = [rest[0], x.detach(), *rest[1:]]
        slope, loss, found, scale = launch(name, cu, x, inputs, outputs, more, doubles)
        bare = [None, *outputs[1:3], None]
        bodies.same(tuple(launch(name, cu, x, inputs, bare, more, doubles)), (loss, found))
        ctx.save_for_backward(slope, scale)
        ctx.cu = cu
        ctx.mark_non_differentiable(found)
        return loss, found

    @staticmethod
    def backward(ctx, grad, _):
        slope, scale = ctx.saved_tensors
        out = [(slope.shape, torch.float32)]
        made = launch("slope", ctx.cu, slope, [slope, grad, scale], out)[0]
        return (made, *[None] * 6)


def ma_ppo_policy_loss(new, old, adv, seg, eps_lo=0.2, eps_hi=0.2, ratio="token", agg="token_mean",
                       denom=0.0, *, weight="macro", cu_seqlens=None):  # fmt: skip
    more = (wide(seg), RATIO_BY.index(ratio), weight == "length", agg != "token_mean")
    return Loss.apply(new, "policy", 6, (seg, old, adv), cu_seqlens, more, (eps_lo, eps_hi, denom))


def ma_ppo_value_loss(new, old, ret, mask, clip=0.2, agg="token_mean", denom=0.0, *,
                      cu_seqlens=None):  # fmt: skip
    rest = (mask.to(torch.uint8), old, ret)
    return Loss.apply(new, "value", 3, rest, cu_seqlens, (agg != "token_mean",), (clip, denom))


EMULATED = SimpleNamespace(**{
    name: globals()[name]
    for name in (
        "macro_segment_fixed", "macro_segment_lengths", "macro_segment_ppl", "macro_segment_starts",
        "macro_pool", "macro_gae", "gae", "ma_ppo_prepare", "ma_ppo_policy_loss",
        "ma_ppo_value_loss",
    )
})  # fmt: skip
bodies.ops = EMULATED
SHAPES = [(1, 1), (3, 7), (2, 301), (0, 5), (3, 0), (2, 1100)]
HOLES = ("bridge", "split")


def check_segments():
    tests = bodies.TestSegments()
    for shape, holes in itertools.product(SHAPES, HOLES):
        for n, isolated in ((1, False), (2, True), (5, True), (1000, False)):
            tests.test_fixed(shape, n, isolated, holes, "cpu")
        for tail, count in itertools.product(("one_segment", "recycle"), (0, 1, 6)):
            tests.test_lengths(shape, tail, count, holes, "cpu")
        for mode in SEGMENT_BY[2:6]:
            tests.test_ppl(shape, mode, torch.float32, holes, "cpu")
        tests.test_starts(shape, holes, "cpu")
        bodies.test_packed_segments(shape, holes, "cpu")
    mask = torch.ones(
        1, 3000, dtype=torch.bool
    )  # more lengths, and tokens, than shared memory takes
    lengths = torch.ones(1, 4500, dtype=torch.int32)
    lengths[0, ::7] = 2
    got = macro_segment_lengths(mask, lengths)
    bodies.same(got, reference.macro_segment_lengths(mask, lengths))
    nll = torch.rand(1, 3000)
    got = macro_segment_ppl(nll, mask, holes="split")
    bodies.same(got, reference.macro_segment_ppl(nll, mask))
    bad = macro_segment_lengths(mask[:, :9], torch.tensor([[0, -5, 3]], dtype=torch.int32))
    want = reference.macro_segment_lengths(mask[:, :9], torch.tensor([[1, 1, 3]]))
    bodies.same(bad, want)  # lengths below 1 count as 1


def check_returns():
    for shape in SHAPES:
        for weight in POOL_BY:
            bodies.test_pool(shape, weight, "cpu")
        for per_token in (False, True):
            bodies.test_gae_of_macro_actions(shape, per_token, "cpu")
        bodies.test_packed_returns(shape, "cpu")
    bodies.test_gae_of_tokens("cpu")
    for shape, weight in itertools.product(SHAPES, POOL_BY):  # backward of the pooling
        batch = bodies.Batch(shape, "cpu")
        seg, _ = batch.segments()
        x = torch.zeros(shape, requires_grad=True)
        want = reference.macro_pool(x, seg, shape[1] + 2, weight)
        grad = torch.randn(want.shape)
        (back,) = torch.autograd.grad(want, x, grad) if shape[0] else (x.detach(),)
        bodies.same(macro_pool_backward(grad, seg.long(), weight), back, rtol=1e-5, atol=1e-6)


# A launch costs the same for all shapes, so options take turns where their product would add nothing.


def check_prepare():
    for turn, shape in enumerate(SHAPES):
        for reduce, discount in (
            (("sum", "per_macro"), ("sigma", "per_token")),
            (("sum", "per_token"), ("sigma", "per_macro")),
        )[turn % 2]:
            bodies.test_prepare(shape, reduce, discount, "cpu")
    bodies.test_padding_rows_and_order("cpu")


def check_losses():
    for turn, shape in enumerate(SHAPES):
        for i, ratio in enumerate(bodies.RATIOS):
            bodies.test_policy_loss(shape, ratio, bodies.AGGREGATIONS[(turn + i) % 2], "cpu")
        bodies.test_value_loss(shape, bodies.AGGREGATIONS[turn % 2], "cpu")
        bodies.test_packed_losses(shape, bodies.AGGREGATIONS[(turn + 1) % 2], "cpu")
    bodies.test_no_valid_token("cpu")


def check_long():
    """Rows beyond shared memory, packed and padded, and of several parts."""
    batch = bodies.Batch((2, 8700), "cpu", seed=3)
    seg, nseg = reference.macro_segment_fixed(batch.mask, 700)
    x = [batch.rows(0.3) for _ in range(3)]
    score = batch.vector()
    packed = bodies.Packed(batch)
    flat_x, ids = [packed(t) for t in x], packed(seg)
    more = {"cu_seqlens": packed.cu}
    want = reference.ma_ppo_prepare(*x, score, seg, nseg, sigma="position")
    bodies.same(ma_ppo_prepare(*x, score, seg, nseg, sigma="position"), want, rtol=1e-4, atol=1e-5)
    got = ma_ppo_prepare(*flat_x, score, ids, nseg, sigma="position", **more)
    bodies.same(got, (*map(packed, want[:4]), want[4]), rtol=1e-4, atol=1e-5)
    pooled = reference.macro_pool(x[0], seg, 40, "position")
    bodies.same(macro_pool(x[0], seg, 40, "position"), pooled, rtol=1e-4, atol=1e-5)
    bodies.same(macro_pool(flat_x[0], ids, 40, "position", **more), pooled, rtol=1e-4, atol=1e-5)
    for ratio in ("token", "geo_mean"):
        args = (0.2, 0.2, ratio, "seq_mean_token_mean")
        got, want = [], []
        for module, made, inputs, rest in (
            (EMULATED, got, (*x, seg), {}), (reference, want, (*x, seg), {}),
            (EMULATED, got, (*flat_x, ids), more), (reference, want, (*flat_x, ids), more),
        ):  # fmt: skip
            y = inputs[0].clone().requires_grad_()
            loss, stats = module.ma_ppo_policy_loss(y, *inputs[1:], *args, **rest)
            made += [loss.detach(), stats, torch.autograd.grad(loss, y)[0]]
        bodies.same(tuple(got), tuple(want), rtol=2e-4, atol=1e-6)


def check_wrong():
    """Any segments and offsets are memory-safe; segment_check finds what the reference finds."""
    for trial in range(6):
        b, r = 3, (5, 40, 600)[trial % 3]
        seg = torch.randint(-3, 4 if trial % 2 else 2 * r, (b, r))
        if trial % 5 == 0:
            seg[0, 0], seg[1, -1] = 1 << 40, -(1 << 40)
        nseg = torch.randint(-2, 2 * r, (b,))
        x = [torch.randn(b, r) for _ in range(3)]
        for sigma in ("equal", "position"):
            safe(ma_ppo_prepare, *x, torch.randn(b), seg, nseg, discount="per_token", sigma=sigma)
            safe(macro_pool, x[0], seg, 7, sigma)
            safe(macro_pool_backward, torch.randn(b, r), seg, sigma)
        for ratio in RATIO_BY:
            safe(ma_ppo_policy_loss, *x, seg, ratio=ratio)
        flat_x = [t.flatten() for t in x]
        for offsets in ([0, 9 * r, -3, r], [5, 2, 2, 1], [-9, -8, r, 1 << 40]):
            cu = torch.tensor(offsets)
            safe(ma_ppo_prepare, *flat_x, torch.randn(b), seg.flatten(), nseg, cu_seqlens=cu)
            safe(macro_segment_ppl, flat_x[0], flat_x[0] > 0, cu_seqlens=cu)
            safe(ma_ppo_value_loss, *flat_x, flat_x[0] > 0, cu_seqlens=cu)
    good, count = reference.macro_segment_fixed(torch.rand(6, 600) < 0.8, 3)
    for column, value in ((5, 99), (0, 1), (300, -1), (599, -2)):
        seg, nseg = good.clone(), count.clone()
        seg[1, column], nseg[3] = value, nseg[3] + 1
        for ids, limit in ((seg, 600), (seg.long(), 600), (seg, 150)):
            want = torch.ops.tenfold.macro_segment_check(ids, nseg, limit)
            assert want[3] and torch.equal(segment_check(ids, nseg, limit).bool(), want)
            alone = torch.ops.tenfold.macro_segment_check(ids, None, limit)
            assert torch.equal(segment_check(ids, None, limit).bool(), alone)


def safe(op, *args, **kwargs):
    """Whatever the result is: nothing outside the arrays is touched (AddressSanitizer sees it)."""
    LIB.emu_schedule(5)
    global scheduled
    before, scheduled = scheduled, lambda _, run: run()
    try:
        op(*args, **kwargs)
    finally:
        scheduled = before


if __name__ == "__main__":
    torch.manual_seed(0)
    for check in sys.argv[1:]:
        torch.manual_seed(0)
        globals()[f"check_{check}"]()
    print("ok")
