# SPDX-License-Identifier: Apache-2.0
"""Cases of ``patchify_u8``, ``patchify_batch`` and ``unpatchify``: part of the family ``pixels``.

Strips of rendered text are [B, 16, 16 L, 3] (HWC, as a renderer or decoder gives them) or [B, 3, 16, 16 L]; images
are 224 x 224. Bytes are the pixels read once and the results written once; the yardsticks copy as many: they
read half of them and write half. The peer is the usual form (scale, then ``F.unfold``); the eager one, ``bytes``,
turns the bytes around before it converts them, which moves the least.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tenfold import ops, reference

from .case import Case, Function, Inputs, Provider, Shape, compiled, provider

P, C, EPS = 16, 3, 1e-6
VALUES = P * P * C
STRIPS = ({"b": 8, "l": 1024}, {"b": 32, "l": 1024})
SMALL = {"b": 1, "l": 529}
SQUARE = {"b": 64, "l": 196}  # 224 x 224
DTYPES = (torch.float32, torch.bfloat16)


def patches_of(s: Shape) -> int:
    return s["b"] * s["l"]


def image_of(s: Shape, device: torch.device, channels: str = "last") -> Tensor:
    """Random pixels; 14 rows of patches where those are 196, else one."""
    rows = 14 if s["l"] == 196 else 1
    h, w = rows * P, s["l"] // rows * P
    sizes = (s["b"], h, w, C) if channels == "last" else (s["b"], C, h, w)
    made = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, sizes, dtype=torch.uint8, generator=made).to(device)


def byte_patches(image: Tensor, channels: str = "last", layout: str = "rcc") -> Tensor:
    """[B, L, P] of the same bytes."""
    if channels == "last":
        b, h, w, _ = image.shape
        x = image.view(b, h // P, P, w // P, P, C)
        order = (0, 1, 3, 2, 4, 5) if layout == "rcc" else (0, 1, 3, 5, 2, 4)
    else:
        b, _, h, w = image.shape
        x = image.view(b, C, h // P, P, w // P, P)
        order = (0, 2, 4, 3, 5, 1) if layout == "rcc" else (0, 2, 4, 1, 3, 5)
    return x.permute(order).reshape(b, -1, VALUES)


def normalized(x: Tensor) -> Tensor:
    """In place where that is faster."""
    var, mean = torch.var_mean(x, -1, keepdim=True)
    return x.sub_(mean).mul_((var + EPS).rsqrt_())


def by_bytes(image: Tensor, dtype: torch.dtype, normalize: bool, **where: str) -> Tensor:
    """Bytes turned around, then converted; scaled by the conversion's product, in place."""
    x = byte_patches(image, **where)
    if normalize:
        return normalized(x.float().mul_(1 / 255)).to(dtype)
    return x.to(dtype).div_(255)


def by_unfold(
    image: Tensor, dtype: torch.dtype, normalize: bool, channels: str, layout: str
) -> Tensor:
    """As most code has it."""
    x = image.movedim(-1, 1) if channels == "last" else image
    x = F.unfold(x.float() / 255, P, stride=P).transpose(1, 2)
    if layout == "rcc":
        x = x.view(*x.shape[:2], C, P * P).transpose(2, 3).reshape(x.shape)
    if normalize:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + EPS).sqrt()
    return x.to(dtype).contiguous()


def yardstick(into: bool) -> Provider:
    """Copies as many bytes, half of them read."""
    if into:
        return provider("copy_", lambda i: i.copy.copy_(i.half), "bound")
    return provider("clone", lambda i: i.half.clone(), "bound")


def _inputs(
    s: Shape, dtype: torch.dtype, device: torch.device, channels: str, moved: int, into: bool
) -> Inputs:
    half = torch.ones(patches_of(s) * VALUES * moved // 2, dtype=torch.uint8, device=device)
    made = Inputs(image=image_of(s, device, channels), half=half)
    made.count = torch.full((s["b"],), s["l"] // 2, device=device)
    if into:
        made.copy = torch.zeros_like(half)
        made.out = torch.zeros(s["b"], s["l"], VALUES, dtype=dtype, device=device)
    return made


def _patchify_case(s: Shape, dtype: torch.dtype, channels: str, layout: str, normalize: bool,
                   into: bool = False) -> Case:  # fmt: skip
    where = {"channels": channels, "layout": layout}
    args = (P, layout, normalize, EPS)

    def ours(i: Inputs) -> Any:
        if into:
            return ops.patchify_u8_(i.out, i.image, *args)
        return ops.patchify_u8(i.image, *args, dtype)

    def form(function: Callable[..., Tensor]) -> Function:
        def run(i: Inputs) -> Any:
            made = function(i.image, dtype, normalize, **where)
            return i.out.copy_(made) if into else made

        return run

    def defined(i: Inputs) -> Any:
        made = reference.patchify_u8(i.image, *args, torch.float64)
        return i.out.copy_(made) if into else made

    name = "normalized" if normalize else "scaled"
    moved = 1 + dtype.itemsize
    return Case(
        op="patchify_u8_" if into else "patchify_u8", variant=f"{name}-{channels}-{layout}", shape=s, dtype=dtype,
        inputs=functools.partial(_inputs, channels=channels, moved=moved, into=into),
        bytes=lambda s, size: patches_of(s) * VALUES * (1 + size),
        providers=[
            provider("tenfold", ours), provider("eager:bytes", form(by_bytes)),
            provider("peer:unfold", form(by_unfold)),
            *([] if into else [compiled(form(by_unfold))]), yardstick(into),
        ],
        reference=defined, tolerance=1e-5 if dtype == torch.float32 else 1e-2,
        mode="out" if into else "functional", mutates=("out",) if into else (),
        quick=s == SMALL,
    )  # fmt: skip


def _batch_case(s: Shape) -> Case:
    """From strips to inputs, targets and masks."""

    def eager(i: Inputs) -> tuple[Tensor, ...]:
        x = byte_patches(i.image).float().mul_(1 / 255)
        at = torch.arange(s["l"], device=x.device)
        mask = at < (i.count + 1)[:, None]
        return x.to(torch.bfloat16), normalized(x).to(torch.bfloat16), mask, mask.clone()

    kinds = {"dtype": torch.bfloat16, "target_dtype": torch.bfloat16}
    return Case(
        op="patchify_batch", shape=s, dtype=torch.bfloat16,
        inputs=functools.partial(_inputs, channels="last", moved=5, into=False),
        bytes=lambda s, size: patches_of(s) * (VALUES * (1 + 2 * size) + 2),
        providers=[
            provider("tenfold", lambda i: tuple(ops.patchify_batch(i.image, i.count, **kinds))),
            provider("eager", eager), compiled(eager), yardstick(False),
        ],
        reference=lambda i: reference.patchify_batch(i.image, i.count, **kinds), tolerance=1e-2,
        quick=s == SMALL,
    )  # fmt: skip


def _unpatchify_case(s: Shape) -> Case:
    def inputs(s: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
        made = _inputs(s, dtype, device, "last", 5, False)
        made.patches = ops.patchify_u8(made.image)
        return made

    def eager(i: Inputs) -> Tensor:
        x = (i.patches.clamp(0, 1) * 255).round_().to(torch.uint8)
        b, h, w, _ = i.image.shape
        return x.view(b, h // P, w // P, P, P, C).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, C)

    def ours(i: Inputs) -> Tensor:
        return ops.unpatchify(i.patches, P, *i.image.shape[1:3], channels="last")

    return Case(
        op="unpatchify", shape=s, dtype=torch.float32, inputs=inputs,
        bytes=lambda s, size: patches_of(s) * VALUES * (1 + size),
        providers=[
            provider("tenfold", ours),
            provider("eager", eager), compiled(eager), yardstick(False),
        ],
        reference=lambda i: i.image, tolerance=0.0, quick=s == SMALL,
    )  # fmt: skip


def _mask_case() -> Case:
    def inputs(s: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
        made = torch.Generator().manual_seed(0)
        return Inputs(count=torch.randint(0, s["l"], (s["b"],), generator=made).to(device))

    def eager(i: Inputs) -> Tensor:
        return torch.arange(1024, device=i.count.device) < (i.count + 1)[:, None]

    return Case(
        op="patch_mask", shape={"b": 256, "l": 1024}, dtype=torch.int64, inputs=inputs,
        bytes=lambda s, size: s["b"] * (s["l"] + size),
        providers=[
            provider("tenfold", lambda i: ops.patch_mask(i.count, 1024)), provider("eager", eager),
            compiled(eager),
        ],
        reference=lambda i: reference.patch_mask(i.count, 1024), tolerance=0.0, quick=True,
    )  # fmt: skip


def cases() -> Iterator[Case]:
    """All cases of the group, in the order of the table."""
    for dtype in DTYPES:
        for s in (SMALL, *STRIPS):
            for normalize in (False, True):
                yield _patchify_case(s, dtype, "last", "rcc", normalize)
        for into in (False, True):
            yield _patchify_case(STRIPS[1], dtype, "first", "crc", False, into)
            yield _patchify_case(STRIPS[1], dtype, "first", "rcc", True, into)
            yield _patchify_case(SQUARE, dtype, "last", "crc", False, into)
        for s in (SMALL, STRIPS[1]):
            for normalize in (False, True):
                yield _patchify_case(s, dtype, "last", "rcc", normalize, True)
    for s in (SMALL, STRIPS[0]):
        yield _batch_case(s)
        yield _unpatchify_case(s)
    yield _mask_case()
