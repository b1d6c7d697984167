# SPDX-License-Identifier: Apache-2.0
"""vdiff_step: acceptance numbers, every option against the definition, places of results, errors."""

import itertools
import math

import pytest
import torch
from diffusion_cases import SHAPES, signals, times

from tenfold import ops, reference
from tenfold.testing import (
    DTYPES,
    LAYOUTS,
    check_cuda_graph,
    check_errors,
    check_op,
    layout,
    on,
    poisoned_memory,
)
from tenfold.testing.plugin import cuda_only

raw = torch.ops.tenfold


def wide(*values):
    return [torch.tensor(v, dtype=torch.float64) for v in values]


def angle(t):
    return torch.cos(t * math.pi / 2), torch.sin(t * math.pi / 2)


def test_one_step():
    """Acceptance 2: the printed number, and the rotation, to 1e-12."""
    z, v = (torch.full((1, 1, 1), x, dtype=torch.float64) for x in (1.0, 0.2))
    got = float(ops.vdiff_step(z, v, None, *wide(0.8, 0.6))[0])
    print(f"one step: {got:.10f}")
    assert abs(got - 0.8892531174) < 5e-11
    z, v = signals((50, 2, 7), torch.float64)
    t = torch.rand(50, dtype=torch.float64)
    u = t * torch.rand(50, dtype=torch.float64)
    d = (math.pi / 2 * (t - u)).view(-1, 1, 1)
    torch.testing.assert_close(ops.vdiff_step(z, v, None, t, u)[0], d.cos() * z - d.sin() * v,
                               rtol=0, atol=1e-12)  # fmt: skip


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_perfect_predictor(eta, device):
    """Acceptance 3: it recovers x0 in any number of steps, to 1e-5 in float32."""
    x0, z0 = signals((2, 2, 90), device=device)
    for steps in (1, 2, 7, 50):
        z = z0.clone()
        for i in range(steps):
            t = torch.tensor(1 - i / steps, dtype=torch.float64, device=device)
            u = torch.tensor(max(1 - (i + 1) / steps, 0.0), dtype=torch.float64, device=device)
            a, s = angle(t)
            v = ((a * z.double() - x0.double()) / s).float()
            z, made = ops.vdiff_step(z, v, None, t, u, None, eta, torch.randn_like(z))
        print(f"eta {eta}, {steps} steps: {float((made - x0).abs().max()):.1e}")
        assert float((made - x0).abs().max()) < 1e-5 and float((z - x0).abs().max()) < 1e-5


def test_gaussian_data():
    """Acceptance 4: the printed results of optimal predictors for data N(0, r^2)."""

    def run(r, steps):
        z = torch.ones(1, 1, 1).double()
        for i in range(steps):
            t, u = wide(1 - i / steps, max(1 - (i + 1) / steps, 0.0))
            a, s = angle(t)
            v = a * s * (1 - r * r) * z / (a * a * r * r + s * s)
            z, x0 = ops.vdiff_step(z, v, None, t, u)
        return float(x0)

    for steps, want in ((10, 0.883485), (100, 0.987738)):
        assert abs(run(1.0, steps) - want) < 5e-7
        assert abs(run(1.0, steps) - math.cos(math.pi / (2 * steps)) ** steps) < 1e-12
    got = [run(0.3, steps) for steps in (25, 50, 100, 200)]
    print("r = 0.3:", " ".join(f"{x:.5f}" for x in got))
    assert [round(x, 5) for x in got] == [0.27420, 0.28684, 0.29335, 0.29666]


def test_posterior():
    """Acceptance 6: eta = 1 draws from the posterior of section 3.1, to 1e-6."""
    z, v = signals((40, 1, 5), torch.float64)
    t = 0.02 + 0.96 * torch.rand(40, dtype=torch.float64)
    u = t * (0.02 + 0.95 * torch.rand(40, dtype=torch.float64))
    (a_t, s_t), (a_u, s_u) = ([x.view(-1, 1, 1) for x in angle(y)] for y in (t, u))
    r = (a_t**2 / s_t**2) / (a_u**2 / s_u**2)
    zero, one = torch.zeros_like(z), torch.ones_like(z)
    mean, x0 = ops.vdiff_step(z, v, None, t, u, None, 1.0, zero)
    want = r * (a_u / a_t) * z + (1 - r) * a_u * x0
    deviation = ops.vdiff_step(z, v, None, t, u, None, 1.0, one)[0] - mean
    print(f"mean {float((mean - want).abs().max()):.1e}")
    torch.testing.assert_close(mean, want, rtol=0, atol=1e-6)
    torch.testing.assert_close(deviation**2, ((1 - r) * s_u**2).expand_as(z), rtol=0, atol=1e-6)


def test_guidance_in_any_space():
    """Acceptance 8: of velocities, of x0 and of noise it is the same."""
    z, v, free = signals((6, 2, 9), torch.float64, 3)
    t, u = times(6, torch.float64), times(6, torch.float64) * 0.5
    g = torch.tensor([0.0, 1.0, 2.5, -1.0, 7.0, 0.5], dtype=torch.float64)
    u = torch.minimum(t, u)
    got = ops.vdiff_step(z, v, free, t, u, g)
    (a_t, s_t), (a_u, s_u) = ([x.view(-1, 1, 1) for x in angle(y)] for y in (t, u))
    by = g.view(-1, 1, 1)
    x0, free_x0 = (a_t * z - s_t * w for w in (v, free))
    e, free_e = (s_t * z + a_t * w for w in (v, free))
    x0, e = free_x0 + by * (x0 - free_x0), free_e + by * (e - free_e)
    torch.testing.assert_close(got[1], x0, rtol=0, atol=1e-12)
    torch.testing.assert_close(got[0], a_u * x0 + s_u * e, rtol=0, atol=1e-12)


OPTIONS = [
    {}, {"eta": 0.7}, {"clip": 0.8}, {"clip": 0.8, "use_clipped_model_output": True, "eta": 1.0},
    {"cfg_plus_plus": True}, {"cfg_plus_plus": True, "clip": 0.5, "eta": 0.3},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize("guided", [False, True])
def test_step(guided, options, device):
    for shape, v_dtype in itertools.product(SHAPES, DTYPES):
        for dtype in {v_dtype, torch.float32}:
            z, noise = signals(shape, dtype)
            v, free = signals(shape, v_dtype)
            t, g = times(shape[0]), torch.tensor([1.0, 3.0, 0.0])[: shape[0]]
            u = t * torch.tensor([0.9, 0.0, 1.0])[: shape[0]]
            free, g = (free, g) if guided else (None, None)
            rest = dict(options)
            eta, clip = rest.pop("eta", 0.0), rest.pop("clip", None)
            with poisoned_memory():
                got = ops.vdiff_step(
                    *on(device, (z, v, free, t, u, g)), eta, noise.to(device), clip, **rest
                )
            exact = [None if x is None else x.double() for x in (z, v, free)]
            want = reference.vdiff_step(*exact, t, u, g, eta, noise.double(), clip, **rest)
            step = torch.finfo(dtype).eps
            for name, mine, w in zip(("z_next", "x0_hat"), got, want):
                # Re-deriving the noise divides by s, which is as good as z's last digit.
                top = max(float(w.abs().max()), float(z.abs().max()), 1.0)
                off = (mine.cpu().double() - w).abs() - step * w.abs()
                assert float(off.max()) < 6 * max(step, 4e-7) * top, (name, shape, dtype, v_dtype)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
def test_step_in_float64(options):
    """The kernel's double precision is the definition."""
    z, v, free, noise = signals((3, 2, 33), torch.float64, 4)
    t, g = times(3, torch.float64), torch.tensor([1.0, 3.0, 0.0], dtype=torch.float64)
    u, rest = t * torch.tensor([0.9, 0.0, 1.0], dtype=torch.float64), dict(options)
    args = z, v, free, t, u, g, rest.pop("eta", 0.0), noise, rest.pop("clip", None)
    got, want = ops.vdiff_step(*args, **rest), reference.vdiff_step(*args, **rest)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_ends(device):
    """t = 1, t = 0, u = t and u = 0, with noise and without: finite, exact, no root of a negative number."""
    z, v, noise = signals((1, 2, 33), count=3, device=device)
    for eta in (0.0, 0.5, 1.0):
        for t in (1.0, 0.7, 1e-7, 0.0):
            same = torch.tensor(t, device=device)
            kept = ops.vdiff_step(z, v, None, same, same, None, eta, noise)[0]
            assert float((kept - z).abs().max()) < 3e-7  # u = t: nothing happens
            end = ops.vdiff_step(z, v, None, same, same * 0, None, eta, noise)
            assert float((end[0] - end[1]).abs().max()) < 3e-7  # u = 0: x0, whatever the noise
    empty = torch.empty(0, 2, 8, device=device)
    none = torch.empty(0, device=device)
    assert ops.vdiff_step(empty, empty, empty, none, none, none)[0].shape == (0, 2, 8)


def test_unread(device):
    """What does not count is not looked at: v_uncond where g is 1, noise where eta is 0."""
    z, v = signals((2, 2, 40), device=device)
    bad = torch.full_like(z, float("nan"))
    t = torch.tensor([0.9, 0.5], device=device)
    want = ops.vdiff_step(z, v, None, t, t * 0.5)
    g = torch.ones(2, device=device)
    for got in (ops.vdiff_step(z, v, bad, t, t * 0.5, g, 0.0, bad), ops.vdiff_step(z, v, bad, t, t * 0.5),
                ops.vdiff_step(z, v, bad, t, t * 0.5, g, cfg_plus_plus=True)):  # fmt: skip
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_layouts(kind, device):
    for dtype in DTYPES:
        z, v, free, noise = signals((2, 3, 75), dtype, 4, device)
        t, g = times(2, device=device), torch.tensor(2.0, device=device)
        want = ops.vdiff_step(z, v, free, t, t * 0.5, g, 0.5, noise)
        z, v, free, noise = (layout(x, kind) for x in (z, v, free, noise))
        got = ops.vdiff_step(z, v, free, t, t * 0.5, g, 0.5, noise)
        assert all(map(torch.equal, got, want))


def test_given_results(device):
    z, v, free, noise = signals((2, 3, 75), count=4, device=device)
    t, g = times(2, device=device), torch.tensor(2.0, device=device)
    args = (t, t * 0.5, g, 0.5)
    want = ops.vdiff_step(z, v, free, *args, noise)
    for places in itertools.permutations((None, 0, 1, 2, 3), 2):
        own = [x.clone() for x in (z, v, free, noise)]
        z_next, x0 = (torch.full_like(z, 9.0) if at is None else own[at] for at in places)
        version = z_next._version
        ops.vdiff_step_(z_next, x0, *own[:3], *args, own[3])
        assert torch.equal(z_next, want[0]) and torch.equal(x0, want[1])
        assert z_next._version > version
    ops.vdiff_step_(z, None, z, v, free, *args, noise)
    assert torch.equal(z, want[0])


def test_errors(device):
    both, into = (ops.vdiff_step, raw.vdiff_step), (ops.vdiff_step_, raw.vdiff_step_)
    z, v, free, noise = signals((2, 3, 8), count=4, device=device)
    t, g = torch.tensor([0.9, 0.5], device=device), torch.tensor(2.0, device=device)
    u = t * 0.5

    def args(z=z, v=v, free=None, t=t, u=u, g=None, eta=0.0, noise=None, clip=None):
        return z, v, free, t, u, g, eta, noise, clip

    bad = [
        (args(z=z.long()), TypeError, ("z", "int64")),
        (args(z=z[0], v=v[0]), ValueError, ("z", "[3, 8]")),
        (args(v=v[:1]), ValueError, ("v", "[2, 3, 8]", "[1, 3, 8]")),
        (args(z=z.half(), v=v), TypeError, ("v", "float16", "float32")),
        (args(free=free.half(), g=g), ValueError, ("v_uncond", "float32", "float16")),
        (args(free=free[:, 1:], g=g), ValueError, ("v_uncond", "[2, 2, 8]")),
        (args(t=t.half()), ValueError, ("t", "float16")),
        (args(u=u[:1]), ValueError, ("u", "[2]", "[1]")),
        (args(g=g.long(), free=free), ValueError, ("guidance", "int64")),
        (args(g=g), ValueError, ("guidance", "v_uncond")),
        (args(eta=1.5, noise=noise), ValueError, ("eta", "1.5", "[0, 1]")),
        (args(eta=float("nan"), noise=noise), ValueError, ("eta", "nan")),
        (args(eta=0.5), ValueError, ("eta", "noise", "None")),
        (args(noise=noise[:1]), ValueError, ("noise", "[1, 3, 8]")),
        (args(clip=0.0), ValueError, ("clip", "0")),
        (args(clip=float("inf")), ValueError, ("clip", "inf")),
    ]  # fmt: skip
    if device.type == "cpu":
        bad += [(args(t=t + 0.5), ValueError, ("t", "[0, 1]", "1.4")),
                (args(u=u * float("nan")), ValueError, ("u", "nan")),
                (args(t=u, u=t), ValueError, ("u", "at most t", "0.9")),
                (args(free=free, g=g * float("inf")), ValueError, ("guidance", "inf"))]  # fmt: skip
    for given, error, words in bad:
        check_errors(*both, given, {}, error, "vdiff_step", *words)
        check_errors(*into, (torch.zeros_like(z), None, *given), {}, error, "vdiff_step_", *words)
    out = torch.zeros_like(z)
    part = torch.zeros(100, device=device)
    for places, words in (((out.half(), None), ("z_next", "float16")), ((out, out[:1]), ("x0_hat", "[1, 3, 8]")),
                          ((out.mT.contiguous().mT, None), ("z_next", "contiguous")),
                          ((out, out), ("z_next", "x0_hat", "same tensor")),
                          ((part[:48].view_as(z), part[4:52].view_as(z)), ("z_next", "x0_hat", "memory"))):  # fmt: skip
        check_errors(*into, (*places, *args()), {}, ValueError, *words)
    check_errors(*into, (part[:48].view_as(z), None, *args(v=part[4:52].view_as(z))), {}, ValueError,
                 "z_next", "v", "memory")  # fmt: skip
    with pytest.raises(RuntimeError, match="inference only"):
        ops.vdiff_step(z.requires_grad_(), v, None, t, u)


def test_registration(device):
    z, v, free, noise = signals((2, 3, 300), count=4, device=device)
    t, g = times(2, device=device), torch.tensor(2.0, device=device)
    check_op(raw.vdiff_step, (z, v, free, t, t * 0.5, g, 0.5, noise, 0.7), {"cfg_plus_plus": True})
    check_op(raw.vdiff_step, (z, v, None, t, t * 0.5, None, 0.0, None, None))
    into = torch.zeros_like(z), torch.zeros_like(z)
    check_op(raw.vdiff_step_, (*into, z, v, free, t, t * 0.5, g, 0.0, None, None), mutates=True)


@cuda_only
def test_cuda_graph(device):
    def call(z, v, free, noise, t, g):
        return ops.vdiff_step(z, v, free, t, t * 0.5, g, 0.5, noise)

    first, second = ([*signals((3, 2, 500), count=4, device=device), times(3, device=device),
                      torch.rand(3, device=device)] for _ in range(2))  # fmt: skip
    check_cuda_graph(call, first, None, second)
