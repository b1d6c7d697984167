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
    return Inputs(
        pred=torch.randn(s["b"], s["l"], VALUES, generator=made).to(device, dtype),
        image=image_of(s, device), mask=mask.to(device),
        half=torch.ones(moved // 2, dtype=torch.uint8, device=device),
        copy=torch.zeros(moved // 2, dtype=torch.uint8, device=device),
    )  # fmt: skip


def _case(op: str, s: Shape, dtype: torch.dtype, variant: str) -> Case:
    shift = 0 if variant == "mae" else 1
    rest = (16, True, EPS, shift)
    grads, over = op != "patch_mse-forward", op == "patch_mse_"

    def ours(i: Inputs) -> Tensor:
        return ops.patch_mse(i.pred, i.image, i.mask, *rest)[0]

    def published(i: Inputs) -> Tensor:
        y = by_unfold(i.image, torch.float32, True, "last", "rcc")[:, shift:]
        error = (i.pred[:, : s["l"] - shift].float() - y).square().mean(-1)
        m = i.mask[:, shift:]
        return (error * m).sum() / m.sum()

    def short(i: Inputs) -> Tensor:
        y = normalized(byte_patches(i.image).float().mul_(1 / 255))[:, shift:]
        m = i.mask[:, shift:]
        e = i.pred[:, : s["l"] - shift].float().sub_(y)
        return (e.square_().mean(-1) * m).sum() / m.sum()

    def written_out(i: Inputs) -> tuple[Tensor, Tensor]:
        y = normalized(byte_patches(i.image).float().mul_(1 / 255))[:, shift:]
        m = i.mask[:, shift:]
        e = i.pred[:, : s["l"] - shift] - y
        num = m.sum()
        loss = (torch.linalg.vector_norm(e, dim=-1).square() * m).sum() / (VALUES * num)
        grad = torch.zeros_like(i.pred)
        grad[:, : s["l"] - shift] = e.mul_((m * (2 / (VALUES * num)))[..., None])
        return loss, grad

    def defined(i: Inputs) -> Tensor:
        return reference.patch_mse(i.pred, i.image, i.mask, *rest)[0]

    def gradient(i: Inputs) -> Any:
        loss, grad = with_gradients(defined, "pred")(i)
        return (grad,) if over else (loss, grad)

    if over:
        providers = [
            provider("tenfold", lambda i: ops.patch_mse_(i.pred, i.image, i.mask, *rest)),
            provider("eager:written_out", lambda i: i.pred.copy_(written_out(i)[1])),
        ]
    elif grads:
        providers = [
            autograd("tenfold", ours, "pred"),
            provider("eager:written_out", written_out),
            autograd("peer:autograd", published, "pred"),
            compiled_gradients(published, "pred"),
        ]
    else:
        providers = [provider("tenfold", ours), provider("eager:in_place", short),
                     provider("peer:sequence", published), compiled(published)]  # fmt: skip
    return Case(
        op=op, variant=variant, shape=s, dtype=dtype,
        inputs=lambda s, dtype, device: _inputs(s, dtype, device, variant, grads),
        bytes=lambda s, size: _bytes(s, size, variant, grads),
        providers=[*providers, yardstick(over)], reference=gradient if grads else defined,
        tolerance=1e-4 if dtype == torch.float32 else 1e-2, traffic="copy" if grads else "read",
        mode="inplace" if over else "functional", mutates=("pred",) if over else (),
        quick=s == SMALL, memory=op == "patch_mse" and s == STRIPS[0],
    )  # fmt: skip


def cases() -> Iterator[Case]:
    """All cases of the group, in the order of the table."""
    for dtype in DTYPES:
        for s in (SMALL, *STRIPS):
            yield _case("patch_mse", s, dtype, "npp")
        yield _case("patch_mse", STRIPS[0], dtype, "text")
        yield _case("patch_mse", SQUARE, dtype, "mae")
        yield _case("patch_mse-forward", STRIPS[1], dtype, "npp")
        yield _case("patch_mse_", STRIPS[1], dtype, "npp")
