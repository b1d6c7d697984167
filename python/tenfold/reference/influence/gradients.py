# SPDX-License-Identifier: Apache-2.0
"""Products of last-layer gradients (sections 3.7 and 6)."""

from __future__ import annotations

import torch
from torch import Tensor


def outer_dot(J: Tensor, X: Tensor, J2: Tensor, X2: Tensor, *, paired: bool = False) -> Tensor:
    """``<J_i^T X_i, J2_k^T X2_k>`` = ``sum((J_i J2_k^T) * (X_i X2_k^T))`` of all pairs i, k; [N, M].

    J [N, T, V], X [N, T, D], J2 [M, S, V], X2 [M, S, D]: the gradient of a linear layer's weight is J^T X, of the
    gradients J at its output and its inputs X. Pairs (i, i) only, [N], if ``paired``. Without N and M: one number.
    """
    if J.dim() == 2:
        return outer_dot(J[None], X[None], J2[None], X2[None], paired=True)[0]
    wide = torch.float64 if J.dtype == torch.float64 else torch.float32
    gradient = torch.einsum("ntv,ntd->nvd", J.to(wide), X.to(wide))
    other = torch.einsum("msv,msd->mvd", J2.to(wide), X2.to(wide))
    if paired:
        return (gradient * other).sum((1, 2))
    return torch.einsum("nvd,mvd->nm", gradient, other)
