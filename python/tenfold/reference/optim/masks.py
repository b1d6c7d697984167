# SPDX-License-Identifier: Apache-2.0
"""Definitions of the mask ops: packed bits, their counts, random and top-k masks, and what they select.

A packed mask is uint8, least significant bit first, unused bits of the last byte zero; a set bit means
"trains". One bit stands for one unit of a tensor in its storage order:

    mask_kind | unit                                                | number of units
    row       | one index of dimension 0 (contiguous tensors)       | shape[0]
    col       | one index of the last dimension (contiguous)        | shape[-1]
    block     | ``block_size`` consecutive elements, last shorter   | ceil(numel / block_size)
    element   | one element                                         | numel
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tenfold.reference.random import philox4x32_10

__all__ = [
    "grad_norm",
    "mask_popcount",
    "mask_prefix",
    "mask_random",
    "mask_topk",
    "masked_copy_",
    "pack_mask",
    "storage_flat",
    "trained_elements",
    "unpack_mask",
]


def pack_mask(mask: Tensor) -> Tensor:
    """bool [n] (any shape, flattened) -> uint8 [ceil(n / 8)]."""
    bits = mask.flatten().to(torch.uint8)
    bits = torch.cat([bits, bits.new_zeros(-bits.numel() % 8)]).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(1).to(torch.uint8)


def unpack_mask(packed: Tensor, n: int) -> Tensor:
    """uint8 [ceil(n / 8)] -> bool [n]."""
    bits = packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (bits & 1).flatten()[:n].bool()


def mask_popcount(packed: Tensor) -> Tensor:
    """Number of set bits, int64 0-d."""
    return unpack_mask(packed, 8 * packed.numel()).sum()


def mask_prefix(packed: Tensor, block: int = 256) -> Tensor:
    """Set bits before each block of ``block`` bits, int32 [ceil(8 * len / block)]."""
    bits = unpack_mask(packed, 8 * packed.numel()).int()
    bits = torch.cat([bits, bits.new_zeros(-bits.numel() % block)]).view(-1, block)
    count = bits.sum(1)
    return (count.cumsum(0) - count).int()


def mask_topk(score: Tensor, fraction: float) -> Tensor:
    """Packed mask of the ``floor(fraction * n)`` largest scores; NaN is largest, ties to the lower index."""
    score = score.flatten()
    order = torch.sort(score, descending=True, stable=True).indices
    mask = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
    mask[order[: math.floor(fraction * score.numel())]] = True
    return pack_mask(mask)


def mask_random(
    n: int, fraction: float, seed: int, stream: int = 0, *, device: torch.device | None = None
) -> Tensor:
    """Packed mask with exactly ``floor(fraction * n)`` of n bits set, every such set equally likely.

    It is ``mask_topk`` of random words: that of position i is word ``i & 3`` of Philox at the counter
    (``i >> 2`` low, ``i >> 2`` high, ``stream`` low, ``stream`` high), key ``seed``.
    """
    i = torch.arange(n, device=device)
    stream_words = (torch.tensor(s, device=device) for s in (stream, stream >> 32))
    words = torch.stack(philox4x32_10((i >> 2, i >> 34, *stream_words), seed))
    return mask_topk(words.gather(0, (i & 3)[None])[0], fraction)


def storage_flat(t: Tensor) -> Tensor:
    """The elements of a dense tensor (whatever its strides) as a 1-D view in storage order."""
    return t.as_strided((t.numel(),), (1,))


def trained_elements(t: Tensor, mask: Tensor | None, kind: str, block_size: int = 256) -> Tensor:
    """Which elements of ``t`` train, bool [numel] in storage order. No mask: all."""
    n = t.numel()
    if mask is None or kind == "none" or n == 0:
        return torch.ones(n, dtype=torch.bool, device=t.device)
    if kind == "row":
        return unpack_mask(mask, t.shape[0]).repeat_interleave(n // t.shape[0])
    if kind == "col":
        return unpack_mask(mask, t.shape[-1]).repeat(n // t.shape[-1])
    if kind == "block":
        return unpack_mask(mask, -(-n // block_size)).repeat_interleave(block_size)[:n]
    return unpack_mask(mask, n)


def grad_norm(
    grads: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    grad_scale: float | None = None,
    *,
    mask_kind: str = "element",
    block_size: int = 256,
    grad_scale_tensor: Tensor | None = None,
) -> Tensor:
    """L2 norm over the trained elements of all gradients, each divided by the scale; float32 0-d.

    The sum runs in float64 here; kernels add float32 squares in a fixed tree.
    """
    scale = 1.0 if grad_scale is None else grad_scale
    if grad_scale_tensor is not None:
        scale = float(grad_scale_tensor)
    total = torch.zeros((), dtype=torch.float64)
    for i, g in enumerate(grads):
        trained = trained_elements(g, masks[i] if len(masks) else None, mask_kind, block_size)
        total = total + (storage_flat(g)[trained].double() / scale).square().sum().cpu()
    device = grads[0].device if len(grads) else None
    return total.sqrt().float().to(device)


def masked_copy_(
    dst: Sequence[Tensor],
    src: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    *,
    mask_kind: str = "element",
    block_size: int = 256,
) -> None:
    """``dst[i] = src[i]`` where the bit is set, in the storage order of ``dst``; no mask: everywhere."""
    for i, (to, of) in enumerate(zip(dst, src, strict=True)):
        trained = trained_elements(to, masks[i] if len(masks) else None, mask_kind, block_size)
        new = torch.empty_like(to).copy_(of)  # its strides and its dtype
        storage_flat(to)[trained] = storage_flat(new)[trained]
