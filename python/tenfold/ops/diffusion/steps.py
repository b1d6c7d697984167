# SPDX-License-Identifier: Apache-2.0
"""The step of DDIM and ancestral samplers, with classifier-free guidance."""

from __future__ import annotations

import torch
from torch import Tensor

from tenfold.ops._register import call_inference, inference_only

_ops = torch.ops.tenfold

inference_only("vdiff_step")
inference_only("vdiff_step_", mutates=(0, 1))


@torch.library.register_fake("tenfold::vdiff_step")
def _(z, *args, **kwargs):
    return z.new_empty(z.shape), z.new_empty(z.shape)


@torch.library.register_fake("tenfold::vdiff_step_")
def _(z_next, *args, **kwargs):
    return None


def vdiff_step(
    z: Tensor, v: Tensor, v_uncond: Tensor | None, t: Tensor, u: Tensor, guidance: Tensor | None = None,
    eta: float = 0.0, noise: Tensor | None = None, clip: float | None = None, *,
    use_clipped_model_output: bool = False, cfg_plus_plus: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """From time t to an earlier time u, guidance and all, in one pass.

    ``v' = v_uncond + g (v - v_uncond)``; ``x0 = a_t z - s_t v'``; ``e = s_t z + a_t v'``;
    ``z_next = a_u x0 + sqrt(s_u^2 - sig^2) e + sig noise`` with ``sig = eta (s_u / s_t) sqrt(1 - a_t^2 / a_u^2)``.
    Without eta it is DDIM, a rotation by ``pi (t - u) / 2``; with eta = 1 it draws from the posterior (ancestral
    sampling). Guidance of velocities is guidance of x0 and of noise: all three are affine in each other.

    Args:
        z: [B, C, L]; float32, bfloat16 or float16 (float64 on the CPU).
        v: predicted velocity, the shape of ``z``; its dtype, or bfloat16 or float16 beside float32.
        v_uncond: the same without the condition, shape and dtype of ``v``; None: no guidance.
        t, u: float32 or float64, [B] or one number [], ``0 <= u <= t <= 1``. u = 0 gives x0; u = t gives z.
        guidance: g, float32 or float64, [B] or []; None is 1. Samples with g = 1 do not look at ``v_uncond``.
        eta: 0 to 1.
        noise: shape and dtype of ``z``, standard normal; needed where eta > 0, else not read.
        clip: x0 is clamped to [-clip, clip]; None: it is not.
        use_clipped_model_output: e is what follows from z and the clamped x0, ``(z - a_t x0) / s_t``, as in
            diffusers' DDIM; else it stays.
        cfg_plus_plus: e is made of ``v_uncond`` (CFG++), x0 of v'.

    Returns:
        (z_next, x0): contiguous, shape and dtype of ``z``; float32 arithmetic on coefficients of float64, rounded
        once. Not differentiable. Nothing waits for a GPU: times and g are read on the device.

    Raises:
        ValueError: shapes, devices, dtypes of times; eta, clip; noise missing; g other than 1 without ``v_uncond``;
        values of times or g (on the CPU only; elsewhere u > t and times outside [0, 1] make NaN). TypeError: dtypes.
        RuntimeError: an input requires grad.

    Source:
        ERNIE-Music (arXiv 2302.04456), section 3.5 of the method's specification; DDIM (arXiv 2010.02502);
        CFG++ (arXiv 2406.08070).
    """
    return call_inference(_ops.vdiff_step.default, z, v, v_uncond, t, u, guidance, eta, noise, clip,
                          use_clipped_model_output=use_clipped_model_output,
                          cfg_plus_plus=cfg_plus_plus)  # fmt: skip


def vdiff_step_(
    z_next: Tensor, x0_hat: Tensor | None, z: Tensor, v: Tensor, v_uncond: Tensor | None, t: Tensor, u: Tensor,
    guidance: Tensor | None = None, eta: float = 0.0, noise: Tensor | None = None, clip: float | None = None, *,
    use_clipped_model_output: bool = False, cfg_plus_plus: bool = False,
) -> None:  # fmt: skip
    """:func:`vdiff_step` into given tensors: no memory is taken; a sampler needs one z.

    Args:
        z_next: contiguous, shape and dtype of ``z``; it may be ``z``, ``v``, ``v_uncond`` or ``noise``.
        x0_hat: likewise, apart from ``z_next``; None: it is not written.

    Raises:
        ValueError: as :func:`vdiff_step`; tensors that overlap in another way.
    """
    mutates = (z_next,) if x0_hat is None else (z_next, x0_hat)
    call_inference(_ops.vdiff_step_.default, z_next, x0_hat, z, v, v_uncond, t, u, guidance, eta, noise, clip,
                   mutates=mutates, use_clipped_model_output=use_clipped_model_output,
                   cfg_plus_plus=cfg_plus_plus)  # fmt: skip
