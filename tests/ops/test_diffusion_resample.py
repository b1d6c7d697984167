# SPDX-License-Identifier: Apache-2.0
"""fir_down2, fir_up2_cat and conv1d_planes: acceptance numbers, values, gradients, layouts, errors."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from diffusion_cases import signals

from tenfold import ops, reference
from tenfold.testing import (
    DTYPES,
    LAYOUTS,
    assert_close_to_ref,
    check_cuda_graph,
    check_errors,
    check_op,
    layout,
    on,
    poisoned_memory,
)
from tenfold.testing.plugin import cuda_only

raw = torch.ops.tenfold
LENGTHS = (3, 4, 5, 8, 9, 16, 17, 25, 33, 40, 64, 131, 1030, 1601)


def dense(x, up):
    """The reference code's form: a C x C x 8 weight, zero but for the filter on its diagonal."""
    taps = torch.tensor(reference.diffusion.FIR_TAPS)
    taps = torch.cat((taps, taps.flip(0))).to(x)
    weight = torch.diag_embed(taps[:, None].expand(8, x.shape[1])).permute(1, 2, 0)
    if up:
        return F.conv_transpose1d(F.pad(x, (2, 2), "reflect"), 2 * weight, stride=2, padding=7)
    return F.conv1d(F.pad(x, (3, 3), "reflect"), weight, stride=2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rates(dtype, device):
    """Every length around strips, vectors and ends; acceptance 9: the dense convolution's results."""
    for length in LENGTHS:
        x, skip = signals((2, 3, length), dtype, 1)[0], signals((2, 2, 2 * length), dtype, 1)[0]
        with poisoned_memory():
            up = ops.fir_up2_cat(*on(device, (x, skip))).cpu()
            alone = ops.fir_up2_cat(x.to(device)).cpu()
        want = reference.fir_up2_cat(x.double())
        torch.testing.assert_close(want, dense(x.double(), True), rtol=0, atol=1e-12)
        assert_close_to_ref(up[:, :3], want, reference.fir_up2_cat(x))
        assert torch.equal(up[:, 3:], skip) and torch.equal(up[:, :3], alone)
        if length < 4:
            continue
        with poisoned_memory():
            down = ops.fir_down2(x.to(device)).cpu()
        want = reference.fir_down2(x.double())
        torch.testing.assert_close(want, dense(x.double(), False), rtol=0, atol=1e-12)
        assert_close_to_ref(down, want, reference.fir_down2(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rate_gradients(dtype, device):
    for length in LENGTHS:
        x, skip = signals((2, 3, length), dtype, 1)[0], signals((2, 2, 2 * length), dtype, 1)[0]
        for op, inputs in (("fir_up2_cat", (x, skip)), ("fir_up2_cat", (x,)), ("fir_down2", (x,))):
            if op == "fir_down2" and length < 4:
                continue
            leaves = [t.to(device).requires_grad_() for t in inputs]
            exact = [t.double().requires_grad_() for t in inputs]
            made, want = getattr(ops, op)(*leaves), getattr(reference, op)(*exact)
            g = torch.randn_like(want).to(dtype)
            with poisoned_memory():
                got = torch.autograd.grad(made, leaves, g.to(device))
            low = [t.detach().requires_grad_() for t in inputs]
            theirs = torch.autograd.grad(getattr(reference, op)(*low), low, g)
            wide = torch.autograd.grad(want, exact, g.double())
            for a, b, c in zip(got, wide, theirs):
                assert_close_to_ref(a.cpu(), b, c, what=f"{op} {length}")


def test_rates_of_known_signals(device):
    """Acceptance 9: constants are returned exactly; a sine of period 64 survives up and down."""
    for dtype in DTYPES:
        value = 0.7 if dtype != torch.float32 else 22937 / 2**15  # 15 bits
        constant = torch.full((1, 2, 50), value, dtype=dtype, device=device)
        assert torch.equal(ops.fir_down2(constant), constant[:, :, :25])
        assert torch.equal(ops.fir_up2_cat(constant), constant.repeat(1, 1, 2))
    x = torch.sin(torch.arange(640, dtype=torch.float64) * (2 * math.pi / 64))[None, None]
    off = (ops.fir_down2(ops.fir_up2_cat(x)) - x).abs()
    print(f"sine: {float(off[..., 8:-8].max()):.1e} inside, {float(off.max()):.1e} at the ends")
    assert float(off[..., 8:-8].max()) < 1e-5 and float(off.max()) < 1e-2
    mine = ops.fir_down2(ops.fir_up2_cat(x.float().to(device))).cpu().double()
    assert float((mine - x).abs()[..., 8:-8].max()) < 1e-5


@pytest.mark.parametrize("kind", LAYOUTS)
def test_rate_layouts(kind, device):
    """Rows are read where they are: slices of channels and of batches too."""
    for dtype in DTYPES:
        x, skip = (
            signals((2, 3, 130), dtype, 1, device)[0],
            signals((2, 4, 260), dtype, 1, device)[0],
        )
        want = ops.fir_down2(x), ops.fir_up2_cat(x, skip)
        other = layout(x, kind), layout(skip, kind)
        assert torch.equal(ops.fir_down2(other[0]), want[0])
        assert torch.equal(ops.fir_up2_cat(*other), want[1])
        big = torch.randn(4, 9, 130, device=device).to(dtype)
        assert torch.equal(
            ops.fir_down2(big[::2, 1:8:3]), ops.fir_down2(big[::2, 1:8:3].contiguous())
        )
        out = torch.full((2, 9, 260), 7.0, dtype=dtype, device=device)
        ops.fir_up2_cat_(out[:, 1:8], x, skip)
        assert torch.equal(out[:, 1:8], want[1]) and bool((out[:, ::8] == 7).all())
        out[:, 3:7] = skip
        ops.fir_up2_cat_(out[:, :7], x)  # what is behind is there already
        assert torch.equal(out[:, :3], want[1][:, :3]) and torch.equal(out[:, 3:7], skip)
        half = torch.full((2, 5, 65), 7.0, dtype=dtype, device=device)
        ops.fir_down2_(half[:, 1:4], x)
        assert torch.equal(half[:, 1:4], want[0]) and bool((half[:, ::4] == 7).all())


def test_large_rates(device):
    """What is written past the caches, and rows of many strips."""
    for dtype, length in ((torch.float32, 1_100_003), (torch.bfloat16, 2_200_003)):
        x = torch.randn(1, 2, length, device=device).to(dtype)
        down, up = (
            ops.fir_down2(x),
            ops.fir_up2_cat(x, torch.zeros(1, 1, 2 * length, dtype=dtype, device=device)),
        )
        for at in (0, 500_001, length - 4000):
            part = x[:, :, at : at + 4000]
            inner = slice(8, 3900)
            assert torch.equal(up[:, :2, 2 * at :][..., inner], ops.fir_up2_cat(part)[..., inner])
            if at % 2 == 0:
                assert torch.equal(
                    down[:, :, at // 2 :][..., 8:1900], ops.fir_down2(part)[..., 8:1900]
                )
        assert bool((up[:, 2] == 0).all())


def test_rate_gradcheck():
    for length in (4, 7):
        x, skip = (
            signals((1, 2, length), torch.float64, 1)[0],
            signals((1, 1, 2 * length), torch.float64, 1)[0],
        )
        x, skip = x.requires_grad_(), skip.requires_grad_()
        for module in (ops, reference):
            assert torch.autograd.gradcheck(module.fir_down2, x)
            assert torch.autograd.gradcheck(module.fir_up2_cat, (x, skip))


def test_rate_errors(device):
    x, skip = (
        signals((2, 3, 8), count=1, device=device)[0],
        signals((2, 1, 16), count=1, device=device)[0],
    )
    down, up = (ops.fir_down2, raw.fir_down2), (ops.fir_up2_cat, raw.fir_up2_cat)
    into_down, into_up = (ops.fir_down2_, raw.fir_down2_), (ops.fir_up2_cat_, raw.fir_up2_cat_)
    out = torch.zeros(2, 4, 16, device=device)
    for (face, op), args, error, words in (
        (down, (x.int(),), TypeError, ("x", "int32")),
        (down, (x[0],), ValueError, ("x", "[3, 8]")),
        (down, (x[:, :, :3],), ValueError, ("x", "at least 4", "3")),
        (up, (x[:, :, :2], skip), ValueError, ("x", "at least 3", "2")),
        (up, (x, skip.half()), ValueError, ("skip", "float16")),
        (up, (x, skip[:, :, 1:]), ValueError, ("skip", "[2, 1, 16]", "[2, 1, 15]")),
        (up, (x, skip[:1]), ValueError, ("skip", "[1, 1, 16]")),
        (into_down, (out[:, :3, :5], x), ValueError, ("out", "[2, 3, 4]")),
        (into_down, (out[:, :3, :8:2], x), ValueError, ("out", "contiguous rows")),
        (into_down, (out[:1, :1, :4].expand(2, 3, 4), x), ValueError, ("out", "overlap")),
        (into_up, (out[:, :3], x, skip), ValueError, ("out", "[2, 4, 16]")),
        (into_up, (out.half(), x, skip), ValueError, ("out", "float16")),
        (into_up, (out, x, out[:, 3:]), ValueError, ("out", "skip", "memory")),
        (into_up, (out, out[:, :3, :8], skip), ValueError, ("out", "x", "memory")),
    ):  # fmt: skip
        check_errors(face, op, args, {}, error, *words)


def test_registration(device):
    x, skip = (
        signals((2, 3, 300), count=1, device=device)[0],
        signals((2, 2, 600), count=1, device=device)[0],
    )
    leaf, behind = x.clone().requires_grad_(), skip.clone().requires_grad_()
    check_op(raw.fir_down2, (leaf,))
    check_op(raw.fir_up2_cat, (leaf, behind))
    check_op(raw.fir_up2_cat, (leaf, None))
    check_op(raw.fir_down2_backward, (x, 601))
    check_op(raw.fir_up2_backward, (skip, 1))
    check_op(raw.fir_down2_, (torch.zeros(2, 3, 150, device=device), x), mutates=True)
    check_op(raw.fir_up2_cat_, (torch.zeros(2, 5, 600, device=device), x, skip), mutates=True)


# -- constant planes ------------------------------------------------------------------------------


@pytest.fixture
def exact_products():
    """Convolutions of float32 without TensorFloat-32."""
    with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
        yield


def plane_case(batch, own, planes, length, out=4, size=5, dtype=torch.float64, biased=True):
    x, c = torch.randn(batch, own, length), torch.randn(batch, planes)
    weight, bias = torch.randn(out, own + planes, size) / 3, torch.randn(out) if biased else None
    return [None if t is None else t.to(dtype) for t in (x, c, weight, bias)]


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 9, 40])
def test_planes(length, device, exact_products):
    """Acceptance 10: the convolution of materialised planes, to 1e-12 in float64, L < 4 too; and gradients."""
    for batch, own, size, biased in itertools.product((1, 3), (1, 2), (1, 3, 5, 7), (True, False)):
        args = plane_case(batch, own, 6, length, size=size, biased=biased)
        if device.type == "cpu":
            got, want = ops.conv1d_planes(*args), reference.conv1d_planes(*args)
            torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
            leaves = [t.requires_grad_() for t in args if t is not None]
            g = torch.randn_like(want)
            mine = torch.autograd.grad(ops.conv1d_planes(*args), leaves, g)
            for a, b in zip(mine, torch.autograd.grad(reference.conv1d_planes(*args), leaves, g)):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-11)
        for dtype in DTYPES:
            low = [None if t is None else t.detach().to(dtype) for t in args]
            exact = [None if t is None else t.double() for t in low]
            plain = reference.conv1d_planes(*low)
            got = ops.conv1d_planes(*on(device, low)).cpu()
            if dtype == torch.float32:
                torch.testing.assert_close(
                    got.double(), reference.conv1d_planes(*exact), rtol=1e-5, atol=1e-5
                )
            else:  # two roundings: of the convolution, and of the sum
                step = torch.finfo(dtype).eps * float(plain.abs().max() + 1)
                torch.testing.assert_close(
                    got.double(), reference.conv1d_planes(*exact), rtol=0, atol=2 * step
                )


def test_planes_gradcheck():
    for batch, length in ((1, 3), (2, 6)):
        args = [t.requires_grad_() for t in plane_case(batch, 2, 3, length, 2)]
        assert torch.autograd.gradcheck(ops.conv1d_planes, args)
        assert torch.autograd.gradcheck(reference.conv1d_planes, args)
    x, c, weight, bias = plane_case(2, 2, 3, 9)
    with pytest.raises(RuntimeError, match="once"):
        y = ops.conv1d_planes(x.requires_grad_(), c, weight, bias)
        torch.autograd.grad(y.square().sum(), x, create_graph=True)


def test_planes_long_rows(device, exact_products):
    """Sums of long rows, and only the gradients that are asked for."""
    args = on(device, plane_case(2, 2, 16, 20_011, 8, dtype=torch.float32))
    exact = [t.double().cpu().requires_grad_() for t in args]
    g = torch.randn(2, 8, 20_011)
    want = torch.autograd.grad(reference.conv1d_planes(*exact), exact, g.double())
    for wrt in ((0, 1, 2, 3), (1,), (2,), (3,), (0,)):
        leaves = [t.clone().requires_grad_(i in wrt) for i, t in enumerate(args)]
        got = torch.autograd.grad(
            ops.conv1d_planes(*leaves), [leaves[i] for i in wrt], g.to(device)
        )
        for i, a in zip(wrt, got):
            torch.testing.assert_close(a.cpu().double(), want[i], rtol=1e-4,
                                       atol=2e-6 * float(want[i].abs().max()) + 1e-5)  # fmt: skip


def test_planes_under_autocast():
    x, c, weight, bias = plane_case(2, 2, 6, 30, dtype=torch.float32)
    weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.conv1d_planes(x, c, weight, bias)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert weight.grad.dtype == torch.float32 and weight.grad.shape == weight.shape


def test_planes_errors(device):
    x, c, weight, bias = on(device, plane_case(2, 2, 3, 9, dtype=torch.float32))
    both = ops.conv1d_planes, raw.conv1d_planes
    for args, error, words in (
        ((x.int(), c, weight, bias), TypeError, ("x", "int32")),
        ((x[0], c, weight, bias), ValueError, ("x", "3-dimensional")),
        ((x[:, :0], c, weight[:, 2:], bias), ValueError, ("x", "[2, 0, 9]")),
        ((x[..., :0], c, weight, bias), ValueError, ("x", "[2, 2, 0]")),
        ((x, c.half(), weight, bias), ValueError, ("c", "float16")),
        ((x, c[:1], weight, bias), ValueError, ("c", "[2, 3]", "[1, 3]")),
        ((x, c[..., None], weight, bias), ValueError, ("c", "2-dimensional")),
        ((x, c, weight[:, 1:], bias), ValueError, ("weight", "2 + 3", "[4, 4, 5]")),
        ((x, c, weight[..., 1:], bias), ValueError, ("weight", "odd", "4")),
        ((x, c, weight, bias[1:]), ValueError, ("bias", "[4]", "[3]")),
        ((x, c, weight.double(), bias), ValueError, ("weight", "float64")),
    ):  # fmt: skip
        check_errors(*both, args, {}, error, "conv1d_planes", *words)


def test_planes_registration(device):
    args = on(device, plane_case(2, 2, 3, 40, dtype=torch.float32))
    check_op(raw.conv1d_planes, [t.clone().requires_grad_() for t in args])
    y, taps = torch.randn(2, 4, 40, device=device), torch.randn(2, 4, 5, device=device)
    check_op(raw.planes_sums, (y, 5))
    check_op(raw.planes_add_, (y, taps, args[3], False), mutates=True)


@cuda_only
def test_cuda_graph(device):
    def call(x, skip, c, weight, bias):
        return ops.fir_down2(x), ops.fir_up2_cat(x, skip), ops.conv1d_planes(x, c, weight, bias)

    first, second = (
        on(device, [torch.randn(2, 2, 50), torch.randn(2, 1, 100), *plane_case(2, 2, 3, 50, dtype=torch.float32)[1:]])
        for _ in range(2)
    )  # fmt: skip
    check_cuda_graph(call, first, None, second)
