"""Faces of the ``attention`` family: decoupled-head attention (DHA, arXiv 2406.06567)."""

from tenfold.ops.attention.decode import dha_cache_append_, dha_decode
from tenfold.ops.attention.prefill import dha_attention, dha_attention_backward

__all__ = ["dha_attention", "dha_attention_backward", "dha_cache_append_", "dha_decode"]
