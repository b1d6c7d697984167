"""Faces of the ``attention`` family."""

from tenfold.ops.attention.prefill import dha_attention, dha_attention_backward

__all__ = ["dha_attention", "dha_attention_backward"]
