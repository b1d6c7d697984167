"""Definitions of the family ``loss``."""

from tenfold.reference.loss.linear import linear_cross_entropy, linear_logprob
from tenfold.reference.loss.logprob import selective_logprob
from tenfold.reference.loss.sequence import sequence_nll

__all__ = ["linear_cross_entropy", "linear_logprob", "selective_logprob", "sequence_nll"]
