# SPDX-License-Identifier: Apache-2.0
"""weighted_linear_ce: a face of the kernel of linear_cross_entropy, so mostly what it adds to that."""

import math

import pytest
import torch
import torch.nn.functional as F
from linear_loss_cases import eager_logits, problem

from tenfold import ops, reference
from tenfold.testing import (
    DTYPES,
    assert_close_to_ref,
    check_errors,
    check_op,
    on,
    poisoned_memory,
)

raw = torch.ops.tenfold
NAMES = ("loss_sum", "w_sum", "nll", "gradient of hidden", "gradient of weight")
UPS = ((1.7, None), (None, True), (-0.6, True))


def eager(hidden, weight, targets, w, **_):
    """What one writes in plain PyTorch: logits are stored in the tested dtype."""
    at = (targets != -100) & (w != 0)
    x = eager_logits(hidden[at], weight, 0.0, 1.0)
    each = F.cross_entropy(x, targets[at], reduction="none")
    nll = torch.zeros(targets.shape).masked_scatter(at, each)
    return (w[at] * each).sum(), w[at].sum(), nll


def step(op, tensors, ups, **options):
    """Results, and gradients of hidden and weight for gradients of the sum and of every nll."""
    leaves = [x.detach().requires_grad_() for x in tensors[:2]]
    loss_sum, w_sum, nll = op(*leaves, *tensors[2:], **options)
    given = [(loss_sum, ups[0]), (nll, ups[1])]
    used = [(v, torch.as_tensor(u).to(v)) for v, u in given if u is not None]
    grads = torch.autograd.grad([v for v, _ in used], leaves, [u for _, u in used])
    return [x.detach().cpu() for x in (loss_sum, w_sum, nll, *grads)]


def judge(names, sides):
    """Results of several problems by the tolerance rule, each name's together."""
    for name, *all_of in zip(names, *(zip(*side) for side in sides)):
        assert_close_to_ref(
            *(torch.cat([x.flatten() for x in of]) for of in zip(*all_of)), what=name
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("sum_up", "nll_up"), UPS)
@pytest.mark.parametrize("shape", [(1, 33, 257), (40, 33, 300), (70, 16, 1031)])
def test_gradients(shape, sum_up, nll_up, dtype, device):
    drawn = torch.randn(shape[0], generator=torch.Generator().manual_seed(3))
    sides = []
    for seed in range(6):
        tensors = problem(shape, dtype, seed, weighted=True)
        tensors[3][::4] *= -1.0
        ups = (sum_up, drawn if nll_up else None)
        options = {"chunk": (0, 1, 33)[seed % 3], "grad_of": ("loss_sum", "nll")[seed % 2]}
        with poisoned_memory():
            mine = step(ops.weighted_linear_ce, on(device, tensors), ups, **options)
        exact = [x.double() if x.is_floating_point() else x for x in tensors]
        want, simple = step(reference.weighted_linear_ce, exact, ups), step(eager, tensors, ups)
        sides.append((mine[3:], want[3:], simple[3:]))
    judge(NAMES[3:], sides)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 33, 257), (40, 33, 300), (70, 16, 1031)])
def test_values(shape, dtype, device):
    sides = []
    for seed in range(max(6, 100 // shape[0])):  # rows enough: each has its own rounding
        tensors = problem(shape, dtype, seed, weighted=True)
        tensors[3][::4] *= -1.0
        with poisoned_memory():
            mine = ops.weighted_linear_ce(*on(device, tensors), chunk=(0, 1, 33)[seed % 3])
        exact = [x.double() if x.is_floating_point() else x for x in tensors]
        want, simple = reference.weighted_linear_ce(*exact), reference.weighted_linear_ce(*tensors)
        sides.append(([x.cpu() for x in mine], want, simple))
    judge(NAMES[:3], sides)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_is_cross_entropy_for_every_chunk(dtype, device):
    """Acceptance check 16: to 1e-5 in float32 and 2e-2 in bfloat16."""
    hidden, weight, targets, _ = on(device, problem((50, 24, 200), dtype, poison=False))
    w = torch.ones(50, device=device)
    near = 1e-5 if dtype == torch.float32 else 2e-2
    leaves = [x.float().requires_grad_() for x in (hidden, weight)]
    want = F.cross_entropy(leaves[0] @ leaves[1].t(), targets, reduction="sum")
    want_grads = torch.autograd.grad(want, leaves)
    for chunk in (1, 7, 50):
        mine = [x.clone().requires_grad_() for x in (hidden, weight)]
        loss, w_sum, nll = ops.weighted_linear_ce(*mine, targets, w, chunk)
        torch.testing.assert_close(loss, want, rtol=near, atol=near)
        torch.testing.assert_close(nll.sum(), loss, rtol=1e-5, atol=1e-5)
        assert w_sum == (targets != -100).sum()
        for g, e in zip(torch.autograd.grad(loss, mine), want_grads):
            torch.testing.assert_close(g.float(), e, rtol=near, atol=near)


def test_printed_numbers(device):
    """Acceptance check 2: p = .5 (tool), .25 (observation), .75 (rationale)."""
    p = torch.tensor([[0.5, 0.5], [0.25, 0.75], [0.75, 0.25]], device=device)
    cls = torch.tensor([[2, 3, 4]], dtype=torch.int8, device=device)
    targets = torch.zeros(3, dtype=torch.long, device=device)
    positive = torch.ones(1, dtype=torch.bool, device=device)
    for beta, want in ((1.0, 0.789041), (0.0, 0.490415)):
        w = ops.lm_weight(cls, positive, beta, 1.0, True)[0]
        loss, w_sum, nll = ops.weighted_linear_ce(p.log(), torch.eye(2, device=device), targets, w)
        assert loss.item() / w_sum.item() == pytest.approx(want, abs=1e-6)
        assert w_sum == 2 + beta
        if beta:
            seg = torch.arange(3, device=device)[None]
            parts = ops.segment_mean(nll[None], seg, 3).sum()
            assert parts.item() == pytest.approx(2.367124, abs=1e-6)


def test_rows_that_do_not_count_cost_nothing_and_may_hold_anything(device):
    hidden, weight, targets, w = on(device, problem((60, 24, 90), torch.float32, weighted=True))
    assert hidden.isnan().any()
    idle = (w == 0) | (targets == -100)
    targets[(w == 0) & (targets != -100)] = 10**6  # not even looked at
    for grad_of in ("loss_sum", "nll"):
        mine = [x.clone().requires_grad_() for x in (hidden, weight)]
        loss, w_sum, nll = ops.weighted_linear_ce(*mine, targets, w, grad_of=grad_of)
        assert not nll[idle].any() and w_sum == pytest.approx(w[~idle].sum().item())
        for what in (loss, nll.sum()):
            got = torch.autograd.grad(what, mine, retain_graph=True)
            assert all(g.isfinite().all() for g in got) and not got[0][idle].any()
    few = [x[~idle].clone() for x in (hidden, targets, w)]
    one = ops.weighted_linear_ce(few[0], weight, few[1], few[2])
    assert torch.equal(one[0], loss) and torch.equal(one[2], nll[~idle])


def test_weights_that_are_all_zero(device):
    hidden, weight, targets, w = on(device, problem((9, 8, 12), torch.float32, weighted=True))
    for by, to in ((torch.zeros_like(w), targets), (w, torch.full_like(targets, -100))):
        mine = [x.clone().requires_grad_() for x in (hidden, weight)]
        loss, w_sum, nll = ops.weighted_linear_ce(*mine, to, by)
        assert loss == w_sum == 0 and not nll.any()
        loss.backward()
        assert all(x.grad is not None and not x.grad.any() for x in mine)
    empty = ops.weighted_linear_ce(hidden[:0], weight, targets[:0], w[:0])
    assert empty[0] == empty[1] == 0 and empty[2].shape == (0,)


def test_twice_and_halves(device):
    """The gradients made ahead are given away once; a loss may be scaled; both results may be used at once."""
    tensors = on(device, problem((40, 16, 70), torch.float32, weighted=True))
    leaves = [x.clone().requires_grad_() for x in tensors[:2]]
    loss, w_sum, nll = ops.weighted_linear_ce(*leaves, *tensors[2:])
    first = torch.autograd.grad(loss / w_sum, leaves, retain_graph=True)
    again = torch.autograd.grad(loss / w_sum, leaves, retain_graph=True)
    mixed = torch.autograd.grad(0.5 * loss / w_sum + 0.5 * (nll * tensors[3]).sum() / w_sum, leaves)
    for a, b, c in zip(first, again, mixed):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a, c)
    frozen = ops.weighted_linear_ce(leaves[0], tensors[1], *tensors[2:])[0]
    torch.testing.assert_close(torch.autograd.grad(frozen, leaves[0])[0] / w_sum, first[0])
    assert not w_sum.requires_grad


def test_shapes_and_autocast(device):
    hidden, weight, targets, w = on(device, problem((24, 16, 40), torch.float32, weighted=True))
    want = ops.weighted_linear_ce(hidden, weight, targets, w)
    folded = ops.weighted_linear_ce(
        hidden.view(2, 12, 16), weight, targets.view(2, 12), w.view(2, 12)
    )
    assert torch.equal(folded[0], want[0]) and torch.equal(folded[2].view(-1), want[2])
    with torch.autocast(device.type, torch.bfloat16):
        low = ops.weighted_linear_ce(hidden, weight, targets, w.double())
    same = ops.weighted_linear_ce(hidden.bfloat16(), weight.bfloat16(), targets, w)
    assert torch.equal(low[0], same[0])


def test_gradcheck():
    hidden, weight, targets, w = problem((7, 4, 9), torch.float64, weighted=True)
    leaves = hidden.nan_to_num(0.5).requires_grad_(), weight.requires_grad_()

    def both(h, v):
        loss, _, nll = reference.weighted_linear_ce(h, v, targets, w)
        return loss, nll

    assert torch.autograd.gradcheck(both, leaves)


def test_errors(device):
    hidden, weight, targets, w = on(device, problem((6, 8, 12), torch.float32, weighted=True))
    both = (ops.weighted_linear_ce, raw.weighted_linear_ce)
    check_errors(*both, (hidden, weight[:, 1:], targets, w), {}, ValueError, "weight", "[V, 8]")
    check_errors(*both, (hidden, weight, targets[1:], w), {}, ValueError, "targets", "[6]", "[5]")
    check_errors(*both, (hidden, weight, targets, w[1:]), {}, ValueError, "w", "[6]", "[5]")
    check_errors(*both, (hidden, weight, targets, w.long()), {}, TypeError, "w", "int64")
    check_errors(*both, (hidden, weight, targets.float(), w), {}, TypeError, "targets", "float32")
    check_errors(*both, (hidden, weight.bfloat16(), targets, w), {}, ValueError, "weight", "dtype")
    check_errors(*both, (hidden, weight, targets, w, -1), {}, ValueError, "chunk", "-1")
    check_errors(
        *both, (hidden, weight, targets, w), {"grad_of": "w"}, ValueError, "grad_of", "'w'"
    )
    if device.type == "cpu":
        for value in (12, -1):
            wrong = targets.clone()
            wrong[3] = value
            check_errors(
                *both, (hidden, weight, wrong, w), {}, IndexError, f"targets[3] = {value}", "V = 12"
            )
    with pytest.raises(ValueError, match="w must be \\[2, 3\\]"):
        ops.weighted_linear_ce(hidden.view(2, 3, 8), weight, targets.view(2, 3), w)


@pytest.mark.parametrize("grad_of", ["loss_sum", "nll"])
def test_registration(grad_of, device):
    hidden, weight, targets, w = on(
        device, problem((20, 16, 40), torch.float32, weighted=True, poison=False)
    )
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    check_op(raw.weighted_linear_ce, (*leaves, targets, w, 16), {"grad_of": grad_of})
    assert math.isfinite(raw.weighted_linear_ce(*leaves, targets, w)[0].item())
