"""Grouped maps ``h // (H / N)``, made once per device: what models without maps of their own use."""

from __future__ import annotations

import torch
from torch import Tensor

_made: dict[tuple[int, int, torch.device], Tensor] = {}


def grouped_map(heads: int, kv_heads: int, device: torch.device) -> Tensor:
    """``h // (heads / kv_heads)`` as int32 [heads], the same tensor every time.

    Raises ValueError if ``kv_heads`` does not divide ``heads``.
    """
    key = (heads, kv_heads, device)
    if key in _made:
        return _made[key]
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(
            f"key and value heads must divide the {heads} query heads or come with maps, got "
            f"{kv_heads}"
        )
    if torch.compiler.is_compiling():
        return torch.arange(heads, dtype=torch.int32, device=device) // (heads // kv_heads)
    with torch.inference_mode(False):  # autograd must be able to save it later
        _made[key] = torch.arange(heads, dtype=torch.int32, device=device) // (heads // kv_heads)
    return _made[key]
