"""Faces of the ``loss`` family, one module per group of ops."""

from tenfold.ops.loss.linear import linear_cross_entropy, linear_logprob
from tenfold.ops.loss.logprob import selective_logprob
from tenfold.ops.loss.sequence import sequence_nll

__all__ = ["linear_cross_entropy", "linear_logprob", "selective_logprob", "sequence_nll"]
