# SPDX-License-Identifier: Apache-2.0
"""Definitions of the family ``loss``."""

from tenfold.reference.loss.linear import linear_cross_entropy, linear_logprob, weighted_linear_ce
from tenfold.reference.loss.logprob import selective_logprob
from tenfold.reference.loss.reward import last_token_reward, pairwise_logsigmoid
from tenfold.reference.loss.segments import segment_mean
from tenfold.reference.loss.sequence import sequence_nll
from tenfold.reference.loss.traces import first_stop, lm_weight, trace_token_class

__all__ = [
    "first_stop",
    "last_token_reward",
    "linear_cross_entropy",
    "linear_logprob",
    "lm_weight",
    "pairwise_logsigmoid",
    "segment_mean",
    "selective_logprob",
    "sequence_nll",
    "trace_token_class",
    "weighted_linear_ce",
]
