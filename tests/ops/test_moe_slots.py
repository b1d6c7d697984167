# SPDX-License-Identifier: Apache-2.0
"""``moe_sort``, ``moe_permute`` and ``moe_combine`` against their definitions."""

import pytest
import torch
from moe_cases import agree, every_isa, rand

from tenfold import ops, reference
from tenfold.testing import DTYPES, check_deterministic, check_errors, check_op, poisoned_memory

raw = torch.ops.tenfold
SHAPES = [(0, 2, 4), (1, 1, 1), (5, 2, 3), (33, 3, 7), (100, 8, 64), (40, 2, 300), (9000, 4, 5)]


def choices(tokens, k, experts, seed=0, sentinel=0):
    made = torch.Generator().manual_seed(seed + tokens + k)
    return torch.randint(0, experts + sentinel, (tokens, k), generator=made)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_sort(shape, dtype, device):
    tokens, k, experts = shape
    for sentinel in (0, 2):
        index = choices(tokens, k, experts, sentinel=sentinel).to(dtype)
        if sentinel and index.numel():
            index[0, 0] = torch.iinfo(dtype).max
        want = reference.moe_sort(index, experts, allow_sentinel=True)
        for isa in every_isa(device):
            with isa, poisoned_memory():
                got = ops.moe_sort(index.to(device), experts, allow_sentinel=sentinel > 0)
            for g, w in zip(got, want, strict=True):
                assert g.dtype == torch.int32 and torch.equal(g.cpu(), w)


def test_sort_is_stable_and_counts_slots(device):
    index = choices(20000, 2, 6).to(device)
    order, inverse, counts, offsets = (x.cpu().long() for x in ops.moe_sort(index, 6))
    sorted_by = index.cpu().reshape(-1)[order]
    assert counts.sum() == 40000 and offsets.tolist() == [0, *counts.cumsum(0).tolist()]
    for e in range(6):
        mine = order[offsets[e] : offsets[e + 1]]
        assert (sorted_by[offsets[e] : offsets[e + 1]] == e).all() and (mine.diff() > 0).all()
    assert torch.equal(order[inverse], torch.arange(40000))


def test_one_expert_takes_all_and_others_none(device):
    index = torch.full((17, 3), 4, device=device)  # each token names it three times
    order, inverse, counts, offsets = ops.moe_sort(index, 6)
    assert torch.equal(order, torch.arange(51, dtype=torch.int32, device=device))
    assert torch.equal(inverse, order) and counts.tolist() == [0, 0, 0, 0, 51, 0]
    assert offsets.tolist() == [0, 0, 0, 0, 0, 51, 51]


def test_sort_takes_any_strides(device):
    index = choices(30, 4, 9).to(device)
    want = ops.moe_sort(index, 9)
    for view in (
        index.t().contiguous().t(),
        torch.stack([index, index], -1)[..., 0],
        index.view(-1),
    ):
        assert all(torch.equal(a, b) for a, b in zip(ops.moe_sort(view, 9), want))
    for row in (index[:1].expand(5, 4),):
        assert ops.moe_sort(row, 9)[2].sum() == 20


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 5, 16, 67, 130])
@pytest.mark.parametrize("sentinel", [0, 3])
def test_permute_and_combine(dim, dtype, sentinel, device):
    for tokens, k, experts in ((0, 2, 4), (9, 1, 1), (29, 3, 5)):
        index = choices(tokens, k, experts, sentinel=sentinel)
        order, inverse, _, _ = reference.moe_sort(index, experts, allow_sentinel=True)
        x, y = rand(tokens, dim, dtype=dtype), rand(tokens * k, dim, dtype=dtype, seed=1)
        weight = rand(tokens, k, seed=2)
        agree("moe_permute", [x, order, k], device, wrt=(0,))
        agree("moe_combine", [y, weight, inverse], device, wrt=(0, 1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_alone(dtype, device):
    """It gets the bits that it gets in a batch, and so do its gradients."""
    y, weight, up = rand(12, 67, dtype=dtype), rand(6, 2), rand(6, 67, dtype=dtype, seed=3)
    y, weight, up = (t.to(device) for t in (y, weight, up))

    def run(rows):
        slots = slice(2 * rows.start, 2 * rows.stop)
        inputs = [t.clone().requires_grad_() for t in (y[slots], weight[rows])]
        inverse = torch.arange(len(inputs[0]), dtype=torch.int32, device=device)
        out = ops.moe_combine(*inputs, inverse)
        return out.detach(), *torch.autograd.grad(out, inputs, up[rows])

    for isa in every_isa(device):
        with isa:
            whole = run(slice(0, 6))
            for t in range(6):
                for one, all_of in zip(run(slice(t, t + 1)), whole):
                    at = slice(2 * t, 2 * t + 2) if len(all_of) == 12 else slice(t, t + 1)
                    assert torch.equal(one, all_of[at])


def test_round_trip(device):
    """Permuted and combined with weights that add up to 1, x is what it was."""
    index = choices(50, 4, 8).to(device)
    x = rand(50, 24).to(device)
    order, inverse, _, _ = ops.moe_sort(index, 8)
    y = ops.moe_permute(x, order, 4)
    assert torch.equal(y[inverse.long()], x.repeat_interleave(4, 0))
    assert torch.equal(ops.moe_combine(y, torch.full((50, 4), 0.25, device=device), inverse), x)


def test_slots_left_out_are_zeros_and_never_read(device):
    index = choices(12, 2, 4, sentinel=3)
    index[3] = 5  # a token without any slot
    order, inverse, _, offsets = ops.moe_sort(index.to(device), 4, allow_sentinel=True)
    kept = int(offsets[-1])
    x = rand(12, 10).to(device)
    y = ops.moe_permute(x, order, 2)
    assert (y[kept:] == 0).all() and kept < 24
    y[kept:] = float("nan")
    weight = rand(12, 2, seed=3).to(device)
    weight[index.to(device) >= 4] = float("nan")
    y.requires_grad_(), weight.requires_grad_()
    out = ops.moe_combine(y, weight, inverse)
    assert out.isfinite().all() and (out[3] == 0).all()
    out.sum().backward()
    assert (y.grad[kept:] == 0).all() and (weight.grad[index.to(device) >= 4] == 0).all()


def test_strided_rows_and_expanded_gradients(device):
    index = choices(20, 2, 4)
    order, inverse, _, _ = ops.moe_sort(index.to(device), 4)
    x, y, weight = rand(20, 9).to(device), rand(40, 9).to(device), rand(20, 2).to(device)
    wide_x, wide_y = (torch.nn.functional.pad(t, (1, 3))[:, 1:10] for t in (x, y))
    assert torch.equal(ops.moe_permute(wide_x, order, 2), ops.moe_permute(x, order, 2))
    combined = ops.moe_combine(y, weight, inverse)
    for other in (wide_y, y.t().contiguous().t()):
        assert torch.equal(ops.moe_combine(other, weight, inverse), combined)
    assert torch.equal(ops.moe_combine(y, weight.t().contiguous().t(), inverse.long()), combined)
    for shape in ((1, 1), (1, 9)):
        up = rand(*shape).to(device)
        for function, inputs, rows in (
            (lambda t: ops.moe_permute(t, order, 2), [x], 40),
            (lambda t, w: ops.moe_combine(t, w, inverse), [wide_y, weight], 20),
        ):
            grads = []
            for g in (up.expand(rows, 9), up.expand(rows, 9).contiguous()):
                leaves = [t.detach().clone().requires_grad_() for t in inputs]
                grads.append(torch.autograd.grad(function(*leaves), leaves, g))
            assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_weights_of_another_dtype_and_frozen_inputs(device):
    index = choices(20, 2, 4)
    _, inverse, _, _ = ops.moe_sort(index.to(device), 4)
    y, weight = rand(40, 9).to(device), rand(20, 2).bfloat16().to(device)
    out = ops.moe_combine(y, weight, inverse)
    assert torch.equal(out, ops.moe_combine(y, weight.float(), inverse))
    both = [y.clone().requires_grad_(), weight.clone().requires_grad_()]
    full = torch.autograd.grad(ops.moe_combine(*both, inverse).square().sum(), both)
    assert full[1].dtype == torch.bfloat16
    for i in range(2):
        one = [t.clone().requires_grad_(i == j) for j, t in enumerate((y, weight))]
        ops.moe_combine(*one, inverse).square().sum().backward()
        assert torch.equal(one[i].grad, full[i]) and one[1 - i].grad is None


def test_gradcheck_with_an_empty_expert():
    """Of the definitions, in float64; kernels are compared with these above."""
    index = torch.tensor([[0, 2], [2, 0], [0, 2], [0, 2], [2, 0], [2, 0], [0, 2]])
    order, inverse, counts, _ = reference.moe_sort(index, 3)
    assert counts.tolist() == [7, 0, 7]
    y, weight, x = (rand(*s).double().requires_grad_() for s in ((14, 5), (7, 2), (7, 5)))
    assert torch.autograd.gradcheck(lambda y, w: reference.moe_combine(y, w, inverse), (y, weight))
    assert torch.autograd.gradcheck(lambda x: reference.moe_permute(x, order, 2), x)


def test_threads_do_not_matter():
    index = choices(40000, 2, 8)
    check_deterministic(raw.moe_sort, (index, 8))
    order, inverse, _, _ = ops.moe_sort(index, 8)
    y, weight, grad = rand(80000, 8), rand(40000, 2), rand(40000, 8, seed=4)
    check_deterministic(raw.moe_combine, (y, weight, inverse))
    check_deterministic(raw.moe_combine_backward, (grad, y, weight, inverse, True, True))
    check_deterministic(raw.moe_permute_backward, (y, order, 2, 40000))


def test_errors(device):
    index = torch.tensor([[0, 1], [2, 3]], device=device)
    sort = (ops.moe_sort, raw.moe_sort)
    check_errors(*sort, (index.float(), 4), {}, IndexError, "index", "float32")
    check_errors(*sort, (index, 0), {}, ValueError, "num_experts", "0")
    order, inverse, _, _ = ops.moe_sort(index, 4)
    x, y, weight = rand(2, 3).to(device), rand(4, 3).to(device), rand(2, 2).to(device)
    permute, combine = (ops.moe_permute, raw.moe_permute), (ops.moe_combine, raw.moe_combine)
    check_errors(*permute, (x, order, 0), {}, ValueError, "k", "0")
    check_errors(*permute, (x, order.float(), 2), {}, IndexError, "order", "float32")
    check_errors(*permute, (x.double(), order, 2), {}, TypeError, "x", "float64")
    check_errors(*permute, (x[0], order, 2), {}, ValueError, "x", "[3]")
    check_errors(*combine, (y, weight[:1], inverse), {}, RuntimeError, "inverse", "[4]", "[1, 2]")
    check_errors(*combine, (y, weight.int(), inverse), {}, TypeError, "weight", "int32")
    check_errors(*combine, (y.double(), weight, inverse), {}, TypeError, "y", "float64")
    check_errors(*combine, (y, weight, inverse.bool()), {}, IndexError, "inverse", "bool")
    if device.type != "cpu":
        return  # values are not read there
    check_errors(
        *sort, (index, 3), {}, IndexError, "index", "[0, 3)", "got 3 at position 3", "sentinel"
    )
    for allowed in (False, True):
        check_errors(
            *sort, (index - 1, 4), {"allow_sentinel": allowed}, IndexError, "got -1 at position 0"
        )
    check_errors(*permute, (x[:1], order, 2), {}, IndexError, "order", "[-1, 2)")
    check_errors(*permute, (x, order - 2, 2), {}, IndexError, "order", "got -2")
    check_errors(*combine, (y[:3], weight, inverse), {}, IndexError, "inverse", "[-1, 3)")
    for backward, args in (
        (raw.moe_permute_backward, (y, order * 0, 2, 2)),
        (raw.moe_combine_backward, (x, y, weight, inverse * 0, True, True)),
    ):
        with pytest.raises(
            RuntimeError, match="must not repeat a value, got 0 at positions 0 and 1"
        ):
            backward(*args)
    with pytest.raises(RuntimeError, match="grad must have the dtype of y"):
        raw.moe_combine_backward(x.half(), y, weight, inverse, True, True)


def test_registration(device):
    index = choices(20, 2, 4, sentinel=1).to(device)
    check_op(raw.moe_sort, (index, 4), {"allow_sentinel": True})
    order, inverse, _, _ = ops.moe_sort(index, 4, allow_sentinel=True)
    check_op(raw.moe_permute, (rand(20, 9).to(device).requires_grad_(), order, 2))
    check_op(raw.moe_combine, (rand(40, 9).to(device).requires_grad_(),
                               rand(20, 2).to(device).requires_grad_(), inverse))  # fmt: skip
