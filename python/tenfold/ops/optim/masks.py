# SPDX-License-Identifier: Apache-2.0
"""Masks of HFT (ACL 2025.acl-long.626, section 3.4 of the method) and what is done under them.

A mask says which part of a tensor trains: uint8, packed bits, least significant first, unused bits of
the last byte zero. One bit stands for one unit of the tensor in its storage order:

    mask_kind | unit                                                | number of units
    row       | one index of dimension 0 (contiguous tensors)       | shape[0]
    col       | one index of the last dimension (contiguous)        | shape[-1]
    block     | ``block_size`` consecutive elements, last shorter   | ceil(numel / block_size)
    element   | one element                                         | numel

No mask (None): everything trains.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tenfold.ops._register import call_inference, inference_only

__all__ = [
    "grad_norm",
    "mask_popcount",
    "mask_prefix",
    "mask_random",
    "mask_topk",
    "masked_copy_",
    "pack_mask",
    "unpack_mask",
]

_ops = torch.ops.tenfold


@torch.library.register_fake("tenfold::pack_mask")
def _(mask):
    return mask.new_empty(((mask.numel() + 7) // 8,), dtype=torch.uint8)


@torch.library.register_fake("tenfold::unpack_mask")
def _(packed, n):
    return packed.new_empty((n,), dtype=torch.bool)


@torch.library.register_fake("tenfold::mask_popcount")
def _(packed):
    return packed.new_empty((), dtype=torch.int64)


@torch.library.register_fake("tenfold::mask_prefix")
def _(packed, block=256):
    return packed.new_empty(((8 * packed.numel() + block - 1) // block,), dtype=torch.int32)


@torch.library.register_fake("tenfold::mask_topk")
def _(score, fraction):
    return score.new_empty(((score.numel() + 7) // 8,), dtype=torch.uint8)


@torch.library.register_fake("tenfold::mask_random")
def _(like, n, fraction, seed, stream=0):
    return like.new_empty(((n + 7) // 8,), dtype=torch.uint8)


@torch.library.register_fake("tenfold::grad_norm")
def _(
    grads, masks, grad_scale=None, *, mask_kind="element", block_size=256, grad_scale_tensor=None
):
    like = grads[0] if grads else grad_scale_tensor
    return like.new_empty((), dtype=torch.float32)


@torch.library.register_fake("tenfold::masked_copy_")
def _(dst, src, masks, *, mask_kind="element", block_size=256):
    return None


for _name in (
    "pack_mask", "unpack_mask", "mask_popcount", "mask_prefix", "mask_topk", "mask_random", "grad_norm",
):  # fmt: skip
    inference_only(_name)
inference_only("masked_copy_", mutates=(0,))


def pack_mask(mask: Tensor) -> Tensor:
    """Packs booleans into bits.

    Args:
        mask: bool, any shape and strides; read in the order of ``mask.flatten()``.

    Returns:
        uint8 [ceil(n / 8)]: bit ``i & 7`` of byte ``i >> 3`` is element i; unused bits are 0.

    Raises:
        TypeError: not bool.

    Example:
        >>> pack_mask(torch.tensor([True, False, True]))
        tensor([5], dtype=torch.uint8)
    """
    return call_inference(_ops.pack_mask, mask)


def unpack_mask(packed: Tensor, n: int) -> Tensor:
    """The first ``n`` bits as booleans; undoes :func:`pack_mask`.

    Args:
        packed: uint8 [ceil(n / 8)].
        n: number of bits.

    Returns:
        bool [n].

    Raises:
        ValueError: ``n`` is negative or ``packed`` has another length. TypeError: not uint8.
    """
    return call_inference(_ops.unpack_mask, packed, n)


def mask_popcount(packed: Tensor) -> Tensor:
    """Number of set bits.

    Args:
        packed: uint8 [bytes].

    Returns:
        int64, 0-d, on the device of ``packed`` (no synchronisation).

    Raises:
        ValueError: not 1-D. TypeError: not uint8.
    """
    return call_inference(_ops.mask_popcount, packed)


def mask_prefix(packed: Tensor, block: int = 256) -> Tensor:
    """Set bits before each block of ``block`` bits: where a block's trained elements start.

    With compact optimiser states, the state of a trained element is at the prefix of its block plus
    the number of set bits before it in the block.

    Args:
        packed: uint8 [bytes], at most 2^31 bits.
        block: a power of two >= 32.

    Returns:
        int32 [ceil(8 * bytes / block)], exclusive: the first is 0.

    Raises:
        ValueError: ``block``, or too many bits. TypeError: not uint8.
    """
    return call_inference(_ops.mask_prefix, packed, block)


def mask_topk(score: Tensor, fraction: float) -> Tensor:
    """Mask of the ``floor(fraction * n)`` largest scores, exactly that many.

    Scores compare as in ``torch.topk``: NaN above +inf, -0 equal to +0; of equal ones the lower index
    comes first. It is a selection, not a sort: one pass over the scores in most cases.

    Args:
        score: float32, bfloat16 or float16 of n elements, any shape; order of ``score.flatten()``.
        fraction: in [0, 1].

    Returns:
        packed uint8 [ceil(n / 8)].

    Raises:
        ValueError: ``fraction``. TypeError: dtype.
    """
    return call_inference(_ops.mask_topk, score, fraction)


def mask_random(
    n: int,
    fraction: float,
    seed: int,
    stream: int = 0,
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """Random mask with exactly ``floor(fraction * n)`` of n bits set, every such set equally likely.

    It is :func:`mask_topk` of random words: that of position i is word ``i & 3`` of Philox4x32-10 at the
    counter (``i >> 2`` low, ``i >> 2`` high, ``stream`` low, ``stream`` high), key ``seed``. So it is the
    same on every device, for any number of threads.

    Args:
        n: number of bits.
        fraction: in [0, 1].
        seed: 64 bits.
        stream: 64 bits; tells apart the masks of one seed, a tensor's number for example.
        device: of the result; default: torch's.

    Returns:
        packed uint8 [ceil(n / 8)].

    Raises:
        ValueError: ``n`` or ``fraction``.
    """
    like = torch.empty((0,), dtype=torch.uint8, device=device)
    return call_inference(_ops.mask_random, like, n, fraction, seed, stream)


def grad_norm(
    grads: Sequence[Tensor],
    masks: Sequence[Tensor | None] = (),
    grad_scale: float | None = None,
    *,
    mask_kind: str = "element",
    block_size: int = 256,
    grad_scale_tensor: Tensor | None = None,
) -> Tensor:
    """L2 norm over the trained elements of all gradients, divided by the loss scale.

    One pass over all tensors; frozen rows and blocks are not read, and frozen elements do not count
    even if they are NaN. The same bits for any number of threads: a fixed order of float32 partial sums,
    added in float64.

    Args:
        grads: float32, bfloat16 or float16, mixed; dense ones are read in storage order, others are
            copied first and must have no mask.
        masks: [] (none), or one packed mask or None per gradient.
        grad_scale: what the gradients are to be divided by, as a number;
        grad_scale_tensor: or as a float32 tensor of one element on their device (no synchronisation).
        mask_kind: ``row``, ``col``, ``block``, ``element`` or ``none``. block_size: of ``block``.

    Returns:
        float32, 0-d, on the device of the gradients; 0 for an empty list.

    Raises:
        ValueError: devices, a mask or the scale does not fit, both scales. TypeError: dtypes.
    """
    if not grads:
        return torch.zeros(
            (), device=None if grad_scale_tensor is None else grad_scale_tensor.device
        )
    return call_inference(
        _ops.grad_norm, list(grads), list(masks), grad_scale, mask_kind=mask_kind,
        block_size=block_size, grad_scale_tensor=grad_scale_tensor,
    )  # fmt: skip


def masked_copy_(
    dst: Sequence[Tensor],
    src: Sequence[Tensor],
    masks: Sequence[Tensor | None] = (),
    *,
    mask_kind: str = "element",
    block_size: int = 256,
) -> None:
    """``dst[i] = src[i]`` where the mask's bit is set (Half-Reset, restoring frozen values).

    Everything else in ``dst`` keeps its bits. Frozen rows and blocks are neither read nor written.

    Args:
        dst: written in place, dense.
        src: same shapes and device. The dtype may differ among float32, bfloat16 and float16 (rounded
            to nearest); other strides cost a copy.
        masks: [] (none), or one packed mask or None per tensor, in the storage order of ``dst``.
        mask_kind: ``row``, ``col``, ``block``, ``element`` or ``none``. block_size: of ``block``.

    Raises:
        ValueError: lengths, shapes, devices, masks; a ``dst`` that is not dense. TypeError: dtypes.
    """
    if not dst and not src and not masks:
        return
    call_inference(
        _ops.masked_copy_, list(dst), list(src), list(masks), mask_kind=mask_kind,
        block_size=block_size, mutates=(list(dst),),
    )  # fmt: skip
