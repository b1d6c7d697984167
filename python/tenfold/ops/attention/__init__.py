"""Faces of the ``attention`` family, one module per group of ops."""

from tenfold.ops.attention import heads
from tenfold.ops.attention.decode import dha_cache_append_, dha_decode
from tenfold.ops.attention.heads import *  # noqa: F403
from tenfold.ops.attention.prefill import dha_attention, dha_attention_backward

__all__ = [
    "dha_attention",
    "dha_attention_backward",
    "dha_cache_append_",
    "dha_decode",
    *heads.__all__,
]
