# SPDX-License-Identifier: Apache-2.0
"""Definitions of the family ``rl``: macro actions, their advantages, and PPO's losses over them."""

from tenfold.reference.rl.losses import ma_ppo_policy_loss, ma_ppo_value_loss
from tenfold.reference.rl.returns import gae, ma_ppo_prepare, macro_gae, macro_pool
from tenfold.reference.rl.segments import (
    macro_segment_fixed,
    macro_segment_lengths,
    macro_segment_ppl,
    macro_segment_starts,
)

__all__ = [
    "gae",
    "ma_ppo_policy_loss",
    "ma_ppo_prepare",
    "ma_ppo_value_loss",
    "macro_gae",
    "macro_pool",
    "macro_segment_fixed",
    "macro_segment_lengths",
    "macro_segment_ppl",
    "macro_segment_starts",
]
