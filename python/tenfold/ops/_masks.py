# SPDX-License-Identifier: Apache-2.0
"""Masks as the kernels read them."""

from __future__ import annotations

import torch
from torch import Tensor

_BYTES = (torch.bool, torch.uint8, torch.int8)


def as_bytes(x: Tensor) -> Tensor:
    """A mask of one byte per entry: nonzero is valid."""
    return x if x.dtype in _BYTES else x != 0
