# SPDX-License-Identifier: Apache-2.0
"""Cases of ``vdiff_step``: part of the family ``diffusion``.

A sampler's step over a batch of stereo waveforms: without guidance, with it, and ancestral with noise. Bytes: z and
velocities (and noise) read, z at the next time and x0 written; ``only_z`` writes the first over z.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tenfold import ops, reference

from .case import Case, Inputs, Shape, compiled, provider
from .diffusion_velocity import FULL, SMALL, TOLERANCE, angle, elements

ETA = {"plain": 0.0, "guided": 0.0, "ancestral": 1.0, "only_z": 0.0}


def _inputs(s: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    made = torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        return torch.randn(s["b"], s["c"], s["l"], generator=made).to(device, dtype)

    z, v, free, noise = (draw() for _ in range(4))
    t = (0.5 + 0.5 * torch.rand(s["b"], generator=made)).to(device)
    return Inputs(z=z, v=v, free=free, noise=noise, t=t, u=t * 0.95, z_next=torch.zeros_like(z),
                  x0_hat=torch.zeros_like(z), g=torch.full((s["b"],), 3.0, device=device))  # fmt: skip


def _case(s: Shape, dtype: torch.dtype, variant: str, into: bool) -> Case:
    guided, only_z = variant != "plain", variant == "only_z"
    eta = ETA[variant]
    moved = 3 + guided + (eta > 0) + (not only_z)

    def args(i: Inputs) -> tuple[Any, ...]:
        free, g = (i.free, i.g) if guided else (None, None)
        return i.z, i.v, free, i.t, i.u, g, eta, i.noise if eta > 0 else None

    def ours(i: Inputs) -> Any:
        if only_z:
            return ops.vdiff_step_(i.z, None, *args(i))
        return ops.vdiff_step_(i.z_next, i.x0_hat, *args(i)) if into else ops.vdiff_step(*args(i))

    def put(i: Inputs, made: Any) -> Any:
        if only_z:
            return i.z.copy_(made[0])
        return (i.z_next.copy_(made[0]), i.x0_hat.copy_(made[1])) if into else made

    def plain(i: Inputs) -> Any:
        (a, sine), (a_u, s_u) = angle(i.t, i.z), angle(i.u, i.z)
        v = i.free + i.g.to(i.z.dtype)[:, None, None] * (i.v - i.free) if guided else i.v
        x0 = a * i.z - sine * v
        e = sine * i.z + a * v
        if eta == 0:
            return put(i, (a_u * x0 + s_u * e, x0))
        sig = eta * (s_u / sine) * (1 - a**2 / a_u**2).clamp(min=0).sqrt()
        return put(i, (a_u * x0 + (s_u**2 - sig**2).clamp(min=0).sqrt() * e + sig * i.noise, x0))

    def copies(i: Inputs) -> None:  # half the bytes are read
        i.z_next.copy_(i.z)
        i.x0_hat.copy_(i.v)

    mutates = ("z",) if only_z else ("z_next", "x0_hat") if into else ()
    return Case(
        op="vdiff_step" + "_" * into, variant=variant, shape=s, dtype=dtype, inputs=_inputs,
        bytes=lambda s, size: moved * elements(s) * size,
        providers=[provider("tenfold", ours), provider("eager", plain), compiled(plain),
                   *([provider("copy_", copies, "bound")] if variant == "plain" and into else [])],
        reference=lambda i: put(i, reference.vdiff_step(*args(i))),
        tolerance=TOLERANCE[dtype] if eta == 0 or dtype == torch.float32 else 2e-2,
        mode="inplace" if only_z else "out" if into else "functional", mutates=mutates,
        quick=s == SMALL,
    )  # fmt: skip


def cases() -> Iterator[Case]:
    """All cases of the group, in the order of the table."""
    for dtype in TOLERANCE:
        for s in (SMALL, FULL):
            for variant in ETA:
                yield _case(s, dtype, variant, variant == "only_z")
        yield _case(FULL, dtype, "plain", True)
        yield _case(FULL, dtype, "guided", True)
