# SPDX-License-Identifier: Apache-2.0
"""Runs the tests of ``moe``'s routing on its emulated CUDA kernels: ``emulated_moe_routing.py CHECK``.

Started by test_emulated.py with ASan preloaded. The emulated kernels stand in for the CPU's, so that the
tests of ``tests/ops`` see them through the public ops.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys

import torch

import tenfold
from build import build
from emu_calls import CODES, OPS, numbers, pointers, ptr, row_stride, rows_of, scheduled, stand_in
from tenfold import ops, reference
from tenfold.testing import DTYPES

sys.path.insert(0, str(OPS))
import moe_cases
import test_moe_gate as gate
import test_moe_router_losses as losses
import test_moe_slots as slots

LIB = ctypes.CDLL(str(build("kernels_moe_routing", "-shared", "-fPIC")))
NAN = float("nan")
LAYER_DTYPES = [*zip(DTYPES, DTYPES), (torch.bfloat16, torch.float32)]


def wide(t):
    return t.dtype == torch.int64


def gate_sizes(logits, k, renormalize):
    return CODES[logits.dtype], len(logits), row_stride(logits), logits.shape[1], k, renormalize


def moe_gate(logits, k, renormalize=True):
    logits = rows_of(logits)
    shape = (len(logits), k)

    def run():
        weight, index = torch.full(shape, NAN), torch.full(shape, -7, dtype=torch.int32)
        sizes = numbers(*gate_sizes(logits, k, renormalize))
        LIB.emu_moe_gate(ptr(logits), ptr(weight), ptr(index), sizes)
        return weight, index

    return scheduled(LIB, run)


def gate_gradient(grad, logits, weight, index, renormalize, also=None):
    logits = rows_of(logits)
    grad, weight, index = (t.contiguous() for t in (grad, weight, index))
    also = None if also is None else also.contiguous()

    def run():
        out = logits.new_full(logits.shape, NAN)
        sizes = numbers(*gate_sizes(logits, weight.shape[1], renormalize), wide(index))
        LIB.emu_moe_gate_backward(pointers(grad, logits, weight, index, also, out), sizes)
        return out

    return scheduled(LIB, run)


def moe_gate_backward(grad, logits, weight, index, renormalize=True):
    return gate_gradient(grad, logits, weight, index, renormalize)


def router_sizes(x, w, k=1, renormalize=True):
    strides = row_stride(x), row_stride(w)
    return numbers(CODES[x.dtype], CODES[w.dtype], *x.shape, len(w), k, renormalize, *strides)


def moe_gate_linear(x, w, k, renormalize=True):
    x, w = rows_of(x), rows_of(w)

    def run():
        logits, weight = torch.full((len(x), len(w)), NAN), torch.full((len(x), k), NAN)
        index = torch.full((len(x), k), -7, dtype=torch.int32)
        made = (logits, weight, index)
        LIB.emu_moe_gate_linear(pointers(x, w, *made), router_sizes(x, w, k, renormalize))
        return made

    return scheduled(LIB, run)


def moe_gate_linear_backward(of_logits, of_weight, x, w, logits, weight, index, renormalize, of_x, of_w):  # fmt: skip
    if of_weight is None:
        grad = of_logits.contiguous()
    else:
        grad = gate_gradient(of_weight, logits, weight, index, renormalize, of_logits)
    x, w = rows_of(x), rows_of(w)

    def run():
        grads = [t.new_full(t.shape if wanted else (0,), NAN) for t, wanted in ((x, of_x), (w, of_w))]  # fmt: skip
        places = [g if wanted else None for g, wanted in zip(grads, (of_x, of_w))]
        LIB.emu_moe_gate_linear_backward(pointers(grad, x, w, *places), router_sizes(x, w))
        return grads

    return tuple(scheduled(LIB, run))


def moe_sort(index, experts, *, allow_sentinel=False):
    index = index.contiguous()
    sizes = (index.numel(), index.numel(), experts, experts + 1)

    def run():
        made = [torch.full((n,), -7, dtype=torch.int32) for n in sizes]
        LIB.emu_moe_sort(ptr(index), pointers(*made), numbers(index.numel(), experts, wide(index)))
        return made

    return tuple(scheduled(LIB, run))


def slot_sizes(y, tokens, k, at):
    return CODES[y.dtype], len(y), tokens, k, y.shape[1], row_stride(y), wide(at)


def moe_permute(x, order, k):
    x, order = rows_of(x), order.contiguous()

    def run():
        y = x.new_full((len(order), x.shape[1]), NAN)
        code, _, *rest = slot_sizes(x, len(x), k, order)
        LIB.emu_moe_permute(ptr(x), ptr(order), ptr(y), numbers(code, len(order), *rest))
        return y

    return scheduled(LIB, run)


def moe_permute_backward(grad, order, k, tokens):
    grad, order = rows_of(grad), order.contiguous()

    def run():
        out = grad.new_full((tokens, grad.shape[1]), NAN)
        sizes = numbers(*slot_sizes(grad, tokens, k, order))
        LIB.emu_moe_permute_backward(ptr(grad), ptr(order), ptr(out), sizes)
        return out

    return scheduled(LIB, run)


def moe_combine(y, weight, inverse):
    y, weight, inverse = rows_of(y), weight.contiguous(), inverse.contiguous()

    def run():
        out = y.new_full((len(weight), y.shape[1]), NAN)
        sizes = numbers(*slot_sizes(y, *weight.shape, inverse))
        LIB.emu_moe_combine(pointers(y, weight, inverse, out), sizes)
        return out

    return scheduled(LIB, run)


def moe_combine_backward(grad, y, weight, inverse, of_y, of_weight):
    grad, y, weight, inverse = rows_of(grad), rows_of(y), weight.contiguous(), inverse.contiguous()

    def run():
        made = [y.new_full(y.shape if of_y else (0,), NAN),
                weight.new_full(weight.shape if of_weight else (0,), NAN)]  # fmt: skip
        places = [t if wanted else None for t, wanted in zip(made, (of_y, of_weight))]
        sizes = numbers(*slot_sizes(y, *weight.shape, inverse), row_stride(grad))
        LIB.emu_moe_combine_backward(pointers(grad, y, weight, inverse, *places), sizes)
        return made

    return tuple(scheduled(LIB, run))


def balance(logits, counts, mask, k, norm, grad=None):
    logits, counts = rows_of(logits), counts.contiguous()
    mask = None if mask is None else mask.contiguous()

    def run():
        out = torch.full((), NAN) if grad is None else logits.new_full(logits.shape, NAN)
        shape = (*logits.shape, row_stride(logits))
        sizes = numbers(CODES[logits.dtype], *shape, k, norm == "slots", wide(counts))
        LIB.emu_load_balance(pointers(logits, counts, mask, grad, out), sizes)
        return out

    return scheduled(LIB, run)


def load_balance_loss(logits, counts, mask, k, norm="slots"):
    return balance(logits, counts, mask, k, norm)


def load_balance_loss_backward(grad, logits, counts, mask, k, norm):
    return balance(logits, counts, mask, k, norm, grad)


def seed_sizes(h, r):
    layers = len(h) if r.dim() == 2 else 1
    strides = (h.stride(0) if r.dim() == 2 else 0, h.stride(-2)) if h.numel() else (0, 0)
    return numbers(CODES[h.dtype], CODES[r.dtype], layers, *h.shape[-2:], *strides)


def seed(h, r, mask, target, with_slope, of_r):
    h, r = rows_of(h), r.contiguous()
    mask, target = (None if t is None else t.contiguous() for t in (mask, target))

    def run():
        loss, slope = torch.full((), NAN), torch.full(h.shape[:-1], NAN)
        grad_r = r.new_full(r.shape if of_r else (0,), NAN)
        places = slope if with_slope else None, grad_r if of_r else None
        LIB.emu_router_seed(pointers(h, r, mask, target, loss, *places), seed_sizes(h, r))
        return [loss, slope, grad_r] if with_slope else [loss]

    return scheduled(LIB, run)


def router_seed_loss(h, r, mask=None, target=None):
    return seed(h, r, mask, target, False, False)[0]


def router_seed_loss_grads(h, r, mask, target, of_r):
    return tuple(seed(h, r, mask, target, True, of_r))


def router_seed_loss_backward(grad, slope, h, r):
    h, r, slope = rows_of(h), r.contiguous(), slope.contiguous()

    def run():
        out = h.new_full(h.shape, NAN)
        LIB.emu_router_seed_backward(pointers(grad, slope, r, out), seed_sizes(h, r))
        return out

    return scheduled(LIB, run)


EMULATED = (moe_gate, moe_gate_backward, moe_gate_linear, moe_gate_linear_backward, moe_sort, moe_permute,
            moe_permute_backward, moe_combine, moe_combine_backward, load_balance_loss,
            load_balance_loss_backward, router_seed_loss, router_seed_loss_grads,
            router_seed_loss_backward)  # fmt: skip


CPU = torch.device("cpu")
# Results are NaN before a kernel writes them; what poisons all of torch's memory takes seconds to load.
moe_cases.poisoned_memory = slots.poisoned_memory = contextlib.nullcontext


def gates_alike():
    """Rows in one unit a lane, in two, and read again; k beyond a token's lanes; both forms of the router."""
    shapes = [(0, 8, 2), (7, 3, 2), (37, 8, 8), (33, 64, 8), (5, 150, 40), (4, 257, 3), (9, 17, 17)]
    for turn, shape in enumerate(shapes):
        for renormalize in (True, False):
            gate.test_gate(shape, DTYPES[(turn + renormalize) % 3], renormalize, CPU)
    for k in (2, 5, 11):
        gate.test_ties_go_to_the_lower_index(k, CPU)
    for k, renormalize in ((2, True), (9, False)):
        gate.test_special_values(k, renormalize, CPU)
    gate.test_masked_experts_have_no_gradient(CPU)
    gate.test_expanded_gradient_and_strided_logits(CPU)
    layers = [(0, 5, 8, 2), (5, 7, 3, 2), (48, 64, 8, 2), (33, 130, 13, 5), (3, 2100, 9, 2)]
    for turn, shape in enumerate(layers):
        gate.test_gate_linear(shape, LAYER_DTYPES[turn % 4], CPU)
    many = torch.randn(540, 8), torch.randn(9, 8)  # tokens enough for the form of many
    for x, w in (many, (many[0].bfloat16(), many[1])):
        for got, want in zip(ops.moe_gate_linear(x[:20], w, 3), ops.moe_gate_linear(x, w, 3)):
            assert torch.equal(got, want[:20])
    gate.agree("moe_gate_linear", [*many, 2], CPU, wrt=(0, 1))
    gate.test_a_frozen_router_or_input(CPU)
    gate.test_a_token_is_routed_alike_in_every_batch(torch.bfloat16, CPU)


def out_of_range():
    """What the host does not read is left out, and nothing outside of the tensors is touched."""
    x, y, weight = torch.randn(5, 12), torch.randn(10, 12), torch.rand(5, 2)
    at = torch.tensor([3, 10, -1, 1 << 40, -(1 << 40), 0, 11, 7, 2, -5])
    known = at.where((at >= 0) & (at < 10), -1)
    assert torch.equal(moe_permute(x, at, 2), reference.moe_permute(x, known, 2))
    assert torch.equal(moe_combine(y, weight, at), moe_combine(y, weight, known))
    for a, b in zip(moe_combine_backward(x, y, weight, at, True, True),
                    moe_combine_backward(x, y, weight, known, True, True)):  # fmt: skip
        assert torch.equal(a, b) and a.isfinite().all()
    assert torch.equal(moe_permute_backward(y, at, 2, 5), moe_permute_backward(y, known, 2, 5))
    moe_permute_backward(y, at * 0, 2, 5), moe_combine_backward(x, y, weight, at * 0, True, True)
    logits = torch.randn(5, 7)
    gradient = moe_gate_backward(weight, logits, weight, at.view(5, 2), False)
    assert gradient.isfinite().all()


def slots_alike():
    for shape in slots.SHAPES[:-1]:
        slots.test_sort(shape, torch.int64 if shape[1] % 2 else torch.int32, CPU)
    slots.test_one_expert_takes_all_and_others_none(CPU)
    slots.test_sort_takes_any_strides(CPU)
    for count, experts in ((9000, 40), (33000, 3)):  # launches of many blocks
        index = torch.randint(-2, experts + 2, (count,))
        want = reference.moe_sort(index.where(index >= 0, experts), experts, allow_sentinel=True)
        for got, w in zip(ops.moe_sort(index, experts, allow_sentinel=True), want, strict=True):
            assert torch.equal(got, w)
    for turn, dim in enumerate((1, 5, 16, 67, 600)):
        slots.test_permute_and_combine(dim, DTYPES[turn % 3], turn % 2 * 3, CPU)
    slots.test_a_token_alone(torch.float16, CPU)
    slots.test_round_trip(CPU)
    slots.test_slots_left_out_are_zeros_and_never_read(CPU)
    slots.test_strided_rows_and_expanded_gradients(CPU)
    slots.test_weights_of_another_dtype_and_frozen_inputs(CPU)
    out_of_range()


def losses_alike():
    shapes = [(0, 4), (1, 1), (33, 8), (130, 64), (700, 5), (18, 150), (7, 300)]
    for turn, shape in enumerate(shapes):
        losses.test_load_balance(shape, DTYPES[turn % 3], ("slots", "tokens")[turn % 2], CPU)
    balance_numbers = losses.TestBalanceNumbers()
    balance_numbers.test_all_mass_on_one_expert(CPU)
    balance_numbers.test_padding_does_not_change_it(CPU)
    balance_numbers.test_the_written_out_gradient(CPU)
    losses.test_balance_without_a_token(CPU)
    losses.test_balance_with_masked_experts_and_nan(CPU)
    losses.test_masks_strides_and_leading_dimensions(CPU)
    for turn, shape in enumerate(losses.SEEDS):
        losses.test_router_seed(shape, LAYER_DTYPES[turn % 4], CPU)
    losses.test_layers_are_a_mean(CPU)
    losses.TestSeedNumbers().test_at_zero(CPU)
    losses.test_long_logits_do_not_overflow(CPU)
    losses.test_rows_that_do_not_count_are_never_read(CPU)
    losses.test_frozen_expert_or_vector(CPU)
    losses.test_scaled_losses(CPU)


def check_all():
    """In one process: to start one takes longer than most of this."""
    gates_alike()
    slots_alike()
    losses_alike()


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    tenfold.cpu_capabilities = lambda: [tenfold.cpu_capability()]  # none of them is asked
    stand_in(EMULATED)
    for check in sys.argv[1:]:
        torch.manual_seed(0)
        globals()[f"check_{check}"]()
    print("ok")
