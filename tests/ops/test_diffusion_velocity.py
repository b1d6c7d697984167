# SPDX-License-Identifier: Apache-2.0
"""vdiff_noise, vdiff_noise_rng and vdiff_loss: values, noise, gradients, places of results, errors."""

import pytest
import torch
from diffusion_cases import SHAPES, signals, times

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
    forced_isa,
    layout,
    on,
    poisoned_memory,
    threads,
)
from tenfold.testing.plugin import cuda_only

raw = torch.ops.tenfold


def plain_noise(x0, t, noise):
    a, s = torch.cos(t * torch.pi / 2).view(-1, 1, 1), torch.sin(t * torch.pi / 2).view(-1, 1, 1)
    a, s = a.to(x0.dtype), s.to(x0.dtype)
    return a * x0 + s * noise, a * noise - s * x0


def plain_loss(v_hat, x0, noise, t):
    return (v_hat - plain_noise(x0, t, noise)[1]).square().mean((1, 2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_noise(shape, dtype, device):
    x0, noise = signals(shape, dtype)
    t = times(shape[0])
    with poisoned_memory():
        got = ops.vdiff_noise(*on(device, (x0, t, noise)))
    want = reference.vdiff_noise(x0.double(), t, noise.double())
    for g, w, low in zip(got, want, plain_noise(x0, t, noise)):
        assert_close_to_ref(g.cpu(), w, low)
    one = ops.vdiff_noise(*on(device, (x0, t[-1], noise)))
    all_of_it = ops.vdiff_noise(*on(device, (x0, t[-1].double().expand(shape[0]), noise)))
    assert all(map(torch.equal, one, all_of_it))


def test_identities():
    """Acceptance 1: x0 and the noise from (z, v), and the weight SNR + 1, to 1e-12."""
    x0, noise = signals((64, 2, 40), torch.float64)
    t = torch.rand(64, dtype=torch.float64)
    z, v = ops.vdiff_noise(x0, t, noise)
    a, s = (f(t * torch.pi / 2).view(-1, 1, 1) for f in (torch.cos, torch.sin))
    assert float((a * z - s * v - x0).abs().max()) < 1e-12
    assert float((s * z + a * v - noise).abs().max()) < 1e-12
    v_hat = torch.randn_like(v)
    by_x0 = (1 + a**2 / s**2) * (x0 - (a * z - s * v_hat)).square()
    keep = (t > 1e-3).view(-1, 1, 1)  # where 1 / s^2 leaves digits
    assert float(((by_x0 - (v - v_hat).square()) * keep / (1 + 1 / s**2)).abs().max()) < 1e-12
    torch.testing.assert_close(ops.vdiff_loss(v_hat, x0, noise, t), (v - v_hat).square().mean((1, 2)),
                               rtol=1e-12, atol=0)  # fmt: skip


def test_ends(device):
    """Nothing is divided by, and cosine and sine are 0 and 1 exactly."""
    x0, noise = signals((2, 2, 50), device=device)
    z, v = ops.vdiff_noise(x0, torch.tensor([0.0, 1.0], device=device), noise)
    assert torch.equal(z[0], x0[0]) and torch.equal(v[0], noise[0])
    assert torch.equal(z[1], noise[1]) and torch.equal(v[1], -x0[1])
    for shape in ((0, 2, 8), (2, 0, 8), (3, 2, 0)):
        empty = torch.empty(shape, device=device)
        t = torch.zeros(shape[0], device=device)
        assert ops.vdiff_noise(empty, t, empty)[0].shape == shape
        loss = ops.vdiff_loss(empty, empty, empty, t)
        assert loss.shape == shape[:1] and bool(loss.isnan().all())


@pytest.mark.parametrize("values", VALUES)
def test_values(values, device):
    for dtype in DTYPES:
        x0, noise = fill((2, 3, 37), dtype, values), fill((2, 3, 37), dtype, seed=1)
        t = torch.tensor([0.3, 0.9])
        got = ops.vdiff_noise(*on(device, (x0, t, noise)))
        want = reference.vdiff_noise(x0.double(), t, noise.double())
        for g, w in zip(got, want):
            assert_close_to_ref(g.cpu(), w, w.to(dtype))
        loss = ops.vdiff_loss(*on(device, (noise, x0, noise, t))).cpu()
        torch.testing.assert_close(loss.double(), reference.vdiff_loss(noise.double(), x0.double(), noise.double(), t),
                                   rtol=1e-5, atol=1e-6, equal_nan=True)  # fmt: skip


@pytest.mark.parametrize("kind", LAYOUTS)
def test_layouts(kind, device):
    for dtype in DTYPES:
        x0, noise, v_hat = signals((2, 3, 75), dtype, 3, device)
        t = times(2, device=device)
        want = *ops.vdiff_noise(x0, t, noise), ops.vdiff_loss(v_hat, x0, noise, t)
        other = [layout(x, kind) for x in (x0, noise, v_hat)]
        wide = torch.stack((t, t), 1)[:, 0]
        got = *ops.vdiff_noise(other[0], wide, other[1]), ops.vdiff_loss(other[2], *other[:2], wide)
        assert all(map(torch.equal, got, want))


def test_given_results(device):
    x0, noise = signals((3, 2, 70), device=device)
    t = times(3, device=device)
    want = ops.vdiff_noise(x0, t, noise)
    drawn = ops.vdiff_noise_rng(x0, t, 5, 6)
    for places in ((None, None), (0, None), (None, 0), (1, 0), (0, 1)):
        own = x0.clone(), noise.clone()
        z, v = (torch.full_like(x0, 9.0) if at is None else own[at] for at in places)
        version = z._version
        ops.vdiff_noise_(z, v, own[0], t, own[1])
        assert torch.equal(z, want[0]) and torch.equal(v, want[1]) and z._version > version
        if 1 in places:
            continue
        own = (x0.clone(),)
        z, v = (torch.full_like(x0, 9.0) if at is None else own[at] for at in places)
        ops.vdiff_noise_rng_(z, v, own[0], t, 5, 6)
        assert torch.equal(z, drawn[0]) and torch.equal(v, drawn[1])
    only = torch.empty_like(x0)
    ops.vdiff_noise_(only, None, x0, t, noise)
    assert torch.equal(only, want[0])
    ops.vdiff_noise_(None, only, x0, t, noise)
    assert torch.equal(only, want[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_results(dtype, device):
    """What is written past the caches is what is written to them, sample by sample."""
    n = (5 if dtype == torch.float32 else 9) * 2**20 // 2 + 37
    x0, noise = (torch.randn(2, 1, n, device=device).to(dtype) for _ in range(2))
    t = torch.tensor([0.3, 0.8], device=device)
    whole = *ops.vdiff_noise(x0, t, noise), *ops.vdiff_noise_rng(x0, t, 3, 4)
    for i, at in ((0, 0), (1, n - 5000)):
        z, v = ops.vdiff_noise(x0[i : i + 1, :, at:], t[i], noise[i : i + 1, :, at:])
        assert torch.equal(whole[0][i, :, at:], z[0]) and torch.equal(whole[1][i, :, at:], v[0])
    drawn = reference.philox_normal(5000, 3, 4).view(1, 1, -1).to(device)
    z, v = reference.vdiff_noise(x0[:1, :, :5000].double(), t[:1].double(), drawn)
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(whole[2][:1, :, :5000].double(), z, rtol=step, atol=4 * step)
    torch.testing.assert_close(whole[3][:1, :, :5000].double(), v, rtol=step, atol=4 * step)


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64))
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2, 33), (2, 3, 127), (2, 2, 4100)])
def test_own_noise(shape, dtype, device):
    if dtype == torch.float64 and device.type != "cpu":
        dtype = torch.float32
    x0 = signals(shape, dtype, 1)[0]
    t = times(shape[0])
    for seed, offset in ((0, 0), (2**62 + 12345, 7), (-3, -(2**40))):
        got = ops.vdiff_noise_rng(*on(device, (x0, t)), seed, offset)
        want = reference.vdiff_noise_rng(x0.double(), t, seed, offset)
        for g, w in zip(got, want):
            step = max(torch.finfo(dtype).eps, 2e-7)
            torch.testing.assert_close(g.cpu().double(), w, rtol=step, atol=8 * step)


def test_own_noise_has_the_same_bits_everywhere():
    """Acceptance 13: for every instruction set and number of threads, and for a part of the stream."""
    import tenfold

    x0, t = torch.zeros(3, 2, 10007), torch.ones(3)
    want = ops.vdiff_noise_rng(x0, t, 77, 3)[0]
    for name in tenfold.cpu_capabilities():
        for count in (1, 3):
            with forced_isa(name), threads(count):
                assert torch.equal(ops.vdiff_noise_rng(x0, t, 77, 3)[0], want), (name, count)
    part = ops.vdiff_noise_rng(x0[:1, :1, :100], t[:1], 77, 3)[0]
    assert torch.equal(part, want[:1, :1, :100])
    # The scalar code that CUDA shares makes float64.
    assert torch.equal(ops.vdiff_noise_rng(x0.double(), t, 77, 3)[0], want.double())


def test_moments_of_own_noise(device):
    """Acceptance 13: moments of 1e6 numbers within 5 sigma, and no two streams alike."""
    n = 1_000_000
    x0, one = torch.zeros(1, 1, n, device=device), torch.ones((), device=device)
    e = ops.vdiff_noise_rng(x0, one, 123, 0)[0].double().flatten()
    facts = {"mean": (e.mean(), 0, 1), "variance": ((e**2).mean(), 1, 2), "third": ((e**3).mean(), 0, 15),
             "fourth": ((e**4).mean(), 3, 96), "lag 1": ((e[1:] * e[:-1]).mean(), 0, 1),
             "lag 2": ((e[2:] * e[:-2]).mean(), 0, 1),
             "beyond 3": ((e.abs() > 3).double().mean(), 0.0026998, 0.0026998)}  # fmt: skip
    for name, (got, want, variance) in facts.items():
        off = abs(float(got) - want) / (variance / n) ** 0.5
        print(f"{name}: {float(got):.6f}, {off:.2f} sigma")
        assert off < 5, name
    assert 4.5 < float(e.abs().max()) < 6.8
    for seed, offset in ((124, 0), (123, 1)):
        other = ops.vdiff_noise_rng(x0, one, seed, offset)[0].double().flatten()
        assert abs(float((e * other).mean())) < 5 / n**0.5


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("v_dtype", DTYPES)
def test_loss(shape, v_dtype, device):
    """Acceptance of sections 3.1 and 6: the mean over a sample, of every mix of dtypes; its gradient."""
    for dtype in {v_dtype, torch.float32}:
        v_hat = signals(shape, v_dtype, 1)[0]
        x0, noise = signals(shape, dtype)
        t, g = times(shape[0]), torch.rand(shape[0])
        exact = [x.double() for x in (v_hat, x0, noise)]
        want = reference.vdiff_loss(*exact, t)
        given = on(device, (v_hat.requires_grad_(), x0, noise, t))
        got = ops.vdiff_loss(*given)
        torch.testing.assert_close(got.cpu().double(), want, rtol=2e-6, atol=1e-7)
        v_hat.grad = None
        got.backward(g.to(device))
        leaf = exact[0].detach().requires_grad_()
        (w,) = torch.autograd.grad(reference.vdiff_loss(leaf, *exact[1:], t), leaf, g.double())
        assert_close_to_ref(v_hat.grad.cpu(), w, w.to(v_dtype))


def test_gradients_of_noise(device):
    x0, noise = signals((3, 2, 45), device=device)
    t = times(3, device=device)
    gz, gv = signals((3, 2, 45), device=device)
    for draw in (False, True):
        for use in ((0, 1), (0,), (1,)):
            leaf = x0.clone().requires_grad_()
            made = ops.vdiff_noise_rng(leaf, t, 1, 2) if draw else ops.vdiff_noise(leaf, t, noise)
            torch.autograd.backward([made[i] for i in use], [(gz, gv)[i] for i in use])
            a, s = (f(t * torch.pi / 2).view(-1, 1, 1) for f in (torch.cos, torch.sin))
            want = a * gz * (0 in use) - s * gv * (1 in use)
            torch.testing.assert_close(leaf.grad, want, rtol=1e-5, atol=1e-6)
    leaf = x0.clone().requires_grad_()
    z, v = ops.vdiff_noise(leaf, t, noise)
    with pytest.raises(RuntimeError, match="once"):
        torch.autograd.grad((z * v).sum(), leaf, create_graph=True)
    for x, made in ((noise, lambda n: ops.vdiff_noise(x0, t, n)), (t, lambda u: ops.vdiff_noise(x0, u, noise)),
                    (noise, lambda n: ops.vdiff_loss(x0, x0, n, t))):  # fmt: skip
        with pytest.raises(RuntimeError, match="requires grad"):
            made(x.clone().requires_grad_())


def test_gradcheck():
    x0, noise, v_hat = signals((2, 1, 3), torch.float64, 3)
    t = torch.tensor([0.2, 0.7], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: ops.vdiff_noise(x, t, noise), x0.requires_grad_())
    assert torch.autograd.gradcheck(lambda x: ops.vdiff_noise_rng(x, t, 1, 2), x0)
    x0 = x0.detach()
    assert torch.autograd.gradcheck(
        lambda w: ops.vdiff_loss(w, x0, noise, t), v_hat.requires_grad_()
    )
    for leaf, call in ((x0, lambda x: reference.vdiff_noise(x, t, noise)),
                       (v_hat.detach(), lambda w: reference.vdiff_loss(w, x0, noise, t))):  # fmt: skip
        assert torch.autograd.gradcheck(call, leaf.clone().requires_grad_())


def test_errors(device):
    x0, noise = signals((2, 3, 8), device=device)
    t = times(2, device=device)
    noised, drawn = (ops.vdiff_noise, raw.vdiff_noise), (ops.vdiff_noise_rng, raw.vdiff_noise_rng)
    lost = ops.vdiff_loss, raw.vdiff_loss
    bad = [
        (noised, (x0.long(), t, noise), TypeError, ("x0", "int64", "float32")),
        (noised, (x0[0], t, noise[0]), ValueError, ("x0", "3-dimensional", "[3, 8]")),
        (noised, (x0, t.half(), noise), ValueError, ("t", "float16", "float32 or float64")),
        (noised, (x0, t.bfloat16(), noise), ValueError, ("t", "bfloat16", "float64")),
        (noised, (x0, t[:1], noise), ValueError, ("t", "[2]", "[1]")),
        (noised, (x0, t[:, None], noise), ValueError, ("t", "[2, 1]")),
        (noised, (x0, t, noise[:1]), ValueError, ("noise", "[2, 3, 8]", "[1, 3, 8]")),
        (noised, (x0, t, noise.half()), ValueError, ("noise", "float32", "float16")),
        (drawn, (x0[0], t, 1, 2), ValueError, ("x0", "[3, 8]")),
        (drawn, (x0, t.int(), 1, 2), ValueError, ("t", "int32")),
        (lost, (x0[:1], x0, noise, t), ValueError, ("v_hat", "[2, 3, 8]", "[1, 3, 8]")),
        (lost, (x0.double(), x0, noise, t), TypeError, ("v_hat", "float64", "bfloat16")),
        (lost, (x0, x0.half(), noise.half(), t), TypeError, ("v_hat", "float16", "float32")),
        (lost, (x0, x0, noise[:, :, 1:], t), ValueError, ("noise", "[2, 3, 7]")),
    ]  # fmt: skip
    if device.type == "cpu":
        nan = torch.tensor([0.5, float("nan")])
        bad += [(noised, (x0, t + 0.5, noise), ValueError, ("t", "[0, 1]", "1.5")),
                (noised, (x0, -t, noise), ValueError, ("t", "[0, 1]", "-1")),
                (drawn, (x0, nan, 1, 2), ValueError, ("t", "nan", "at 1")),
                (lost, (x0, x0, noise, nan), ValueError, ("t", "nan"))]  # fmt: skip
    for (face, op), args, error, words in bad:
        check_errors(face, op, args, {}, error, *words)
    z, v, big = torch.zeros_like(x0), torch.zeros_like(x0), torch.zeros(100, device=device)
    into = ops.vdiff_noise_, raw.vdiff_noise_
    for args, words in (
        ((None, None), ("z and v", "None")),
        ((z.half(), v), ("z", "float16")),
        ((z, v[:1]), ("v", "[2, 3, 8]")),
        ((z.mT.contiguous().mT, v), ("z", "contiguous")),
        ((z, z), ("z", "v", "same tensor")),
        ((big[:48].view(2, 3, 8), big[4:52].view(2, 3, 8)), ("z", "v", "memory")),
    ):
        check_errors(*into, (*args, x0, t, noise), {}, ValueError, *words)
    half = big[:48].view(2, 3, 8), big[4:52].view(2, 3, 8)
    check_errors(*into, (half[0], None, half[1], t, noise), {}, ValueError, "z", "x0", "memory")
    check_errors(*into, (None, half[0], x0, t, half[1]), {}, ValueError, "v", "noise", "memory")


def test_registration(device):
    x0, noise, v_hat = signals((2, 3, 700), count=3, device=device)
    t = times(2, device=device)
    leaf = x0.clone().requires_grad_()
    check_op(raw.vdiff_noise, (leaf, t, noise))
    check_op(raw.vdiff_noise_rng, (leaf, t, 3, 4))
    check_op(raw.vdiff_loss, (v_hat.clone().requires_grad_(), x0, noise, t))
    check_op(raw.vdiff_loss_backward, (t, v_hat, x0, noise, t))
    z, v = torch.zeros_like(x0), torch.zeros_like(x0)
    check_op(raw.vdiff_noise_, (z, v, x0, t, noise), mutates=True)
    check_op(raw.vdiff_noise_rng_, (z, v, x0, t, 3, 4), mutates=True)


def test_compiles_with_inductor():
    def block(x0, t, noise, u):
        z, v = ops.vdiff_noise(x0, t, noise)
        return ops.vdiff_loss(v * 0.5, x0, noise, t), ops.vdiff_step(z, v, None, t, u)[0]

    x0, noise = signals((2, 2, 64))
    t = torch.tensor([0.5, 0.9])
    check_compiles(
        block, (x0, t, noise, t * 0.5), backend="inductor", dynamic=None
    )  # once for the family


@cuda_only
def test_cuda_graph(device):
    def call(x0, t, noise, v_hat):
        made = *ops.vdiff_noise(x0, t, noise), *ops.vdiff_noise_rng(x0, t, 3, 4)
        return *made, ops.vdiff_loss(v_hat, x0, noise, t)

    first, second = ([*signals((3, 2, 500), count=2, device=device)] for _ in range(2))
    check_cuda_graph(call, (first[0], times(3, device=device), *first[1:], first[0] * 2), None,
                     (second[0], times(3, device=device), *second[1:], second[0] * 3))  # fmt: skip
