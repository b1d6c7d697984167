# SPDX-License-Identifier: Apache-2.0
"""Faces of the ``attention`` family, one module per group of ops."""

from tenfold.ops.attention.decode import dha_cache_append_, dha_decode
from tenfold.ops.attention.heads import (
    allocate_heads,
    collapse_heads,
    fuse_heads,
    fuse_heads_backward,
    fusion_mse,
    fusion_mse_backward,
    group_heads,
    head_cka,
)
from tenfold.ops.attention.prefill import dha_attention, dha_attention_backward
from tenfold.ops.attention.t5 import t5_attention, t5_attention_backward

__all__ = [
    "allocate_heads",
    "collapse_heads",
    "dha_attention",
    "dha_attention_backward",
    "dha_cache_append_",
    "dha_decode",
    "fuse_heads",
    "fuse_heads_backward",
    "fusion_mse",
    "fusion_mse_backward",
    "group_heads",
    "head_cka",
    "t5_attention",
    "t5_attention_backward",
]
