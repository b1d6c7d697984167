# SPDX-License-Identifier: Apache-2.0
"""Noise and velocity targets of variance preserving diffusion, and the loss on velocities."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tenfold._load import call
from tenfold.ops._register import call_inference, differentiable_by, inference_only

_ops = torch.ops.tenfold

for _name in ("vdiff_noise_", "vdiff_noise_rng_"):
    inference_only(_name, mutates=(0, 1))
inference_only("vdiff_loss_backward")


@torch.library.register_fake("tenfold::vdiff_noise")
def _(x0, t, noise):
    return x0.new_empty(x0.shape), x0.new_empty(x0.shape)


@torch.library.register_fake("tenfold::vdiff_noise_rng")
def _(x0, t, seed, offset):
    return x0.new_empty(x0.shape), x0.new_empty(x0.shape)


@torch.library.register_fake("tenfold::vdiff_noise_")
def _(z, v, x0, t, noise):
    return None


@torch.library.register_fake("tenfold::vdiff_noise_rng_")
def _(z, v, x0, t, seed, offset):
    return None


@torch.library.register_fake("tenfold::vdiff_loss")
def _(v_hat, x0, noise, t):
    wide = v_hat.dtype == torch.float64
    return v_hat.new_empty(x0.shape[:1], dtype=torch.float64 if wide else torch.float32)


@torch.library.register_fake("tenfold::vdiff_loss_backward")
def _(grad, v_hat, x0, noise, t):
    return v_hat.new_empty(v_hat.shape)


def _once(name: str) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(f"tenfold::{name} is differentiable once, not with create_graph")


def _of_x0(ctx: Any, name: str, *grads: Tensor | None) -> Tensor | None:
    """``a gz - s gv``, which is the velocity of gv with the noise gz."""
    _once(name)
    gz, gv = grads
    if gz is None and gv is None:
        return None
    gz = torch.zeros_like(gv) if gz is None else gz
    gv = torch.zeros_like(gz) if gv is None else gv
    return call_inference(_ops.vdiff_noise.default, gv, *ctx.saved_tensors, gz)[1]


class _Noise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x0: Tensor, others: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        t, noise = others
        if noise.requires_grad:
            raise RuntimeError(
                "tenfold::vdiff_noise is differentiable in x0 only, and noise requires grad: detach it"
            )
        ctx.save_for_backward(t)
        with torch._C._AutoDispatchBelowAutograd():
            return _ops.vdiff_noise.default(x0, t, noise)

    @staticmethod
    def backward(ctx: Any, gz: Tensor | None, gv: Tensor | None) -> tuple[Tensor | None, ...]:
        return _of_x0(ctx, "vdiff_noise", gz, gv), None, None


class _NoiseRng(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x0: Tensor, others: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(others[0])
        with torch._C._AutoDispatchBelowAutograd():
            return _ops.vdiff_noise_rng.default(x0, *others)

    @staticmethod
    def backward(ctx: Any, gz: Tensor | None, gv: Tensor | None) -> tuple[Tensor | None, ...]:
        return _of_x0(ctx, "vdiff_noise_rng", gz, gv), None, None


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v_hat: Tensor, others: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        ctx.save_for_backward(v_hat, *others)
        with torch._C._AutoDispatchBelowAutograd():
            return _ops.vdiff_loss.default(v_hat, *others)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _once("vdiff_loss")
        made = call_inference(_ops.vdiff_loss_backward.default, grad, *ctx.saved_tensors)
        return made, None, None


_noise = differentiable_by("vdiff_noise", _Noise)
_noise_rng = differentiable_by("vdiff_noise_rng", _NoiseRng)
_loss = differentiable_by("vdiff_loss", _Loss)


def _constants(op: str, of: str, **tensors: Tensor) -> None:
    if not torch.is_grad_enabled():
        return
    for name, x in tensors.items():
        if isinstance(x, Tensor) and x.requires_grad:
            raise RuntimeError(
                f"tenfold::{op} is differentiable in {of} only, and {name} requires grad: detach it"
            )


def vdiff_noise(x0: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The noisy signal at time t and its velocity: ``z = a x0 + s noise``, ``v = a noise - s x0``.

    ``a = cos(pi t / 2)`` and ``s = sin(pi t / 2)``, exactly 1 and 0 at t = 0, 0 and 1 at t = 1. Back again it is
    ``x0 = a z - s v``, ``noise = s z + a v``.

    Args:
        x0: [B, C, L]; float32, bfloat16 or float16 (float64 on the CPU). What is not contiguous is copied.
        t: float32 or float64 in [0, 1]: [B], or one number [] for all. Never 16 bits, which cannot tell steps apart.
        noise: the shape and dtype of ``x0``, standard normal.

    Returns:
        (z, v): contiguous, shape and dtype of ``x0``; float32 arithmetic, rounded once. Differentiable in ``x0``,
        once: ``a gz - s gv``.

    Raises:
        ValueError: shapes, devices, dtypes that differ, dtype or values of t (values on the CPU only; elsewhere what
        is not in [0, 1] makes NaN). TypeError: dtype of x0. RuntimeError: t or noise require grad.

    Source:
        ERNIE-Music (arXiv 2302.04456), section 3.1 of the method's specification.
    """
    _constants("vdiff_noise", "x0", t=t, noise=noise)
    return call(_noise, x0, t, noise)


def vdiff_noise_(z: Tensor | None, v: Tensor | None, x0: Tensor, t: Tensor, noise: Tensor) -> None:
    """:func:`vdiff_noise` into given tensors, without a gradient: no memory is taken, and none is touched first.

    Args:
        z, v: contiguous, of the shape and dtype of ``x0``. Either may be None, and is not made: what a scheduler's
            ``add_noise`` and ``get_velocity`` ask for. Either may be ``x0`` or ``noise``.
        x0, t, noise: as of :func:`vdiff_noise`.

    Raises:
        ValueError: as :func:`vdiff_noise`; both None; tensors that overlap in another way.
    """
    mutates = tuple(x for x in (z, v) if x is not None)
    call_inference(_ops.vdiff_noise_.default, z, v, x0, t, noise, mutates=mutates)


def vdiff_noise_rng(x0: Tensor, t: Tensor, seed: int, offset: int = 0) -> tuple[Tensor, Tensor]:
    """:func:`vdiff_noise` with noise of its own, which is never in memory.

    The noise of an element is a function of ``seed``, ``offset`` and its position in a contiguous ``x0``
    (Philox4x32-10, then Box and Muller: see ``tenfold.reference.philox_normal``), with the same bits on every device
    and for any number of threads. It is ``s z + a v``, should it be wanted.

    Args:
        x0, t: as of :func:`vdiff_noise`.
        seed, offset: any int64 each; every pair is a stream of its own. Count steps with one of them.

    Returns:
        (z, v), as of :func:`vdiff_noise`. Differentiable in ``x0``, once.

    Raises:
        As :func:`vdiff_noise`.
    """
    _constants("vdiff_noise_rng", "x0", t=t)
    return call(_noise_rng, x0, t, seed, offset)


def vdiff_noise_rng_(
    z: Tensor | None, v: Tensor | None, x0: Tensor, t: Tensor, seed: int, offset: int = 0
) -> None:
    """:func:`vdiff_noise_rng` into given tensors, as :func:`vdiff_noise_` does it.

    Raises:
        ValueError: as :func:`vdiff_noise_`.
    """
    mutates = tuple(x for x in (z, v) if x is not None)
    call_inference(_ops.vdiff_noise_rng_.default, z, v, x0, t, seed, offset, mutates=mutates)


def vdiff_loss(v_hat: Tensor, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The mean squared error of predicted velocities, ``mean((v_hat - (a noise - s x0))^2)`` of each sample.

    The target is never in memory. It is the error of x0 weighted by ``1 + a^2 / s^2`` ("SNR + 1").

    Args:
        v_hat: [B, C, L]; the dtype of ``x0``, or bfloat16 or float16 beside float32: what a model in 16 bits gives.
        x0, noise, t: as of :func:`vdiff_noise`.

    Returns:
        float32 [B] (float64 if ``v_hat`` is); its mean is the loss of the batch. Sums are in float32 within blocks of
        fixed size and in float64 over blocks: the same bits for any number of threads. Samples without elements: NaN.
        Differentiable in ``v_hat``, once.

    Raises:
        ValueError: as :func:`vdiff_noise`. TypeError: dtypes. RuntimeError: x0, noise or t require grad.

    Source:
        ERNIE-Music (arXiv 2302.04456), section 3.1 of the method's specification.
    """
    _constants("vdiff_loss", "v_hat", x0=x0, noise=noise, t=t)
    return call(_loss, v_hat, x0, noise, t)
