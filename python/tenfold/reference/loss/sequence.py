# SPDX-License-Identifier: Apache-2.0
"""What a model gives whole sequences."""

from __future__ import annotations

import torch
from torch import Tensor


def sequence_nll(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> tuple[Tensor, Tensor]:
    """Sums [B] of ``-log softmax(logits)[label]`` over the positions that count, and their number.

    logits [B, S, V], labels [B, S]; a position with ``ignore_index`` does not count, and is not read.
    """
    there = labels != ignore_index
    chosen = labels[there].long()
    if ((chosen < 0) | (chosen >= logits.shape[2])).any():
        raise IndexError(f"labels must be ignore_index or in [0, {logits.shape[2]})")
    x = logits[there].to(torch.promote_types(logits.dtype, torch.float32))
    nll = x.logsumexp(-1) - x.gather(1, chosen[:, None])[:, 0]
    sequence = there.nonzero()[:, 0]
    return nll.new_zeros(logits.shape[0]).index_add(0, sequence, nll), there.sum(1)
