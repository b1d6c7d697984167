# SPDX-License-Identifier: Apache-2.0
"""markov_scan and markov_onestep: simulated and recorded runs against their definitions."""

import pytest
import torch
from influence_cases import Runs, agree
from moe_cases import every_isa

from tenfold import ops, reference
from tenfold.testing import (
    assert_same_pattern,
    check_deterministic,
    check_errors,
    check_op,
    layout,
    on,
    peak_growth,
)

raw = torch.ops.tenfold
# R, T, B, M, Q, n: one of each, several blocks of lanes, n > T, nothing of each, enough to be packed.
SHAPES = [(1, 1, 1, 1, 1, 1), (3, 9, 4, 5, 33, 1), (2, 6, 3, 6, 17, 3), (2, 3, 2, 4, 70, 5),
          (2, 40, 5, 30, 150, 2), (5, 30, 3, 7, 100, 1), (0, 4, 2, 3, 5, 1), (2, 0, 2, 3, 5, 2),
          (2, 4, 0, 3, 5, 1), (2, 4, 2, 3, 0, 1), (1, 3, 2, 0, 5, 1)]  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
class TestAgainstTheDefinition:
    def test_scan(self, shape, dtype, device):
        x = Runs(shape, dtype)
        given = {"factors": x.factors, "order": x.order, "y0": x.y0, "residual": True}
        agree("markov_scan", given, device, ("factors", "y0"))
        given |= {"order": x.order.long(), "residual": False, "lengths": x.lengths}
        agree("markov_scan", given | {"reduction": "mean"}, device, ("factors", "y0"))

    def test_onestep(self, shape, dtype, device):
        x = Runs(shape, dtype)
        given = {"factors": x.factors, "order": x.order, "y": x.y, "residual": True}
        agree("markov_onestep", given, device, ("factors", "y"))
        given |= {"y0": x.y0, "lengths": x.lengths.int(), "mask": x.mask, "reduction": "mean"}
        agree("markov_onestep", given, device, ("factors", "y", "y0"))
        given["y"] = torch.where(x.mask, x.y, float("nan"))  # not recorded: not used
        got = agree("markov_onestep", given | {"mask": x.mask.long() * 3}, device, ("factors",))
        assert got.isfinite().all()


def constant(a, b, steps, tests=3):
    """Order 1 with one training example, whose factors are a and b."""
    factors = torch.tensor([a, b])[:, None, None].expand(2, 1, tests).contiguous()
    return factors, torch.zeros(1, steps, 1, dtype=torch.int32)


class TestClosedForms:
    def test_geometric(self, device):
        a, b = 0.9, 0.25
        factors, order = on(device, constant(a, b, 20))
        y0 = torch.tensor([2.0, -1.0, 0.0], device=device)
        y = ops.markov_scan(factors, order, y0.view(1, 1, 3))[0]
        k = torch.arange(1, 21, device=device)[:, None]
        torch.testing.assert_close(y, a**k * y0 + b * (1 - a**k) / (1 - a))

    def test_fibonacci(self, device):
        factors = torch.tensor([1.0, 1.0, 0.0], device=device).view(3, 1, 1)
        y0 = torch.tensor([0.0, 1.0], device=device).view(1, 2, 1)
        order = torch.zeros(1, 8, 1, dtype=torch.int32, device=device)
        assert ops.markov_scan(factors, order, y0).flatten().tolist() == [1, 2, 3, 5, 8, 13, 21, 34]

    def test_residual_without_factors_changes_nothing(self, device):
        factors, order = on(device, constant(0.0, 0.0, 6))
        y0 = torch.randn(1, 1, 3, device=device)
        for ids in (order, order - 1):
            assert torch.equal(ops.markov_scan(factors, ids, y0, True), y0.expand(1, 6, 3))
        assert not ops.markov_scan(factors, order - 1, y0).any()

    def test_gradient_descent_on_a_square(self, device):
        """Loss (theta - y)^2 / 2 of one parameter: alpha is (1 - eta)^2."""
        eta, theta, losses = 0.1, 3.0, []
        for _ in range(30):
            losses.append((theta - 1.0) ** 2 / 2)
            theta -= eta * (theta - 1.0)
        factors, order = constant((1 - eta) ** 2, 0.0, 29, 1)
        y0 = torch.tensor([[[losses[0]]]], dtype=torch.float64, device=device)
        factors = factors.double().to(device)
        factors[0] = (1 - eta) ** 2
        y = ops.markov_scan(factors, order.to(device), y0).flatten().cpu()
        torch.testing.assert_close(
            y, torch.tensor(losses[1:], dtype=torch.float64), rtol=0, atol=1e-12
        )

    def test_what_overflows_is_infinite(self, device):
        factors, order = on(device, constant(1e20, 1.0, 5))
        y = ops.markov_scan(factors, order, torch.ones(1, 1, 3, device=device))
        want = reference.markov_scan(factors.cpu(), order.cpu(), torch.ones(1, 1, 3))
        assert_same_pattern(y.cpu(), want)
        assert y[0, -1].isposinf().all()


@pytest.mark.parametrize("n", [1, 2, 3])
def test_float64(n, device):
    x = Runs((2, 5, 3, 4, 3, n), torch.float64)
    factors, y0, y = (t.to(device).requires_grad_() for t in (x.factors, x.y0, x.y))
    order, lengths, mask = on(device, (x.order, x.lengths, x.mask))
    want = reference.markov_scan(x.factors, x.order, x.y0, True)
    torch.testing.assert_close(ops.markov_scan(factors, order, y0, True).cpu(), want,
                               rtol=1e-12, atol=1e-12)  # fmt: skip

    def scan(factors, y0):
        whole = ops.markov_scan(factors, order, y0, True)
        return whole, ops.markov_scan(factors, order, y0, lengths=lengths, reduction="mean")

    def onestep(factors, y, y0):
        whole = ops.markov_onestep(factors, order, y, True, y0=y0, lengths=lengths)
        return whole, ops.markov_onestep(factors, order, y, y0=y0, mask=mask, reduction="mean")

    assert torch.autograd.gradcheck(scan, (factors, y0))
    assert torch.autograd.gradcheck(onestep, (factors, y, y0))


class TestRuns:
    def inputs(self, device, shape=(4, 20, 4, 9, 40, 2)):
        x = Runs(shape)
        return on(device, (x.factors, x.order, x.y0, x.lengths))

    def test_one_step_is_a_scan_of_one(self, device):
        factors, order, y0, _ = self.inputs(device)
        y = torch.full((4, 1, 40), float("nan"), device=device)  # the last one is not read
        got = ops.markov_onestep(factors, order[:, :1], y, True, y0=y0)
        torch.testing.assert_close(got, ops.markov_scan(factors, order[:, :1], y0, True))
        for isa in every_isa(device):
            with isa:
                pred = ops.markov_scan(factors, order, y0, True)
                again = ops.markov_onestep(factors, order, pred, True, y0=y0)
            torch.testing.assert_close(again, pred, rtol=1e-6, atol=1e-6)
            assert device.type != "cpu" or torch.equal(again, pred)

    def test_ragged_runs_are_what_they_are_alone(self, device):
        factors, order, y0, lengths = self.inputs(device)
        whole = ops.markov_scan(factors, order, y0, True, lengths=lengths)
        for r, n in enumerate(lengths.tolist()):
            alone = ops.markov_scan(factors, order[r : r + 1, :n], y0[r : r + 1], True)
            assert torch.equal(whole[r, :n], alone[0]) and not whole[r, n:].any()
        leaf = factors.clone().requires_grad_()
        grad = torch.randn_like(whole)
        pred = ops.markov_scan(leaf, order, y0, True, lengths=lengths)
        want = torch.autograd.grad(pred, leaf, grad)[0]
        later = torch.arange(20, device=device)[:, None] >= lengths[:, None, None]
        wild = torch.where(later, float("nan"), grad)  # gradients after the end are not read
        pred = ops.markov_scan(leaf, order, y0, True, lengths=lengths)
        assert torch.equal(torch.autograd.grad(pred, leaf, wild)[0], want)

    def test_names_of_training_examples_do_not_matter(self, device):
        factors, order, y0, _ = self.inputs(device)
        new = torch.randperm(9, device=device)
        moved = torch.empty_like(factors).index_copy_(1, new, factors)
        renamed = torch.where(order >= 0, new[order.clamp_min(0).long()], -1)
        want = ops.markov_scan(factors, order, y0)
        assert torch.equal(ops.markov_scan(moved, renamed, y0), want)
        turned = order.flip(2)
        torch.testing.assert_close(ops.markov_scan(factors, turned, y0), want)

    def test_memory_layouts(self, device):
        factors, order, y0, _ = self.inputs(device)
        y = torch.randn(4, 20, 40, device=device)
        scan, step = (
            ops.markov_scan(factors, order, y0),
            ops.markov_onestep(factors, order, y, y0=y0),
        )
        for kind in ("sliced", "transposed", "misaligned"):
            f, h, v = (layout(t, kind) for t in (factors, y0, y))
            wide = layout(order, kind)
            assert torch.equal(ops.markov_scan(f, wide, h), scan)
            assert torch.equal(ops.markov_onestep(f, wide, v, y0=h), step)
        flat = factors.mT.contiguous().mT  # columns of a plane
        assert torch.equal(ops.markov_scan(flat, order, y0), scan)
        start = y0[:1].expand(4, 2, 40)
        want = ops.markov_scan(factors, order, start.contiguous())
        assert torch.equal(ops.markov_scan(factors, order, start), want)
        leaf = factors.clone().requires_grad_()
        ops.markov_scan(leaf, order, y0).sum().backward()  # an expanded gradient
        other = factors.clone().requires_grad_()
        made = ops.markov_scan(other, order, y0)
        made.backward(torch.ones_like(made))
        assert torch.equal(leaf.grad, other.grad)

    def test_nan_without_a_mask_shows(self, device):
        factors, order, y0, _ = self.inputs(device)
        y = torch.randn(4, 20, 40, device=device)
        y[1, 3, 7] = float("nan")
        pred = ops.markov_onestep(factors, order, y, y0=y0)
        assert pred.isnan().nonzero().tolist() == [[1, 4, 7], [1, 5, 7]]

    def test_threads(self, device):
        if device.type != "cpu":
            return
        for dtype in DTYPES:
            x = Runs((6, 50, 6, 40, 150, 2), dtype)

            def both(factors, order, y0, y):
                leaves = [t.clone().requires_grad_() for t in (factors, y0)]
                made = ops.markov_scan(leaves[0], order, leaves[1], True)
                step = ops.markov_onestep(leaves[0], order, y, y0=leaves[1])
                grads = torch.autograd.grad(made.sum() + (step * step).sum(), leaves)
                return (made.detach(), step.detach(), *grads)

            check_deterministic(both, (x.factors, x.order, x.y0, x.y))


def test_memory_is_that_of_the_states():
    setup = """
        import tenfold
        factors = torch.randn(2, 200, 512).mul_(1e-3).requires_grad_()
        order = torch.randint(0, 200, (1, 4000, 8), dtype=torch.int32)
        y0 = torch.randn(1, 1, 512)
        grad = torch.ones(1, 4000, 512)
        # As it is measured: the first backward of a gradient that is given imports much.
        tenfold.ops.markov_scan(factors, order[:, :9], y0, True).backward(grad[:, :9])
    """
    call = "tenfold.ops.markov_scan(factors, order, y0, True).backward(grad)"
    states = 4000 * 512 * 4
    assert peak_growth(setup, call) < 2 * states + (4 << 20)  # gathered rows would be 16 states


def test_errors(device):
    x = Runs((3, 5, 2, 4, 6, 2))
    factors, order, y0, y = on(device, (x.factors, x.order, x.y0, x.y))
    both = (ops.markov_scan, raw.markov_scan)
    check_errors(*both, (factors.half(), order, y0), {}, TypeError, "factors", "float16")
    check_errors(*both, (factors[0], order, y0), {}, ValueError, "factors", "[n + 1, M, Q]")
    check_errors(*both, (factors[:1], order, y0), {}, ValueError, "factors", "2 planes")
    check_errors(*both, (factors, order.float(), y0), {}, TypeError, "order", "int32", "float32")
    check_errors(*both, (factors, order[0], y0), {}, ValueError, "order", "[R, T, B]")
    check_errors(*both, (factors, order, y0.double()), {}, TypeError, "y0", "float32", "float64")
    check_errors(*both, (factors, order, y0[:, 1:]), {}, ValueError, "y0", "[R, n, Q] = [3, 2, 6]")
    check_errors(
        *both, (factors, order, y0), {"reduction": "max"}, ValueError, "reduction", "'max'"
    )
    check_errors(*both, (factors, order, y0), {"lengths": y0[:, 0, 0]}, TypeError, "lengths")
    long = torch.tensor([0, 1, 6], device=device)
    check_errors(*both, (factors, order, y0), {"lengths": long[1:]}, ValueError, "lengths", "[R]")
    both = (ops.markov_onestep, raw.markov_onestep)
    check_errors(*both, (factors, order, y[:, 1:]), {}, ValueError, "y must", "[3, 5, 6]")
    check_errors(*both, (factors, order, y), {"y0": y}, ValueError, "y0", "[3, 2, 6]")
    mask = {"mask": torch.ones(3, 5, dtype=torch.bool, device=device)}
    check_errors(*both, (factors, order, y), mask, ValueError, "mask", "[R, T, Q]")
    if device.type != "cpu":
        return
    for value in (4, -2):
        wrong = order.clone()
        wrong[2, 4, 1] = value
        for ids in (wrong, wrong.long()):
            words = (f"order[2, 4, 1] = {value}", "[-1, 4)")
            check_errors(
                ops.markov_scan, raw.markov_scan, (factors, ids, y0), {}, IndexError, *words
            )
            check_errors(*both, (factors, ids, y), {}, IndexError, *words)
    huge = order.long()
    huge[0, 0, 0] = (1 << 32) + 1  # in 32 bits a training example
    check_errors(*both, (factors, huge, y), {}, IndexError, "order[0, 0, 0] = 4294967297")
    check_errors(
        *both, (factors, order, y), {"lengths": long}, IndexError, "lengths[2] = 6", "[0, 5]"
    )


def test_once_differentiable(device):
    x = Runs((1, 3, 2, 4, 5, 1))
    factors, order, y0 = on(device, (x.factors, x.order, x.y0))
    leaf = factors.requires_grad_()
    loss = ops.markov_scan(leaf, order, y0).square().sum()
    with pytest.raises(RuntimeError, match="inference only"):
        torch.autograd.grad(loss, leaf, create_graph=True)


def test_registration(device):
    x = Runs((2, 6, 3, 5, 37, 2))
    factors, order, y0, y, mask, lengths = on(
        device, (x.factors, x.order, x.y0, x.y, x.mask, x.lengths)
    )
    leaf, start = factors.clone().requires_grad_(), y0.clone().requires_grad_()
    check_op(raw.markov_scan, (leaf, order, start, True))
    check_op(raw.markov_scan, (factors, order, y0), {"lengths": lengths, "reduction": "mean"})
    check_op(raw.markov_onestep, (leaf, order, y))
    check_op(
        raw.markov_onestep, (leaf, order, y.clone().requires_grad_(), True, start), {"mask": mask}
    )
    pred = ops.markov_scan(factors, order, y0)
    check_op(raw.markov_scan_backward, (torch.ones_like(pred), factors, order, y0, pred, True))
    for past in (False, True):
        check_op(
            raw.markov_onestep_backward, (torch.ones_like(y), factors, order, y, True, y0, past)
        )
