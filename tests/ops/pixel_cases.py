# SPDX-License-Identifier: Apache-2.0
"""What the tests of the family ``pixels`` share: images of every layout, and the plain PyTorch sequence."""

import torch
from moe_cases import rand

EPS = 1e-6
NAN = float("nan")
STRIP = ((2,), 1, 5, 16, 3)
# (batch, rows of patches, patches of a row, patch, channels)
GRIDS = [
    ((2,), 1, 5, 16, 3),
    ((), 2, 3, 8, 1),
    ((2, 3), 2, 2, 7, 3),
    ((1,), 1, 2, 32, 4),
    ((3,), 3, 1, 5, 2),
    ((2,), 1, 3, 33, 3),
    ((2,), 2, 9, 1, 3),
    ((2,), 1, 1, 1, 1),
    ((0,), 1, 2, 16, 3),
    ((2,), 1, 0, 16, 3),
]
FORMS = ("hwc", "chw", "cropped", "turned", "grey")


def values(shape, dtype, seed=0):
    """Random pixels; half of the flat image is one value, so that some patches are constant."""
    made = torch.Generator().manual_seed(seed + sum(shape))
    x = torch.randint(0, 256, shape, generator=made, dtype=torch.uint8)
    flat = x.view(-1)
    flat[: len(flat) // 2] = 255
    return x if dtype == torch.uint8 else (x.float() / 255).to(dtype)


def image_of(grid, form, dtype=torch.uint8, device="cpu", seed=0):
    """(image, channels) of a grid, laid out in memory in one of the forms."""
    batch, rows, cols, patch, c = grid
    h, w = rows * patch, cols * patch
    if form == "chw":
        return values((*batch, c, h, w), dtype, seed).to(device), "first"
    if form == "grey":  # one channel seen as several
        return values((*batch, 1, h, w), dtype, seed).to(device).expand(*batch, c, h, w), "first"
    if form == "cropped":  # the corner of a larger image
        big = values((*batch, h + 3, w + 5, c), dtype, seed).to(device)
        return big[..., 2 : 2 + h, 1 : 1 + w, :], "last"
    if form == "turned":  # columns first in memory
        return values((*batch, w, c, h), dtype, seed).to(device).movedim(-1, -3), "last"
    return values((*batch, h, w, c), dtype, seed).to(device), "last"


def plain_patches(image, patch, channels, real=torch.float64):
    """[..., L, P] in the order rcc, in [0, 1]."""
    x = image.movedim(-3, -1) if channels == "first" else image
    x = x.to(real) / 255 if image.dtype == torch.uint8 else x.to(real)
    *batch, h, w, c = x.shape
    x = x.reshape(*batch, h // patch, patch, w // patch, patch, c)
    x = torch.einsum("...hpwqc->...hwpqc", x)
    return x.reshape(*batch, (h // patch) * (w // patch), patch * patch * c)


def plain_targets(x, norm_pix=True, eps=EPS):
    if not norm_pix or x.numel() == 0:
        return x
    var = x.var(-1, keepdim=True, correction=min(1, x.shape[-1] - 1))  # one value has none
    return (x - x.mean(-1, keepdim=True)) / (var + eps).sqrt()


def plain_mse(pred, image, mask, patch, norm_pix, channels, shift=1):
    """The sequence of section 3.5: (loss, l)."""
    real = torch.promote_types(pred.dtype, torch.float32)
    y = plain_targets(plain_patches(image, patch, channels, real), norm_pix)
    keep = pred.shape[-2] - shift
    error = (pred[..., :keep, :].to(real) - y[..., shift:, :]).square().mean(-1)
    m = mask[..., shift:].to(real)
    return (error * m).sum() / m.sum(), error


def weights(shape, kind, seed=0):
    made = torch.Generator().manual_seed(seed + sum(shape))
    there = torch.rand(shape, generator=made) < 0.7
    if kind == torch.bool:
        return there
    if kind.is_floating_point:
        return (torch.rand(shape, generator=made) * there).to(kind)
    return torch.randint(1, 4, shape, generator=made).to(kind) * there.to(kind)


def problem(
    grid, form="hwc", dtype=torch.float32, kind=torch.bool, pixels=torch.uint8, device="cpu"
):
    """(pred, image, mask, channels); pred is NaN where it does not count with shift 1."""
    batch, rows, cols, patch, c = grid
    image, channels = image_of(grid, form, pixels, device)
    shape = (*batch, rows * cols)
    pred = rand(*shape, patch * patch * c, dtype=dtype).to(device)
    return pred, image, weights(shape, kind).to(device), channels


def differentiated(face, pred, *args, by=1.0, **kwargs):
    x = pred.clone().requires_grad_()
    loss, per_patch, denom = face(x, *args, **kwargs)
    (grad,) = torch.autograd.grad(loss * by, x)
    return loss.detach(), per_patch, denom, grad
