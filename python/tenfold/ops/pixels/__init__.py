# SPDX-License-Identifier: Apache-2.0
"""Images as rows of patches, and the loss on them (PixelGPT, PIXEL, ViT-MAE)."""

from tenfold.ops.pixels.mse import (
    patch_mse,
    patch_mse_,
    patch_mse_backward,
    patch_mse_backward_,
)
from tenfold.ops.pixels.patches import (
    patch_mask,
    patchify_batch,
    patchify_u8,
    patchify_u8_,
    unpatchify,
)

__all__ = [
    "patch_mask",
    "patch_mse",
    "patch_mse_",
    "patch_mse_backward",
    "patch_mse_backward_",
    "patchify_batch",
    "patchify_u8",
    "patchify_u8_",
    "unpatchify",
]
