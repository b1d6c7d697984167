# SPDX-License-Identifier: Apache-2.0
"""NACL: one-shot KV-cache eviction with proxy tokens and random sampling (arXiv 2408.03675)."""

from tenfold.nacl.baselines import (
    METHODS,
    FullPress,
    H2OPress,
    RandomPress,
    SnapKVPress,
    StreamingLLMPress,
    TOVAPress,
    make_press,
)
from tenfold.nacl.cache import NaclCache, NaclCacheLayer, RaggedCacheLayer, cache_bytes
from tenfold.nacl.config import BudgetPlan, NaclConfig
from tenfold.nacl.press import NaclPress, Press

__all__ = [
    "METHODS",
    "BudgetPlan",
    "FullPress",
    "H2OPress",
    "NaclCache",
    "NaclCacheLayer",
    "NaclConfig",
    "NaclPress",
    "Press",
    "RaggedCacheLayer",
    "RandomPress",
    "SnapKVPress",
    "StreamingLLMPress",
    "TOVAPress",
    "cache_bytes",
    "make_press",
]
