# SPDX-License-Identifier: Apache-2.0
"""markov_onestep_tuples and outer_dot against their definitions."""

import pytest
import torch
from influence_cases import Runs, agree
from moe_cases import rand

from tenfold import ops, reference
from tenfold.testing import check_deterministic, check_errors, check_op, layout, on

raw = torch.ops.tenfold
# N, B, M, Q, E, n
SHAPES = [(1, 1, 1, 1, 1, 1), (7, 3, 5, 4, 33, 1), (40, 4, 30, 9, 150, 2), (3, 2, 4, 5, 7, 5),
          (0, 2, 3, 4, 5, 1), (4, 0, 3, 4, 5, 1), (4, 2, 3, 4, 0, 2), (3, 2, 0, 4, 5, 1)]  # fmt: skip


def tuples(shape, dtype=torch.float32):
    n, b, m, q, e, lags = shape
    real = torch.float64 if dtype == torch.float64 else torch.float32
    rows = Runs((n, 1, b, m, 1, lags)).order[:, 0]
    made = torch.Generator().manual_seed(sum(shape))
    return {"H": rand(lags + 1, m, e, seed=1).to(dtype), "G": rand(lags + 1, q, e, seed=2).to(dtype),
            "order_rows": rows, "test_rows": torch.randint(0, q, (n,), generator=made),
            "hist": rand(n, lags, seed=3).to(real)}  # fmt: skip


class TestTuples:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_values_and_gradients(self, shape, dtype, device):
        given = tuples(shape, dtype)
        agree("markov_onestep_tuples", given, device, ("H", "G", "hist"))
        given |= {"order_rows": given["order_rows"].long(), "test_rows": given["test_rows"].int()}
        given |= {"residual": True, "reduction": "mean"}
        agree("markov_onestep_tuples", given, device, ("H", "G"))

    def test_float64(self, device):
        given = on(device, tuples((5, 3, 4, 3, 6, 2), torch.float64))
        ids = {k: given.pop(k) for k in ("order_rows", "test_rows")}
        leaves = [x.requires_grad_() for x in given.values()]
        for more in ({}, {"residual": True, "reduction": "mean"}):

            def run(H, G, hist, more=more):
                return ops.markov_onestep_tuples(H, G, hist=hist, **ids, **more)

            assert torch.autograd.gradcheck(run, leaves)

    def test_they_are_steps_of_runs(self, device):
        """Of factors that are all products of the features."""
        x = Runs((3, 6, 4, 5, 7, 2))
        H, G = rand(3, 5, 20, seed=4), rand(3, 7, 20, seed=5)
        run, t, q = (
            g.flatten() for g in torch.meshgrid(*map(torch.arange, (3, 6, 7)), indexing="ij")
        )
        past = torch.cat([x.y0, x.y], 1)
        hist = torch.stack([past[run, t, q], past[run, t + 1, q]], 1)
        got = ops.markov_onestep_tuples(
            *on(device, (H, G, x.order[run, t], q, hist)), residual=True
        )
        factors, order, y, y0 = on(device, (torch.bmm(H, G.mT), x.order, x.y, x.y0))
        want = ops.markov_onestep(factors, order, y, True, y0=y0)
        torch.testing.assert_close(got.view(3, 6, 7), want, rtol=1e-5, atol=1e-5)

    def test_layouts_and_threads(self, device):
        given = on(device, tuples((60, 4, 30, 9, 150, 1)))
        want = ops.markov_onestep_tuples(**given)
        for kind in ("sliced", "misaligned"):
            other = {k: layout(x, kind) for k, x in given.items()}
            assert torch.equal(ops.markov_onestep_tuples(**other), want)

        def both(H, G, *rest):
            leaves = [x.clone().requires_grad_() for x in (H, G)]
            made = ops.markov_onestep_tuples(*leaves, *rest)
            return (made.detach(), *torch.autograd.grad(made.square().sum(), leaves))

        if device.type == "cpu":
            check_deterministic(both, list(given.values()))

    def test_errors(self, device):
        given = on(device, tuples((4, 2, 3, 5, 6, 2)))
        both = (ops.markov_onestep_tuples, raw.markov_onestep_tuples)

        def check(name, value, error, *words):
            args = tuple((given | {name: value}).values())
            check_errors(*both, args, {}, error, *words)

        H, G, rows, tests, hist = given.values()
        check("H", H.half(), TypeError, "H must be", "float16")
        check("H", H[0], ValueError, "H", "[n + 1, M, E]")
        check("G", G[..., 1:], ValueError, "G must be [3, Q, 6]", "[3, 5, 5]")
        check("G", G.bfloat16(), ValueError, "G", "float32", "bfloat16")
        check("order_rows", rows[0], ValueError, "order_rows", "[N, B]")
        check("test_rows", tests[1:], ValueError, "test_rows", "[N] = [4]")
        check("test_rows", tests.float(), TypeError, "test_rows")
        check("hist", hist[:, 1:], ValueError, "hist", "[4, 2]")
        check("hist", hist.double(), TypeError, "hist", "float64")
        check_errors(*both, (H, G, rows, tests, hist), {"reduction": "?"}, ValueError, "reduction")
        if device.type == "cpu":
            beyond = rows.clone()
            beyond[0, 0] = 3
            check("order_rows", beyond, IndexError, "order_rows[0, 0]", "[-1, 3)")
            check("test_rows", tests - 5, IndexError, "test_rows[0]", "[0, 5)")

    def test_registration(self, device):
        given = on(device, tuples((6, 3, 5, 4, 37, 2)))
        leaves = {k: x.requires_grad_() if x.is_floating_point() else x for k, x in given.items()}
        check_op(raw.markov_onestep_tuples, tuple(leaves.values()), {"residual": True})
        plain = tuple(x.detach() for x in given.values())
        check_op(
            raw.markov_onestep_tuples_backward,
            (torch.ones(6, device=device), *plain, True, False, True),
        )


# N, T, M, S, V, D: tokens that fill tiles, exceed them, and do not. Pairs enough that the worst of
# their roundings is no accident, as it is of two or three.
PAIRS = [(1, 1, 1, 1, 1, 1), (24, 5, 9, 7, 33, 20), (30, 1, 41, 1, 300, 65), (16, 100, 3, 40, 70, 33),
         (12, 9, 2, 210, 40, 520), (0, 3, 2, 3, 4, 5), (2, 0, 3, 4, 5, 6), (2, 3, 2, 4, 0, 6)]  # fmt: skip


def plain_products(J, X, J2, X2, paired=False):
    sizes = *J.shape[:2], *J2.shape[:2]
    J, X, J2, X2 = (x.float() for x in (J, X, J2, X2))
    if paired:
        return ((J @ J2.mT) * (X @ X2.mT)).sum((1, 2))
    J, X, J2, X2 = (x.flatten(0, 1) for x in (J, X, J2, X2))
    return ((J @ J2.mT) * (X @ X2.mT)).view(sizes).sum((1, 3))


class TestOuterDot:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("shape", PAIRS)
    def test_values(self, shape, dtype, device):
        n, t, m, s, v, d = shape
        J, X = rand(n, t, v, seed=1).to(dtype), rand(n, t, d, seed=2).to(dtype)
        J2, X2 = rand(m, s, v, seed=3).to(dtype), rand(m, s, d, seed=4).to(dtype)
        given = {"J": J, "X": X, "J2": J2, "X2": X2}
        every = ("J", "X", "J2", "X2")
        agree("outer_dot", given, device, every, plain_products)
        given |= {"J2": rand(n, s, v, seed=3).to(dtype), "X2": rand(n, s, d, seed=4).to(dtype)}
        agree("outer_dot", given | {"paired": True}, device, every, plain_products)

    def test_they_are_products_of_gradients(self, device):
        """Of the last layer of a small model, as autograd makes them."""
        weight = rand(11, 6, seed=1).to(device).requires_grad_()
        hidden, target = (
            rand(4, 5, 6, seed=2).to(device),
            torch.arange(20, device=device).view(4, 5) % 11,
        )
        grads, J = [], []
        for h, y in zip(hidden, target):
            loss = torch.nn.functional.cross_entropy(h @ weight.T, y, reduction="sum")
            grads.append(torch.autograd.grad(loss, weight)[0].flatten())
            J.append((h @ weight.T).softmax(-1).detach() - torch.nn.functional.one_hot(y, 11))
        flat, J = torch.stack(grads), torch.stack(J)
        torch.testing.assert_close(ops.outer_dot(J, hidden, J, hidden), flat @ flat.T)
        own = ops.outer_dot(J, hidden, J, hidden, paired=True)
        torch.testing.assert_close(own, flat.square().sum(1))
        one = ops.outer_dot(J[0], hidden[0], J[1], hidden[1])
        assert one.shape == () and torch.allclose(one, flat[0] @ flat[1])

    def test_other_examples_and_padding_change_nothing(self, device):
        J, X = on(device, (rand(5, 7, 40, seed=1), rand(5, 7, 24, seed=2)))
        J2, X2 = on(device, (rand(9, 30, 40, seed=3), rand(9, 30, 24, seed=4)))
        want = ops.outer_dot(J, X, J2, X2)
        part = ops.outer_dot(J[3:4], X[3:4], J2[2:], X2[2:])
        assert torch.equal(part, want[3:4, 2:])
        wide = (
            torch.nn.functional.pad(J, (0, 0, 0, 4)),
            torch.nn.functional.pad(X, (0, 0, 0, 4), value=9.0),
        )
        torch.testing.assert_close(ops.outer_dot(*wide, J2, X2), want, rtol=1e-5, atol=1e-4)
        for kind in ("sliced", "transposed", "misaligned"):
            other = (layout(x, kind) for x in (J, X, J2, X2))
            assert torch.equal(ops.outer_dot(*other), want)
        if device.type == "cpu":
            check_deterministic(ops.outer_dot, (J, X, J2, X2))

    def test_errors(self, device):
        J, X = torch.randn(3, 4, 5, device=device), torch.randn(3, 4, 6, device=device)
        both = (ops.outer_dot, raw.outer_dot)
        check_errors(*both, (J.double(), X, J, X), {}, TypeError, "J", "float64")
        check_errors(*both, (J, X.half(), J, X), {}, ValueError, "X", "float32", "float16")
        check_errors(*both, (J[0, 0], X, J, X), {}, ValueError, "J must be [N, T, V]", "[5]")
        check_errors(*both, (J, X[:, 1:], J, X), {}, ValueError, "X must", "[3, 4, 5]", "[3, 3, 6]")
        check_errors(*both, (J, X, J[..., 1:], X), {}, ValueError, "J2", "[M, S, 5]", "[3, 4, 4]")
        check_errors(*both, (J, X, J, X[1:]), {}, ValueError, "X2", "[2, 4, 6]")
        check_errors(*both, (J, X, J, X[..., 1:]), {}, ValueError, "X2", "width 6")
        check_errors(*both, (J, X, J[1:], X[1:]), {"paired": True}, ValueError, "paired", "2 and 3")

    def test_registration(self, device):
        args = on(device, (rand(3, 5, 40), rand(3, 5, 24), rand(2, 4, 40), rand(2, 4, 24)))
        leaves = tuple(x.clone().requires_grad_() for x in args)
        check_op(raw.outer_dot, leaves, rtol=1e-4, atol=1e-3)
        check_op(raw.outer_dot, (*args[:2], *args[:2]), {"paired": True}, rtol=1e-4, atol=1e-3)
        check_op(raw.outer_dot, tuple(x[0] for x in args), rtol=1e-4, atol=1e-3)
        assert reference.outer_dot(*(x[0].cpu() for x in args)).shape == ()
