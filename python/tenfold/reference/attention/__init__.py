"""Definitions of the ``attention`` family."""

from tenfold.reference.attention.decode import dha_cache_append_, dha_decode
from tenfold.reference.attention.prefill import dha_attention, dha_attention_backward

__all__ = ["dha_attention", "dha_attention_backward", "dha_cache_append_", "dha_decode"]
