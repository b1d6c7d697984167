# SPDX-License-Identifier: Apache-2.0
"""Cases of ``patch_mse``: part of the family ``pixels``.

``npp``: next patch prediction on strips whose patches all count; ``text``: three quarters of them do; ``mae``: a masked
autoencoder's loss on 224 x 224 images. Bytes are pred and pixels read once and the gradient written once. The
plain forms keep uint8 pixels too and make the targets at every step, as a model's forward pass does: ``peer:autograd``
is the published sequence, ``eager:written_out`` makes the gradient by hand, in place, the least that plain torch moves.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tenfold import ops, reference

from .case import Case, Inputs, Shape, compiled, provider
from .gradients import autograd, compiled_gradients, with_gradients
from .pixels_patches import (
    EPS,
    SMALL,
    SQUARE,
    STRIPS,
    VALUES,
    by_unfold,
    byte_patches,
    image_of,
    normalized,
    patches_of,
    yardstick,
)

DTYPES = (torch.bfloat16, torch.float32)
COUNTED = {"npp": 1.0, "text": 0.75, "mae": 0.75}


def _counted(s: Shape, variant: str) -> int:
    return int(patches_of(s) * COUNTED[variant])


def _bytes(s: Shape, size: int, variant: str, grads: bool) -> int:
    return VALUES * (_counted(s, variant) * (1 + size) + (patches_of(s) * size if grads else 0))


def _inputs(
    s: Shape, dtype: torch.dtype, device: torch.device, variant: str, grads: bool
) -> Inputs:
    made = torch.Generator().manual_seed(1)
    at = torch.arange(s["l"]).expand(s["b"], -1)
    mask = at % 4 != 0 if variant == "mae" else at < COUNTED[variant] * s["l"]
    moved = _bytes(s, dtype.itemsize, variant, grads)
    pred = torch.randn(s["b"], s["l"], VALUES, generator=made).to(device, dtype)
    return Inputs(
        pred=pred, grad=torch.zeros_like(pred), image=image_of(s, device), mask=mask.to(device),
        denom=mask[:, 0 if variant == "mae" else 1 :].sum().float().to(device),
        one=torch.ones((), device=device),
        half=torch.ones(moved // 2, dtype=torch.uint8, device=device),
        copy=torch.zeros(moved // 2, dtype=torch.uint8, device=device),
    )  # fmt: skip


class Plain:
    """The plain forms of one case."""

    def __init__(self, s: Shape, shift: int) -> None:
        self.keep, self.shift = s["l"] - shift, shift

    def published(self, i: Inputs) -> Tensor:
        """The loss as the published code has it."""
        y = by_unfold(i.image, torch.float32, True, "last", "rcc")[:, self.shift :]
        error = (i.pred[:, : self.keep].float() - y).square().mean(-1)
        m = i.mask[:, self.shift :]
        return (error * m).sum() / m.sum()

    def errors(self, i: Inputs) -> tuple[Tensor, Tensor]:
        """f - y in float32, and the weights."""
        y = normalized(byte_patches(i.image).float().mul_(1 / 255))[:, self.shift :]
        return i.pred[:, : self.keep] - y, i.mask[:, self.shift :]

    def short(self, i: Inputs) -> Tensor:
        """The loss, in place where that can be."""
        e, m = self.errors(i)
        return (e.square_().mean(-1) * m).sum() / m.sum()

    def gradient(self, i: Inputs) -> Tensor:
        """Written out."""
        e, m = self.errors(i)
        grad = torch.zeros_like(i.pred)
        grad[:, : self.keep] = e.mul_((m * (2 / (VALUES * m.sum())))[..., None])
        return grad

    def both(self, i: Inputs) -> tuple[Tensor, Tensor]:
        """Loss and gradient, written out."""
        e, m = self.errors(i)
        num = m.sum()
        loss = (torch.linalg.vector_norm(e, dim=-1).square() * m).sum() / (VALUES * num)
        grad = torch.zeros_like(i.pred)
        grad[:, : self.keep] = e.mul_((m * (2 / (VALUES * num)))[..., None])
        return loss, grad


def _case(op: str, s: Shape, dtype: torch.dtype, variant: str, forward: bool = False) -> Case:
    shift = 0 if variant == "mae" else 1
    rest = (16, True, EPS, shift)
    plain = Plain(s, shift)
    written = {"patch_mse_": "pred", "patch_mse_backward_": "grad"}.get(op)

    def ours(i: Inputs) -> Any:
        back = (i.one, i.pred, i.image, i.mask, i.denom, *rest)
        if op == "patch_mse_":
            return ops.patch_mse_(i.pred, i.image, i.mask, *rest)
        if op == "patch_mse_backward_":
            return ops.patch_mse_backward_(i.grad, *back)
        if op == "patch_mse_backward":
            return ops.patch_mse_backward(*back)
        return ops.patch_mse(i.pred, i.image, i.mask, *rest)[0]

    def eager(i: Inputs) -> Any:
        if written:
            return getattr(i, written).copy_(plain.gradient(i))
        return plain.gradient(i)

    def loss(i: Inputs) -> Tensor:
        return reference.patch_mse(i.pred, i.image, i.mask, *rest)[0]

    def defined(i: Inputs) -> Any:
        if forward:
            return loss(i)
        both = with_gradients(loss, "pred")(i)
        if written:
            return getattr(i, written).copy_(both[1])
        return both if op == "patch_mse" else both[1]

    if op != "patch_mse":
        providers = [provider("tenfold", ours), provider("eager:written_out", eager)]
    elif forward:
        providers = [provider("tenfold", ours), provider("eager:in_place", plain.short),
                     provider("peer:sequence", plain.published), compiled(plain.published)]  # fmt: skip
    else:
        providers = [autograd("tenfold", ours, "pred"), provider("eager:written_out", plain.both),
                     autograd("peer:autograd", plain.published, "pred"),
                     compiled_gradients(plain.published, "pred")]  # fmt: skip
    return Case(
        op=op, variant=f"{variant}-forward" if forward else variant, shape=s, dtype=dtype,
        inputs=lambda s, dtype, device: _inputs(s, dtype, device, variant, not forward),
        bytes=lambda s, size: _bytes(s, size, variant, not forward),
        providers=[*providers, yardstick(bool(written))], reference=defined,
        tolerance=1e-4 if dtype == torch.float32 else 1e-2, traffic="read" if forward else "copy",
        mode="inplace" if op == "patch_mse_" else "out" if written else "functional",
        mutates=(written,) if written else (), quick=s == SMALL,
        memory=op == "patch_mse" and s == STRIPS[0],
    )  # fmt: skip


def cases() -> Iterator[Case]:
    """All cases of the group, in the order of the table."""
    for dtype in DTYPES:
        for s in (SMALL, *STRIPS):
            yield _case("patch_mse", s, dtype, "npp")
        yield _case("patch_mse", STRIPS[0], dtype, "text")
        yield _case("patch_mse", SQUARE, dtype, "mae")
        yield _case("patch_mse", STRIPS[1], dtype, "npp", forward=True)
        for op in ("patch_mse_", "patch_mse_backward", "patch_mse_backward_"):
            for s in (SMALL, STRIPS[1]):
                yield _case(op, s, dtype, "npp")
