# SPDX-License-Identifier: Apache-2.0
"""One step of one run for one test example at a time, from features (section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from tenfold.reference.influence.markov import batch_weights, real_dtype


def markov_onestep_tuples(
    H: Tensor, G: Tensor, order_rows: Tensor, test_rows: Tensor, hist: Tensor, *, residual: bool = False,
    reduction: str = "sum",
) -> Tensor:  # fmt: skip
    """[N]: ``sum_j alpha_j hist_j + beta`` with ``alpha_j = <sum over the batch of H[j, i], G[j, q]>``.

    H [n + 1, M, E], G [n + 1, Q, E]: features; order_rows [N, B]: batches, -1 is none; test_rows [N]; hist [N, n]:
    oldest first, so lag j is column n - j.
    """
    n, wide = H.shape[0] - 1, real_dtype(H)
    weights = batch_weights(order_rows, reduction, wide)
    if H.shape[1] == 0:
        batch = H.new_zeros(n + 1, order_rows.shape[0], H.shape[2], dtype=wide)
    else:
        rows = H[:, order_rows.clamp_min(0).long()].to(wide)  # [n + 1, N, B, E]
        batch = torch.where(order_rows[..., None] >= 0, rows * weights[..., None], 0.0).sum(2)
    alpha = (batch * G[:, test_rows.long()].to(wide)).sum(-1)  # [n + 1, N]
    if residual:
        alpha = torch.cat([alpha[:1] + 1.0, alpha[1:]])
    lags = hist.to(wide).flip(1).T  # lag 1 first
    return (alpha[:n] * lags).sum(0) + alpha[n]
