# SPDX-License-Identifier: Apache-2.0
"""gn1_gelu: values and gradients against torch's, statistics far from 0, layouts, places of results, errors."""

import pytest
import torch
import torch.nn.functional as F
from diffusion_cases import signals

from tenfold import ops, reference
from tenfold.testing import (
    DTYPES,
    LAYOUTS,
    VALUES,
    assert_close_to_ref,
    check_cuda_graph,
    check_errors,
    check_op,
    fill,
    layout,
    on,
    poisoned_memory,
)
from tenfold.testing.plugin import cuda_only

raw = torch.ops.tenfold
SHAPES = [(2, 1, 1), (1, 3, 5), (3, 2, 33), (2, 4, 64), (2, 3, 127), (1, 2, 9001), (2, 40, 130)]


def parameters(channels, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(7)
    draw = torch.randn(2, channels, generator=generator)
    return on(device, [(1 + 0.3 * draw[0]).to(dtype), (0.3 * draw[1]).to(dtype)])


def plain(x, weight, bias, residual=None, eps=1e-5):
    y = F.gelu(F.group_norm(x, 1, weight.to(x.dtype), bias.to(x.dtype), eps))
    return y if residual is None else y + residual


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_norm(shape, dtype, device):
    x, residual = signals(shape, dtype)
    for w_dtype in {dtype, torch.float32}:
        weight, bias = parameters(shape[1], w_dtype)
        for more in (None, residual):
            with poisoned_memory():
                y, mean, rstd = ops.gn1_gelu(*on(device, (x, weight, bias, more)))
            exact = [None if t is None else t.double() for t in (x, weight, bias, more)]
            want, m, r = reference.gn1_gelu(*exact)
            assert_close_to_ref(y.cpu(), want, plain(x, weight, bias, more))
            torch.testing.assert_close(mean.cpu().double(), m, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(rstd.cpu().double(), r, rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES[1:])
def test_gradients(shape, dtype, device):
    for w_dtype in {dtype, torch.float32}:
        sides = []
        for _ in range(max(1, 32 // shape[1])):  # numbers enough: a channel has one sum
            x, residual, dy = signals(shape, dtype, 3)
            inputs = x, *parameters(shape[1], w_dtype), residual
            leaves = [t.to(device).requires_grad_() for t in inputs]
            with poisoned_memory():
                got = torch.autograd.grad(ops.gn1_gelu(*leaves)[0], leaves, dy.to(device))
            exact = [t.double().requires_grad_() for t in inputs]
            want = torch.autograd.grad(reference.gn1_gelu(*exact)[0], exact, dy.double())
            low = [t.detach().requires_grad_() for t in inputs]
            sides.append(([g.cpu() for g in got], want, torch.autograd.grad(plain(*low), low, dy)))
        for i, name in enumerate(("x", "weight", "bias", "residual")):
            together = (torch.cat([g[i].flatten() for g in side]) for side in zip(*sides))
            assert_close_to_ref(*together, what=name)


def test_gradcheck():
    """Acceptance 12: of the kernel's float64 and of torch's own operations."""
    x, residual = signals((2, 3, 4), torch.float64)
    weight, bias = parameters(3, torch.float64)
    args = [t.requires_grad_() for t in (x, weight, bias, residual)]
    assert torch.autograd.gradcheck(lambda *a: ops.gn1_gelu(*a, 1e-3)[0], args)
    assert torch.autograd.gradcheck(lambda *a: reference.gn1_gelu(*a, 1e-3)[0], args)
    torch.testing.assert_close(ops.gn1_gelu(*args)[0], plain(*args), rtol=0, atol=1e-12)
    with pytest.raises(RuntimeError, match="once"):
        torch.autograd.grad(ops.gn1_gelu(*args)[0].sum(), x, create_graph=True)


def test_far_from_zero(device):
    """Acceptance 12: mean 100 (and 1e4) stays as accurate as what float32 holds of the input."""
    weight, bias = parameters(16)
    for center in (100.0, -1e4):
        x = torch.randn(2, 16, 5000) + center
        y, mean, rstd = (t.cpu().double() for t in ops.gn1_gelu(*on(device, (x, weight, bias))))
        want, m, r = reference.gn1_gelu(x.double(), weight.double(), bias.double())
        off = float((y - want).abs().max())
        print(f"mean {center}: {off:.1e}, rstd {float((rstd / r - 1).abs().max()):.1e}")
        assert off < 2e-6 and float((rstd / r - 1).abs().max()) < 1e-6
        assert float((mean / m - 1).abs().max()) < 1e-7


def test_many_elements(device):
    """Sums over 42 million elements, as of the widest level of the full net, with an offset and outliers."""
    x = torch.randn(1, 128, 327_680 // 16, device=device).repeat(1, 1, 16)
    x[0, 0, :5] = 1e4
    x += 3.0
    ones = torch.ones(128, device=device)
    mean, rstd = raw.gn1_gelu(x, ones, ones, None, 1e-5)[1:]
    double = x.double()
    want = double.var(correction=0)
    assert abs(float(mean) - float(double.mean())) < 1e-6
    assert abs(float(rstd) / float((want + 1e-5).rsqrt()) - 1) < 1e-6


@pytest.mark.parametrize("values", VALUES)
def test_values(values, device):
    weight, bias = parameters(3)
    for dtype in DTYPES:
        x, residual = fill((2, 3, 37), dtype, values), fill((2, 3, 37), dtype, seed=1)
        got = ops.gn1_gelu(*on(device, (x, weight, bias, residual)))[0].cpu()
        want = reference.gn1_gelu(x.double(), weight.double(), bias.double(), residual.double())[0]
        if values in ("nan", "inf"):  # of that sample everything
            assert torch.equal(got.isnan().all((1, 2)), want.isnan().all((1, 2)))
            assert torch.equal(got.isnan(), want.isnan())
        else:
            assert_close_to_ref(got, want, plain(x, weight, bias, residual))
    constant = torch.full((2, 3, 50), 5.25, device=device)
    y, mean, rstd = ops.gn1_gelu(constant, *on(device, (weight, bias)))
    assert bool((mean == 5.25).all()) and float((rstd - 1e-5**-0.5).abs().max()) < 1e-4
    torch.testing.assert_close(
        y.cpu(), F.gelu(bias)[None, :, None].expand(2, 3, 50), rtol=1e-6, atol=1e-6
    )


def test_empty(device):
    for shape in ((0, 3, 8), (2, 0, 8), (2, 3, 0)):
        x = torch.empty(shape, device=device, requires_grad=True)
        weight, bias = (t.requires_grad_() for t in parameters(shape[1], device=device))
        y, mean, rstd = ops.gn1_gelu(x, weight, bias)
        assert y.shape == shape and mean.shape == rstd.shape == shape[:1]
        assert bool(mean.isnan().all()) and bool(rstd.isnan().all())
        y.sum().backward()
        assert weight.grad.abs().sum() == 0 and bias.grad.abs().sum() == 0 and x.grad.shape == shape


@pytest.mark.parametrize("kind", LAYOUTS)
def test_layouts(kind, device):
    weight, bias = parameters(3, device=device)
    for dtype in DTYPES:
        x, residual, dy = signals((2, 3, 75), dtype, 3, device)

        def results(x, residual, dy):
            made = ops.gn1_gelu(x, weight, bias, residual)
            return *made, *raw.gn1_gelu_backward(dy, x, weight, bias, *made[1:])

        want = results(x, residual, dy)
        got = results(*(layout(t, kind) for t in (x, residual, dy)))
        assert all(map(torch.equal, got, want))


def test_given_results(device):
    x, residual = signals((3, 4, 70), device=device)
    weight, bias = parameters(4, device=device)
    want = ops.gn1_gelu(x, weight, bias, residual)[0]
    for place in range(3):
        own = x.clone(), residual.clone(), torch.full_like(x, 9.0)
        version = own[place]._version
        ops.gn1_gelu_(own[place], own[0], weight, bias, own[1])
        assert torch.equal(own[place], want) and own[place]._version > version
    own = x.clone()
    ops.gn1_gelu_(own, own, weight, bias)
    assert torch.equal(own, ops.gn1_gelu(x, weight, bias)[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_results(dtype, device):
    """Samples that are in no cache, in blocks, are what each is alone."""
    length = 1_000_003 if dtype == torch.float32 else 2_000_003
    x, dy = (torch.randn(2, 3, length, device=device).to(dtype) for _ in range(2))
    weight, bias = parameters(3, device=device)
    y, mean, rstd = raw.gn1_gelu(x, weight, bias, dy, 1e-5)
    dx = raw.gn1_gelu_backward(dy, x, weight, bias, mean, rstd)[0]
    for i in range(2):
        one = raw.gn1_gelu(x[i : i + 1], weight, bias, dy[i : i + 1], 1e-5)
        assert torch.equal(one[0][0], y[i]) and torch.equal(one[1][0], mean[i])
        alone = raw.gn1_gelu_backward(dy[i : i + 1], x[i : i + 1], weight, bias, *one[1:])[0]
        assert torch.equal(alone[0], dx[i])


def test_batches_do_not_matter(device):
    """Rows that end within a vector; alone, a sample is cut elsewhere than beside others."""
    x, residual = (torch.randn(2, 512, 40).to(device) for _ in range(2))
    weight, bias = torch.randn(512).to(device), torch.randn(512).to(device)
    both, *_ = ops.gn1_gelu(x, weight, bias, residual)
    alone, *_ = ops.gn1_gelu(x[:1], weight, bias, residual[:1])
    assert torch.equal(both[:1], alone)


def test_constant_far_from_zero(device):
    """What is not in a row does not make NaN of its gradients."""
    x = torch.full((1, 2, 37), 2e36, device=device).requires_grad_()
    y, *_ = ops.gn1_gelu(x, torch.ones(2, device=device), torch.zeros(2, device=device))
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert bool(torch.isfinite(y).all() and torch.isfinite(dx).all())


def test_only_what_is_needed(device):
    x, residual, dy = signals((2, 3, 40), count=3, device=device)
    inputs = x, *parameters(3, device=device), residual
    leaves = [t.clone().requires_grad_() for t in inputs]
    y, mean, rstd = ops.gn1_gelu(*leaves)
    assert not mean.requires_grad and not rstd.requires_grad
    whole = torch.autograd.grad(y, leaves, dy)
    assert torch.equal(whole[3], dy)
    for wrt in ((0,), (1, 2), (3,), (0, 3)):
        leaves = [t.clone().requires_grad_(i in wrt) for i, t in enumerate(inputs)]
        got = torch.autograd.grad(ops.gn1_gelu(*leaves)[0], [leaves[i] for i in wrt], dy)
        assert all(map(torch.equal, got, [whole[i] for i in wrt]))


def test_errors(device):
    both, into = (ops.gn1_gelu, raw.gn1_gelu), (ops.gn1_gelu_, raw.gn1_gelu_)
    x, residual = signals((2, 3, 8), device=device)
    w, b = parameters(3, device=device)
    for args, error, words in (
        ((x.int(), w, b, None, 1e-5), TypeError, ("x", "int32")),
        ((x[0], w, b, None, 1e-5), ValueError, ("x", "3-dimensional", "[3, 8]")),
        ((x, w[1:], b, None, 1e-5), ValueError, ("weight", "[3]", "[2]")),
        ((x, w, b[1:], None, 1e-5), ValueError, ("bias", "[3]", "[2]")),
        ((x, w.half(), b.half(), None, 1e-5), ValueError, ("weight", "float16", "float32")),
        ((x, w, b.half(), None, 1e-5), ValueError, ("bias", "float16")),
        ((x, w, b, residual[:1], 1e-5), ValueError, ("residual", "[2, 3, 8]", "[1, 3, 8]")),
        ((x, w, b, residual.half(), 1e-5), ValueError, ("residual", "float16")),
        ((x, w, b, None, -1.0), ValueError, ("eps", "-1")),
        ((x, w, b, None, float("inf")), ValueError, ("eps", "inf")),
    ):  # fmt: skip
        check_errors(*both, args, {}, error, "gn1_gelu", *words)
        check_errors(*into, (torch.zeros_like(x), *args), {}, error, "gn1_gelu_", *words)
    y, part = torch.zeros_like(x), torch.zeros(100, device=device)
    for out, given, words in ((y.half(), x, ("y", "float16")), (y[:1], x, ("y", "[1, 3, 8]")),
                              (y.mT.contiguous().mT, x, ("y", "contiguous")),
                              (part[:48].view_as(x), part[4:52].view_as(x), ("y", "x", "memory"))):  # fmt: skip
        check_errors(*into, (out, given, w, b, None, 1e-5), {}, ValueError, *words)


def test_registration(device):
    x, residual, dy = signals((2, 3, 3000), count=3, device=device)
    w, b = parameters(3, device=device)
    leaves = [t.clone().requires_grad_() for t in (x, w, b, residual)]
    close = {"rtol": 1e-5, "atol": 1e-4}
    check_op(raw.gn1_gelu, (*leaves, 1e-5), **close)
    check_op(raw.gn1_gelu, (*leaves[:3], None, 1e-5), **close)
    mean, rstd = ops.gn1_gelu(x, w, b)[1:]
    check_op(raw.gn1_gelu_backward, (dy, x, w, b, mean, rstd), rtol=1e-5, atol=1e-3)
    check_op(raw.gn1_gelu_, (torch.zeros_like(x), x, w, b, residual, 1e-5), mutates=True, **close)


@cuda_only
def test_cuda_graph(device):
    def call(x, residual, dy, weight, bias):
        y, mean, rstd = ops.gn1_gelu(x, weight, bias, residual)
        return y, mean, rstd, *raw.gn1_gelu_backward(dy, x, weight, bias, mean, rstd)

    first, second = (
        [*signals((2, 3, 900), count=3, device=device), *parameters(3, device=device)]
        for _ in range(2)
    )
    check_cuda_graph(call, first, None, second)
