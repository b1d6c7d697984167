"""Definitions of the ``attention`` ops: decoupled-head attention (DHA, arXiv 2406.06567)."""

from tenfold.reference.attention.decode import dha_cache_append_, dha_decode

__all__ = ["dha_cache_append_", "dha_decode"]
