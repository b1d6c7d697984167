# SPDX-License-Identifier: Apache-2.0
"""Faces of the ``corruption`` family, one module per group of ops."""

from tenfold.ops.corruption.pairs import pair_pack, shift_right
from tenfold.ops.corruption.sizes import corrupted_sizes, longest_chunk, span_counts
from tenfold.ops.corruption.spans import span_corrupt, span_corruption, span_mask, span_restore

__all__ = [
    "corrupted_sizes",
    "longest_chunk",
    "pair_pack",
    "shift_right",
    "span_corrupt",
    "span_corruption",
    "span_counts",
    "span_mask",
    "span_restore",
]
