# SPDX-License-Identifier: Apache-2.0
"""Definitions of the ``optim`` family, one module per group of ops."""

from tenfold.reference.optim.adamw import dynamic_code, masked_adamw_, masked_adamw_8bit_
from tenfold.reference.optim.masks import (
    grad_norm,
    mask_popcount,
    mask_prefix,
    mask_random,
    mask_topk,
    masked_copy_,
    pack_mask,
    unpack_mask,
)
from tenfold.reference.optim.wgrad import linear_wgrad_rows

__all__ = [
    "dynamic_code",
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
