# SPDX-License-Identifier: Apache-2.0
"""Definitions of the ``attention`` family, one module per group of ops."""

from tenfold.reference.attention.decode import dha_cache_append_, dha_decode
from tenfold.reference.attention.heads import (
    allocate_heads,
    collapse_heads,
    fuse_heads,
    fuse_states,
    fusion_mse,
    group_heads,
    head_cka,
)
from tenfold.reference.attention.prefill import dha_attention, dha_attention_backward
from tenfold.reference.attention.t5 import (
    t5_attention,
    t5_attention_backward,
    t5_buckets,
    t5_dropout,
)

__all__ = [
    "allocate_heads",
    "collapse_heads",
    "dha_attention",
    "dha_attention_backward",
    "dha_cache_append_",
    "dha_decode",
    "fuse_heads",
    "fuse_states",
    "fusion_mse",
    "group_heads",
    "head_cka",
    "t5_attention",
    "t5_attention_backward",
    "t5_buckets",
    "t5_dropout",
]
