# SPDX-License-Identifier: Apache-2.0
"""Gated activations of feed-forward layers: SwiGLU and gated GELU, on one kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tenfold._load import call
from tenfold.ops._register import (
    call_inference,
    differentiable_by,
    inference_only,
    no_gradient,
    written,
)

_ops = torch.ops.tenfold
_SILU = 0  # numbers of the gates
_GELUS = {"tanh": 1, "none": 2}

inference_only("swiglu_", mutates=(0,))
inference_only("gated_gelu_", mutates=(0,))
inference_only("gated_act_backward")


@torch.library.register_fake("tenfold::gated_act")
def _(a, b, act):
    return a.new_empty(a.shape)


@torch.library.register_fake("tenfold::swiglu")
def _(gate, up):
    return gate.new_empty(gate.shape)


@torch.library.register_fake("tenfold::swiglu_")
def _(out, gate, up):
    return None


@torch.library.register_fake("tenfold::gated_gelu")
def _(a, b, *, approximate="tanh"):
    return a.new_empty(a.shape)


@torch.library.register_fake("tenfold::gated_gelu_")
def _(out, a, b, *, approximate="tanh"):
    return None


@torch.library.register_fake("tenfold::gated_act_")
def _(out, a, b, act):
    return None


@torch.library.register_fake("tenfold::gated_act_backward")
def _(grad, a, b, act, of_a, of_b):
    return tuple(a.new_empty(a.shape if wanted else (0,)) for wanted in (of_a, of_b))


def _gradients(ctx: Any, grad: Tensor, act: int) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[:2]
    made = call_inference(_ops.gated_act_backward.default, grad, *ctx.saved_tensors, act, *needed)
    return *(x if wanted else None for x, wanted in zip(made, needed)), None, None


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor, others: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        ctx.save_for_backward(gate, up)
        with torch._C._AutoDispatchBelowAutograd():
            return _ops.swiglu.default(gate, up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, grad, _SILU)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, others: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        ctx.act = _GELUS[kwargs.get("approximate", "tanh")]
        ctx.save_for_backward(a, b)
        with torch._C._AutoDispatchBelowAutograd():
            return _ops.gated_gelu.default(a, b, **kwargs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, grad, ctx.act)


_swiglu = differentiable_by("swiglu", _Swiglu, (0, 1))
_gated_gelu = differentiable_by("gated_gelu", _Gelu, (0, 1))
_gated_act = _ops.gated_act.default._op
_gated_act_into = _ops.gated_act_.default._op


def _into(out: Tensor, a: Tensor, b: Tensor, act: int) -> bool:
    """Whether it was done; if not, it has to be recorded or traced, or the op itself says what is wrong."""
    if not no_gradient(out, a, b):
        return False
    try:
        _gated_act_into(out, a, b, act)
    except RuntimeError:
        return False
    written(out)
    return True


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``, with ``silu(g) = g / (1 + e^-g)``.

    Args:
        gate, up: [..., F], one shape, dtype (float32, bfloat16 or float16) and device. Rows of F neighbours, equally
            far apart, are read where they are: halves of one [..., 2 F] tensor, as ``gate_up.chunk(2, -1)`` gives them,
            need no copy; other layouts are copied.

    Returns:
        [..., F], contiguous, of their dtype: float32 arithmetic, rounded once. Differentiable in both, once.

    Raises:
        ValueError: shapes, dtypes that differ, devices. TypeError: dtypes.

    Source:
        Shazeer, arXiv 2002.05202; PixelGPT, section 3.4 of the method's specification.
    """
    if no_gradient(gate, up):
        try:
            return _gated_act(gate, up, _SILU)
        except RuntimeError:  # in its own words
            return call(_swiglu, gate, up)
    return call(_swiglu, gate, up)


def swiglu_(out: Tensor, gate: Tensor, up: Tensor) -> None:
    """:func:`swiglu` into ``out``, without a gradient: no memory is taken.

    Args:
        out: shape, dtype and device of ``gate``, rows of neighbours equally far apart; may be ``gate`` or ``up``.
        gate, up: as of :func:`swiglu`.

    Raises:
        ValueError: as :func:`swiglu`; tensors that overlap in another way. RuntimeError: an input requires grad.
    """
    if not _into(out, gate, up, _SILU):
        call_inference(_ops.swiglu_.default, out, gate, up, mutates=(out,))


def gated_gelu(a: Tensor, b: Tensor, *, approximate: str = "tanh") -> Tensor:
    """``gelu(a) * b``.

    Args:
        a, b: as gate and up of :func:`swiglu`: halves of one tensor need no copy.
        approximate: as of ``torch.nn.functional.gelu``: ``"tanh"``, which T5 v1.1, mT5 and ERNIE-Code use
            (``gelu_new``), ``a / 2 (1 + tanh(sqrt(2 / pi) (a + 0.044715 a^3)))``, or ``"none"``,
            ``a / 2 (1 + erf(a / sqrt(2)))``.

    Returns:
        [..., F], contiguous, of their dtype: float32 arithmetic, rounded once. Differentiable in both, once.

    Raises:
        ValueError: shapes, dtypes that differ, devices, approximate. TypeError: dtypes.

    Source:
        Shazeer, arXiv 2002.05202; ERNIE-Code, section 3.1 of the method's specification.
    """
    if no_gradient(a, b):
        try:
            return _gated_act(a, b, _GELUS.get(approximate, -1))
        except RuntimeError:  # in its own words
            return call(_gated_gelu, a, b, approximate=approximate)
    return call(_gated_gelu, a, b, approximate=approximate)


def gated_gelu_(out: Tensor, a: Tensor, b: Tensor, *, approximate: str = "tanh") -> None:
    """:func:`gated_gelu` into ``out``, without a gradient: no memory is taken.

    Args:
        out: shape, dtype and device of ``a``, rows of neighbours equally far apart; may be ``a`` or ``b``.
        a, b, approximate: as of :func:`gated_gelu`.

    Raises:
        ValueError: as :func:`gated_gelu`; tensors that overlap in another way. RuntimeError: an input requires grad.
    """
    if not _into(out, a, b, _GELUS.get(approximate, -1)):
        call_inference(_ops.gated_gelu_.default, out, a, b, mutates=(out,), approximate=approximate)
