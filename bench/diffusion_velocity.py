# SPDX-License-Identifier: Apache-2.0
"""Cases of ``vdiff_noise``, ``vdiff_noise_rng`` and ``vdiff_loss``: part of the family ``diffusion``.

Batches of stereo waveforms: eight crops of the full length, and a small one. Bytes: x0 (and noise) read, z and v
written; of the loss all three read, with its gradient that written too. ``own`` noise is drawn by ``torch.randn_like``
in the plain form. ``add_noise``: z only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tenfold import ops, reference

from .case import Case, Inputs, Shape, compiled, provider
from .gradients import compiled_and_pulled_back, pulled_back

FULL = {"b": 8, "c": 2, "l": 327_680}
SMALL = {"b": 4, "c": 2, "l": 16_384}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def elements(s: Shape) -> int:
    """Of one signal."""
    return s["b"] * s["c"] * s["l"]


def inputs(s: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Signals, times, and places for results."""
    made = torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        return torch.randn(s["b"], s["c"], s["l"], generator=made).to(device, dtype)

    x0, noise, v_hat = draw(), draw(), draw()
    t = torch.rand(s["b"], generator=made).to(device)
    return Inputs(x0=x0, noise=noise, v_hat=v_hat, t=t, z=torch.zeros_like(x0), v=torch.zeros_like(x0),
                  upstream=[torch.rand(s["b"], generator=made).to(device)])  # fmt: skip


def angle(t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of ``pi t / 2``, for [B, C, L]."""
    a, s = ((t * (torch.pi / 2)).cos(), (t * (torch.pi / 2)).sin())
    return a.to(like.dtype)[:, None, None], s.to(like.dtype)[:, None, None]


def _noised(x0: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    a, s = angle(t, x0)
    return a * x0 + s * noise, a * noise - s * x0


def _in_place(x0: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The fewest passes that plain torch has."""
    a, s = angle(t, x0)
    return (a * x0).addcmul_(s, noise), (a * noise).addcmul_(s, x0, value=-1)


def _copies(pairs: tuple[tuple[str, str], ...]) -> Any:
    def run(i: Inputs) -> None:
        for source, out in pairs:
            getattr(i, out).copy_(getattr(i, source))

    return provider("copy_", run, "bound")


def _drawn_agree(got: Any, want: Any, i: Inputs) -> float:
    """Noise of another generator: mean and variance within six sigma, through what it was mixed to."""
    z, v = (x.double() for x in got)
    a, s = (x.double() for x in angle(i.t, i.x0.float()))
    e = s * z + a * v
    sigmas = e.mean().abs() * e.numel() ** 0.5, (e.var() - 1).abs() * (e.numel() / 2) ** 0.5
    return float(max(sigmas)) / 6 * TOLERANCE[i.x0.dtype]


def _noise_case(s: Shape, dtype: torch.dtype, own: bool, into: bool) -> Case:
    name = "vdiff_noise_rng" if own else "vdiff_noise"

    def ours(i: Inputs) -> Any:
        if own:
            return (ops.vdiff_noise_rng_(i.z, i.v, i.x0, i.t, 3, 4) if into
                    else ops.vdiff_noise_rng(i.x0, i.t, 3, 4))  # fmt: skip
        if into:
            return ops.vdiff_noise_(i.z, i.v, i.x0, i.t, i.noise)
        return ops.vdiff_noise(i.x0, i.t, i.noise)

    def plain(form: Any) -> Any:
        def run(i: Inputs) -> Any:
            made = form(i.x0, i.t, torch.randn_like(i.x0) if own else i.noise)
            return (i.z.copy_(made[0]), i.v.copy_(made[1])) if into else made

        return run

    def defined(i: Inputs) -> Any:
        made = (reference.vdiff_noise_rng(i.x0, i.t, 3, 4) if own
                else reference.vdiff_noise(i.x0, i.t, i.noise))  # fmt: skip
        return (i.z.copy_(made[0]), i.v.copy_(made[1])) if into else made

    other: dict[str, Any] = {"agree": _drawn_agree} if own else {}
    bound = [_copies((("x0", "z"), ("noise", "v")))] if into else []
    return Case(
        op=name + "_" * into, shape=s, dtype=dtype, inputs=inputs,
        bytes=lambda s, size: (3 if own else 4) * elements(s) * size,
        providers=[provider("tenfold", ours), provider("eager", plain(_noised), **other),
                   provider("eager:in_place", plain(_in_place), **other), compiled(plain(_noised), **other), *bound],
        reference=defined, tolerance=TOLERANCE[dtype], mode="out" if into else "functional",
        mutates=("z", "v") if into else (), quick=s == SMALL,
    )  # fmt: skip


def _add_noise_case(s: Shape, dtype: torch.dtype) -> Case:
    def plain(i: Inputs) -> Tensor:
        a, sine = angle(i.t, i.x0)
        return torch.mul(a, i.x0, out=i.z).addcmul_(sine, i.noise)

    return Case(
        op="vdiff_noise_", variant="add_noise", shape=s, dtype=dtype, inputs=inputs,
        bytes=lambda s, size: 3 * elements(s) * size,
        providers=[provider("tenfold", lambda i: ops.vdiff_noise_(i.z, None, i.x0, i.t, i.noise)),
                   provider("eager:in_place", plain)],
        reference=lambda i: i.z.copy_(reference.vdiff_noise(i.x0, i.t, i.noise)[0]),
        tolerance=TOLERANCE[dtype], mode="out", mutates=("z",),
    )  # fmt: skip


def _loss_case(s: Shape, dtype: torch.dtype, gradient: bool) -> Case:
    def plain(i: Inputs) -> Tensor:
        a, sine = angle(i.t, i.x0)
        return (i.v_hat - (a * i.noise - sine * i.x0)).square().mean((1, 2), dtype=torch.float32)

    def ours(i: Inputs) -> Tensor:
        return ops.vdiff_loss(i.v_hat, i.x0, i.noise, i.t)

    def defined(i: Inputs) -> Tensor:
        return reference.vdiff_loss(i.v_hat, i.x0, i.noise, i.t)

    if gradient:
        providers = [provider("tenfold", pulled_back(ours, "v_hat")), provider("eager", pulled_back(plain, "v_hat")),
                     compiled_and_pulled_back(plain, "v_hat")]  # fmt: skip
        wanted = pulled_back(defined, "v_hat")
    else:
        providers = [provider("tenfold", ours), provider("eager", plain), compiled(plain)]
        wanted = defined
    return Case(
        op="vdiff_loss", variant="gradient" if gradient else "", shape=s, dtype=dtype, inputs=inputs,
        bytes=lambda s, size: (7 if gradient else 3) * elements(s) * size, providers=providers, reference=wanted,
        tolerance=TOLERANCE[dtype], traffic="copy" if gradient else "read", quick=s == SMALL,
        memory=gradient and s == FULL,
    )  # fmt: skip


def cases() -> Iterator[Case]:
    """All cases of the group, in the order of the table."""
    for dtype in TOLERANCE:
        for s in (SMALL, FULL):
            for own in (False, True):
                for into in (False, True):
                    yield _noise_case(s, dtype, own, into)
            for gradient in (False, True):
                yield _loss_case(s, dtype, gradient)
        yield _add_noise_case(FULL, dtype)
