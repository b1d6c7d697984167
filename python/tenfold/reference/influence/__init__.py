# SPDX-License-Identifier: Apache-2.0
"""Definitions of the ``influence`` family: simulated training runs and gradient products."""

from tenfold.reference.influence.gradients import outer_dot
from tenfold.reference.influence.markov import markov_onestep, markov_scan
from tenfold.reference.influence.tuples import markov_onestep_tuples

__all__ = ["markov_onestep", "markov_onestep_tuples", "markov_scan", "outer_dot"]
