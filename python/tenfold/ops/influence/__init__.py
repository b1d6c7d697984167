# SPDX-License-Identifier: Apache-2.0
"""Faces of the ``influence`` family, one module per group of ops."""

from tenfold.ops.influence.gradients import outer_dot
from tenfold.ops.influence.markov import markov_onestep, markov_scan
from tenfold.ops.influence.tuples import markov_onestep_tuples

__all__ = ["markov_onestep", "markov_onestep_tuples", "markov_scan", "outer_dot"]
