"""Definitions of the family ``loss``."""

from tenfold.reference.loss.linear import linear_cross_entropy, linear_logprob
from tenfold.reference.loss.logprob import selective_logprob

__all__ = ["linear_cross_entropy", "linear_logprob", "selective_logprob"]
