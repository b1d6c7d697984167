# SPDX-License-Identifier: Apache-2.0
"""Images as rows of patches, and the loss on them (PixelGPT, sections 3.2, 3.3 and 3.5)."""

from __future__ import annotations

import torch
from torch import Tensor


def _channels_last(image: Tensor, channels: str) -> Tensor:
    """[..., H, W, C] of an image with its channels at either end of the last three dims."""
    if channels == "auto":
        first, last = (image.shape[i] in (1, 3, 4) for i in (-3, -1))
        if first == last:
            raise ValueError(f"channels of {tuple(image.shape)} cannot be told")
        channels = "first" if first else "last"
    return image if channels == "last" else image.movedim(-3, -1)


def _patches(image: Tensor, patch: int, layout: str, channels: str) -> Tensor:
    """[..., L, P], values as they are in the image."""
    x = _channels_last(image, channels)
    *batch, h, w, c = x.shape
    rows, cols = h // patch, w // patch
    x = x.reshape(*batch, rows, patch, cols, patch, c)  # ..., row, r, column, s, channel
    x = x.movedim(-4, -3)
    if layout == "crc":
        x = x.movedim(-1, -3)
    return x.reshape(*batch, rows * cols, patch * patch * c)


def _normalized(x: Tensor, eps: float) -> Tensor:
    """Each patch minus its mean, over ``sqrt(variance + eps)``; x uint8 or floats in [0, 1]; in float64.

    Of uint8 in integers, S1 the sum and S2 that of squares: ``(u - S1 / N) / sqrt((N S2 - S1^2) / (N (N - 1)) +
    65025 eps)``. Of floats from their differences to the first one. Either way equal values give 0.
    """
    n = x.shape[-1]
    if x.dtype == torch.uint8:
        u = x.long()
        s1, s2 = u.sum(-1, keepdim=True), (u * u).sum(-1, keepdim=True)
        apart = u.double() - s1.double() / n
        variance, eps = (n * s2 - s1 * s1).double() / max(n * (n - 1), 1), 65025 * eps
    else:
        d = x.double() - x[..., :1].double()
        apart = d - d.mean(-1, keepdim=True)
        variance = (apart * apart).sum(-1, keepdim=True) / max(n - 1, 1)
    root = (variance + eps).sqrt()
    return torch.where(root > 0, apart / root, 0.0)


def _values(
    image: Tensor, patch: int, layout: str, normalize: bool, eps: float, channels: str
) -> Tensor:
    x = _patches(image, patch, layout, channels)
    if normalize:
        return _normalized(x, eps)
    return x.double() / 255 if x.dtype == torch.uint8 else x.double()


def _rounded(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    return x if dtype == torch.float64 else x.float().to(dtype or torch.float32)


def patchify_u8(
    image: Tensor, patch: int = 16, layout: str = "rcc", normalize: bool = False, eps: float = 1e-6,
    dtype: torch.dtype | None = None, *, channels: str = "auto", validate: bool = True,
) -> Tensor:  # fmt: skip
    """Patches [..., L, P] in [0, 1], or normalised each; in float64, rounded to float32 and then to ``dtype``."""
    return _rounded(_values(image, patch, layout, normalize, eps, channels), dtype)


def patchify_u8_(
    out: Tensor, image: Tensor, patch: int = 16, layout: str = "rcc", normalize: bool = False, eps: float = 1e-6, *,
    channels: str = "auto", validate: bool = True,
) -> None:  # fmt: skip
    """The same into ``out``."""
    out.copy_(patchify_u8(image, patch, layout, normalize, eps, out.dtype, channels=channels))


def unpatchify(
    patches: Tensor, patch: int, height: int, width: int, layout: str = "rcc", dtype: torch.dtype | None = None, *,
    channels: str = "first", mean: Tensor | None = None, std: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The image [..., C, H, W] (or channels last) of patches; uint8 from [0, 1], rounded."""
    *batch, _, values = patches.shape
    rows, cols, c = height // patch, width // patch, values // (patch * patch)
    x = patches.float()
    if std is not None:
        x = x * std[..., None]
    if mean is not None:
        x = x + mean[..., None]
    inner = (patch, patch, c) if layout == "rcc" else (c, patch, patch)
    x = x.reshape(*batch, rows, cols, *inner)
    if layout == "crc":
        x = x.movedim(-3, -1)
    x = x.movedim(-3, -4).reshape(*batch, height, width, c)
    if channels == "first":
        x = x.movedim(-1, -3)
    if dtype not in (None, torch.uint8):
        return x.to(dtype).contiguous()
    return (x.nan_to_num(nan=0.0).clamp(0, 1) * 255).round().to(torch.uint8).contiguous()


def patch_mask(num_patches: Tensor, length: int, eos: bool = True) -> Tensor:
    """bool [..., L]: ``i < min(num_patches + eos, L)``."""
    return torch.arange(length, device=num_patches.device) < (num_patches + int(eos))[..., None]


def patchify_batch(
    image: Tensor, num_patches: Tensor, patch: int = 16, layout: str = "rcc", norm_pix: bool = True, eps: float = 1e-6,
    dtype: torch.dtype | None = None, eos_in_loss: bool = True, *, targets: bool = True,
    target_dtype: torch.dtype | None = None, channels: str = "auto", validate: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Patches in [0, 1], regression targets (rcc), the patches that are there, those that count in the loss."""
    patches = patchify_u8(image, patch, layout, dtype=dtype, channels=channels)
    made = patches.new_empty(0, dtype=target_dtype or torch.float32)
    if targets:
        made = patchify_u8(image, patch, "rcc", norm_pix, eps, target_dtype, channels=channels)
    length = patches.shape[-2]
    masks = patch_mask(num_patches, length), patch_mask(num_patches, length, eos_in_loss)
    return patches, made, *masks


def patch_mse(
    pred: Tensor, image: Tensor, mask: Tensor, patch: int = 16, norm_pix: bool = True, eps: float = 1e-6,
    shift: int = 1, denom: Tensor | float | None = None, *, channels: str = "auto", validate: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, per_patch, denom): position i against patch i + shift, weighted by what that weighs.

    ``l_i = mean_k (pred_ik - y_(i + shift),k)^2``, ``loss = sum m_(i + shift) l_i / denom`` with ``denom`` the sum of
    the weights if none is given. In float32, or float64 if pred is. What weighs nothing is left out.
    """
    real = torch.float64 if pred.dtype == torch.float64 else torch.float32
    y = _values(image, patch, "rcc", norm_pix, eps, channels).to(real)
    length = pred.shape[-2]
    keep = max(length - shift, 0)
    weight = torch.zeros(pred.shape[:-1], dtype=torch.float64, device=pred.device)
    weight[..., :keep] = mask[..., length - keep :].double()
    target = torch.zeros_like(y)
    target[..., :keep, :] = y[..., length - keep :, :]
    counts = weight != 0
    f = torch.where(counts[..., None], pred.to(real), 0.0)
    error = torch.where(counts[..., None], f - target, 0.0)
    per_patch = (error * error).mean(-1) if error.shape[-1] else error.sum(-1)
    total = (weight.to(real) * per_patch).sum()
    by = weight.sum().to(real) if denom is None else torch.as_tensor(denom).to(total).reshape(())
    loss = total / torch.where(by > 0, by, 1.0) * (by > 0)
    return loss, per_patch.detach(), by


def patch_mse_backward(
    grad_loss: Tensor, pred: Tensor, image: Tensor, mask: Tensor, denom: Tensor, patch: int = 16, norm_pix: bool = True,
    eps: float = 1e-6, shift: int = 1, *, channels: str = "auto",
) -> Tensor:  # fmt: skip
    """Gradient of the loss by pred: what autograd makes of the definition."""
    with torch.enable_grad():
        x = pred.detach().requires_grad_()
        loss = patch_mse(x, image, mask, patch, norm_pix, eps, shift, denom, channels=channels)[0]
        return torch.autograd.grad(loss, x, grad_loss.reshape(()).to(loss))[0].contiguous()


def patch_mse_(
    pred: Tensor, image: Tensor, mask: Tensor, patch: int = 16, norm_pix: bool = True, eps: float = 1e-6,
    shift: int = 1, denom: Tensor | float | None = None, *, channels: str = "auto", validate: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss, whose gradient takes the place of pred."""
    made = patch_mse(pred, image, mask, patch, norm_pix, eps, shift, denom, channels=channels)
    pred.copy_(patch_mse_backward(made[0].new_ones(()), pred, image, mask, made[2], patch, norm_pix, eps, shift,
                                  channels=channels))  # fmt: skip
    return made


def patch_mse_backward_(
    grad: Tensor, grad_loss: Tensor, pred: Tensor, image: Tensor, mask: Tensor, denom: Tensor, patch: int = 16,
    norm_pix: bool = True, eps: float = 1e-6, shift: int = 1, *, channels: str = "auto", made: bool = False,
) -> None:  # fmt: skip
    """:func:`patch_mse_backward` into ``grad``."""
    grad.copy_(
        patch_mse_backward(
            grad_loss, pred, image, mask, denom, patch, norm_pix, eps, shift, channels=channels
        )
    )
