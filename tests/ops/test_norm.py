# SPDX-License-Identifier: Apache-2.0
"""rms_norm: values, gradients, layouts, places of results, and what models expect."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from moe_cases import agree, rand
from norm_cases import LARGE, SHAPES, in_pieces, same_bits, weight_of

from tenfold import ops, reference
from tenfold.testing import (
    DTYPES,
    LAYOUTS,
    VALUES,
    assert_close_to_ref,
    check_compiles,
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
ORDERS = ("llama", "t5", "float")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_norm(shape, dtype, device):
    x, residual = rand(*shape, dtype=dtype, scale=2.0), rand(*shape, dtype=dtype, seed=1)
    weight = weight_of(shape[-1], dtype)
    for order in ORDERS:
        agree("rms_norm", [x, residual, weight, 1e-5], device, (0, 1, 2), order=order)
    agree("rms_norm", [x, None, weight, 1e-6], device, (0, 2))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_norm_of_mixed_dtypes(narrow, order, device):
    for x_dtype, w_dtype in ((narrow, torch.float32), (torch.float32, narrow)):
        x, weight = rand(5, 77, dtype=x_dtype), weight_of(77, w_dtype)
        args = [x, rand(5, 77, dtype=x_dtype, seed=2), weight, 1e-6]
        agree("rms_norm", args, device, (0, 1, 2), order=order)
        y = ops.rms_norm(*on(device, [x, None, weight]), order=order)[0]
        assert y.dtype == (narrow if order == "t5" and w_dtype == narrow else x_dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norm_is_the_models(dtype, device):
    """LlamaRMSNorm and T5LayerNorm of transformers: but for sums in another order, the same bits."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama").LlamaRMSNorm
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5").T5LayerNorm
    for module, order, x_dtype, w_dtype in (
        (llama, "llama", dtype, dtype), (llama, "llama", dtype, torch.float32), (t5, "t5", dtype, dtype),
        (t5, "t5", torch.float32, dtype), (t5, "t5", dtype, torch.float32),
    ):  # fmt: skip
        layer = module(768).to(device)
        layer.weight.data = weight_of(768, w_dtype).to(device)
        x, weight = rand(40, 768, dtype=x_dtype, scale=3.0).to(device), layer.weight.detach()
        with torch.no_grad():
            want = layer(x)
        got = ops.rms_norm(x, None, weight, layer.variance_epsilon, order=order)[0]
        assert got.dtype == want.dtype or (x_dtype, want.dtype) == (dtype, torch.float32)
        want = want.to(got.dtype)
        assert (got != want).float().mean() < 2e-3
        torch.testing.assert_close(got, want, rtol=2.5 * torch.finfo(dtype).eps, atol=0)


def test_norm_is_torchs(device):
    x, weight = on(device, (rand(30, 200), weight_of(200)))
    for dtype in DTYPES:
        got = ops.rms_norm(x.to(dtype), None, weight.to(dtype), 1e-5, order="float")[0]
        want = F.rms_norm(x.double().to(dtype).double(), (200,), weight.to(dtype).double(), 1e-5)
        plain = F.rms_norm(x.to(dtype), (200,), weight.to(dtype), 1e-5)
        assert_close_to_ref(got.cpu(), want.cpu(), plain.cpu())


@pytest.mark.parametrize("values", VALUES)
def test_values(values, device):
    for dtype in DTYPES:
        x, other = fill((6, 37), dtype, values), fill((6, 37), dtype, seed=1)
        agree("rms_norm", [x, other, weight_of(37, dtype), 1e-5], device)
        agree("rms_norm", [x, None, weight_of(37, dtype), 1e-5], device, order="t5")
    nothing = ops.rms_norm(torch.empty(3, 0, device=device), None, torch.empty(0, device=device))
    assert nothing[0].shape == (3, 0) and bool(nothing[2].isnan().all())


@pytest.mark.parametrize("kind", LAYOUTS)
def test_layouts(kind, device):
    """Rows are read where they are: the same bits as of a contiguous copy."""
    for dtype, n in itertools.product(DTYPES, (64, 75)):
        x, residual, grad = on(device, [rand(2, 3, 5, n, dtype=dtype, seed=s) for s in range(3)])
        weight, rstd = weight_of(n, dtype).to(device), torch.rand(2, 3, 5, device=device)

        def results(x, residual, grad, weight=weight, rstd=rstd):
            made = raw.rms_norm(x, residual, weight, 1e-5)
            return *made, *raw.rms_norm_backward(grad, residual, x, weight, rstd, True, True)

        want = results(x, residual, grad)
        assert same_bits(results(*(layout(t, kind) for t in (x, residual, grad))), want)
        assert same_bits(results(x, layout(residual, kind), grad), want)


def test_given_results(device):
    for dtype, (rows, n) in itertools.product(DTYPES, [(1, 5), (7, 200), (0, 3)]):
        x, residual, weight = on(device, (rand(rows, n, dtype=dtype), rand(rows, n, dtype=dtype, seed=1),
                                          weight_of(n, dtype)))  # fmt: skip
        for order in ORDERS:
            want = ops.rms_norm(x, residual, weight, 1e-5, order=order)[:2]
            plain = ops.rms_norm(x, None, weight, 1e-5, order=order)[0]
            fresh = torch.empty_like(x), torch.empty_like(x)
            with poisoned_memory():
                ops.rms_norm_(*fresh, x, residual, weight, 1e-5, order=order)
            assert same_bits(fresh, want)
            for y_at, sum_at in ((0, 1), (1, 0), (0, None), (None, 0), (None, 1), (1, None)):
                own = x.clone(), residual.clone()
                y, total = (torch.empty_like(x) if at is None else own[at] for at in (y_at, sum_at))
                version = y._version
                ops.rms_norm_(y, total, *own, weight, 1e-5, order=order)
                assert same_bits((y, total), want) and y._version > version
            own = x.clone()
            ops.rms_norm_(own, None, own, None, weight, 1e-5, order=order)
            assert same_bits([own], [plain])
            with torch.inference_mode():
                own = x.clone(), residual.clone()
                ops.rms_norm_(*own, *own, weight, 1e-5, order=order)
                assert same_bits(own, want)
                assert same_bits([ops.rms_norm(x, None, weight, 1e-5, order=order)[0]], [plain])
    x, weight = on(device, (rand(4, 32), weight_of(32, torch.bfloat16)))
    y = torch.empty(4, 32, dtype=torch.bfloat16, device=device)
    ops.rms_norm_(y, None, x, None, weight, order="t5")
    assert torch.equal(y, ops.rms_norm(x, None, weight, order="t5")[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_results(dtype, device):
    """What is written past the caches is what is written to them, a few rows at a time."""
    rows, n = LARGE[dtype], 1024
    x, residual, grad = on(device, [rand(rows, n, dtype=dtype, seed=s) for s in range(3)])
    weight, rstd = weight_of(n, dtype).to(device), torch.rand(rows, device=device)
    for call in (
        lambda x, r, g, s: raw.rms_norm(x, r, weight, 1e-5),
        lambda x, r, g, s: raw.rms_norm(x, None, weight, 1e-5)[::2],
        lambda x, r, g, s: raw.rms_norm_backward(g, r, x, weight, s, True, False)[:1],
    ):
        inputs = x, residual, grad, rstd
        assert same_bits(call(*inputs), in_pieces(call, inputs, 1050))
    y, total = torch.empty_like(x), residual.clone()
    ops.rms_norm_(y, total, x, total, weight, 1e-5)
    assert same_bits((y, total), raw.rms_norm(x, residual, weight, 1e-5)[:2])


def test_a_row_depends_on_no_other(device):
    x, residual, weight = on(device, (rand(50, 300), rand(50, 300, seed=1), weight_of(300)))
    y, total, rstd = ops.rms_norm(x, residual, weight)
    for i in (0, 3, 49):
        alone = ops.rms_norm(x[i], residual[i], weight)
        assert same_bits(alone, (y[i], total[i], rstd[i]))


def test_only_what_is_needed(device):
    x, residual, grad, weight = on(
        device, (*(rand(6, 40, seed=s) for s in range(3)), weight_of(40))
    )

    def gradients(wrt, use):
        leaves = [t.clone().requires_grad_(i in wrt) for i, t in enumerate((x, residual, weight))]
        y, total, rstd = ops.rms_norm(*leaves)
        assert not rstd.requires_grad
        loss = {"y": (y * grad).sum(), "sum": (total * grad).sum()}
        wanted = [leaves[i] for i in wrt]
        return torch.autograd.grad(sum(loss[u] for u in use), wanted, allow_unused=True)

    whole = gradients((0, 1, 2), ("y", "sum"))
    assert torch.equal(whole[0], whole[1])
    for wrt in ((0,), (1,), (2,), (0, 2), (0, 1)):
        assert all(map(torch.equal, gradients(wrt, ("y", "sum")), [whole[i] for i in wrt]))
    only_sum = gradients((0, 1, 2), ("sum",))
    assert torch.equal(only_sum[0], grad) and torch.equal(only_sum[1], grad) and only_sum[2] is None


def test_gradcheck():
    x, residual = (rand(3, 5, seed=s).double().requires_grad_() for s in range(2))
    weight = weight_of(5).double().requires_grad_()
    for order in ORDERS:
        assert torch.autograd.gradcheck(
            lambda x, r, w, o=order: reference.rms_norm(x, r, w, 1e-3, order=o)[:2], (x, residual, weight)
        )  # fmt: skip


def test_norm_errors(device):
    both, into = (ops.rms_norm, raw.rms_norm), (ops.rms_norm_, raw.rms_norm_)
    x, residual, w = on(device, (rand(4, 8), rand(4, 8, seed=1), weight_of(8)))
    bad = [
        ((x.double(), None, w, 1e-6), {}, TypeError, ("x", "float64")),
        ((x[0, 0], None, w, 1e-6), {}, ValueError, ("x", "0-d")),
        ((x, None, w[1:], 1e-6), {}, ValueError, ("weight", "[8]", "[7]")),
        ((x, None, w.double(), 1e-6), {}, TypeError, ("weight", "float64")),
        ((x.half(), None, w.bfloat16(), 1e-6), {}, ValueError, ("weight", "float16", "bfloat16")),
        ((x, residual[1:], w, 1e-6), {}, ValueError, ("residual", "[4, 8]", "[3, 8]")),
        ((x, residual.half(), w, 1e-6), {}, ValueError, ("residual", "float16")),
        ((x, None, w, -1.0), {}, ValueError, ("eps", "-1")),
        ((x, None, w, float("nan")), {}, ValueError, ("eps", "nan")),
        ((x, None, w, 1e-6), {"order": "gemma"}, ValueError, ("order", "gemma", "llama", "t5")),
    ]  # fmt: skip
    for args, kwargs, error, words in bad:
        check_errors(*both, args, kwargs, error, "rms_norm", *words)
        y = torch.zeros(4, 8, device=device)
        total = None if args[1] is None else torch.zeros(4, 8, device=device)
        check_errors(*into, (y, total, *args), kwargs, error, "rms_norm_", *words)
    y, wide = torch.zeros(4, 8, device=device), rand(4, 12).to(device)
    bad = [
        ((y.half(), None, x, None), ("y", "float32", "float16")),
        ((y[1:], None, x, None), ("y", "[4, 8]")),
        ((y.t().contiguous().t(), None, x, None), ("y", "contiguous")),
        ((y[:1].expand(4, 8), None, x, None), ("y", "contiguous")),
        ((y, None, x, residual), ("sum",)),
        ((y, y.clone(), x, None), ("sum",)),
        ((y, y, x, residual), ("y", "sum", "memory")),
        ((wide[:, 4:], None, wide[:, :8], None), ("y", "x", "memory")),
        ((y, wide[:, 1:9], x, wide[:, 4:]), ("sum", "residual", "memory")),
        ((wide.view(-1)[8:40].view(4, 8), None, wide.view(-1)[:32].view(4, 8), None), ("y", "memory")),
    ]  # fmt: skip
    for args, words in bad:
        check_errors(*into, (*args, w, 1e-6), {}, ValueError, *words)


def test_registration(device):
    x, residual, grad = on(device, [rand(300, 200, seed=s) for s in range(3)])
    weight, rstd = weight_of(200).to(device), torch.rand(300, device=device)
    close = {"rtol": 1e-5, "atol": 1e-4}
    leaves = [t.clone().requires_grad_() for t in (x, residual, weight)]
    check_op(raw.rms_norm, (*leaves, 1e-5), **close)
    check_op(
        raw.rms_norm, (x, None, weight.bfloat16(), 1e-5), {"order": "t5"}, rtol=2e-2, atol=1e-4
    )
    check_op(raw.rms_norm_, (torch.zeros_like(x), torch.zeros_like(x), x, residual, weight, 1e-5),
             mutates=True, **close)  # fmt: skip
    backward = raw.rms_norm_backward
    check_op(backward, (grad, residual, x, weight, rstd, True, True), **close)
    check_op(backward, (grad, None, x, weight, rstd, False, True), **close)


def test_compiles_with_inductor():
    def block(x, residual, weight):
        y, total, _ = ops.rms_norm(x, residual, weight, 1e-5)
        return ops.swiglu(y, total) + ops.gated_gelu(total, y)

    check_compiles(
        block, (rand(9, 64), rand(9, 64, seed=1), weight_of(64)), backend="inductor", dynamic=None
    )


@cuda_only
def test_cuda_graph(device):
    def block(x, residual, weight):
        y, total, _ = ops.rms_norm(x, residual, weight, 1e-5)
        ops.rms_norm_(x, residual, x, residual, weight, 1e-5)
        grads = raw.rms_norm_backward(y, total, x, weight, torch.ones_like(x[:, 0]), True, True)
        return [y, total, *grads, ops.swiglu(x, y)]

    one, two = ([t.to(device) for t in (rand(33, 1100, seed=s), rand(33, 1100, seed=s + 1), weight_of(1100))]
                for s in (0, 5))  # fmt: skip
    check_cuda_graph(block, one, None, two)
