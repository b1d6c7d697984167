# SPDX-License-Identifier: Apache-2.0
"""Patches of images, back to images, and which of them are there."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tenfold.ops._register import call_inference, inference_only

_ops = torch.ops.tenfold
_CHANNELS = (1, 3, 4)  # by which channels="auto" knows them

for _name in ("patchify_u8", "patchify_batch", "unpatchify", "patch_mask"):
    inference_only(_name)
inference_only("patchify_u8_", mutates=(0,))


def patch_shape(image: Tensor, patch: int, channels: str) -> tuple[int, ...]:
    """[..., L, P] of an image's patches, as the kernels see it."""
    *batch, a, b, c = image.shape
    last = channels == "last" or (channels == "auto" and c in _CHANNELS)
    h, w, depth = (a, b, c) if last else (b, c, a)
    return (*batch, (h // patch) * (w // patch), patch * patch * depth)


@torch.library.register_fake("tenfold::patchify_u8")
def _(image, patch, layout, normalize, eps, dtype, *, channels="auto", validate=True):
    return image.new_empty(patch_shape(image, patch, channels), dtype=dtype or torch.float32)


@torch.library.register_fake("tenfold::patchify_u8_")
def _(out, image, patch, layout, normalize, eps, *, channels="auto", validate=True):
    return None


@torch.library.register_fake("tenfold::patchify_batch")
def _(image, num_patches, patch, layout, norm_pix, eps, dtype, eos_in_loss, *, targets=True,
      target_dtype=None, channels="auto", validate=True):  # fmt: skip
    shape = patch_shape(image, patch, channels)
    masks = (image.new_empty(shape[:-1], dtype=torch.bool) for _ in range(2))
    made = image.new_empty(shape if targets else (0,), dtype=target_dtype or torch.float32)
    return image.new_empty(shape, dtype=dtype or torch.float32), made, *masks


@torch.library.register_fake("tenfold::unpatchify")
def _(patches, patch, height, width, layout, dtype, *, channels="first", mean=None, std=None):
    *batch, _, values = patches.shape
    depth = values // (patch * patch)
    sizes = (depth, height, width) if channels == "first" else (height, width, depth)
    return patches.new_empty((*batch, *sizes), dtype=dtype or torch.uint8)


@torch.library.register_fake("tenfold::patch_mask")
def _(num_patches, length, eos=True):
    return num_patches.new_empty((*num_patches.shape, length), dtype=torch.bool)


def patchify_u8(
    image: Tensor, patch: int = 16, layout: str = "rcc", normalize: bool = False, eps: float = 1e-6,
    dtype: torch.dtype | None = None, *, channels: str = "auto", validate: bool = True,
) -> Tensor:  # fmt: skip
    """An image, or a strip of rendered text, as a row of patches: scaled to [0, 1], or normalised each.

    Args:
        image: [..., H, W, C] or [..., C, H, W], of any strides, H and W whole patches; uint8, or float32, bfloat16
            or float16 in [0, 1].
        patch: height and width of a patch, 1 to 1,024.
        layout: order of a patch's values: ``"rcc"`` (row, column, channel: what losses compare) or ``"crc"``
            (channel, row, column: a convolution's weight [D, C, p, p] as a [D, P] matrix).
        normalize: subtract a patch's mean, divide by ``sqrt(v + eps)`` with its variance v (divisor P - 1), both of
            values in [0, 1]. Sums of uint8 are integers: a constant patch is 0 exactly.
        eps: at least 0.
        dtype: float32 (None), bfloat16 or float16.
        channels: ``"first"``, ``"last"``, or ``"auto"``: the one of the two dims that has 1, 3 or 4.
        validate: look for values of float images outside [0, 1]; on the CPU only, and it reads them twice. False
            takes any range (pixels normalised by mean and deviation, say).

    Returns:
        [..., L, P], contiguous: L = (H / p) (W / p) patches, row by row, of P = p p C values. Without ``normalize``
        they are u / 255, rounded once to float32 and then to ``dtype``. Not differentiable: RuntimeError for an
        image that requires grad.

    Raises:
        ValueError: dtype or values of the image, sizes that are not whole patches, channels that cannot be told.
        TypeError: dtype.

    Source:
        PixelGPT (arXiv 2404.10710), sections 3.3 and 3.5 of the method's specification.
    """
    return call_inference(_ops.patchify_u8.default, image, patch, layout, normalize, eps, dtype, channels=channels,
                          validate=validate)  # fmt: skip


def patchify_u8_(
    out: Tensor, image: Tensor, patch: int = 16, layout: str = "rcc", normalize: bool = False, eps: float = 1e-6, *,
    channels: str = "auto", validate: bool = True,
) -> None:  # fmt: skip
    """:func:`patchify_u8` into ``out``, contiguous [..., L, P] of float32, bfloat16 or float16.

    Raises:
        ValueError: also if ``out`` has another shape, is not contiguous or shares memory with the image.
    """
    call_inference(_ops.patchify_u8_.default, out, image, patch, layout, normalize, eps, mutates=(out,),
                   channels=channels, validate=validate)  # fmt: skip


class PatchBatch(NamedTuple):
    """What :func:`patchify_batch` makes of strips."""

    patches: Tensor
    targets: Tensor
    mask: Tensor
    loss_mask: Tensor


def patchify_batch(
    image: Tensor, num_patches: Tensor, patch: int = 16, layout: str = "rcc", norm_pix: bool = True, eps: float = 1e-6,
    dtype: torch.dtype | None = None, eos_in_loss: bool = True, *, targets: bool = True,
    target_dtype: torch.dtype | None = None, channels: str = "auto", validate: bool = True,
) -> PatchBatch:  # fmt: skip
    """A batch of strips as a model takes it: patches, regression targets and masks, in one pass over the pixels.

    What a data collator calls on its stacked strips. :func:`patch_mse` needs no ``targets``: it takes the strips.

    Args:
        image: as of :func:`patchify_u8`; [B, p, p L, 3] of rendered strips, say.
        num_patches: int32 or int64 of the image's batch shape: patches of text, before the black one that ends it.
        layout: of ``patches``.
        norm_pix, eps: whether targets are normalised (see :func:`patchify_u8`), else they are in [0, 1] too.
        dtype, target_dtype: float32 (None), bfloat16 or float16.
        eos_in_loss: the end-of-sequence patch counts in the loss; it is always attended to.
        targets: False leaves them out: [0].
        patch, channels, validate: as of :func:`patchify_u8`.

    Returns:
        patches [..., L, P] in [0, 1]; targets [..., L, P] in the order ``"rcc"``; mask bool [..., L], True for
        ``i < min(num_patches + 1, L)``; loss_mask, the same or, without ``eos_in_loss``, ``i < min(num_patches, L)``.

    Raises:
        ValueError: as of :func:`patchify_u8`; a negative number of patches (checked on the CPU only, elsewhere 0).
        TypeError: dtypes.

    Source:
        PixelGPT (arXiv 2404.10710), sections 3.2, 3.3 and 3.5 of the method's specification.
    """
    return PatchBatch(*call_inference(_ops.patchify_batch.default, image, num_patches, patch, layout, norm_pix, eps,
                                      dtype, eos_in_loss, targets=targets, target_dtype=target_dtype,
                                      channels=channels, validate=validate))  # fmt: skip


def unpatchify(
    patches: Tensor, patch: int, height: int, width: int, layout: str = "rcc", dtype: torch.dtype | None = None, *,
    channels: str = "first", mean: Tensor | None = None, std: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The image whose patches these are: the inverse of :func:`patchify_u8`, exactly for uint8 in any dtype.

    Args:
        patches: [..., L, P], float32, bfloat16 or float16, of any strides.
        patch, layout: as of :func:`patchify_u8`.
        height, width: of the image, whole patches.
        dtype: uint8 (None), whose values in [0, 1] become 0 to 255, rounded, others the nearer end, NaN 0; or
            float32, bfloat16 or float16, which keep any value.
        channels: where they are in the result, ``"first"`` or ``"last"``.
        mean, std: float32 [..., L]: what normalised patches are multiplied by and shifted to before (std, then mean).

    Returns:
        [..., C, H, W] or [..., H, W, C], contiguous. Not differentiable.

    Raises:
        ValueError: sizes, or L and P that do not go with them. TypeError: dtypes.

    Source:
        PixelGPT (arXiv 2404.10710), sections 3.3 and 3.9 of the method's specification.
    """
    return call_inference(_ops.unpatchify.default, patches, patch, height, width, layout, dtype, channels=channels,
                          mean=mean, std=std)  # fmt: skip


def patch_mask(num_patches: Tensor, length: int, eos: bool = True) -> Tensor:
    """Which patches of strips are there: the first ``num_patches``, and the black one that ends them.

    Args:
        num_patches: int32 or int64 [...].
        length: patches of a strip, L.
        eos: whether the patch after them is there too: to attention it is; to the loss as one likes.

    Returns:
        bool [..., L]: True for ``i < min(num_patches + eos, L)``.

    Raises:
        ValueError: a negative number of patches (checked on the CPU only, elsewhere 0), or length. TypeError: dtype.

    Source:
        PixelGPT (arXiv 2404.10710), section 3.2 of the method's specification.
    """
    return call_inference(_ops.patch_mask.default, num_patches, length, eos)
