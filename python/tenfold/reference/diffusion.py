# SPDX-License-Identifier: Apache-2.0
"""Diffusion on waveforms (ERNIE-Music, sections 3.1, 3.4, 3.5 and 6): noising, loss and steps of variance preserving
diffusion with velocities, resampling by a fixed filter, a convolution with constant planes.

``a = cos(pi t / 2)``, ``s = sin(pi t / 2)``; ``z = a x0 + s noise``, ``v = a noise - s x0``. Everything is computed in
float32 (float64 stays) and rounded once.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tenfold.reference.numbers import work
from tenfold.reference.random import philox4x32_10

# Of the resampling filter, which is symmetric; they sum to 1 (Dance Diffusion's "cubic").
FIR_TAPS = (-0.01171875, -0.03515625, 0.11328125, 0.43359375)


def _angle(t: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of ``pi t / 2`` in float64: exactly 0 and 1 at both ends."""
    t = t.double()
    flip = t > 0.5
    x = torch.where(flip, 1 - t, t) * (math.pi / 2)
    return torch.where(flip, x.sin(), x.cos()), torch.where(flip, x.cos(), x.sin())


def _per_sample(value: Tensor, like: Tensor) -> Tensor:
    """A number, or one for each sample, so that it multiplies [B, C, L]; in the precision of the arithmetic."""
    value = value.to(work(like).dtype)
    return value if value.dim() == 0 else value.view(-1, 1, 1)


def philox_normal(count: int, seed: int, offset: int) -> Tensor:
    """Standard normal noise at positions 0, 1, ... of the stream (seed, offset): float64 [count].

    Position p takes number ``p % 4`` of the counter ``(p // 4, offset)``, both of 64 bits, with the key ``seed``. Of
    its four words each pair (a, b) makes two numbers by Box and Muller: the radius ``sqrt(-2 log u)`` with
    ``u = (a + 1/2) / 2^32`` rounded to float32, and an angle ``(pi / 2) g`` with the lowest 30 bits of b as a signed
    number g in [-1/2, 1/2); the bit above swaps cosine and sine, the highest one is the sign of both.
    """
    at = torch.arange((count + 3) // 4)
    high, low = (offset >> 32) & 0xFFFFFFFF, offset & 0xFFFFFFFF
    words = philox4x32_10((at, at >> 32, torch.tensor(low), torch.tensor(high)), seed)
    made = []
    for a, b in (words[:2], words[2:]):
        u = ((a.double() + 0.5) * 2.0**-32).float().double()
        radius = (-2 * torch.log(u)).sqrt()
        turn = ((b & 0x3FFFFFFF) ^ 0x20000000) - 0x20000000
        angle = turn.double() * 2.0**-30 * (math.pi / 2)
        swap, sign = (b >> 30) & 1 == 1, 1 - 2 * (b >> 31).double()
        made.append(sign * radius * torch.where(swap, angle.sin(), angle.cos()))
        made.append(sign * radius * torch.where(swap, angle.cos(), angle.sin()))
    return torch.stack(made, -1).flatten()[:count]


def vdiff_noise(x0: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """(z, v) of [B, C, L] at times t, [B] or one."""
    a, s = (_per_sample(x, x0) for x in _angle(t))
    x, n = work(x0), work(noise)
    return (a * x + s * n).to(x0.dtype), (a * n - s * x).to(x0.dtype)


def vdiff_noise_(z: Tensor | None, v: Tensor | None, x0: Tensor, t: Tensor, noise: Tensor) -> None:
    """:func:`vdiff_noise` into z and v; either may be left out."""
    for out, made in zip((z, v), vdiff_noise(x0, t, noise)):
        if out is not None:
            out.copy_(made)


def _drawn(x0: Tensor, seed: int, offset: int) -> Tensor:
    return philox_normal(x0.numel(), seed, offset).view(x0.shape).to(x0.device, work(x0).dtype)


def vdiff_noise_rng(x0: Tensor, t: Tensor, seed: int, offset: int = 0) -> tuple[Tensor, Tensor]:
    """:func:`vdiff_noise` with :func:`philox_normal` at the positions of a contiguous x0 as noise."""
    return vdiff_noise(x0, t, _drawn(x0, seed, offset))


def vdiff_noise_rng_(
    z: Tensor | None, v: Tensor | None, x0: Tensor, t: Tensor, seed: int, offset: int = 0
) -> None:
    """:func:`vdiff_noise_rng` into z and v; either may be left out."""
    vdiff_noise_(z, v, x0, t, _drawn(x0, seed, offset))


def vdiff_loss(v_hat: Tensor, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """[B]: the mean of ``(v_hat - (a noise - s x0))^2`` over each sample."""
    a, s = (_per_sample(x, x0) for x in _angle(t))
    return (work(v_hat) - (a * work(noise) - s * work(x0))).square().mean((1, 2))


def vdiff_step(
    z: Tensor, v: Tensor, v_uncond: Tensor | None, t: Tensor, u: Tensor, guidance: Tensor | None = None,
    eta: float = 0.0, noise: Tensor | None = None, clip: float | None = None, *,
    use_clipped_model_output: bool = False, cfg_plus_plus: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(z at time u <= t, x0_hat).

    ``v = v_uncond + guidance (v - v_uncond)``, ``x0 = a_t z - s_t v``, ``e = s_t z + a_t v``, then
    ``z_u = a_u x0 + sqrt(s_u^2 - sig^2) e + sig noise`` with ``sig = eta (s_u / s_t) sqrt(1 - a_t^2 / a_u^2)``. x0 is
    clamped to [-clip, clip]; ``use_clipped_model_output``: e is what follows from z and that. ``cfg_plus_plus``: e is
    made of v_uncond.
    """
    (a_t, s_t), (a_u, s_u) = _angle(t), _angle(u)
    ahead = ((a_u**2 - a_t**2).clamp(min=0) / a_u**2).nan_to_num(0.0)
    sig = (eta * s_u / s_t * ahead.sqrt()).nan_to_num(0.0)
    along = (s_u**2 - sig**2).clamp(min=0).sqrt()
    a_t, s_t, a_u, sig, along = (_per_sample(x, z) for x in (a_t, s_t, a_u, sig, along))
    state, guided = work(z), work(v).to(work(z).dtype)
    other = guided
    if v_uncond is not None and guidance is not None:
        g, free = _per_sample(guidance, z), work(v_uncond).to(state.dtype)
        guided = torch.where(g == 1, guided, free + g * (guided - free))
        other = torch.where(g == 1, guided, free) if cfg_plus_plus else guided
    x0 = a_t * state - s_t * guided
    e = s_t * state + a_t * other
    if clip is not None:
        x0 = x0.clamp(-clip, clip)
        if use_clipped_model_output:
            e = torch.where(s_t > 0, (state - a_t * x0) / s_t, e)
    made = a_u * x0 + along * e
    if eta > 0 and noise is not None:
        made = made + sig * work(noise)
    return made.to(z.dtype), x0.to(z.dtype)


def vdiff_step_(
    z_next: Tensor, x0_hat: Tensor | None, z: Tensor, v: Tensor, v_uncond: Tensor | None, t: Tensor, u: Tensor,
    guidance: Tensor | None = None, eta: float = 0.0, noise: Tensor | None = None, clip: float | None = None, *,
    use_clipped_model_output: bool = False, cfg_plus_plus: bool = False,
) -> None:  # fmt: skip
    """:func:`vdiff_step` into z_next, which may be z, and x0_hat, which may be left out."""
    made = vdiff_step(z, v, v_uncond, t, u, guidance, eta, noise, clip,
                      use_clipped_model_output=use_clipped_model_output, cfg_plus_plus=cfg_plus_plus)  # fmt: skip
    z_next.copy_(made[0])
    if x0_hat is not None:
        x0_hat.copy_(made[1])


def _taps(x: Tensor) -> Tensor:
    return x.new_tensor(FIR_TAPS + FIR_TAPS[::-1]).view(1, 1, 8)


def fir_down2(x: Tensor) -> Tensor:
    """[B, C, L] -> [B, C, L // 2]: three reflected samples at both ends, the filter, every second result."""
    rows = F.pad(work(x), (3, 3), "reflect").flatten(0, 1)[:, None]
    made = F.conv1d(rows, _taps(rows), stride=2)
    return made.view(*x.shape[:2], x.shape[2] // 2).to(x.dtype)


def fir_down2_(out: Tensor, x: Tensor) -> None:
    """:func:`fir_down2` into out."""
    out.copy_(fir_down2(x))


def fir_up2_cat(x: Tensor, skip: Tensor | None = None) -> Tensor:
    """[B, C, L], [B, K, 2 L] -> [B, C + K, 2 L]: x at twice the rate, and skip after it.

    Two reflected samples at both ends, a transposed convolution with twice the filter, stride 2 and padding 7.
    """
    rows = F.pad(work(x), (2, 2), "reflect").flatten(0, 1)[:, None]
    made = F.conv_transpose1d(rows, 2 * _taps(rows), stride=2, padding=7)
    made = made.view(*x.shape[:2], 2 * x.shape[2]).to(x.dtype)
    return made if skip is None else torch.cat((made, skip), 1)


def fir_up2_cat_(out: Tensor, x: Tensor, skip: Tensor | None = None) -> None:
    """:func:`fir_up2_cat` into out; without skip the rest of the channels stays."""
    made = fir_up2_cat(x, skip)
    out[:, : made.shape[1]] = made


def conv1d_planes(x: Tensor, c: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """conv1d of x [B, C, L] and the constant planes c [B, D], side by side, with zero padding ``K // 2``.

    weight [O, C + D, K] of an odd K, bias [O]; [B, O, L].
    """
    planes = c[..., None].expand(*c.shape, x.shape[-1])
    return F.conv1d(torch.cat((x, planes), 1), weight, bias, padding=weight.shape[-1] // 2)
