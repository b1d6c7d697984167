"""Faces of the ``loss`` family, one module per group of ops."""

from tenfold.ops.loss.logprob import selective_logprob

__all__ = ["selective_logprob"]
