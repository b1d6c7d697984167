# SPDX-License-Identifier: Apache-2.0
"""swiglu and gated_gelu: values, gradients, halves of one tensor, places of results."""

import itertools

import pytest
import torch
from moe_cases import agree, every_isa, rand
from norm_cases import GATES, LARGE, SHAPES, in_pieces, same_bits

from tenfold import ops, reference
from tenfold.testing import DTYPES, LAYOUTS, VALUES, check_errors, check_op, fill, layout, on

raw = torch.ops.tenfold
# Without a sum that cancels, which float64 would feel as well.
EXACT = {
    "silu": lambda a: a * torch.sigmoid(a),
    "tanh": lambda a: (
        a * torch.sigmoid(1.5957691216057308 * a * (1 + 0.044715 * a.square().clamp(max=1e4)))
    ),
    "erf": lambda a: a / 2 * torch.erfc(-a * 0.5**0.5),
}
RELATIVE = {"silu": 1e-6, "tanh": 2e-5, "erf": 5e-6}  # what is raised to e is rounded, and up to 60


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gates(gate, dtype, device):
    name, kwargs = GATES[gate][0].__name__, GATES[gate][2]
    for shape in SHAPES:
        a, b = rand(*shape, dtype=dtype, scale=4.0), rand(*shape, dtype=dtype, seed=1)
        agree(name, [a, b], device, (0, 1), **kwargs)


@pytest.mark.parametrize("gate", GATES)
def test_gates_far_from_zero(gate, device):
    """Relatively exact in the tails, where the gate is small; with its gradient, 0 and not NaN beyond."""
    face, _, kwargs = GATES[gate]
    near = torch.linspace(-9, 9, 4001)
    far = torch.tensor([-1e30, -1e4, -200.0, -40.0, 40.0, 200.0, 1e4, 1e30])
    for isa in every_isa(device):
        with isa:
            for x in (near, far):
                a, b = x.to(device).requires_grad_(), torch.ones_like(x).to(device).requires_grad_()
                made = face(a, b, **kwargs)
                grads = torch.autograd.grad(made.sum(), (a, b))
                exact = x.double().requires_grad_()
                want = EXACT[gate](exact)
                slope = torch.autograd.grad(want.sum(), exact)[0]
                want = want.detach()
                close = {"rtol": RELATIVE[gate], "atol": 1e-30 if x is far else 0}
                torch.testing.assert_close(made.detach().cpu().double(), want, **close)
                torch.testing.assert_close(grads[1].cpu().double(), want, **close)
                torch.testing.assert_close(grads[0].cpu().double(), slope, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("values", VALUES)
def test_values(values, device):
    for dtype, (face, _, kwargs) in itertools.product(DTYPES, GATES.values()):
        x, other = fill((6, 37), dtype, values), fill((6, 37), dtype, seed=1)
        agree(face.__name__, [x, other], device, **kwargs)
        agree(face.__name__, [-x, other], device, **kwargs)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_layouts(kind, device):
    """Rows are read where they are: the same bits as of a contiguous copy."""
    for dtype, n in itertools.product(DTYPES, (64, 75)):
        rows = on(device, [rand(2, 3, 5, n, dtype=dtype, seed=s) for s in range(3)])

        def results(a, b, grad):
            made = raw.gated_act_backward(grad, a, b, 2, True, True)
            return raw.swiglu(a, b), raw.gated_gelu(a, b), *made

        want = results(*rows)
        assert same_bits(results(*(layout(t, kind) for t in rows)), want)
        assert same_bits(results(rows[0], layout(rows[1], kind), rows[2]), want)


@pytest.mark.parametrize("n", [33, 64])
def test_halves_of_one_tensor(n, device):
    for dtype in DTYPES:
        both = rand(3, 7, 2 * n, dtype=dtype).to(device).requires_grad_()
        gate, up = both.chunk(2, -1)
        alone = [h.detach().contiguous().requires_grad_() for h in (gate, up)]
        made, want = ops.swiglu(gate, up), ops.swiglu(*alone)
        made.backward(torch.ones_like(made))
        want.backward(torch.ones_like(want))
        assert same_bits([made], [want]) and made.is_contiguous()
        assert torch.equal(both.grad, torch.cat([h.grad for h in alone], -1))
        one = both.detach().clone()
        ops.swiglu_(one[..., :n], *one.chunk(2, -1))
        assert torch.equal(one[..., :n], want) and torch.equal(one[..., n:], both[..., n:])
        one = both.detach().clone()  # rows that lie between those that are read
        ops.gated_gelu_(one[..., :n], one[..., n:], one[..., n:])
        assert torch.equal(one[..., :n], ops.gated_gelu(up.detach(), up.detach()))


def test_given_results(device):
    for dtype, (rows, n) in itertools.product(DTYPES, [(1, 5), (7, 200), (0, 3)]):
        a, b = on(device, [rand(rows, n, dtype=dtype, seed=s) for s in range(2)])
        for face, into, kwargs in GATES.values():
            want = face(a, b, **kwargs)
            for at in (0, 1, None):
                own = a.clone(), b.clone()
                out = torch.empty_like(a) if at is None else own[at]
                version = out._version
                into(out, *own, **kwargs)
                assert same_bits([out], [want]) and out._version > version
                with torch.inference_mode():
                    own = a.clone(), b.clone()
                    out = torch.empty_like(a) if at is None else own[at]
                    into(out, *own, **kwargs)
                    assert same_bits([out, face(a, b, **kwargs)], [want, want])


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_results(dtype, device):
    """What is written past the caches is what is written to them, a few rows at a time."""
    rows = on(device, [rand(LARGE[dtype], 1024, dtype=dtype, seed=s) for s in range(3)])
    for call in (
        lambda a, b, g: [raw.swiglu(a, b)],
        lambda a, b, g: raw.gated_act_backward(g, a, b, 1, True, True),
    ):
        assert same_bits(call(*rows), in_pieces(call, rows, 1050))


def test_only_what_is_needed(device):
    a, b, grad = on(device, [rand(6, 40, seed=s) for s in range(3)])
    for face, _, kwargs in GATES.values():
        both = [t.clone().requires_grad_() for t in (a, b)]
        want = torch.autograd.grad(face(*both, **kwargs), both, grad)
        for i in range(2):
            some = [t.clone().requires_grad_(k == i) for k, t in enumerate((a, b))]
            assert torch.equal(
                torch.autograd.grad(face(*some, **kwargs), some[i], grad)[0], want[i]
            )
    with pytest.raises(RuntimeError, match="inference only"):
        ops.swiglu_(a, a.clone().requires_grad_(), b)


def test_gradcheck():
    a, b = (rand(3, 5, seed=s).double().requires_grad_() for s in range(2))
    for face, _, kwargs in GATES.values():
        definition = getattr(reference, face.__name__)
        assert torch.autograd.gradcheck(lambda a, b, f=definition, k=kwargs: f(a, b, **k), (a, b))


def test_gate_errors(device):
    a, b = on(device, (rand(4, 8), rand(4, 8, seed=1)))
    for face, op, into, raw_into, first, second in (
        (ops.swiglu, raw.swiglu, ops.swiglu_, raw.swiglu_, "gate", "up"),
        (ops.gated_gelu, raw.gated_gelu, ops.gated_gelu_, raw.gated_gelu_, "a", "b"),
    ):
        check_errors(face, op, (a.double(), b), {}, TypeError, first, "float64")
        check_errors(face, op, (a, b.half()), {}, ValueError, second, "float16")
        check_errors(face, op, (a, b[:, 1:]), {}, ValueError, second, "[4, 7]")
        check_errors(face, op, (a[0, 0], b[0, 0]), {}, ValueError, first, "0-d")
        both = (into, raw_into)
        check_errors(*both, (a[1:].clone(), a, b), {}, ValueError, "out", "[3, 8]")
        check_errors(*both, (a.half(), a, b), {}, ValueError, "out", "float16")
        check_errors(*both, (a.t().contiguous().t(), a, b), {}, ValueError, "out", "contiguous")
        wide = rand(4, 12).to(device)
        check_errors(*both, (wide[:, 4:], a, wide[:, :8]), {}, ValueError, "out", second, "memory")
    wrong = {"approximate": "erf"}
    check_errors(ops.gated_gelu, raw.gated_gelu, (a, b), wrong, ValueError, "approximate", "erf")


def test_registration(device):
    a, b, grad = on(device, [rand(300, 200, dtype=torch.bfloat16, seed=s) for s in range(3)])
    close = {"rtol": 2e-2, "atol": 1e-5}
    leaves = [t.clone().requires_grad_() for t in (a, b)]
    check_op(raw.swiglu, leaves, **close)
    check_op(raw.swiglu_, (torch.zeros_like(a), a, b), mutates=True, **close)
    check_op(raw.gated_gelu, leaves, {"approximate": "none"}, **close)
    check_op(raw.gated_gelu_, (torch.zeros_like(a), a, b), mutates=True, **close)
    check_op(raw.gated_act_backward, (grad, a, b, 1, True, False), **close)
