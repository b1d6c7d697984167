# SPDX-License-Identifier: Apache-2.0
"""Faces of the ``loss`` family, one module per group of ops."""

from tenfold.ops.loss.linear import linear_cross_entropy, linear_logprob
from tenfold.ops.loss.logprob import selective_logprob
from tenfold.ops.loss.reward import last_token_reward, pairwise_logsigmoid
from tenfold.ops.loss.segments import segment_mean
from tenfold.ops.loss.sequence import sequence_nll
from tenfold.ops.loss.traces import first_stop, lm_weight, trace_token_class
from tenfold.ops.loss.weighted import weighted_linear_ce

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
