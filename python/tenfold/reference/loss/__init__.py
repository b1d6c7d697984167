"""Definitions of the family ``loss``."""

from tenfold.reference.loss.logprob import selective_logprob

__all__ = ["selective_logprob"]
