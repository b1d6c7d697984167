# SPDX-License-Identifier: Apache-2.0
"""What the attention integrations share: grouped maps ``h // (H / N)``, made once per device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

DECODE_STEPS = 16  # queries that dha_decode takes at once

_made: dict[tuple[int, int, torch.device], Tensor] = {}


def grouped_map(heads: int, kv_heads: int, device: torch.device) -> Tensor:
    """``h // (heads / kv_heads)`` as int32 [heads], mostly the same tensor every time.

    Raises ValueError if ``kv_heads`` does not divide ``heads``.
    """
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(
            f"key and value heads must divide the {heads} query heads or come with maps, got "
            f"{kv_heads}"
        )
    # A tracer or FakeTensorMode sees its own tensors only, and no one may see them afterwards.
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        return _make(heads, kv_heads, device)
    key = (heads, kv_heads, device)
    if key not in _made:
        with torch.inference_mode(False):  # autograd must be able to save it later
            made = _make(heads, kv_heads, device)
        if not _may_stay(made):
            return made
        _made[key] = made
    return _made[key]


def _make(heads: int, kv_heads: int, device: torch.device) -> Tensor:
    return torch.arange(heads, dtype=torch.int32, device=device) // (heads // kv_heads)


def _may_stay(made: Tensor) -> bool:
    """False for wrappers of functorch and the like, and for memory of a CUDA graph's own pool."""
    if type(made) is not Tensor or torch._is_functional_tensor(made):
        return False
    return not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
