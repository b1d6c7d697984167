# SPDX-License-Identifier: Apache-2.0
"""The standard matrix of shapes, dtypes, memory layouts and values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# 0, 1, around the vector widths (4, 8, 16), primes, more than one tile.
LENGTHS = (0, 1, 3, 4, 7, 8, 15, 16, 17, 31, 33, 61, 127, 257)
LAYOUTS = ("contiguous", "sliced", "transposed", "misaligned")
VALUES = ("normal", "zeros", "large", "tiny", "nan", "inf")


def fill(shape: tuple[int, ...], dtype: torch.dtype, kind: str = "normal", seed: int = 0) -> Tensor:
    """Deterministic values of one of the kinds ``VALUES``."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    if kind == "zeros":
        x.zero_()
    elif kind == "large":
        x *= 100.0
    elif kind == "tiny":
        x *= 1e-6
    elif kind in ("nan", "inf"):
        x.view(-1)[x.numel() // 2 :][:1] = float(kind)  # nothing to set in an empty tensor
    elif kind != "normal":
        raise ValueError(f"unknown kind of values {kind!r}; known: {', '.join(VALUES)}")
    return x.to(dtype)


def layout(x: Tensor, kind: str) -> Tensor:
    """The same values in another memory layout (one of ``LAYOUTS``)."""
    if kind == "contiguous":
        return x.contiguous()
    if kind == "sliced":  # rows of a bigger buffer
        big = torch.full((*x.shape[:-1], x.shape[-1] + 5), 7.0, dtype=x.dtype, device=x.device)
        big[..., : x.shape[-1]] = x
        return big[..., : x.shape[-1]]
    if kind == "transposed":  # [B, L, H, D] storage of a [B, H, L, D] tensor; rows stay whole
        at = (1, 2) if x.dim() >= 4 else (0, x.dim() - 2 if x.dim() > 2 else 0)
        return x.transpose(*at).contiguous().transpose(*at)
    if kind == "misaligned":
        flat = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
        flat[1:] = x.reshape(-1)
        return flat[1:].view(x.shape)
    raise ValueError(f"unknown layout {kind!r}; known: {', '.join(LAYOUTS)}")


def on(device: torch.device | str, tree: Any) -> Any:
    """The same lists, dicts and tuples with all tensors on the device; None and numbers stay."""
    return pytree.tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, tree)
