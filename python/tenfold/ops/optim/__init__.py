# SPDX-License-Identifier: Apache-2.0
"""Faces of the ``optim`` family, one module per group of ops."""

from tenfold.ops.optim.adamw import masked_adamw_, masked_adamw_8bit_
from tenfold.ops.optim.masks import (
    grad_norm,
    mask_popcount,
    mask_prefix,
    mask_random,
    mask_topk,
    masked_copy_,
    pack_mask,
    unpack_mask,
)
from tenfold.ops.optim.wgrad import linear_wgrad_rows

__all__ = [
    "grad_norm",
    "linear_wgrad_rows",
    "mask_popcount",
    "mask_prefix",
    "mask_random",
    "mask_topk",
    "masked_adamw_",
    "masked_adamw_8bit_",
    "masked_copy_",
    "pack_mask",
    "unpack_mask",
]
