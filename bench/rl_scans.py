# SPDX-License-Identifier: Apache-2.0
"""Forms of the recursion of GAE, ``A_t = delta_t + c A_{t+1}``, that others can be timed with.

Columns one after the other (as trainers write it), the recursive filter of SciPy, and in plain torch the
fastest that we know: products with triangular matrices of powers, within chunks and between them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .case import Inputs, NotAvailable

Scan = Callable[[Tensor], Tensor]
CHUNK = 64


def _powers(c: float, size: int, device: torch.device) -> Tensor:
    """[size, size], from t (row) to s (column): c ** (t - s) where t >= s."""
    at = torch.arange(size, device=device)
    power = (at[:, None] - at).double()
    return torch.where(power >= 0, c ** power.clamp_min(0), 0.0).float()


def chunked_scan(c: float, width: int, device: torch.device) -> Scan:
    """Of [B, width], where the chunk divides the width."""
    chunks = width // CHUNK
    inside, between = _powers(c, CHUNK, device), _powers(c**CHUNK, chunks, device)
    # From the first place of the next chunk to every place of this one.
    reach = c ** torch.arange(CHUNK, 0, -1, device=device).float()

    def scan(delta: Tensor) -> Tensor:
        local = torch.matmul(delta.reshape(-1, chunks, CHUNK), inside)
        if chunks == 1:
            return local.view(delta.shape)
        first = torch.matmul(local[:, :, 0], between)
        local[:, :-1] += first[:, 1:, None] * reach
        return local.view(delta.shape)

    return scan


def column_scan(c: float) -> Scan:
    """One column after the other, for all rows."""

    def scan(delta: Tensor) -> Tensor:
        carry, columns = torch.zeros_like(delta[:, 0]), []
        for d in reversed(delta.unbind(1)):
            carry = d + c * carry
            columns.append(carry)
        return torch.stack(columns[::-1], 1)

    return scan


def filter_scan(c: float) -> Callable[[Inputs], Scan]:
    """SciPy's ``lfilter`` over the rows from their end."""

    def build(inputs: Inputs) -> Scan:
        try:
            from scipy.signal import lfilter
        except ImportError:
            raise NotAvailable("SciPy is not installed") from None
        if any(v.is_cuda for v in vars(inputs).values() if isinstance(v, Tensor)):
            raise NotAvailable("SciPy has no GPU")
        a = torch.tensor([1.0, -c]).numpy()

        def scan(delta: Tensor) -> Tensor:
            filtered = lfilter(a[:1], a, delta.numpy()[:, ::-1], axis=1)
            return torch.from_numpy(filtered[:, ::-1].copy())

        return scan

    return build


def padded(width: int) -> int:
    """The next multiple of the chunk."""
    return -(-width // CHUNK) * CHUNK


def next_of(x: Tensor) -> Tensor:
    """x one column later, 0 at the end."""
    return torch.nn.functional.pad(x[:, 1:], (0, 1))
